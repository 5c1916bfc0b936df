"""Chats: which tokens the assistant wrote, against transformers' own mask, for templates with and
without its tags.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from helpers.runs import write_run
from titan_ulysses.config.schema import SourceSettings
from titan_ulysses.data.chat import encode_question, tokens_by_role
from titan_ulysses.data.encoding import Encoder
from titan_ulysses.data.records import BadRow, Chat, Row, read_record
from titan_ulysses.distributed.errors import RefusedRow, UserError

ROOT = Path(__file__).resolve().parent.parent
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
SPECIAL += ["<think>", "</think>", "<|start|>", "<|channel|>", "<|message|>", "<|call|>"]
SPECIAL += ["<|return|>"]
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


FAILING = {
    "division": "{{ 1 // (messages | length - 2) }}",
    "overflow": "{{ 10.0 ** (200 * messages | length) }}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
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
            "the first message is the assistant's",
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
        ("division", record(("user", "a"), ("assistant", "b")), " by zero)"),
        ("overflow", record(("user", "a"), ("assistant", "b")), "refuses it ("),
        ("recursion", record(("user", "a"), ("assistant", "b")), "refuses it (maximum recursion"),
    ],
)
def test_bad_chats_are_told_with_their_place(
    family: str, fields: dict, reason: str, backend: Tokenizer
) -> None:
    found = encoded(tokenizer_with(backend, (TEMPLATES | FAILING)[family]), fields)
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


def test_arguments_of_tool_calls_may_be_json(backend: Tokenizer) -> None:
    """OpenAI's form: text, which `tojson` would write as a string with escaped quotes."""
    tokenizer = tokenizer_with(backend, CHATML)

    def ids(arguments: Any) -> Any:
        calls = [{"type": "function", "function": {"name": "add", "arguments": arguments}}]
        asked = {"role": "user", "content": "a"}
        answer = {"role": "assistant", "content": "", "tool_calls": calls}
        return encoded(tokenizer, {"messages": [asked, answer]})

    arguments = {"a": 1, "b": "two"}
    as_object, as_text = ids(arguments), ids(json.dumps(arguments))
    assert as_text.ids.tolist() == as_object.ids.tolist()
    assert (as_object.parsed_calls, as_text.parsed_calls) == (0, 1)
    assert '"b": null' in tokenizer.decode(ids('{"b": null}').ids)
    assert ids("").ids.tolist() == ids({}).ids.tolist()
    for other in ("ls -la", "[1]", "{", "[" * 9999):
        assert ids(other).parsed_calls == 0
        assert json.dumps(other)[:40] in tokenizer.decode(ids(other).ids)
    flat = {"role": "assistant", "tool_calls": [{"name": "add", "arguments": '{"a": 1}'}]}
    chat = read_record({"messages": [flat]}, SourceSettings(source="chat"), "a:1").content
    assert chat.messages[0]["tool_calls"] == [{"name": "add", "arguments": {"a": 1}}]
    pair = {name: [{"role": "assistant", "content": name}] for name in ("prompt", "rejected")}
    pair["chosen"] = [{"role": "assistant", "tool_calls": call()}]
    pair["chosen"][0]["tool_calls"][0]["function"]["arguments"] = '{"a": 1}'
    row = read_record(pair, SourceSettings(source="preference"), "a:1")
    assert row.content.parsed_calls == 1
    assert row.content.completions[0][0]["tool_calls"] == call(a=1)


# --- templates that write earlier turns differently once others follow ----------------------------

# In the manner of Qwen3: thoughts are kept only behind the last question of the user, so through
# calls of tools and what they answered; answers of tools stand together in one turn of the user.
QWEN3 = """
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- if tools %}{{ '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}[[
{%- if loop.index0 > ns.last and (loop.last or m.reasoning_content) %}
{{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{% endif %}
{{- m.content or '' }}
{%- for call in m.tool_calls or [] %}
{{- '\\n<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>' }}]]{{ '\\n' }}
{%- elif m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
{%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# In the manner of gpt-oss: an analysis is a message of its own. It is dropped as soon as a final
# answer follows, and the token that ends the last answer is another one than of earlier answers.
HARMONY = """
{%- set ns = namespace(final=-1) %}
{%- for m in messages %}
{%- if m.role == 'assistant' and not m.tool_calls %}{% set ns.final = loop.index0 %}{% endif %}
{%- endfor %}
{%- if tools %}{{ '<|start|>developer<|message|>' + (tools | tojson) + '<|end|>' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}{{ '<|start|>assistant' }}[[
{%- if m.reasoning_content and (loop.index0 > ns.final or loop.last) %}
{{- '<|channel|>analysis<|message|>' + m.reasoning_content + '<|end|><|start|>assistant' }}
{%- endif %}
{%- if m.tool_calls %}{% set call = m.tool_calls[0].function %}
{{- ' to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}
{{- (call.arguments | tojson) + '<|call|>' }}
{%- else %}{{ '<|channel|>final<|message|>' + m.content }}
{{- '<|return|>' if loop.last else '<|end|>' }}{% endif %}]]
{%- elif m.role == 'tool' %}
{{- '<|start|>functions.add to=assistant<|channel|>commentary<|message|>' + m.content + '<|end|>' }}
{%- else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""

REWRITING = {"qwen3": QWEN3, "harmony": HARMONY}


def call(**arguments) -> list[dict]:
    return [{"type": "function", "function": {"name": "add", "arguments": arguments}}]


AGENT = [
    {"role": "user", "content": "What is 1 + 2, then + 4?"},
    {"role": "assistant", "reasoning_content": "Add first.", "tool_calls": call(a=1, b=2)},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "reasoning_content": "Again.", "tool_calls": call(a=3, b=4)},
    {"role": "tool", "content": "7"},
    {"role": "assistant", "reasoning_content": "Done.", "content": "It is 7."},
    {"role": "user", "content": "And + 1?"},
    {"role": "assistant", "reasoning_content": "Easy.", "content": "8"},
]


def parts_of(encoded) -> list[tuple[list[int], list[bool]]]:
    return [(part.ids.tolist(), part.trained.tolist()) for part in encoded.documents()]


def turns_as_seen(tokenizer, messages: list[dict], tools) -> list[tuple[list[int], int, int]]:
    """For each turn of the assistant, from transformers alone: the tokens that the model sees up to
    and with it, and from where to where they are the turn's own.

    They are those of the messages before with the generation prompt, and what the template marks as
    the last turn when it is there.
    """
    found = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            ids, mask = transformers_mask(tokenizer, Chat(messages[: number + 1], tools))
            end = len(mask) - mask[::-1].index(1)
            begin = end - [*mask[:end][::-1], 0].index(0)
            seen = tokenizer.apply_chat_template(
                messages[:number], tools=tools, add_generation_prompt=True
            )["input_ids"]
            found.append((seen + ids[begin:], len(seen), len(seen) + end - begin))
    return found


@pytest.mark.parametrize("marked", [True, False], ids=["marked", "unmarked"])
@pytest.mark.parametrize("family", REWRITING)
def test_each_turn_is_trained_as_the_model_sees_it(
    family: str, marked: bool, backend: Tokenizer
) -> None:
    """Against transformers' rendering and mask of each prefix, token by token."""
    reference = tokenizer_with(backend, REWRITING[family], marked=True)
    tokenizer = tokenizer_with(backend, REWRITING[family], marked=marked)
    found = parts_of(encoded(tokenizer, {"messages": AGENT, "tools": TOOLS}))
    expected = turns_as_seen(reference, AGENT, TOOLS)
    # The last question makes the template forget the thoughts before.
    assert [len(ids) for ids, _ in found] == [len(expected[i][0]) for i in (2, 3)]
    for (ids, mask), turns in zip(found, (expected[:3], expected[3:]), strict=True):
        assert ids == turns[-1][0]
        own = set()
        for seen, begin, end in turns:
            assert ids[:end] == seen[:end]
            own |= {*range(begin, end)}
        assert [i for i, is_trained in enumerate(mask) if is_trained] == sorted(own)
    words = reference.decode([i for ids, m in found for i, t in zip(ids, m, strict=True) if t])
    thoughts = [m["reasoning_content"] for m in AGENT if m["role"] == "assistant"]
    assert [words.count(thought) for thought in thoughts] == 4 * [1]


@few
@given(data=st.data())
@pytest.mark.parametrize("family", REWRITING)
def test_any_chat_trains_each_turn_once(
    family: str, backend: Tokenizer, data: st.DataObject
) -> None:
    chat = data.draw(chats(tools=True))
    reference = tokenizer_with(backend, REWRITING[family], marked=True)
    turns = turns_as_seen(reference, chat.messages, chat.tools)
    expected = [token for seen, begin, end in turns for token in seen[begin:end]]
    for marked in (True, False):
        tokenizer = tokenizer_with(backend, REWRITING[family], marked=marked)
        found = parts_of(Encoder(tokenizer)(Row("a", chat)))
        assert [i for ids, m in found for i, t in zip(ids, m, strict=True) if t] == expected


def test_a_turn_may_be_left_out(backend: Tokenizer) -> None:
    tokenizer = tokenizer_with(backend, QWEN3)
    messages = [dict(message) for message in AGENT]
    messages[1]["train"] = messages[5]["train"] = False
    messages[3]["train"] = True
    messages[0]["train"] = None  # as Arrow gives it
    found = parts_of(encoded(tokenizer, {"messages": messages, "tools": TOOLS}))
    trained = tokenizer.decode([ids[i] for ids, m in found for i in range(len(ids)) if m[i]])
    kept, left_out = ("Again.", "Easy."), ("Add first.", "Done.")
    assert all(word in trained for word in kept) and not any(word in trained for word in left_out)
    whole = parts_of(encoded(tokenizer, {"messages": AGENT, "tools": TOOLS}))
    # The flag is not for the template, and what is not trained on is read all the same.
    assert "Add first." in tokenizer.decode(found[0][0])
    assert found[-1][0] == whole[-1][0]
    refused = encoded(tokenizer, {"messages": messages, "tools": TOOLS}, train_on="all")
    assert refused.reason.startswith('message 1 has "train": false, and data.train_on = "all"')


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "assistant", "content": "b", "train": "no"}, 'message 1: "train" is "no", neit'),
        ({"role": "assistant", "content": "b", "train": 0}, 'message 1: "train" is 0, neither'),
        ({"role": "user", "content": "b", "train": True}, 'message 1: "train" is true, and its'),
    ],
)
def test_a_flag_that_is_none(message: dict, reason: str, backend: Tokenizer) -> None:
    found = encoded(
        tokenizer_with(backend, CHATML), {"messages": [{"role": "user", "content": "a"}, message]}
    )
    assert isinstance(found, BadRow) and found.reason.startswith(reason)


def test_a_template_that_cannot_tell_is_refused_by_name(backend: Tokenizer, tmp_path) -> None:
    """It asks with a thought begun, and writes the answer without it."""
    template = FORGETFUL.replace(
        "assistant\\n' }}{% endif %}", "assistant\\n<think>' }}{% endif %}"
    )
    assert template != FORGETFUL
    tokenizer_with(backend, template).save_pretrained(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    fields = record(("user", "a"), ("assistant", "b"))
    with pytest.raises(UserError) as caught:
        encoded(tokenizer, fields)
    message = str(caught.value)
    assert message.startswith(
        f'chats.jsonl:7: model.tokenizer = "{tmp_path}": its chat template does not show which part'
    )
    assert "message 2 of 2" in message and "{% generation %}" in message and "\n" not in message
    assert encoded(tokenizer, fields, train_on="all").trained is None


# --- seen from outside ----------------------------------------------------------------------------


SHOWN = [
    {"role": "user", "content": "What is 1 + 2?"},
    {"role": "assistant", "reasoning_content": "Add them.", "tool_calls": call(a=1, b=2)},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
    {"role": "user", "content": "And + 1?"},
    {"role": "assistant", "reasoning_content": "Easy.", "content": "4"},
]


def write_chats(folder: Path, backend: Tokenizer) -> Path:
    """A config of chats in the manner of Qwen3, whose tokenizer is in `folder`."""
    config = write_run(folder)
    tokenizer_with(backend, QWEN3).save_pretrained(folder / "tokenizer")
    shown = json.loads(json.dumps(SHOWN))
    for message in shown:
        for one in message.get("tool_calls", []):  # as text, as most traces have them
            one["function"]["arguments"] = json.dumps(one["function"]["arguments"])
    lines = [{"messages": shown}] + 3 * [record(("user", "a"), ("assistant", "b"))]
    (folder / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = config.read_text().replace('"bytes"', f'"{folder}/tokenizer"')
    text = text.replace("vocab_size = 257", f"vocab_size = {backend.get_vocab_size()}")
    data = f'source = "chat"\npath = "{folder}/chats.jsonl"\npacking = "best_fit"\n'
    config.write_text(text.replace(f'path = "{folder}/data"\n', data))
    return config


def test_the_start_says_how_many_samples_chats_became(tmp_path, backend: Tokenizer) -> None:
    from titan_ulysses.config.load import load_config
    from titan_ulysses.data.pipeline import open_sequences
    from titan_ulysses.data.tokenizer import load_tokenizer

    config = load_config(write_chats(tmp_path, backend), [("training.seq_len", 512)])
    sequences, _ = open_sequences(config, load_tokenizer(config.model.tokenizer))
    said = sequences.describe()
    assert said.startswith("5 document(s)")
    assert "1 chat(s) became 2 samples, because the chat template writes earlier turns" in said
    assert "1 tool call(s) had their arguments as JSON text, and are read as objects" in said


def test_show_data(tmp_path, backend: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    """What it prints is what docs/data.md shows, and what is between brackets is what is trained
    on.
    """
    from titan_ulysses.tools.show_data import main as show

    config = write_chats(tmp_path, backend)
    show(["--config", str(config), "--rows", "1"])
    printed = capsys.readouterr().out
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer")
    encoding = encoded(tokenizer, {"messages": SHOWN})
    trained = [id for ids, m in parts_of(encoding) for id, t in zip(ids, m, strict=True) if t]
    assert "".join(re.findall(r"\[\[(.*?)\]\]", printed, re.DOTALL)) == tokenizer.decode(trained)
    page = (ROOT / "docs" / "data.md").read_text()
    assert f"```console\n{printed}```" in page, printed


def test_tokens_by_role_where_earlier_thoughts_are_left_out(backend: Tokenizer) -> None:
    tokenizer = tokenizer_with(backend, FORGETFUL)
    said = [("user", "a"), ("assistant", "b</think>c"), ("user", "d")]
    messages = [{"role": role, "content": text} for role, text in said]
    turns = [tokenizer.apply_chat_template([one], tokenize=False) for one in messages]
    user, answer, more = (len(tokenizer(one, add_special_tokens=False).input_ids) for one in turns)
    counts = tokens_by_role(tokenizer, Chat(messages, None))
    assert counts == {"user": user + more, "assistant": answer}
    with pytest.raises(RefusedRow, match="writes message 3 otherwise once another one follows"):
        tokens_by_role(tokenizer, Chat([*messages[:2], messages[1]], None))


def test_a_question_is_what_a_user_says_and_the_beginning_of_an_answer(backend: Tokenizer) -> None:
    tokenizer = tokenizer_with(backend, CHATML)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 1 + 2?"}], add_generation_prompt=True, tokenize=False
    )
    assert tokenizer.decode(encode_question(tokenizer, "What is 1 + 2?")) == asked
    assert asked.split("What is 1 + 2?")[1].count("<|im_start|>") == 1
    with pytest.raises(RefusedRow, match="the chat template refuses it"):
        encode_question(tokenizer_with(backend, "{{ raise_exception('no') }}"), "What?")


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
