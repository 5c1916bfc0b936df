"""What a record of a file or data set holds: a text, a prompt and completion, a chat, a prompt with
two completions (a preference) or with one that is good or bad, or tokens that exist already.

A record that cannot be used is not an exception but a `BadRow`; `corpus.CorpusStats` decides
whether to skip it.

Tokens are `input_ids`, with or without a teacher's k largest log-probabilities for each of them.
`teacher_ids` is then, for each token, a list of k token ids, and `teacher_log_probs` a list of
their log-probabilities in the teacher's distribution of that token, given those before it. As
`labels`, they are not shifted. Tokens that are not trained on, and the first one of a document, may
have empty lists, or null.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from titan_ulysses.config.schema import SourceSettings
from titan_ulysses.data.images import Visual
from titan_ulysses.data.media import Media, has_media, take_media
from titan_ulysses.distributed.errors import RefusedRow

TOKEN_FIELDS = (
    "input_ids",
    "labels",
    "position_ids",
    "document_lengths",
    "seq_lengths",
    "attention_mask",
)
"""The fields that are read, with the names that Hugging Face's collators and TRL give them."""
TEACHER_FIELDS = ("teacher_ids", "teacher_log_probs")
TOP = np.dtype([("id", np.uint32), ("log_prob", np.float32)])
"""One of the k largest log-probabilities of a token, in fp32."""
NOT_TRAINED = -100


class Completion(NamedTuple):
    prompt: str
    completion: str


class Chat(NamedTuple):
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    untrained: frozenset[int] = frozenset()
    """messages of the assistant, by number from 0, that are not trained on"""
    parsed_calls: int = 0
    """tool calls whose arguments were JSON text, see `_parse_calls`"""
    media: tuple[Media, ...] = ()
    """the images and videos of the messages, in their order"""


class Answers(NamedTuple):
    """A prompt and completions of it, all texts (str), or all lists of messages."""

    prompt: Any
    completions: tuple[Any, ...]
    """the chosen and the rejected one, or one"""
    desirable: bool | None = None
    """whether the only completion is good; None: there are two"""
    parsed_calls: int = 0
    """tool calls whose arguments were JSON text, see `_parse_calls`"""


class Encoded(NamedTuple):
    """A row as token ids."""

    ids: np.ndarray
    """[tokens] integers; empty for an empty row."""
    trained: np.ndarray | None = None
    """[tokens] bool: which tokens are trained on; None: all of them."""
    lengths: tuple[int, ...] | None = None
    """the lengths of the documents of the row, in order; None: it is one."""
    split: int | None = None
    """where the second document of a pair begins, or the completion of KTO; None: neither"""
    teacher: np.ndarray | None = None
    """[tokens, k] TOP: a teacher's largest log-probabilities; None: none."""
    parsed_calls: int = 0
    """tool calls of the row whose arguments were JSON text"""
    desirable: bool | None = None
    """whether the completion is good; None: not known"""
    visuals: tuple[Visual, ...] = ()
    """its images and videos, by their first placeholders, which count from the row's first token"""
    media: tuple[Media, ...] = ()
    """of each of them, where its pixels are"""
    positions: np.ndarray | None = None
    """[tokens, axes] int32, from 0 in each document; None: they count along one axis"""

    def documents(self) -> Iterator[Encoded]:
        """Yield each document of the row. A pair is one."""
        if self.lengths is None:
            yield self
            return
        ends = np.cumsum(self.lengths).tolist()
        for begin, end in zip([0, *ends], ends, strict=False):
            columns = (self.trained, self.teacher, self.positions)
            trained, teacher, positions = (x if x is None else x[begin:end] for x in columns)
            here = [i for i, one in enumerate(self.visuals) if begin <= one.spans[0][0] < end]
            yield Encoded(
                self.ids[begin:end],
                trained,
                teacher=teacher,
                visuals=tuple(self.visuals[i].at(-begin) for i in here),
                media=tuple(self.media[i] for i in here),
                positions=positions,
            )


class Row(NamedTuple):
    place: str
    """the file's name and the line or row in it, for messages"""
    content: str | bytes | Completion | Chat | Answers | Encoded


class BadRow(NamedTuple):
    place: str
    reason: str


def read_record(
    record: Any, source: SourceSettings, place: str, folder: Path = Path()
) -> Row | BadRow:
    """Return the row of one record, as `source` says what it holds.

    Relative paths of images begin in `folder`. An exception in the place of the record says why the
    line is not JSON.
    """
    if isinstance(record, ValueError | RecursionError):
        return BadRow(
            place, f"not JSON ({record})" if not isinstance(record, UnicodeError) else str(record)
        )
    if not isinstance(record, dict):
        return BadRow(place, f"a JSON {type(record).__name__}, not an object with fields")
    try:
        if source.source == "chat":
            return Row(place, _read_chat(record, source, place, folder))
        if source.source == "preference":
            return Row(place, _read_preference(record, source))
        if source.source == "unpaired":
            return Row(place, _read_judged(record, source))
        if source.source == "tokens":
            everything, top_k = source.train_on == "all", source.teacher_top_k
            return Row(place, tokens_of(record, teacher_top_k=top_k, train_on_all=everything))
        names = field_names(source)
        for name in names:
            if not isinstance(record.get(name), str):
                raise _missing(record, name, "text")
    except RefusedRow as error:
        return BadRow(place, str(error))
    texts = [record[name] for name in names]
    return Row(place, Completion(*texts) if source.prompt_field else texts[0])


def field_names(source: SourceSettings, there: Sequence[str] = ()) -> list[str]:
    """Return the fields that every row must have, in a data set whose fields are `there`."""
    if source.source == "chat":
        if source.prompt_field:
            return [source.prompt_field, source.completion_field]
        others = ([_SHARE_GPT], [*_ALPACA])
        found = (names for names in others if {*names} <= {*there})
        is_ours = source.messages_field in there or source.messages_field != "messages"
        return [source.messages_field] if is_ours else next(found, [source.messages_field])
    if source.source == "preference":
        return [source.chosen_field, source.rejected_field]
    if source.source == "unpaired":
        return [source.prompt_field or "prompt", source.completion_field or "completion"]
    if source.source == "tokens":
        return ["input_ids"]
    pair = [source.prompt_field, source.completion_field]
    return pair if source.prompt_field else [source.text_field]


def _missing(record: dict[str, Any], name: str, wanted: str) -> RefusedRow:
    if name in record:
        value = json.dumps(record[name], default=str)[:40]
        return RefusedRow(f'the field "{name}" holds {value}, not {wanted}')
    return RefusedRow(f'no field "{name}" (it has {", ".join(map(str, record)) or "none"})')


# --- messages -------------------------------------------------------------------------------------


_SHARE_GPT = "conversations"
_ALPACA = ("instruction", "output")
_FIELDS = {"role": "from", "content": "value"}
"""The fields of a message of ShareGPT, by ours."""
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}
_ROLES |= {"bard": "assistant", "function_call": "assistant", "observation": "tool"}
"""The roles of ShareGPT, and ours."""


def _messages_of(record: dict[str, Any], source: SourceSettings) -> list[dict[str, Any]]:
    """Return the messages of a row: a list, or made of a prompt and its completion.

    A list has our names of fields and roles, or those of `data.message_fields` and `data.roles`, or
    those of ShareGPT. A row of Alpaca has an instruction, perhaps with an input, and an output,
    perhaps with a system message and earlier turns (history: pairs of texts).
    """
    names = field_names(source, [*record])
    if names == [*_ALPACA] or source.prompt_field:
        texts = [record.get(name) for name in names]
        for name, text in zip(names, texts, strict=True):
            if not isinstance(text, str):
                raise _missing(record, name, "text")
        prompt, answer = texts
        if not source.prompt_field and record.get("input"):
            prompt = f"{prompt}\n{record['input']}"
        earlier = [] if source.prompt_field else record.get("history") or []
        turns = [("system", record.get("system"))] if not source.prompt_field else []
        if any(not isinstance(pair, list) or len(pair) != 2 for pair in earlier):
            raise _missing(record, "history", "a list of pairs of texts")
        turns += [one for asked, said in earlier for one in (("user", asked), ("assistant", said))]
        turns += [("user", prompt), ("assistant", answer)]
        return [{"role": role, "content": text} for role, text in turns if text]
    messages = record.get(names[0])
    if not (messages and _are_objects(messages)):
        raise _missing(record, names[0], "a list of messages")
    is_share_gpt = all("role" not in one and "from" in one for one in messages)
    ours = {**(_FIELDS if is_share_gpt else {}), **source.message_fields}
    roles = {**(_ROLES if is_share_gpt else {}), **source.roles}
    if not (ours or roles):
        return messages
    renamed = {theirs: name for name, theirs in ours.items()}
    found = [{renamed.get(key, key): value for key, value in one.items()} for one in messages]
    for one in found:
        if isinstance(role := one.get("role"), str):
            one["role"] = roles.get(role, role)
    return found


def _trained_flag(message: dict[str, Any], number: int) -> bool | None:
    """Return whether a message says that it is trained on, by train, loss or weight (0 or 1)."""
    for name in FLAGS:
        flag = message.get(name)
        if flag is None:
            continue
        if not isinstance(flag, bool) and not (name == "weight" and flag in (0, 1)):
            value = json.dumps(flag, default=str)[:40]
            wanted = "neither 0 nor 1" if name == "weight" else "neither true nor false"
            raise RefusedRow(f'message {number}: "{name}" is {value}, {wanted}')
        return bool(flag)
    return None


FLAGS = ("train", "loss", "weight")
"""The fields of a message that say whether it is trained on; weight is OpenAI's."""


def _read_chat(record: dict[str, Any], source: SourceSettings, place: str, folder: Path) -> Chat:
    messages, tools = _messages_of(record, source), record.get(source.tools_field)
    flags = [_trained_flag(message, number) for number, message in enumerate(messages)]
    for number, (message, flag) in enumerate(zip(messages, flags, strict=True)):
        role = message.get("role")
        if not isinstance(role, str):
            raise RefusedRow(f"message {number} has no role")
        if flag and role != "assistant":
            name = next(name for name in FLAGS if message.get(name) is not None)
            if name != "train":  # other formats have them on each message
                continue
            raise RefusedRow(
                f'message {number}: "train" is true, and its role is "{role}": only "assistant" is '
                "trained"
            )
    # A column has one type and the schemas of tools differ, so data sets store tools as JSON text.
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise RefusedRow(f"{source.tools_field} is text but not JSON ({error})") from error
    if not (tools is None or _are_objects(tools)):
        raise RefusedRow(f"{source.tools_field} is not a list of tools")
    untrained = {number for number, flag in enumerate(flags) if flag is False}
    if source.train_on == "last":
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        untrained |= {*turns[:-1]}
    # Templates get the messages without the flag: some write all that a message holds.
    messages = [{k: v for k, v in message.items() if k not in FLAGS} for message in messages]
    messages, media = take_media(_without_nulls(messages), record, folder)
    media = tuple(one._replace(row=place) for one in media)
    calls = _parse_calls(messages)
    return Chat(messages, _without_nulls(tools) or None, frozenset(untrained), calls, media)


def _read_preference(record: dict[str, Any], source: SourceSettings) -> Answers:
    """Read texts, or lists of messages.

    Where there is no list of messages with the prompt, both completions are whole conversations,
    and the prompt is the messages that both begin with.
    """
    name, fields = source.prompt_field or "prompt", field_names(source)
    values: list[Any] = [record.get(key) for key in (name, *fields)]
    prompt, chosen, rejected = values
    if all(isinstance(value, str) for value in values):
        return Answers(prompt, (chosen, rejected))
    for key in fields:
        _check_messages(record, key)
    if not _are_messages(prompt):
        alike = (one == other for one, other in zip(chosen, rejected, strict=False))
        shared = sum(takewhile(bool, alike))
        if not shared:
            raise RefusedRow(
                f'no list of messages in "{name}", and {" and ".join(fields)} do not begin with '
                "the same messages"
            )
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    return _answers(prompt, (chosen, rejected))


def _read_judged(record: dict[str, Any], source: SourceSettings) -> Answers:
    """Read a prompt and a completion, texts or lists of messages, and the label, true or false."""
    names, label = field_names(source), record.get(source.label_field)
    if not (isinstance(label, bool) or (isinstance(label, int) and label in (0, 1))):
        raise _missing(record, source.label_field, "true or false")
    prompt, completion = (record.get(name) for name in names)
    if isinstance(prompt, str) and isinstance(completion, str):
        return Answers(prompt, (completion,), bool(label))
    for name in names:
        _check_messages(record, name)
    return _answers(prompt, (completion,), bool(label))


def _answers(prompt: Any, completions: tuple[Any, ...], desirable: bool | None = None) -> Answers:
    """Return a prompt and completions that are lists of messages."""
    prompt, *others = map(_without_nulls, (prompt, *completions))
    if any(map(has_media, (prompt, *others))):
        raise RefusedRow('it has an image or video, which only data.source = "chat" may have')
    calls = sum(map(_parse_calls, (prompt, *others)))
    return Answers(prompt, tuple(others), desirable, calls)


def _check_messages(record: dict[str, Any], name: str) -> None:
    if not _are_messages(record.get(name)):
        wanted = "text like the other fields, or a list of messages with a role"
        raise _missing(record, name, wanted)


def _are_messages(value: Any) -> bool:
    has_roles = _are_objects(value) and all(isinstance(one.get("role"), str) for one in value)
    return has_roles and bool(value)


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(x, dict) for x in value)


def _parse_calls(messages: list[dict[str, Any]]) -> int:
    """Make objects of the arguments of tool calls that are JSON text, and return how many were.

    OpenAI's form has them as text. A template that applies `tojson` would write such a text as a
    string with escaped quotes. Text that is not a JSON object stays as it is.
    """
    count = 0
    for message in messages:
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            function = call.get("function", call) if isinstance(call, dict) else None
            text = function.get("arguments") if isinstance(function, dict) else None
            if not isinstance(text, str):
                continue
            try:
                arguments = json.loads(text or "{}")
            except (ValueError, RecursionError):
                continue
            if isinstance(arguments, dict):
                function["arguments"], count = arguments, count + 1
    return count


def _without_nulls(value: Any) -> Any:
    """Remove keys whose value is null, recursively.

    An Arrow table gives every message all keys that any message has, with null for missing ones,
    but chat templates test whether a key exists.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


# --- tokens ---------------------------------------------------------------------------------------


def tokens_of(
    record: dict[str, Any], *, teacher_top_k: int = 0, train_on_all: bool = False
) -> Encoded:
    """Return the tokens of a record.

    - `input_ids`: the tokens. Nothing is added to them.
    - `labels`: as transformers takes them, one for each token and not shifted: the token itself, or
      -100 where it is not trained on.
    - `position_ids`, or `document_lengths` (TRL: `seq_lengths`): where each document of the record
      begins. Positions begin at 0 in each document, and go up by 1.
    - `attention_mask`: tokens at which it is 0 are padding, and left out.
    - with teacher_top_k: what a teacher says of each token that is trained on ;
      train_on_all: also where labels are -100.

    Raise `RefusedRow` with the reason if the fields contradict each other.
    """
    given = {name: record[name] for name in TOKEN_FIELDS if record.get(name) is not None}
    if "input_ids" not in given:
        raise _missing(record, "input_ids", "a list of token ids")
    arrays = {name: _whole_numbers(name, values) for name, values in given.items()}
    ids = arrays["input_ids"]
    for name, values in arrays.items():
        if not name.endswith("_lengths") and len(values) != len(ids):
            raise RefusedRow(f"{len(values)} {name} for {len(ids)} input_ids")
    lengths = _lengths(arrays, len(ids))
    labels = arrays.get("labels")
    if labels is not None:
        wrong = np.flatnonzero((labels != NOT_TRAINED) & (labels != ids))
        if len(wrong):
            raise RefusedRow(
                f"labels[{wrong[0]}] is {labels[wrong[0]]}, neither {NOT_TRAINED} nor "
                f"input_ids[{wrong[0]}] = {ids[wrong[0]]}: give labels that are not shifted"
            )
    trained = None if labels is None else labels != NOT_TRAINED
    kept = arrays["attention_mask"] != 0 if "attention_mask" in arrays else np.ones(len(ids), bool)
    teacher = None
    if teacher_top_k:
        needed = kept & (True if trained is None or train_on_all else trained)
        begins = np.cumsum((0, *(lengths or (len(ids),))))[:-1]
        needed[begins[begins < len(ids)]] = False  # the first token of a document is no label
        teacher = top_of(record, teacher_top_k, needed=needed)
    if not kept.all():
        if lengths is not None:
            parts = np.split(kept, np.cumsum(lengths)[:-1])
            lengths = tuple(int(part.sum()) for part in parts if part.any())
        ids = ids[kept]
        trained = None if trained is None else trained[kept]
        teacher = None if teacher is None else teacher[kept]
    return Encoded(ids, trained, lengths, teacher=teacher)


def _whole_numbers(name: str, values: Any) -> np.ndarray:
    """Return [n] int64. Raise `RefusedRow` if values are no list of whole numbers."""
    try:
        array = np.asarray(values)
    except ValueError:  # lists of different lengths
        array = np.array(None)
    if array.ndim == 1 and not len(array):
        return np.empty(0, dtype=np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise RefusedRow(f"{name} is no list of whole numbers")
    return array.astype(np.int64)


def _lengths(arrays: dict[str, np.ndarray], count: int) -> tuple[int, ...] | None:
    """Return the lengths of the documents, if a field gives them; None: the row is one."""
    found: dict[str, tuple[int, ...]] = {}
    for name in ("document_lengths", "seq_lengths"):
        if name in arrays:
            total = sum(arrays[name].tolist())  # in Python's numbers, which do not overflow
            if (arrays[name] < 0).any() or total != count:
                raise RefusedRow(f"{name} sum to {total}, not to {count} tokens")
            found[name] = tuple(length for length in arrays[name].tolist() if length)
    if "position_ids" in arrays and count:
        positions = arrays["position_ids"]
        begins = np.flatnonzero(positions == 0)
        goes_on = np.flatnonzero((np.diff(positions) != 1) & (positions[1:] != 0))
        if positions[0] != 0 or len(goes_on):
            place = 0 if positions[0] != 0 else int(goes_on[0]) + 1
            raise RefusedRow(
                f"position_ids[{place}] is {positions[place]}: positions begin at 0 in each "
                "document, and go up by 1"
            )
        found["position_ids"] = tuple(np.diff(np.append(begins, count)).tolist())
    if len(set(found.values())) > 1:
        raise RefusedRow(f"{' and '.join(found)} describe different documents")
    return next(iter(found.values()), None)


_TEACHER_VALUES = {
    "teacher_ids": ("id", "token id", "iu", 0, np.iinfo(np.uint32).max),
    "teacher_log_probs": (
        "log_prob",
        "number in fp32",
        "iuf",
        float(np.finfo(np.float32).min),
        float(np.finfo(np.float32).max),
    ),
}
"""(field of TOP, what a value is, kinds of dtype, smallest, largest)"""


def top_of(record: dict[str, Any], top_k: int, *, needed: np.ndarray) -> np.ndarray:
    """Return the teacher's largest log-probabilities [tokens, k] of a record, as TOP.

    needed [tokens] bool: which tokens must have them; those of others are 0. Raise `RefusedRow`
    with the reason if they are not there, or not k for each token.
    """
    found = np.zeros((len(needed), top_k), dtype=TOP)
    places = np.flatnonzero(needed).tolist()
    for name, (key, kind, dtypes, smallest, largest) in _TEACHER_VALUES.items():
        rows = record.get(name)
        if rows is None:
            raise RefusedRow(f'no field "{name}", which data.teacher_top_k = {top_k} needs')
        if not isinstance(rows, list) or len(rows) != len(needed):
            count = len(rows) if isinstance(rows, list) else "no list of"
            raise RefusedRow(f"{count} {name} for {len(needed)} input_ids")
        for place in places:
            row = rows[place]
            if not isinstance(row, list) or len(row) != top_k:
                count = len(row) if isinstance(row, list) else "no"
                raise RefusedRow(
                    f"{name}[{place}] has {count} entries, and data.teacher_top_k = {top_k}"
                )
        if not places:
            continue
        try:
            values = np.array([rows[place] for place in places])
        except ValueError:  # lists in lists
            values = np.array(None)
        if values.dtype.kind not in dtypes or values.ndim != 2:
            raise RefusedRow(f"{name} has an entry that is no {kind}")
        if (wrong := values[~((values >= smallest) & (values <= largest))]).size:  # NaN too
            raise RefusedRow(f"{name} has an entry that is no {kind}: {wrong[0]}")
        twice = (np.diff(np.sort(values)) == 0).any(axis=1)
        if key == "id" and twice.any():
            raise RefusedRow(f"{name}[{places[int(twice.argmax())]}] has one token id twice")
        found[key][places] = values
    return found
