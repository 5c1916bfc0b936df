"""Tokenizes the rows of a source into a corpus, and caches large corpora on disk.

A corpus that takes more than a moment to tokenize is stored on disk and memory-mapped at the next
start. It is a folder named by a hash of content, tokenizer and settings. The folder is written
under a temporary name and renamed when it is complete, under a lock: the first process on a machine
writes it and the others wait. The partial folder of a killed process is never used, and is removed
by the next one. Sizes and checksums are verified before a corpus is used, and a damaged corpus is
made again.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from titan_ulysses.config.schema import SourceSettings
from titan_ulysses.data.corpus import Corpus, CorpusStats
from titan_ulysses.data.encoding import Encoded, Encoder, encode_rows, size_of
from titan_ulysses.data.files import section_of
from titan_ulysses.data.megatron import find_megatron, read_megatron
from titan_ulysses.data.rows import open_rows
from titan_ulysses.data.sources import BadRow, Row, Rows
from titan_ulysses.data.teacher import TOP
from titan_ulysses.data.tokenizer import num_token_ids
from titan_ulysses.distributed.atomic import partial_path, remove
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.launch.host import usable_cores
from titan_ulysses.launch.run_store import host_name

SMALL_CHARACTERS = 2**23
"""Sources of up to this many characters are not cached: tokenizing them again is faster than
starting worker processes, and the corpus takes little memory.
"""
_LAYOUT = 2  # version of the file layout; part of the cache key
_MESSAGES = 2  # version of how messages are read; part of the key of those that have some
_BLOCK = 2**22
_OLD_SECONDS = 86_400.0


def read_corpus(
    source: SourceSettings, encoder: Encoder, *, cache_folder: str = "", setting: str = "data.path"
) -> tuple[Corpus, CorpusStats]:
    """Tokenize all documents of `source`, or read them from the cache.

    Raise `UserError` if the source cannot be read or contains no document.
    """
    encoder.check(source.source)
    if source.source == "tokens" and (files := find_megatron(source.path, setting)):
        if source.teacher_top_k:
            raise UserError(
                f"{section_of(setting)}.teacher_top_k = {source.teacher_top_k}: Megatron's files "
                "hold tokens alone. Give rows with teacher_ids and teacher_log_probs, or a teacher."
            )
        skip = source.bad_lines == "skip"
        corpus, tally = read_megatron(
            files, num_token_ids=num_token_ids(encoder.tokenizer), skip=skip, setting=setting
        )
        return _not_empty(corpus, tally, source, setting)
    rows, tally = open_rows(source, setting), CorpusStats()
    reading = iter(rows)
    head, goes_on = _small_head(reading)

    def documents() -> Iterator[Encoded]:
        workers = usable_cores() if goes_on and source.source != "tokens" else 1
        encoded = encode_rows(chain(head, reading), encoder, workers=workers)
        return tally.keep(encoded, setting=setting, skip=source.bad_lines == "skip")

    if goes_on:
        parts = (
            _LAYOUT,
            rows.fingerprint(),
            encoder.fingerprint(),
            source.model_dump(exclude={"path", "weight"}),
            *([_MESSAGES] if source.source in ("chat", "preference") else []),
        )
        key = blake2b(repr(parts).encode(), digest_size=16).hexdigest()
        make = _with_bar(documents, rows, tally, setting)
        corpus, tally = _cached(
            Path(cache_folder or _default_folder()), key, make, tally, encoder.dtype
        )
    else:
        corpus = Corpus.from_documents(documents())
    return _not_empty(corpus, tally, source, setting)


def _not_empty(
    corpus: Corpus, tally: CorpusStats, source: SourceSettings, setting: str
) -> tuple[Corpus, CorpusStats]:
    if not len(corpus):
        why = "; ".join(tally.notes()) or "it is empty"
        raise UserError(
            f'{setting} = "{source.path}" has no document to train on ({why}): give data with text '
            "in it"
        )
    return corpus, tally


def _small_head(rows: Iterator[Row | BadRow]) -> tuple[list[Row | BadRow], bool]:
    """Return the first rows, and whether they exceed `SMALL_CHARACTERS`.

    If they do not, they are all the rows.
    """
    head, size = [], 0
    for row in rows:
        head.append(row)
        size += size_of(row)
        if size > SMALL_CHARACTERS:
            return head, True
    return head, False


def _default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "titan_ulysses"


def _cached(
    folder: Path,
    key: str,
    make: Callable[[], Iterator[Encoded]],
    tally: CorpusStats,
    dtype: np.dtype,
) -> tuple[Corpus, CorpusStats]:
    """Return the corpus in folder/key. Make it first if it is missing or damaged."""
    from filelock import FileLock

    # Locks of some file systems do not reach other hosts, so each host has a name of its own.
    final, partial = folder / key, partial_path(folder / f"{key}.{host_name()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{key}.lock"):
            if found := _open(final):
                return found
            _remove_left(folder, partial)
            remove(final)
            try:
                _write(partial, make(), tally, dtype)
                partial.rename(final)
            finally:
                remove(partial)
    except OSError as error:
        raise UserError(
            f"data.cache_folder = {folder}: cannot keep the tokenized data there "
            f"({error.strerror or error}). Free space, or name a folder that can be written."
        ) from error
    made = _open(final)
    assert made, final
    return made


def _remove_left(folder: Path, own: Path) -> None:
    """Remove what killed processes have left: `own`, which is locked, and what is a day old."""
    for partial in folder.glob(".*.partial"):
        with suppress(OSError):
            files = [partial, *partial.iterdir()] if partial != own else []
            newest = max((file.stat().st_mtime for file in files), default=0.0)
            if time.time() - newest > _OLD_SECONDS:
                remove(partial)


def _write(folder: Path, documents: Iterable[Encoded], tally: CorpusStats, dtype: np.dtype) -> None:
    folder.mkdir()
    masked = paired = taught = False
    with ExitStack() as opened:
        names = ("tokens", "lengths", "trained", "splits", "teacher")
        files = {
            name: _Checked(opened.enter_context(open(folder / f"{name}.bin", "wb")))
            for name in names
        }
        written = 0
        for row in documents:
            files["tokens"].write(row.ids.astype(dtype))
            lengths = row.lengths or (len(row.ids),)
            files["lengths"].write(np.array(lengths, dtype=np.int64))
            if row.trained is not None and not masked:
                masked = True
                files["trained"].write(np.ones(written, bool))  # of the rows before, without mask
            if masked:
                every = np.ones(len(row.ids), bool)
                files["trained"].write(every if row.trained is None else row.trained)
            if row.split is not None:
                paired = True
                files["splits"].write(np.array([row.split], dtype=np.int64))
            if row.teacher is not None:
                taught = True
                files["teacher"].write(row.teacher)
            written += len(row.ids)
        absent = {"trained": not masked, "splits": not paired, "teacher": not taught}
        described = {name: file.finish() for name, file in files.items() if not absent.get(name)}
    about = {"dtype": np.dtype(dtype).name, "files": described, "tally": asdict(tally)}
    (folder / "corpus.json").write_text(json.dumps(about))


class _Checked:
    """A file that is written once, with its size and checksum."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._checksum = file, 0

    def write(self, array: np.ndarray) -> None:
        data = array.tobytes()
        self._checksum = zlib.crc32(data, self._checksum)
        self._file.write(data)

    def finish(self) -> list[int]:
        self._file.flush()
        os.fsync(self._file.fileno())
        return [self._file.tell(), self._checksum]


def _open(folder: Path) -> tuple[Corpus, CorpusStats] | None:
    """Return the corpus in `folder`, or None if there is none or its files are damaged."""
    try:
        about = json.loads((folder / "corpus.json").read_text())
        found = {name: _map(folder / f"{name}.bin", *told) for name, told in about["files"].items()}
        tally = CorpusStats(**about["tally"])
        tokens, lengths = found["tokens"].view(about["dtype"]), found["lengths"].view(np.int64)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    ends = np.cumsum(lengths)
    trained = found["trained"].view(bool) if "trained" in found else None
    splits = found["splits"].view(np.int64) if "splits" in found else None
    teacher = None
    if "teacher" in found:
        teacher = found["teacher"].view(TOP).reshape(len(tokens), -1)
    # Of sizes and checksums, which have been compared with the files just now.
    content = blake2b(json.dumps(about["files"], sort_keys=True).encode(), digest_size=16)
    corpus = Corpus(
        tokens,
        ends - lengths,
        ends,
        trained,
        content=content.hexdigest(),
        splits=splits,
        teacher=teacher,
    )
    return corpus, tally


def _map(path: Path, size: int, checksum: int) -> np.ndarray:
    """Return the bytes of the file as a memory map. Raise `ValueError` if they have changed."""
    if path.stat().st_size != size:
        raise ValueError(f"{path} has not its {size} bytes")
    mapped = np.memmap(path, dtype=np.uint8, mode="r") if size else np.empty(0, dtype=np.uint8)
    found = 0
    for first in range(0, size, _BLOCK):
        found = zlib.crc32(mapped[first : first + _BLOCK].data, found)
    if found != checksum:
        raise ValueError(f"{path} has changed")
    return mapped.view(np.ndarray)


def _with_bar(
    make: Callable[[], Iterator[Encoded]], rows: Rows, tally: CorpusStats, setting: str
) -> Callable[[], Iterator[Encoded]]:
    """Return `make` with a progress bar, which is shown if stderr is a terminal."""

    def made() -> Iterator[Encoded]:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns: list[Any] = [
            TextColumn(f"tokenizing {setting}"),
            BarColumn(),
            TextColumn("{task.fields[tokens]:,} tokens, ETA"),
            TimeRemainingColumn(),
        ]
        with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task("", total=rows.total, tokens=0)
            for document in make():
                yield document
                if tally.documents % 64 == 0:
                    bar.update(task, completed=rows.done, tokens=tally.tokens)

    return made
