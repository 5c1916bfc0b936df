"""Megatron's `.bin` and `.idx`: tokens that are memory-mapped and never copied.

The format is that of `MMapIndexedDataset`, version 1, as Megatron-LM writes it
(megatron/core/datasets/indexed_dataset.py, compared at commit 00caa53), and GPT-NeoX. All numbers
are little-endian. NAME.idx holds

    9 bytes   MMIDIDX\\0\\0
    uint64    version, 1
    uint8     the type of a token: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16
    uint64    number of sequences
    uint64    number of document borders: documents + 1
    int32     [sequences] tokens of each
    int64     [sequences] byte in NAME.bin at which each begins
    int64     [borders] first sequence of each document, and last the number of sequences
    int8      [sequences] modes; only of multimodal data

and NAME.bin the tokens of all sequences. A document is the tokens of its sequences, end to end.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from titan_ulysses.data.corpus import Corpus, CorpusStats, JoinedTokens
from titan_ulysses.data.files import find_files
from titan_ulysses.data.sources import TOKEN_EXTENSIONS
from titan_ulysses.distributed.errors import UserError

_MAGIC, _OLD_MAGIC = b"MMIDIDX\0\0", b"TNTIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_BLOCK = 2**22


def find_megatron(path: str, setting: str) -> dict[str, Path]:
    """Return {name: NAME.idx} if the path stands for Megatron's files, else nothing.

    It is NAME.idx, NAME.bin, NAME alone as Megatron's own option takes it, a folder or a pattern.
    Raise `UserError` if other files are among them.
    """
    if path.endswith(".bin") or not Path(path).exists():
        index = Path(path.removesuffix(".bin") + ".idx")
        if index.is_file():
            return {index.name: index}
        if path.endswith(".bin"):
            raise UserError(
                f'{setting} = "{path}" has no {index.name} beside it, which says where documents '
                "begin and how wide a token is: give Megatron's .bin and .idx together"
            )
        if not any(sign in path for sign in "*?["):
            return {}
    files = find_files(path, extensions=TOKEN_EXTENSIONS, setting=setting)
    files = {name: file for name, file in files.items() if file.suffix != ".bin"}
    found = {name: file for name, file in files.items() if file.suffix == ".idx"}
    if found and len(found) < len(files):
        other = next(name for name in files if name not in found)
        raise UserError(
            f'{setting} = "{path}" has Megatron\'s {next(iter(found))} and {other}: give one kind '
            "of file, or an entry of data.mixture for each"
        )
    return found


def read_megatron(
    files: dict[str, Path], *, num_token_ids: int, skip: bool, setting: str
) -> tuple[Corpus, CorpusStats]:
    """Return all documents of the files, in their order.

    Every token is looked at once, so that none outside of the vocabulary is met in the middle of a
    run. A document with such a token is left out and counted if `skip`. Raise `UserError` for it
    otherwise, and for files that are cut short or of another byte order.
    """
    parts, begins, ends, first = [], [], [], 0
    stats = CorpusStats()
    for name, file in files.items():
        tokens, borders = _open(file, setting)
        bad = _documents_outside(tokens, borders, num_token_ids)
        if bad:
            stats.bad += len(bad)
            document, why = next(iter(bad.items()))
            first_bad = f"{name}: document {document}: {why}"
            stats.first_bad = stats.first_bad or first_bad
            if not skip:
                raise UserError(
                    f"{setting}: {first_bad}. Take the tokenizer that wrote these tokens, or set "
                    'bad_lines = "skip" to leave such documents out and count them'
                )
        kept = np.diff(borders) > 0
        stats.empty += int((~kept).sum())
        kept[[*bad]] = False
        parts.append(tokens)
        begins.append(first + borders[:-1][kept])
        ends.append(first + borders[1:][kept])
        first += len(tokens)
    corpus = Corpus(JoinedTokens(parts), np.concatenate(begins), np.concatenate(ends))
    stats.documents, stats.tokens = len(corpus), corpus.num_tokens
    return corpus, stats


def _open(file: Path, setting: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (tokens, borders): document d is tokens[borders[d]:borders[d + 1]]."""
    try:
        dtype, lengths, pointers, documents = _read_index(file)
        binary = file.with_suffix(".bin")
        size = binary.stat().st_size
        places = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        if not np.array_equal(pointers, places[:-1] * dtype.itemsize):
            raise _Damage("its sequences do not follow each other in the .bin")
        if size != (expected := places[-1] * dtype.itemsize):
            short = "is cut short" if size < expected else "is another file's"
            raise _Damage(
                f"{binary.name} {short}: it has {size:,} bytes, and the index tells of "
                f"{places[-1]:,} tokens of {dtype.itemsize} bytes"
            )
        tokens = np.memmap(binary, dtype=dtype, mode="r") if size else np.empty(0, "u1")
        return tokens.view(np.ndarray), places[documents]
    except OSError as error:
        raise UserError(
            f"{setting}: {error.filename or file} cannot be read ({error.strerror}): Megatron's "
            ".bin and .idx belong together"
        ) from error
    except _Damage as error:
        raise UserError(
            f"{setting}: {file}: {error}. Copy or make both files again, or leave them out"
        ) from error


class _Damage(Exception):
    """Raised with what is wrong with the files."""


def _read_index(file: Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """Return the type of a token, and what the format says of sequences and documents."""
    raw = np.fromfile(file, dtype=np.uint8)
    if len(raw) < _HEADER.size or raw[:9].tobytes() != _MAGIC:
        if raw[:8].tobytes() == _OLD_MAGIC:
            raise _Damage("it has the format TNTIDX of Megatron before MMapIndexedDataset")
        raise _Damage("it does not begin as Megatron's index does (MMIDIDX)")
    _, version, code, sequences, borders = _HEADER.unpack(raw[: _HEADER.size].tobytes())
    if version == 1 << 56:
        raise _Damage("it has another byte order (big-endian): the format is little-endian")
    if version != 1:
        raise _Damage(f"it has version {version} of the format, and only version 1 is known")
    if code not in _TYPES:
        raise _Damage(f"its tokens have the type {code}, which is not that of whole numbers")
    expected = _HEADER.size + 12 * sequences + 8 * borders
    if len(raw) not in (expected, expected + sequences):  # with modes
        raise _Damage(
            f"it is cut short or damaged: it has {len(raw):,} bytes, and {sequences:,} sequences "
            f"with {borders:,} borders of documents need {expected:,}"
        )
    parts = np.split(
        raw[_HEADER.size : expected], np.array([4 * sequences, 12 * sequences], dtype=np.int64)
    )
    # Copied, because views of other types need an address that is a multiple of their size.
    lengths, pointers, documents = (
        np.frombuffer(part.tobytes(), dtype=kind)
        for part, kind in zip(parts, ("<i4", "<i8", "<i8"), strict=True)
    )
    in_order = borders and documents[0] == 0 and documents[-1] == sequences
    if not in_order or (np.diff(documents) < 0).any() or (lengths < 0).any():
        raise _Damage("its borders of documents contradict its sequences: it is damaged")
    return np.dtype(_TYPES[code]), lengths, pointers, documents


def _documents_outside(
    tokens: np.ndarray, borders: np.ndarray, num_token_ids: int
) -> dict[int, str]:
    """Return {document: which token of it is outside of the vocabulary}, block by block."""
    found: dict[int, str] = {}
    for first in range(0, len(tokens), _BLOCK):
        block = tokens[first : first + _BLOCK]
        if block.min() >= 0 and block.max() < num_token_ids:
            continue
        swapped = block.byteswap()
        hint = ""
        if block.itemsize > 1 and swapped.min() >= 0 and swapped.max() < num_token_ids:
            hint = "; it would fit in another byte order (big-endian), which the format is not"
        places = np.flatnonzero((block < 0) | (block >= num_token_ids))
        documents = np.searchsorted(borders, first + places, side="right") - 1
        for document, at in zip(*np.unique(documents, return_index=True), strict=True):
            found.setdefault(
                int(document),
                f"token {first + places[at] - borders[document]} (from 0) is {block[places[at]]}, "
                f"and the tokenizer has the ids 0 to {num_token_ids - 1}{hint}",
            )
    return found
