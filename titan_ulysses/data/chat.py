"""Encodes chats with the tokenizer's chat template, and finds which tokens the assistant wrote."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from titan_ulysses.data.records import Chat, Encoded
from titan_ulysses.data.tokenizer import refuse_surrogates, tokenized
from titan_ulysses.distributed.errors import RefusedRow, UserError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from titan_ulysses.data.processor import VisionProcessor

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
    if train_on != "all" and not tokenizer.is_fast:
        raise UserError(
            f'model.tokenizer = "{name}" is not a fast tokenizer, so the '
            "assistant's tokens cannot be located: use a fast one (tokenizer.json), or set "
            'data.train_on = "all"'
        )


class _Sample(NamedTuple):
    """A text that the model reads, and what of it is trained on."""

    text: str
    spans: list[tuple[int, int]]
    """[begin, end) of what the assistant wrote in each trained turn, in characters, in order"""


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    chat: Chat,
    *,
    train_on: str,
    vision: VisionProcessor | None = None,
) -> Encoded:
    """Return one chat as tokens: its samples, one after the other.

    `trained` marks the tokens that are trained on. With train_on = "all" it is None: every token
    of the whole chat is. Otherwise it marks what the assistant wrote, in the turns that the
    chat trains on. A token is trained on if any of its characters is. Placeholders of images and
    videos, which `vision` reads, are never trained on.

    A turn is trained as the model sees it: with the messages before it rendered as they are when
    the turn is the last one. Most templates write earlier turns the same way whatever follows, and
    then one sample, the whole chat, holds all turns; the lengths are None. Others leave the
    thoughts of earlier turns out, or end them otherwise. Then a sample ends where the next turn
    would read something else before it, and that turn begins a sample of its own, with all that the
    model sees at that point. Its earlier turns are not trained on again.

    Raise `RefusedRow` if the template refuses the chat or leaves a message out. Raise `UserError`
    if the template has no way to tell the assistant's turns apart, see `_turn`.
    """
    text = _render(tokenizer, chat)
    refuse_surrogates(text)
    if chat.media:
        if vision is None:
            raise UserError(why_no_vision(tokenizer.name_or_path))
        vision.check(text, chat.media)
    # A template may ignore a role that it does not know, and what its messages say would be lost.
    roles = {message["role"] for message in chat.messages if message.get("content")}
    for role in roles - {"user", "assistant"}:
        others = [message for message in chat.messages if message["role"] != role]
        try:
            without = _render(tokenizer, chat._replace(messages=others))
        except RefusedRow:
            continue  # the template fails without these messages, so it does use them
        if without == text:
            raise RefusedRow(f'the chat template leaves out messages with the role "{role}"')
    if train_on == "all":
        if chat.untrained:
            raise RefusedRow(
                f'message {min(chat.untrained)} has "train": false, and data.train_on = "all" '
                "trains on everything"
            )
        if not chat.media:
            ids = np.array(tokenized(tokenizer, text)["input_ids"], dtype=np.uint32)
            return Encoded(ids, parsed_calls=chat.parsed_calls)
        samples = [_Sample(text, [(0, len(text))])]
    else:
        samples = _samples(tokenizer, chat, text) or [_Sample(text, [])]
    read = [_read(tokenizer, sample, chat, vision) for sample in samples]
    return _joined(read)._replace(parsed_calls=chat.parsed_calls)


def _read(
    tokenizer: PreTrainedTokenizerBase, sample: _Sample, chat: Chat, vision: VisionProcessor | None
) -> Encoded:
    if not (chat.media and vision):
        found = tokenized(tokenizer, sample.text, return_offsets_mapping=True)
        ids = np.array(found["input_ids"], dtype=np.uint32)
        return Encoded(ids, _overlapping(found["offset_mapping"], sample.spans))
    encoded, offsets = vision.read(sample.text, chat.media)
    trained = _overlapping(offsets, sample.spans)
    for begin, end in (span for visual in encoded.visuals for span in visual.spans):
        trained[begin:end] = False
    return encoded._replace(trained=trained)


def _joined(samples: list[Encoded]) -> Encoded:
    """Return samples end to end as the documents of one row."""
    if len(samples) == 1:
        return samples[0]
    lengths = tuple(len(sample.ids) for sample in samples)
    begins = np.cumsum((0, *lengths)).tolist()
    moved = [one.at(at) for at, x in zip(begins, samples, strict=False) for one in x.visuals]
    positions = [x.positions for x in samples if x.positions is not None]
    return Encoded(
        np.concatenate([x.ids for x in samples]),
        np.concatenate([x.trained for x in samples]),
        lengths,
        visuals=tuple(moved),
        media=tuple(one for x in samples for one in x.media),
        positions=np.concatenate(positions) if positions else None,
    )


def why_no_vision(name: str) -> str:
    """Return why images cannot be read with the tokenizer `name`."""
    needed = {"pillow": "PIL", "torchvision": "torchvision"}
    missing = [package for package, module in needed.items() if not find_spec(module)]
    if missing:
        return f"images need {' and '.join(missing)}: pip install 'titan-ulysses[vision]'"
    return (
        f'it has images, which need model.vision = "frozen" or "train", and in model.tokenizer = '
        f'"{name}" a processor (processor_config.json or preprocessor_config.json)'
    )


def encode_answer(
    tokenizer: PreTrainedTokenizerBase, prompt: list[Any], answer: list[Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of messages that follow a prompt, and which of them are the answer's.

    The chat template renders the prompt with the beginning of an answer, and the whole; the answer
    is what is added. A token with any character of the answer counts as the answer's.
    """
    if not (tokenizer.chat_template and tokenizer.is_fast):
        raise UserError(
            f'model.tokenizer = "{tokenizer.name_or_path}" has no chat template, or is not a fast '
            "tokenizer, which completions of messages need: take the tokenizer of the family's "
            "instruct model, or give prompt, chosen and rejected as texts"
        )
    chat = Chat([*prompt, *answer], None)
    before, whole = _render(tokenizer, chat, len(prompt), asks=True), _render(tokenizer, chat)
    refuse_surrogates(whole)
    if not whole.startswith(before):
        raise RefusedRow(
            "the chat template renders the prompt differently once a completion follows it, so "
            "the start of the completion cannot be located"
        )
    found = tokenized(tokenizer, whole, return_offsets_mapping=True)
    ends = np.array([end for _, end in found["offset_mapping"]], dtype=np.int64)
    return np.array(found["input_ids"], dtype=np.uint32), ends > len(before)


def tokens_by_role(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> dict[str, int]:
    """Return how many tokens the template writes for the messages of each role.

    A message is counted as it is written when it is the last one; what the template does not write
    without the next message, as a system message of some, is counted with that one. Images and
    videos count as one token each. Raise `RefusedRow` if the template does not show what it writes.
    """
    counts, before = dict.fromkeys((one["role"] for one in chat.messages), 0), ""
    for number, message in enumerate(chat.messages, start=1):
        try:
            text = _render(tokenizer, chat, number)
        except RefusedRow:
            continue
        begin, before = before, text
        if not text.startswith(begin):  # earlier messages are written otherwise: write it twice
            begin, twice = text, chat._replace(messages=[*chat.messages[:number], message])
            text = _render(tokenizer, twice)
        if not text.startswith(begin):
            raise RefusedRow(
                f"the chat template writes message {number} otherwise once another one follows"
            )
        counts[message["role"]] += len(tokenized(tokenizer, text[len(begin) :])["input_ids"])
    return counts


def encode_question(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """Return the ids of a chat in which a user says `text` and an answer begins.

    Raise `RefusedRow` if the template refuses it.
    """
    refuse_surrogates(text)
    chat = Chat([{"role": "user", "content": text}], None)
    return np.array(tokenized(tokenizer, _render(tokenizer, chat, asks=True))["input_ids"])


def _render(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, count: int | None = None, *, asks: bool = False
) -> str:
    """Render the first `count` messages as text, or all; `asks` adds the generation prompt.

    Raise `RefusedRow` if the template fails.
    """
    with _refusing():
        return tokenizer.apply_chat_template(
            chat.messages[:count], tools=chat.tools, tokenize=False, add_generation_prompt=asks
        )


@contextmanager
def _refusing() -> Iterator[None]:
    """Raise `RefusedRow` for what a template raises: it is a program, and can fail in many ways."""
    try:
        yield
    except Exception as error:  # it may also divide by zero, or call itself for ever
        raise RefusedRow(f"the chat template refuses it ({one_line(error)})") from error


def _samples(tokenizer: PreTrainedTokenizerBase, chat: Chat, text: str) -> list[_Sample]:
    """Return the samples that train each turn of the assistant once; none if no turn is trained.

    text: the whole chat.
    """
    samples: list[_Sample] = []

    def goes_on(text: str) -> bool:
        last = samples[-1]
        return text.startswith(last.text[: last.spans[-1][1]])

    for number, message in enumerate(chat.messages):
        if message["role"] != "assistant" or number in chat.untrained:
            continue
        turn = _turn(tokenizer, chat, number)
        if turn.spans and samples and goes_on(turn.text):
            samples[-1] = _Sample(turn.text, [*samples[-1].spans, *turn.spans])
        elif turn.spans:
            samples.append(turn)
    if samples and goes_on(text):  # with what follows the last turn
        samples[-1] = _Sample(text, samples[-1].spans)
    return samples


def _turn(tokenizer: PreTrainedTokenizerBase, chat: Chat, number: int) -> _Sample:
    """Return the chat up to and including a message of the assistant, which alone is trained on.

    A template with `{% generation %}` says itself what the assistant wrote: what it marks behind
    the messages before. For any other template it is what follows the messages before with the
    generation prompt (`add_generation_prompt`). Whitespace after the token that ends the turn does
    not belong to it.
    """
    template = tokenizer.get_chat_template(None, chat.tools)
    if _GENERATION.search(template):
        text, marked = _render_marked(tokenizer, chat, number + 1, template)
        before = _render(tokenizer, chat, number) if number else ""
        cut = _cut(tokenizer, chat, number, before, "", text)
        # Marks are in order, and those behind the cut are this turn's.
        spans = [(a + len(before) - cut, b + len(before) - cut) for a, b in marked if cut <= a < b]
        return _Sample(before + text[cut:], spans)
    if number == 0:
        raise RefusedRow(
            "the first message is the assistant's, and the chat template has no {% generation %} "
            "that marks what it wrote"
        )
    before = _render(tokenizer, chat, number)
    asked = _render(tokenizer, chat, number, asks=True)
    text = _render(tokenizer, chat, number + 1)
    if not text.startswith(asked):
        kept = os.path.commonprefix([before, asked])
        text = kept + text[_cut(tokenizer, chat, number, kept, asked[len(kept) :], text) :]
    turn = text[len(asked) :]
    added = tuple(token.content for token in tokenizer.added_tokens_decoder.values())
    if (ended := turn.rstrip()).endswith(added):
        turn = ended
    return _Sample(text, [(len(asked), len(asked) + len(turn))] if turn else [])


def _cut(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, number: int, before: str, asks: str, text: str
) -> int:
    """Return where message `number` begins in `text`, which ends with it.

    before: the messages before it as the model sees them; asks: the generation prompt behind them.
    Usually `text` begins with them. A template may also leave thoughts out of earlier messages as
    soon as this one is there. Then the last message before, with `asks`, must be in `text` once.
    """
    if text.startswith(before + asks):
        return len(before)
    earlier = _render(tokenizer, chat, number - 1) if number > 1 else ""
    last = before[len(os.path.commonprefix([before, earlier])) :]
    if not last or text.count(last + asks) != 1:
        raise UserError(
            f'model.tokenizer = "{tokenizer.name_or_path}": its chat template does not show which '
            f"part the assistant wrote of message {number + 1} of {len(chat.messages)}: its text "
            "does not follow that of the messages before it, which ends in "
            f"{json.dumps((before + asks)[-30:], ensure_ascii=False)}. Give it a template with "
            '{% generation %} around what the assistant writes, or set data.train_on = "all"'
        )
    return text.index(last + asks) + len(last)


def _render_marked(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, count: int, template: str
) -> tuple[str, list[tuple[int, int]]]:
    """Render the first `count` messages; also return the spans in {% generation %}, in order."""
    from transformers.utils.chat_template_utils import render_jinja_template

    with _refusing():
        texts, spans = render_jinja_template(
            conversations=[chat.messages[:count]],
            tools=chat.tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    return texts[0], sorted(map(tuple, spans[0]))


def _overlapping(offsets: Any, spans: list[tuple[int, int]]) -> np.ndarray:
    """Return a [tokens] bool array that marks the tokens that share a character with a span.

    offsets: [tokens, 2], the characters of each token. Both lists are sorted, and the spans are
    disjoint.
    """
    if not spans:
        return np.zeros(len(offsets), dtype=bool)
    token_begins, token_ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    begins, ends = np.array(spans, dtype=np.int64).T
    # The first span that ends after the token begins.
    candidate = np.searchsorted(ends, token_begins, side="right")
    begins = np.append(begins, np.iinfo(np.int64).max)
    return token_ends > begins[candidate]
