"""What makes a checkpoint or an export whole: the size and the hashes of each of its files.

The manifest is in `run.json` of a checkpoint, and in `training_step.json` of an export. Of a file
of tensors it has a hash for each stored piece, computed while the piece is written and compared
when the piece is read, so that a large checkpoint is read once. Any other file has one hash. The
manifest has a hash of itself.

The hash is XXH3 of 128 bits (https://xxhash.com): it finds damage, not forgery. It is the fastest
of those available, and `datasets` needs its package anyway.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import xxhash

from titan_ulysses.distributed.atomic import whole_file
from titan_ulysses.distributed.errors import one_line

PieceHashes = dict[str, list[tuple[int, int, str]]]
"""For each file of tensors by name: offset, length and hash of each piece, in the file's order."""

TABLE_FILE = ".metadata"
"""DCP's table of contents of a checkpoint."""

_CHUNK = 2**22
_SAMPLE = 2**20
_VIEW_SECONDS = 5.0
_CHECKSUM = "checksum"


class Damage(ValueError):
    """Raised if stored bytes are not those that were saved. The message names the file."""


def digest(data: Any) -> str:
    """Return the hash of bytes, or of an object with their buffer."""
    return xxhash.xxh3_128_hexdigest(data)


def digest_of(path: Path) -> str:
    """Return the hash of a file."""
    hasher = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()


# --- JSON with a checksum -------------------------------------------------------------------------


def write_json(path: Path, state: dict[str, Any]) -> None:
    """Write a JSON file with a checksum of its contents, and wait until the disk has it."""
    state = json.loads(json.dumps(state))  # as it will be read: keys are text, lists are lists
    with whole_file(path) as partial, open(partial, "w") as file:
        json.dump({**state, _CHECKSUM: _checksum(state)}, file)


def read_json(path: Path) -> dict[str, Any]:
    """Return what `write_json` has written.

    Raise `Damage` if it is not what was written, and OSError if it cannot be read.
    """
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        what = "it is empty" if not path.stat().st_size else f"it is not JSON: {one_line(error)}"
        raise Damage(f"{path.name}: {what}") from error
    if not isinstance(state, dict):
        raise Damage(f"{path.name}: it holds a {type(state).__name__}, not a table")
    written = state.pop(_CHECKSUM, None)
    if written != _checksum(state):
        what = "its contents differ from what was written"
        raise Damage(f"{path.name}: {'checksum is missing' if written is None else what}")
    return state


def _checksum(state: dict[str, Any]) -> str:
    return digest(json.dumps(state, sort_keys=True).encode())


# --- the files of a manifest ----------------------------------------------------------------------


def entry_of(file: Path) -> dict[str, Any]:
    """Return what a manifest says of a file that is hashed as a whole."""
    return {"bytes": file.stat().st_size, "xxh3": digest_of(file)}


def describe_written(folder: Path, pieces: PieceHashes) -> dict[str, Any]:
    """Return the manifest's entries of a checkpoint: of the files that its ranks have written.

    What a listing shows is not asked: it may lack a file of another host, or hold one too many.
    Raise `Damage` or OSError if the folder does not hold a file as it was written, also after a
    while: the view of a network file system may be old.
    """
    deadline = time.monotonic() + _VIEW_SECONDS
    while True:
        try:
            sizes = {name: _expect_written(folder / name, found) for name, found in pieces.items()}
            break
        except (FileNotFoundError, Damage):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
    files = {name: {"bytes": size, "pieces": pieces[name]} for name, size in sizes.items()}
    return dict(sorted({**files, TABLE_FILE: entry_of(folder / TABLE_FILE)}.items()))


def _expect_written(path: Path, pieces: list[tuple[int, int, str]]) -> int:
    """Return the size of a file of tensors. Raise `Damage` if it is not what a rank has written.

    Its size is compared, and a MiB of its smallest pieces: all of it would be too much to read.
    """
    size, read = max(offset + length for offset, length, _ in pieces), 0
    with open(path, "rb") as file:  # a network file system then looks again
        if (found := os.fstat(file.fileno()).st_size) != size:
            raise Damage(f"{path.name} has {found} of {size} bytes")
        for offset, length, known in sorted(pieces, key=lambda piece: piece[1]):
            if read and read + length > _SAMPLE:
                break
            file.seek(offset)
            place = path.name, offset
            expect_saved(*place, file.read(length), {place: (length, known)})
            read += length
    return size


def expect_sizes(folder: Path, files: dict[str, Any]) -> None:
    """Raise `Damage` unless the folder holds each file of a manifest with its size.

    Raise OSError if that cannot be looked up.
    """
    for name, entry in files.items():
        size, path = entry["bytes"], folder / name
        if not path.exists():
            raise Damage(f"{name} is missing")
        if not path.is_file():
            raise Damage(f"{name} is not a file")
        if (found := path.stat().st_size) != size:
            raise Damage(f"{name} has {found} of {size} bytes")


def saved_pieces(files: dict[str, Any]) -> dict[tuple[str, int], tuple[int, str]]:
    """Return length and hash of each piece of a manifest, by file and offset.

    A file that is hashed as a whole is one piece.
    """
    return {
        (name, offset): (length, found)
        for name, entry in files.items()
        for offset, length, found in entry.get("pieces") or [(0, entry["bytes"], entry["xxh3"])]
    }


def expect_saved(
    name: str, offset: int, data: bytes, saved: dict[tuple[str, int], tuple[int, str]]
) -> None:
    """Raise `Damage` if `data` is not the piece of the file that begins at `offset`."""
    if saved.get((name, offset)) != (len(data), digest(data)):
        raise Damage(
            f"{name}: the bytes {offset} to {offset + len(data)} differ from what was saved"
        )
