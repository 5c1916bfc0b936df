"""Chats -> token ids, and which of them the assistant wrote. The tokenizer's own chat template
renders them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from titan_ulysses.data.sources import LONE_SURROGATE_ERROR, Chat, RefusedRow, has_surrogate
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.failure import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def check_chat_template(tokenizer: PreTrainedTokenizerBase, *, train_on: str) -> None:
    """UserError where the tokenizer cannot render chats, or cannot say which characters a token
    stands for.
    """
    name = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise UserError(
            f'model.tokenizer = "{name}" has no chat template, which data.source = "chat" needs: '
            "take the tokenizer of the family's instruct model, or put a chat_template.jinja into "
            "the tokenizer's folder"
        )
    if train_on == "assistant" and not tokenizer.is_fast:
        raise UserError(
            f'model.tokenizer = "{name}" is not a fast tokenizer, so that nobody knows which '
            "tokens are the "
            'assistant\'s: take a fast one (tokenizer.json), or set data.train_on = "all"'
        )


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, *, train_on: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """(ids [tokens], trained [tokens] bool): one chat as the template renders it, nothing added to
    it.

    With train_on = "assistant" a template with a `{% generation %}` block says itself what the
    assistant writes (transformers' `return_assistant_tokens_mask`). For any other template it is
    what one more message adds: the chat up to and with an assistant's turn, less the chat before it
    with the prompt to answer (`add_generation_prompt`). Whitespace behind the token that ends a
    turn is not the assistant's. A token is trained on where any of its characters are. With "all"
    the second value is None: every token is.

    Raises `RefusedRow` where the template refuses a chat or leaves a message out, `UserError` where
    the template renders earlier turns differently once later ones follow, so that there is no
    difference to take.
    """
    text = _render(tokenizer, chat, len(chat.messages))
    if has_surrogate(text):
        raise RefusedRow(LONE_SURROGATE_ERROR)
    _refuse_messages_left_out(tokenizer, chat, text)
    options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    if train_on == "all":
        return np.array(
            tokenizer(text, add_special_tokens=False, **options)["input_ids"], dtype=np.uint32
        ), None
    if _GENERATION.search(tokenizer.get_chat_template(None, chat.tools)):
        found = tokenizer.apply_chat_template(
            chat.messages,
            tools=chat.tools,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
        )
        return np.array(found["input_ids"], dtype=np.uint32), np.array(
            found["assistant_masks"], dtype=bool
        )
    spans = _assistant_spans(tokenizer, chat, text)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, **options)
    return np.array(found["input_ids"], dtype=np.uint32), _overlapping(
        found["offset_mapping"], spans
    )


def _render(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, count: int, *, asks: bool = False
) -> str:
    """The first `count` messages as text; `asks` adds the prompt to answer."""
    return _render_messages(tokenizer, chat.messages[:count], chat.tools, asks)


def _render_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    tools: list | None,
    asks: bool = False,
) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=asks
        )
    except (
        TemplateError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
    ) as error:  # a template is a program
        raise RefusedRow(f"the chat template refuses it ({one_line(error)})") from error


def _refuse_messages_left_out(tokenizer: PreTrainedTokenizerBase, chat: Chat, text: str) -> None:
    """A template may know nothing of a role, and then says nothing: what the user wrote would be
    lost.
    """
    for role in {message["role"] for message in chat.messages if message.get("content")} - {
        "user",
        "assistant",
    }:
        others = [message for message in chat.messages if message["role"] != role]
        try:
            without = _render_messages(tokenizer, others, chat.tools)
        except RefusedRow:
            continue  # so it does look at them
        if without == text:
            raise RefusedRow(f'the chat template leaves out messages with the role "{role}"')


def _assistant_spans(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, text: str
) -> list[tuple[int, int]]:
    """[begin, end) in `text` of what the assistant writes in each of its turns."""
    if chat.messages[0]["role"] == "assistant":
        raise RefusedRow(
            "the assistant begins, and the chat template has no {% generation %} to say with what"
        )
    added = tuple(token.content for token in tokenizer.added_tokens_decoder.values())
    spans = []
    for count, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, chat, count, asks=True)
        after = _render(tokenizer, chat, count + 1)
        if not (text.startswith(after) and after.startswith(before)):
            raise UserError(
                f'model.tokenizer = "{tokenizer.name_or_path}": its chat template is not '
                f"prefix-stable (message {count + 1} of {len(chat.messages)} reads differently "
                "once others follow it), so that the assistant's part of a chat cannot be told. "
                "Give it a template with {% generation %} around what the assistant writes, or set "
                'data.train_on = "all"'
            )
        turn = after[len(before) :]
        if (ended := turn.rstrip()).endswith(added):
            turn = ended
        spans.append((len(before), len(before) + len(turn)))
    return spans


def _overlapping(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> np.ndarray:
    """[tokens] bool: which tokens share a character with a span. Both are sorted, spans are
    disjoint.
    """
    if not spans:
        return np.zeros(len(offsets), dtype=bool)
    token_begins, token_ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    begins, ends = np.array(spans, dtype=np.int64).T
    # The first span that ends behind the token's begin.
    candidate = np.searchsorted(ends, token_begins, side="right")
    begins = np.append(begins, np.iinfo(np.int64).max)
    return token_ends > begins[candidate]
