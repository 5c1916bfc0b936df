"""Chats: which tokens the assistant wrote, against transformers' own mask, for templates with and
without its tags.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from titan_ulysses.config.schema import SourceSettings
from titan_ulysses.data.encoding import Encoder
from titan_ulysses.data.sources import BadRow, Chat, Row, read_record
from titan_ulysses.distributed.errors import UserError

few = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

# How the families write a chat, from what they document, in the fewest words that do. [[ and ]] are
# around what the assistant writes: {% generation %} and {% endgeneration %} in one version of each
# template, nothing in the other.
CHATML = """
{%- if tools %}{{ '<|im_start|>tools\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}[[{{ m.content or '' }}
{%- for call in m.tool_calls or [] %}{{ '<tool_call>' + (call.function | tojson) + \
'</tool_call>' }}{% endfor %}
{{- '<|im_end|>' }}]]{{ '\\n' }}
{%- elif m.role == 'tool' %}{{ '<|im_start|>user\\n<tool_response>' + m.content + \
'</tool_response><|im_end|>\\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

LLAMA3 = """
{{- '<|begin_of_text|>' }}
{%- if tools %}{{ '<|start_header_id|>system<|end_header_id|>\\n\\n' + (tools | tojson) + \
'<|eot_id|>' }}{% endif %}
{%- for m in messages %}
{%- set role = 'ipython' if m.role == 'tool' else m.role %}
{{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
{%- if role == 'assistant' %}[[{{ m.content or '' }}
{%- for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}{{ '<|eot_id|>' }}]]
{%- else %}{{ (m.content | trim) + '<|eot_id|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% \
endif %}"""

MISTRAL = """
{{- '<s>' }}
{%- if tools %}{{ '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}
{%- if messages[0].role == 'system' %}{% set first = messages[0].content + '\\n\\n' %}{% set \
turns = messages[1:] %}
{%- else %}{% set first = '' %}{% set turns = messages %}{% endif %}
{%- for m in turns %}
{%- if m.role == 'user' %}{{ '[INST] ' + (first if loop.first else '') + m.content + ' [/INST]' }}
{%- elif m.role == 'tool' %}{{ '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}
{%- elif m.role == 'assistant' %}[[{{ (' ' + m.content) if m.content else '' }}
{%- if m.tool_calls %}{{ '[TOOL_CALLS]' + (m.tool_calls | map(attribute='function') | list | \
tojson) }}{% endif %}
{{- '</s>' }}]]
{%- else %}{{ raise_exception('only user, tool and assistant roles are supported, not ' + m.role) }}
{%- endif %}{% endfor %}"""

GEMMA = """
{{- '<bos>' }}
{%- if messages[0].role == 'system' %}{% set first = messages[0].content + '\\n\\n' %}{% set \
turns = messages[1:] %}
{%- else %}{% set first = '' %}{% set turns = messages %}{% endif %}
{%- for m in turns %}
{%- if m.role == 'assistant' %}{{ '<start_of_turn>model\\n' }}[[{{ (m.content | trim) + \
'<end_of_turn>' }}]]{{ '\\n' }}
{%- elif m.role == 'user' %}
{{- '<start_of_turn>user\\n' + (first if loop.first else '') + (m.content | trim) + \
'<end_of_turn>\\n' }}
{%- else %}{{ raise_exception('role ' + m.role + ' is not supported') }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

PHI3 = """
{%- for m in messages %}
{%- if m.role == 'system' %}{{ '<|system|>\\n' + m.content + '<|end|>\\n' }}
{%- elif m.role == 'user' %}{{ '<|user|>\\n' + m.content + '<|end|>\\n' }}
{%- elif m.role == 'assistant' %}{{ '<|assistant|>\\n' }}[[{{ m.content + '<|end|>' }}]]{{ '\\n' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ '' }}{% endif %}"""

# Earlier thoughts are left out once there are later turns, as several reasoning families do.
FORGETFUL = """
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}
{%- else %}{{ m.content }}{% endif %}
{{- '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "gemma": GEMMA, "phi3": PHI3}
WITH_TOOLS = ("chatml", "llama3", "mistral")
SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
SPECIAL += [
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[TOOL_CALLS]",
    "<bos>",
    "<start_of_turn>",
    "<end_of_turn>",
]
SPECIAL += ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "parameters": {"type": "object", "properties": {}}},
    }
]


@pytest.fixture(scope="module")
def backend() -> Tokenizer:
    """Byte-level BPE of a few hundred merges, so that tokens reach over borders of words and
    lines.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    text = [
        json.dumps(TOOLS),
        "assistant\n\nmodel\n\nuser\n\n  the theme of that tale, then the other one\n\n\n",
    ] * 20
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return tokenizer


def tokenizer_with(
    backend: Tokenizer, template: str | None, *, marked: bool = False
) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", model_max_length=8
    )
    if template is not None:
        begin, end = ("{% generation %}", "{% endgeneration %}") if marked else ("", "")
        tokenizer.chat_template = template.replace("[[", begin).replace("]]", end)
    return tokenizer


texts = st.text(st.sampled_from("the tale, \nä漢🙂]<"), max_size=12)
words = texts.filter(lambda text: text.strip())


@st.composite
def chats(draw: st.DrawFn, *, tools: bool = False) -> Chat:
    """One to four exchanges; with a system message, calls of tools and what they answered, where
    they are known.
    """
    messages = [{"role": "system", "content": draw(words)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        messages.append({"role": "user", "content": draw(words)})
        if tools and draw(st.booleans()):
            call = {
                "type": "function",
                "function": {"name": "add", "arguments": {"a": draw(texts)}},
            }
            messages.append({"role": "assistant", "tool_calls": [call]})
            messages.append({"role": "tool", "content": draw(words)})
        messages.append({"role": "assistant", "content": draw(words)})
    if draw(st.booleans()) and len(messages) > 2:
        messages.append({"role": "user", "content": draw(words)})  # a question that nobody answers
    return Chat(messages, TOOLS if tools else None)


def transformers_mask(
    tokenizer: PreTrainedTokenizerFast, chat: Chat
) -> tuple[list[int], list[int]]:
    found = tokenizer.apply_chat_template(
        chat.messages, tools=chat.tools, return_dict=True, return_assistant_tokens_mask=True
    )
    return found["input_ids"], found["assistant_masks"]


@pytest.mark.parametrize("family", TEMPLATES)
@few
@given(data=st.data())
def test_masks_are_those_of_transformers(
    family: str, backend: Tokenizer, data: st.DataObject
) -> None:
    chat = data.draw(chats(tools=family in WITH_TOOLS and data.draw(st.booleans())))
    ids, mask = transformers_mask(tokenizer_with(backend, TEMPLATES[family], marked=True), chat)
    assert 0 < sum(mask) < len(mask)
    for marked in (True, False):
        tokenizer = tokenizer_with(backend, TEMPLATES[family], marked=marked)
        encoded = Encoder(tokenizer)(Row("a", chat))
        assert encoded.ids.tolist() == ids
        assert encoded.trained.tolist() == [bool(entry) for entry in mask]
        whole = Encoder(tokenizer, "all")(Row("a", chat))
        assert whole.ids.tolist() == ids and whole.trained is None


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("chatml", ["Hello!<|im_end|>", "Bye.<|im_end|>"]),
        ("llama3", ["Hello!<|eot_id|>", "Bye.<|eot_id|>"]),
        ("mistral", [" Hello!</s>", " Bye.</s>"]),
        ("gemma", ["Hello!<end_of_turn>", "Bye.<end_of_turn>"]),
        ("phi3", ["Hello!<|end|>", "Bye.<|end|>"]),
    ],
)
def test_what_is_trained_on_in_words(family: str, expected: list[str], backend: Tokenizer) -> None:
    """Both turns with the token that ends them; not the header, and not the line's end behind."""
    tokenizer = tokenizer_with(backend, TEMPLATES[family])
    messages = [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello!"),
        ("user", "x"),
        ("assistant", "Bye."),
    ]
    chat = Chat([{"role": role, "content": content} for role, content in messages], None)
    encoded = Encoder(tokenizer)(Row("a", chat))
    edges = np.flatnonzero(np.diff(np.pad(encoded.trained.astype(int), 1)))
    found = [tokenizer.decode(encoded.ids[begin:end]) for begin, end in edges.reshape(-1, 2)]
    assert found == expected


# --- what cannot be trained on


def record(*messages: tuple[str, str], **fields) -> dict:
    return {
        "messages": [{"role": role, "content": content} for role, content in messages],
        **fields,
    }


def encoded(tokenizer, fields: dict, **settings):
    source = SourceSettings(source="chat", **settings)
    return Encoder(tokenizer, source.train_on)(read_record(fields, source, "chats.jsonl:7"))


@pytest.mark.parametrize(
    ("family", "fields", "reason"),
    [
        (
            "mistral",
            record(("user", "a"), ("narrator", "b"), ("assistant", "c")),
            "refuses it (only user, tool and",
        ),
        (
            "gemma",
            record(("user", "a"), ("tool", "b"), ("assistant", "c")),
            "refuses it (role tool is not supported",
        ),
        (
            "phi3",
            record(("user", "a"), ("tool", "b"), ("assistant", "c")),
            'leaves out messages with the role "tool"',
        ),
        (
            "chatml",
            record(("assistant", "a"), ("user", "b"), ("assistant", "c")),
            "the assistant begins",
        ),
        (
            "chatml",
            record(("system", "a"), ("user", "b")),
            "nothing in it is trained on (no turn of the assistant",
        ),
        ("chatml", record(("user", "a"), ("assistant", "\ud800")), "half of a surrogate pair"),
        ("chatml", {"text": "a"}, 'no field "messages" (it has text)'),
        ("chatml", {"messages": []}, 'the field "messages" holds [], not a list of messages'),
        ("chatml", {"messages": "hi"}, 'the field "messages" holds "hi", not a list of messages'),
        ("chatml", {"messages": [{"content": "a"}]}, "message 0 has no role"),
        (
            "chatml",
            record(("user", "a"), ("assistant", "b"), tools="[oops"),
            "tools is text but not JSON",
        ),
        (
            "chatml",
            record(("user", "a"), ("assistant", "b"), tools=["add"]),
            "tools is not a list of tools",
        ),
        (
            "phi3",
            {"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]},
            "refuses it (",
        ),
    ],
)
def test_bad_chats_are_told_with_their_place(
    family: str, fields: dict, reason: str, backend: Tokenizer
) -> None:
    found = encoded(tokenizer_with(backend, TEMPLATES[family]), fields)
    assert isinstance(found, BadRow) and found.place == "chats.jsonl:7"
    assert reason in found.reason and "\n" not in found.reason


def test_nulls_of_a_table_are_absent(backend: Tokenizer) -> None:
    """Arrow gives every message every key; templates ask whether one is there."""
    tokenizer = tokenizer_with(
        backend, "{% for m in messages %}{{ m.keys() | list }}{{ m.content }}</s>{% endfor %}"
    )
    plain = record(("user", "a"), ("assistant", "b"))
    table = {
        "messages": [{**message, "tool_calls": None} for message in plain["messages"]],
        "tools": None,
    }
    assert (
        encoded(tokenizer, table, train_on="all").ids.tolist()
        == encoded(tokenizer, plain, train_on="all").ids.tolist()
    )


def test_tools_may_be_json(backend: Tokenizer) -> None:
    tokenizer, turns = tokenizer_with(backend, CHATML), (("user", "a"), ("assistant", "b"))
    as_list, as_text = (
        encoded(tokenizer, record(*turns, tools=tools)) for tools in (TOOLS, json.dumps(TOOLS))
    )
    assert (
        as_list.ids.tolist()
        == as_text.ids.tolist()
        != encoded(tokenizer, record(*turns)).ids.tolist()
    )


def test_a_template_that_changes_earlier_turns_is_refused_by_name(
    backend: Tokenizer, tmp_path
) -> None:
    tokenizer_with(backend, FORGETFUL).save_pretrained(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    one = record(("user", "a"), ("assistant", "hm</think>b"))
    several = record(
        ("user", "a"), ("assistant", "hm</think>b"), ("user", "c"), ("assistant", "hm</think>d")
    )
    # Nothing earlier: fine.
    assert "hm</think>b<|im_end|>" in tokenizer.decode(encoded(tokenizer, one).ids)
    with pytest.raises(UserError) as caught:
        encoded(tokenizer, several)
    message = str(caught.value)
    assert message.startswith(
        f'chats.jsonl:7: model.tokenizer = "{tmp_path}": its chat template is not prefix-stable'
    )
    assert "message 2 of 4" in message and "{% generation %}" in message and "\n" not in message
    assert encoded(tokenizer, several, train_on="all").trained is None


def test_tokenizers_that_cannot(backend: Tokenizer) -> None:
    with pytest.raises(UserError, match=r'has no chat template, which data\.source = "chat" needs'):
        Encoder(tokenizer_with(backend, None)).check("chat")
    slow = ByT5Tokenizer()
    slow.chat_template = CHATML
    with pytest.raises(UserError, match=r'is not a fast tokenizer.*data\.train_on = "all"'):
        Encoder(slow).check("chat")
    Encoder(slow, "all").check("chat")
    Encoder(slow).check("text")
    turns = record(("user", "a"), ("assistant", "b"))
    assert encoded(slow, {"messages": turns["messages"]}, train_on="all").trained is None
