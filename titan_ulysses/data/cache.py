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
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from titan_ulysses.config.schema import SourceSettings
from titan_ulysses.data.corpus import (
    COLUMNS,
    Corpus,
    CorpusStats,
    columns_of,
    with_other_completions,
)
from titan_ulysses.data.encoding import Encoder, encode_rows, size_of
from titan_ulysses.data.files import section_of
from titan_ulysses.data.megatron import find_megatron, read_megatron
from titan_ulysses.data.records import Encoded
from titan_ulysses.data.sources import Rows, open_rows
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
_MESSAGES = 3  # version of how messages are read; part of the key of those that have some
_BLOCK = 2**22
_OLD_SECONDS = 86_400.0


def read_corpus(
    source: SourceSettings, encoder: Encoder, *, cache_folder: str = "", setting: str = "data.path"
) -> tuple[Corpus, CorpusStats]:
    """Tokenize all documents of `source`, or read them from the cache.

    Raise `UserError` if the source cannot be read or contains no document.
    """
    encoder.check(source.source)
    corpus, stats = _read(source, encoder, cache_folder, setting)
    if not len(corpus):
        raise stats.nothing_in(f'{setting} = "{source.path}"')
    return corpus, stats


def _read(
    source: SourceSettings, encoder: Encoder, cache_folder: str, setting: str
) -> tuple[Corpus, CorpusStats]:
    skip = source.bad_lines == "skip"
    if source.source == "tokens" and (files := find_megatron(source.path, setting)):
        if source.teacher_top_k:
            raise UserError(
                f"{section_of(setting)}.teacher_top_k = {source.teacher_top_k}: Megatron's files "
                "hold only tokens. Use rows with teacher_ids and teacher_log_probs, or a teacher."
            )
        ids = num_token_ids(encoder.tokenizer)
        return read_megatron(files, num_token_ids=ids, skip=skip, setting=setting)
    rows, stats = open_rows(source, setting), CorpusStats()
    reading, head, size = iter(rows), [], 0
    for row in reading:
        head.append(row)
        size += size_of(row)
        if size > SMALL_CHARACTERS:
            break
    is_large = size > SMALL_CHARACTERS
    workers = usable_cores() if is_large and source.source != "tokens" else 1
    encoded = encode_rows(chain(head, reading), encoder, workers=workers)
    documents = stats.keep(encoded, setting=setting, skip=skip)
    if source.source == "unpaired":
        documents = with_other_completions(documents, setting=setting)
    if not is_large:
        return Corpus.from_documents(documents), stats
    parts = (
        _LAYOUT,
        rows.fingerprint(),
        encoder.fingerprint(),
        source.model_dump(exclude={"path", "weight"}),
        *([_MESSAGES] if source.source in ("chat", "preference", "unpaired") else []),
    )
    key = blake2b(repr(parts).encode(), digest_size=16).hexdigest()
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(cache_folder or Path(cache_home) / "titan_ulysses")
    return _cached(folder, key, _with_bar(documents, rows, stats, setting), stats, encoder.dtype)


def _cached(
    folder: Path, key: str, documents: Iterable[Encoded], stats: CorpusStats, dtype: np.dtype
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
                _write(partial, documents, stats, dtype)
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


def _write(folder: Path, documents: Iterable[Encoded], stats: CorpusStats, dtype: np.dtype) -> None:
    folder.mkdir()
    files: dict[str, _Checked] = {}
    with ExitStack() as opened:
        for name, array in columns_of(documents):
            if name not in files:
                file = opened.enter_context(open(folder / f"{name}.bin", "wb"))
                files[name] = _Checked(file)
            files[name].write(array.astype(dtype) if name == "tokens" else array)
        written = {name: file.finish() for name, file in files.items()}
    about = {"dtype": np.dtype(dtype).name, "files": written, "tally": asdict(stats)}
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
        dtypes = COLUMNS | {"tokens": about["dtype"]}
        columns = {
            name: _map(folder / f"{name}.bin", *size_and_checksum).view(dtypes[name])
            for name, size_and_checksum in about["files"].items()
        }
        # Of sizes and checksums, which have been compared with the files just now.
        content = blake2b(json.dumps(about["files"], sort_keys=True).encode(), digest_size=16)
        corpus = Corpus.from_columns(columns, content=content.hexdigest())
        return corpus, CorpusStats(**about["tally"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _map(path: Path, size: int, checksum: int) -> np.ndarray:
    """Return the bytes of the file as a memory map. Raise `ValueError` if they have changed."""
    if path.stat().st_size != size:
        raise ValueError(f"{path} is not {size} bytes long")
    mapped = np.memmap(path, dtype=np.uint8, mode="r") if size else np.empty(0, dtype=np.uint8)
    found = 0
    for first in range(0, size, _BLOCK):
        found = zlib.crc32(mapped[first : first + _BLOCK].data, found)
    if found != checksum:
        raise ValueError(f"{path} has changed")
    return mapped.view(np.ndarray)


def _with_bar(
    documents: Iterable[Encoded], rows: Rows, stats: CorpusStats, setting: str
) -> Iterator[Encoded]:
    """Yield the documents, with a progress bar if stderr is a terminal."""
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
        for document in documents:
            yield document
            if stats.documents % 64 == 0:
                bar.update(task, completed=rows.done, tokens=stats.tokens)
