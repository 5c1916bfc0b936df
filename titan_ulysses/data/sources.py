"""The sources of rows: text files, files of records (JSON lines, JSON, parquet, arrow), and Hugging
Face data sets: folders written by `save_to_disk`, and whatever `load_dataset` reads.

A source yields rows, each with the place where it was found, in the same order on every machine and
rank. `datasets` reads data sets, not files: it names neither file nor line of a bad row, takes
equal size and time of a file for equal content, and uses a damaged cache as it is.
"""

from __future__ import annotations

import codecs
import json
import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader, BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from titan_ulysses.config.paths import is_no_hub_name
from titan_ulysses.config.schema import SourceSettings
from titan_ulysses.data.files import check_codec, digest, find_files, read_text, section_of
from titan_ulysses.data.records import (
    TEACHER_FIELDS,
    TOKEN_FIELDS,
    BadRow,
    Row,
    field_names,
    read_record,
)
from titan_ulysses.data.remote import fetched, is_remote
from titan_ulysses.distributed.errors import UserError, one_line

TEXT_EXTENSIONS = [".txt"]
RECORD_EXTENSIONS = [
    f"{kind}{packed}" for kind in (".jsonl", ".json") for packed in ("", ".gz", ".zst")
] + [".parquet"]
TOKEN_EXTENSIONS = [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow", ".idx"]
_CODECS = {".gz": "gzip", ".zst": "zstd"}
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_SHUFFLE_ROWS = 1000


def open_rows(source: SourceSettings, setting: str = "data.path") -> Rows:
    """Return the rows of `source`, whose path is called `setting` in messages.

    Raise `UserError` for what is wrong before the first row is read: a missing path, data set,
    split or field, or an unknown codec.
    """
    check_codec(source.encoding, setting)
    if is_remote(source.path):
        source = source.model_copy(update={"path": fetched(source.path, setting)})
    if source.source == "text":
        return FileRows(source, setting)
    path = source.path
    # A path that looks like a file or a pattern is never the name of a data set.
    is_files = source.source == "jsonl" or (
        Path(path).exists()
        or any(sign in path for sign in "*?[")
        or path.lower().endswith((*RECORD_EXTENSIONS, *TOKEN_EXTENSIONS))
    )
    if source.source == "hf" or is_saved_dataset(path) or not is_files:
        return DatasetRows(source, setting)
    for key, value in {"split": source.split, "subset": source.subset}.items():
        if value != SourceSettings.model_fields[key].default:
            raise UserError(
                f'{setting} = "{path}" are files, which have no {key} "{value}": give a data set'
            )
    return FileRows(source, setting)


class FileRows:
    """The rows of files: a text each, or a row for each record of JSON lines, JSON, parquet, arrow.

    They can be iterated repeatedly. `.gz` and `.zst` files are decompressed while they are read.
    """

    def __init__(self, source: SourceSettings, setting: str) -> None:
        self.source, self.setting = source, setting
        own = {"text": TEXT_EXTENSIONS, "tokens": TOKEN_EXTENSIONS}
        extensions = source.extensions or own.get(source.source, RECORD_EXTENSIONS)
        self.files = find_files(source.path, extensions=extensions, setting=setting)
        self.done = 0
        """bytes that the current iteration has read"""
        self.total: int | None = sum(file.stat().st_size for file in self.files.values())

    def fingerprint(self) -> str:
        """Return a hash that identifies the content."""
        return digest(self.files)

    def __iter__(self) -> Iterator[Row | BadRow]:
        before = 0
        for name, file in self.files.items():
            self.done = before
            if self.source.source == "text":
                yield Row(name, read_text(file, self.source.encoding, self.setting))
            else:
                yield from self._records(name, file)
            before += file.stat().st_size
        self.done = before

    def _records(self, name: str, file: Path) -> Iterator[Row | BadRow]:
        from pyarrow import ArrowException

        table = {".parquet": self._parquet, ".arrow": self._arrow}.get(file.suffix.lower())
        records = enumerate(table(file), start=1) if table else self._json(file)
        try:
            for number, record in records:
                yield read_record(record, self.source, f"{name}:{number}", file.parent)
        except (OSError, ValueError, RecursionError, ArrowException) as error:
            raise UserError(
                f"{self.setting}: {file} cannot be read ({one_line(error)}): repair it, or leave "
                "it out"
            ) from error

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

    def _parquet(self, file: Path) -> Iterator[dict[str, Any]]:
        import pyarrow.parquet

        before, size = self.done, file.stat().st_size
        with pyarrow.parquet.ParquetFile(file) as table:
            for group in range(table.num_row_groups):
                for batch in table.iter_batches(batch_size=1024, row_groups=[group]):
                    yield from self._of_table(batch)
                self.done = before + size * (group + 1) // table.num_row_groups

    def _arrow(self, file: Path) -> Iterator[dict[str, Any]]:
        before = self.done
        for batch, end in arrow_batches(file):
            yield from self._of_table(batch)
            self.done = before + end

    def _of_table(self, batch: Any) -> Iterable[dict[str, Any]]:
        if self.source.source != "tokens":
            return batch.to_pylist()
        columns = {name: batch.column(name) for name in batch.schema.names}
        return (
            {name: _value(column[row], name) for name, column in columns.items()}
            for row in range(batch.num_rows)
        )


def _value(scalar: Any, name: str) -> Any:
    """Return the value of a field of tokens: lists as arrays, not as a Python number for each."""
    if name in TEACHER_FIELDS:
        return scalar.as_py()
    if name not in TOKEN_FIELDS:
        return None  # only its name is of use, for messages
    values = getattr(scalar, "values", None)  # of a list
    return scalar.as_py() if values is None else values.to_numpy(zero_copy_only=False)


def arrow_batches(file: Path) -> Iterator[tuple[Any, int]]:
    """Yield each batch of an Arrow file, or stream in a file, and the byte up to which it is read.

    Raise `ValueError` or `ArrowException` if it is damaged.
    """
    import pyarrow

    with pyarrow.memory_map(str(file)) as mapped:
        is_file = mapped.read(6) == b"ARROW1"
        mapped.seek(max(0, mapped.size() - 8))
        if not is_file and mapped.read() != _END_OF_STREAM:
            # Its reader would take any end between two batches for the end of the stream.
            raise ValueError("it has no end marker: it is truncated, or not an Arrow file")
        mapped.seek(0)
        if is_file:
            table = pyarrow.ipc.open_file(mapped)
            batches = map(table.get_batch, range(table.num_record_batches))
        else:
            batches = iter(pyarrow.ipc.open_stream(mapped))
        for batch in batches:
            yield _validated(batch), mapped.tell()


def _validated(table: Any) -> Any:
    """Return an Arrow table or batch. Raise an `ArrowException` if it is damaged.

    A damaged offset would be read as it is, far outside of the mapped file.
    """
    table.validate(full=True)
    return table


def _ends_lines_with_a_byte(encoding: str) -> bool:
    """Return whether a line in this codec ends with a byte: not in UTF-16 and UTF-32."""
    try:
        return "\n\n".encode(encoding).endswith(b"\n\n")
    except UnicodeError:
        return True  # the codec cannot encode at all: reading the file says so


def _parse(line: bytes, encoding: str) -> Any:
    """Return the JSON value of a line, or the exception if it has none."""
    try:
        return json.loads(line.decode(encoding).removeprefix("\ufeff").strip())
    except (ValueError, RecursionError) as error:
        if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return ValueError('the file begins like UTF-16: set encoding = "utf-16"')
        return error


class DatasetRows:
    """The rows of one split of a data set. They can be iterated repeatedly.

    With `source.streaming` rows are read when they are needed, and nothing is written to disk.
    """

    def __init__(self, source: SourceSettings, setting: str) -> None:
        self.source, self.setting = source, setting
        self.done = 0
        """rows that the current iteration has read"""
        with _quiet():
            self.dataset = self._open()
        if source.source == "tokens":
            self.dataset = self.dataset.with_format("numpy")  # not a Python number for each token
        self._has_media = source.source == "chat" and _decodes(self.dataset.features)
        if self._has_media:
            self.dataset = self.dataset.with_format("arrow")  # images as they are stored
        names = self.dataset.column_names  # None for a stream that does not know its columns yet
        for name in field_names(source, names or ()) if names is not None else []:
            if name not in names:
                raise UserError(
                    f'{setting} = "{source.path}" has no field "{name}" (it has '
                    f"{', '.join(names)}); text_field, prompt_field and completion_field, "
                    "messages_field, or chosen_field and rejected_field say which is read, and of "
                    "tokens it is input_ids"
                )
        self.total: int | None = None if source.streaming else len(self.dataset)

    def __iter__(self) -> Iterator[Row | BadRow]:
        return self._read(self.dataset, skip=0)

    def shuffled(self, seed: int, *, skip: int = 0) -> Iterator[Row | BadRow]:
        """Yield the rows of a stream in the order given by `seed`, from row `skip` on.

        The order of the files is shuffled, and the order of rows within a buffer. The rows before
        `skip` are read again, though not tokenized, because reading cannot start in the middle of a
        shuffle buffer.
        """
        return self._read(self.dataset.shuffle(seed=seed, buffer_size=_SHUFFLE_ROWS), skip=skip)

    def fingerprint(self) -> str:
        # A private attribute, but the key of the data set's own cache.
        return self.dataset._fingerprint

    def _read(self, dataset: Any, *, skip: int) -> Iterator[Row | BadRow]:
        from datasets.exceptions import DatasetsError
        from pyarrow import ArrowException

        self.done = skip
        try:
            if not self.source.streaming:
                self.dataset.data.validate(full=True)  # streams: see `_open`
            for record in islice(dataset, skip, None):
                self.done += 1
                record = record.to_pylist()[0] if self._has_media else record
                yield read_record(record, self.source, f"row {self.done}")
        except (OSError, ValueError, ArrowException, DatasetsError) as error:
            raise self._refusal(
                f"cannot be read from row {self.done + 1} on ({one_line(error)})"
            ) from error

    def _open(self) -> Any:
        import datasets

        source = self.source
        if is_no_hub_name(source.path) and not Path(source.path).exists():
            raise self._refusal("does not exist: give a folder, or a name on the hub")
        try:
            if is_saved_dataset(source.path):
                found = datasets.load_from_disk(source.path)
                if isinstance(found, datasets.DatasetDict):
                    if source.split not in found:
                        there = ", ".join(found)
                        raise self._refusal(
                            f'has no split "{source.split}", only {there}: set {self._key("split")}'
                        )
                    found = found[source.split]
                return _validated_stream(found.to_iterable_dataset()) if source.streaming else found
            arrow_files = [*Path(source.path).rglob("*.arrow")]
            for file in arrow_files:
                for _ in arrow_batches(file):  # before `load_dataset` copies what it reads
                    if source.streaming:
                        break
            found = datasets.load_dataset(
                source.path,
                source.subset or None,
                split=source.split,
                streaming=source.streaming,
                trust_remote_code=False,  # versions of datasets before 4 would ask the user
            )
            return _validated_stream(found) if source.streaming and arrow_files else found
        except UserError:
            raise
        except ConnectionError as error:
            raise self._refusal(
                f"is not a local folder, and the hub cannot be reached ({one_line(error)}): on a "
                "machine with network access, run "
                f'datasets.load_dataset("{source.path}").save_to_disk(FOLDER), then give that '
                "folder"
            ) from error
        except Exception as error:  # of any kind, depending on the format and what is damaged
            raise self._refusal(
                f"cannot be opened ({one_line(error)}): give a folder, a name on the hub, and its "
                f"{self._key('subset')} and {self._key('split')}"
            ) from error

    def _key(self, key: str) -> str:
        """Return the name of the setting for messages.

        The split of held-out data may be set by `validation.split`, which is not in [data].
        """
        if key == "split" and self.setting.startswith("validation.split"):
            return "validation.split"
        return f"{section_of(self.setting)}.{key}"

    def _refusal(self, why: str) -> UserError:
        return UserError(f'{self.setting} = "{self.source.path}" {why}')


Rows = FileRows | DatasetRows
"""`done` of `total` is the progress of the current iteration; `total` is None if it is unknown."""


def _decodes(features: Any) -> bool:
    """Return whether `datasets` would decode images or videos of such rows."""
    from datasets.features.features import require_decoding

    return any(map(require_decoding, (features or {}).values()))


def _validated_stream(rows: Any) -> Any:
    """Return a stream of Arrow tables that looks at each before a row of it is read."""
    validated = rows.with_format("arrow").map(_validated, batched=True, features=rows.features)
    return validated.with_format(None)


def is_saved_dataset(path: str) -> bool:
    """Return whether `path` is a folder written by `save_to_disk`."""
    return any((Path(path) / name).is_file() for name in ("dataset_dict.json", "state.json"))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings of the hub client, and progress bars if stderr is not a terminal.

    If the hub cannot be reached, the user sees one error message instead of six warnings.
    """
    import datasets

    logger = logging.getLogger("huggingface_hub")
    level, bars = logger.level, datasets.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
