"""The sources of documents: text files, and files of records (JSON lines, JSON, parquet, arrow).

A source yields rows, each with the place where it was found, in the same order on every machine and
rank. A row that cannot be used is not an exception but a `BadRow`; `corpus.CorpusStats` decides
whether to skip it. A record holds a text, a prompt and completion, a chat, tokens (tokens.py), or a
prompt with two completions. The rows of Hugging Face data sets are in datasets.py.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from io import BufferedReader, BytesIO
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from titan_ulysses.config.schema import SourceSettings
from titan_ulysses.data.files import digest, find_files, read_text
from titan_ulysses.data.tokens import TOKEN_EXTENSIONS, Tokens, token_records, tokens_of
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.failure import one_line

TEXT_EXTENSIONS = [".txt"]
RECORD_EXTENSIONS = [
    f"{kind}{packed}" for kind in (".jsonl", ".json") for packed in ("", ".gz", ".zst")
] + [".parquet"]
LONE_SURROGATE_ERROR = "half of a surrogate pair in it is no character"
_CODECS = {".gz": "gzip", ".zst": "zstd"}
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


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


class Preference(NamedTuple):
    """A prompt and two completions of it: three texts (str), or three lists of messages."""

    prompt: Any
    chosen: Any
    rejected: Any
    parsed_calls: int = 0
    """tool calls whose arguments were JSON text, see `_parse_calls`"""


class Row(NamedTuple):
    place: str
    """the file's name and the line or row in it, for messages"""
    content: str | bytes | Completion | Chat | Preference | Tokens


class BadRow(NamedTuple):
    place: str
    reason: str


class RefusedRow(Exception):
    """Raised with the reason if a row cannot become a document.

    It becomes a `BadRow` in the caller, which knows the place of the row.
    """


class Rows:
    """All rows of one source. They can be iterated repeatedly.

    `done` of `total` is the progress of the current iteration; `total` is None if it is unknown.
    """

    def __init__(self) -> None:
        self.done = 0
        self.total: int | None = None

    def __iter__(self) -> Iterator[Row | BadRow]:
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Return a hash that identifies the content."""
        raise NotImplementedError


class TextRows(Rows):
    """Text files, one row per file. Progress is counted in bytes."""

    def __init__(self, source: SourceSettings, setting: str) -> None:
        super().__init__()
        self.encoding, self.setting = source.encoding, setting
        self.files = find_files(
            source.path, extensions=source.extensions or TEXT_EXTENSIONS, setting=setting
        )
        self.total = sum(file.stat().st_size for file in self.files.values())

    def __iter__(self) -> Iterator[Row]:
        self.done = 0
        for name, file in self.files.items():
            yield Row(name, read_text(file, self.encoding, self.setting))
            self.done += file.stat().st_size

    def fingerprint(self) -> str:
        return digest(self.files)


class RecordRows(Rows):
    """JSON-lines, JSON, parquet and arrow files, one row per record. Progress is in bytes.

    `.gz` and `.zst` files are decompressed while they are read.
    """

    def __init__(self, source: SourceSettings, setting: str) -> None:
        super().__init__()
        self.source, self.setting = source, setting
        default = TOKEN_EXTENSIONS if source.source == "tokens" else RECORD_EXTENSIONS
        self.files = find_files(
            source.path, extensions=source.extensions or default, setting=setting
        )
        self.total = sum(file.stat().st_size for file in self.files.values())

    def __iter__(self) -> Iterator[Row | BadRow]:
        from pyarrow import ArrowException

        before = 0
        for name, file in self.files.items():
            self.done = before
            readers = {".parquet": self._parquet, ".arrow": self._arrow}
            records = readers.get(file.suffix.lower(), self._json)
            try:
                for number, record in records(file):
                    yield read_record(record, self.source, f"{name}:{number}")
            except (OSError, ValueError, RecursionError, ArrowException) as error:
                raise UserError(
                    f"{self.setting}: {file} cannot be read ({one_line(error)}): repair it, or "
                    "leave it out"
                ) from error
            before += file.stat().st_size
        self.done = before

    def fingerprint(self) -> str:
        return digest(self.files)

    def _json(self, file: Path) -> Iterator[tuple[int, Any]]:
        """Yield (line number, JSON value) of each line that is not empty.

        For a line that is not JSON, the value is the exception. For a file that is one JSON array,
        yield (index from 1, JSON value) of each element.
        """
        import pyarrow

        before, encoding = self.done, self.source.encoding
        codec = _CODECS.get(file.suffix.lower())
        is_json = (
            file.name.lower().removesuffix(file.suffix.lower() if codec else "").endswith(".json")
        )
        with open(file, "rb") as raw:
            lines: BinaryIO = raw
            if codec:
                lines = BufferedReader(pyarrow.CompressedInputStream(raw, codec))
            if not _ends_lines_with_a_byte(self.source.encoding):
                # Such files are decoded whole, because no line of theirs can be found in bytes.
                lines = BytesIO(lines.read().decode(self.source.encoding).encode())
                encoding = "utf-8"
            for number, line in enumerate(lines, start=1):
                # The file is one array, not JSON lines.
                start = line.removeprefix(codecs.BOM_UTF8).lstrip()
                if number == 1 and is_json and start.startswith(b"["):
                    elements = _parse(line + lines.read(), encoding)
                    if isinstance(elements, Exception):
                        raise elements  # of no element is it known where it ends
                    yield from enumerate(elements, start=1)
                    return
                if line.strip():
                    yield number, _parse(line, encoding)
                self.done = before + raw.tell()

    def _parquet(self, file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (row number from 1, fields) of each row."""
        import pyarrow.parquet

        before, size, number = self.done, file.stat().st_size, 0
        with pyarrow.parquet.ParquetFile(file) as table:
            for group in range(table.num_row_groups):
                for batch in table.iter_batches(batch_size=1024, row_groups=[group]):
                    yield from enumerate(self._records(batch), start=number + 1)
                    number += batch.num_rows
                self.done = before + size * (group + 1) // table.num_row_groups

    def _arrow(self, file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (row number from 1, fields) of each row of an Arrow file, or stream in a file."""
        import pyarrow

        before, number = self.done, 0
        with pyarrow.memory_map(str(file)) as mapped:
            is_file = mapped.read(6) == b"ARROW1"
            mapped.seek(max(0, mapped.size() - 8))
            if not is_file and mapped.read() != _END_OF_STREAM:
                # Its reader would take any end between two batches for the end of the stream.
                raise ValueError("it has no mark of its end: it is cut short, or no Arrow file")
            mapped.seek(0)
            if is_file:
                table = pyarrow.ipc.open_file(mapped)
                batches = map(table.get_batch, range(table.num_record_batches))
            else:
                batches = iter(pyarrow.ipc.open_stream(mapped))
            for batch in batches:
                # A damaged offset would be read as it is, far outside of the file.
                batch.validate(full=True)
                yield from enumerate(self._records(batch), start=number + 1)
                number += batch.num_rows
                self.done = before + mapped.tell()

    def _records(self, batch: Any) -> Iterable[dict[str, Any]]:
        return token_records(batch) if self.source.source == "tokens" else batch.to_pylist()


def _ends_lines_with_a_byte(encoding: str) -> bool:
    """Return whether a line in this codec ends with a byte: not in UTF-16 and UTF-32."""
    try:
        return "\n\n".encode(encoding).endswith(b"\n\n")
    except UnicodeError:
        return True  # of no file it is known what its lines are


def _parse(line: bytes, encoding: str) -> Any:
    """Return the JSON value of a line, or the exception if it has none."""
    try:
        return json.loads(line.decode(encoding).removeprefix("\ufeff").strip())
    except (ValueError, RecursionError) as error:
        if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return ValueError('the file begins like UTF-16: set encoding = "utf-16"')
        return error


def read_record(record: Any, source: SourceSettings, place: str) -> Row | BadRow:
    """Return the row of one record: its text, prompt and completion or two, chat, or tokens."""
    if isinstance(record, ValueError | RecursionError):
        return BadRow(
            place, f"not JSON ({record})" if not isinstance(record, UnicodeError) else str(record)
        )
    if not isinstance(record, dict):
        return BadRow(place, f"a JSON {type(record).__name__}, not an object with fields")
    if source.source == "chat":
        return _read_chat(record, source, place)
    if source.source == "preference":
        return _read_preference(record, source, place)
    if source.source == "tokens":
        try:
            everything = source.train_on == "all"
            found = tokens_of(record, teacher_top_k=source.teacher_top_k, train_on_all=everything)
            return Row(place, found)
        except ValueError as error:
            return BadRow(place, str(error))
    names = field_names(source)
    for name in names:
        if not isinstance(record.get(name), str):
            return BadRow(place, _missing(record, name, "text"))
    texts = [record[name] for name in names]
    return Row(place, Completion(*texts) if source.prompt_field else texts[0])


def field_names(source: SourceSettings) -> list[str]:
    """Return the fields that every row must have."""
    if source.source == "chat":
        return [source.messages_field]
    if source.source == "preference":
        return [source.chosen_field, source.rejected_field]
    if source.source == "tokens":
        return ["input_ids"]
    return (
        [source.prompt_field, source.completion_field]
        if source.prompt_field
        else [source.text_field]
    )


def _read_chat(record: dict[str, Any], source: SourceSettings, place: str) -> Row | BadRow:
    messages, tools = record.get(source.messages_field), record.get(source.tools_field)
    if not (
        isinstance(messages, list)
        and messages
        and all(isinstance(message, dict) for message in messages)
    ):
        return BadRow(place, _missing(record, source.messages_field, "a list of messages"))
    for number, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            return BadRow(place, f"message {number} has no role")
        if problem := _problem_of_flag(message):
            return BadRow(place, f"message {number}: {problem}")
    # A column has one type and the schemas of tools differ, so data sets store tools as JSON text.
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            return BadRow(place, f"{source.tools_field} is text but not JSON ({error})")
    if not (
        tools is None or (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools))
    ):
        return BadRow(place, f"{source.tools_field} is not a list of tools")
    untrained = frozenset(i for i, message in enumerate(messages) if message.get("train") is False)
    # Templates get the messages without the flag: some write all that a message holds.
    messages = [{k: v for k, v in message.items() if k != "train"} for message in messages]
    messages = _without_nulls(messages)
    parsed = _parse_calls(messages)
    return Row(place, Chat(messages, _without_nulls(tools) or None, untrained, parsed))


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


def _problem_of_flag(message: dict[str, Any]) -> str | None:
    """Return what is wrong with the flag "train" of a message, which may be missing or null."""
    flag = message.get("train")
    if flag is not None and not isinstance(flag, bool):
        return f'"train" is {json.dumps(flag, default=str)[:40]}, neither true nor false'
    if flag and message["role"] != "assistant":
        return f'"train" is true, and its role is "{message["role"]}": only "assistant" is trained'
    return None


def _read_preference(record: dict[str, Any], source: SourceSettings, place: str) -> Row | BadRow:
    """Read texts, or lists of messages.

    Where there is no list of messages with the prompt, both completions are whole conversations,
    and the prompt is what they begin with alike.
    """
    name = source.prompt_field or "prompt"
    prompt: Any = record.get(name)
    completions: list[Any] = [record.get(key) for key in field_names(source)]
    if all(isinstance(value, str) for value in (prompt, *completions)):
        return Row(place, Preference(prompt, *completions))
    for key, value in zip(field_names(source), completions, strict=True):
        if not _are_messages(value):
            wanted = "text beside texts, or a list of messages that have a role"
            return BadRow(place, _missing(record, key, wanted))
    chosen, rejected = completions
    if not _are_messages(prompt):
        alike = (one == other for one, other in zip(chosen, rejected, strict=False))
        shared = sum(takewhile(bool, alike))
        if not shared:
            return BadRow(
                place,
                f'no list of messages in "{name}", and {" and ".join(field_names(source))} do not '
                "begin alike",
            )
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    parts = [_without_nulls(part) for part in (prompt, chosen, rejected)]
    return Row(place, Preference(*parts, sum(map(_parse_calls, parts))))


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(x, dict) and isinstance(x.get("role"), str) for x in value)
    )


def _without_nulls(value: Any) -> Any:
    """Remove keys whose value is null, recursively.

    An Arrow table gives every message all keys that any message has, with null for missing ones,
    but chat templates test whether a key exists.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _missing(record: dict[str, Any], name: str, wanted: str) -> str:
    if name in record:
        return (
            f'the field "{name}" holds {json.dumps(record[name], default=str)[:40]}, not {wanted}'
        )
    return f'no field "{name}" (it has {", ".join(map(str, record)) or "none"})'


def has_surrogate(text: str | bytes) -> bool:
    """Return whether the text contains half of a surrogate pair.

    JSON can express it, but it is not a valid character and tokenizers fail on it.
    """
    return isinstance(text, str) and not text.isascii() and bool(re.search("[\ud800-\udfff]", text))
