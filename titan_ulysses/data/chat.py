"""Encodes chats with the tokenizer's chat template, and finds which tokens the assistant wrote."""

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
    """Raise `UserError` if the tokenizer lacks what `train_on` needs.

    That is a chat template and, for "assistant", a fast tokenizer, which can tell which characters
    a token stands for.
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
    """Return (ids [tokens], trained [tokens] bool) of one chat, exactly as the template renders it.

    `trained` marks the tokens that are trained on. With train_on = "all" it is None: every token
    is. With "assistant" it marks what the assistant wrote. A template with a `{% generation %}`
    block defines this itself (transformers' `return_assistant_tokens_mask`). For any other
    template, an assistant's turn is the difference between two renderings: the chat up to and
    including that turn, minus the chat before it with the generation prompt
    (`add_generation_prompt`). Whitespace after the token that ends a turn does not belong to the
    assistant. A token is trained on if any of its characters belongs to the assistant.

    Raise `RefusedRow` if the template refuses the chat or leaves a message out. Raise `UserError`
    if the template renders earlier turns differently once later turns follow, because the
    difference is not defined then.
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
    """Render the first `count` messages as text; `asks` adds the generation prompt."""
    return render_messages(tokenizer, chat.messages[:count], chat.tools, asks)


def render_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    tools: list | None,
    asks: bool = False,
) -> str:
    """Render messages as text; `asks` adds the generation prompt.

    Raise `RefusedRow` if the template fails.
    """
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=asks
        )
    # A template is a program, so it can fail in many ways.
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise RefusedRow(f"the chat template refuses it ({one_line(error)})") from error


def _refuse_messages_left_out(tokenizer: PreTrainedTokenizerBase, chat: Chat, text: str) -> None:
    """Raise `RefusedRow` if the template silently leaves out all messages of some role.

    A template may ignore a role that it does not know, and what the user wrote would be lost. The
    roles "user" and "assistant" are not checked.
    """
    for role in {message["role"] for message in chat.messages if message.get("content")} - {
        "user",
        "assistant",
    }:
        others = [message for message in chat.messages if message["role"] != role]
        try:
            without = render_messages(tokenizer, others, chat.tools)
        except RefusedRow:
            continue  # the template fails without these messages, so it does use them
        if without == text:
            raise RefusedRow(f'the chat template leaves out messages with the role "{role}"')


def _assistant_spans(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, text: str
) -> list[tuple[int, int]]:
    """Return the span [begin, end) in `text` of what the assistant wrote in each of its turns."""
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
    """Return a [tokens] bool array that marks the tokens that share a character with a span.

    Both lists are sorted, and the spans are disjoint.
    """
    if not spans:
        return np.zeros(len(offsets), dtype=bool)
    token_begins, token_ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    begins, ends = np.array(spans, dtype=np.int64).T
    # The first span that ends after the token begins.
    candidate = np.searchsorted(ends, token_begins, side="right")
    begins = np.append(begins, np.iinfo(np.int64).max)
    return token_ends > begins[candidate]
