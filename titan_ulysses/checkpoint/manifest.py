"""What makes a checkpoint or an export whole: the size and the hashes of each of its files.

The manifest is in `run.json` of a checkpoint, and in `training_step.json` of an export. Of a file
of tensors it has a hash for each stored piece, computed while the piece is written and compared
when the piece is read, so that a large checkpoint is read once. Any other file has one hash. The
manifest has a hash of itself.

The hash is XXH3 of 128 bits (https://xxhash.com): it finds damage, not forgery. It is the fastest
of those at hand, and `datasets` needs its package anyway.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageWriterTransforms

from titan_ulysses.distributed.atomic import sync_folder, whole_file
from titan_ulysses.distributed.errors import one_line

Pieces = dict[str, list[tuple[int, int, str]]]
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


# --- written --------------------------------------------------------------------------------------


class HashingWriter(dcp.FileSystemWriter):
    """DCP's writer, which hashes each piece of a tensor while it is written, into `pieces`."""

    def __init__(self, folder: Path, **options: Any):
        super().__init__(folder, **options)
        self.pieces: Pieces = {}
        self.transforms = _Hashing(self.pieces)


class _Hashing(_StorageWriterTransforms):
    def __init__(self, pieces: Pieces):
        super().__init__()
        self._pieces = pieces

    def transform_save_stream(self, write_item: Any, raw_stream: Any) -> tuple[Any, list[str]]:
        def done(offset: int, length: int, found: str) -> None:
            self._pieces.setdefault(Path(raw_stream.name).name, []).append((offset, length, found))

        return _HashedPiece(raw_stream, done), []


class _HashedPiece(io.RawIOBase):
    """Writes a piece to an open file. Closing it closes the piece, not the file."""

    def __init__(self, file: Any, done: Callable[[int, int, str], None]):
        self._file, self._done, self._hasher = file, done, xxhash.xxh3_128()
        self._offset, self._length = file.tell(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._hasher.update(data)
        written = self._file.write(data)
        self._length += written
        return written

    def close(self) -> None:
        if not self.closed:
            self._done(self._offset, self._length, self._hasher.hexdigest())
            super().close()


def describe_files(folder: Path) -> dict[str, Any]:
    """Return the manifest's entry of each file in a folder, by its path below the folder."""
    files = {file.relative_to(folder).as_posix(): file for file in sorted(_files_in(folder))}
    return {
        name: {"bytes": file.stat().st_size, "xxh3": digest_of(file)}
        for name, file in files.items()
    }


def describe_written(folder: Path, pieces: Pieces) -> dict[str, Any]:
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
    table = folder / TABLE_FILE
    files[TABLE_FILE] = {"bytes": table.stat().st_size, "xxh3": digest_of(table)}
    return dict(sorted(files.items()))


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
            check_piece(*place, file.read(length), {place: (length, known)})
            read += length
    return size


def _files_in(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def write_sealed(path: Path, state: dict[str, Any]) -> None:
    """Write a JSON file with a checksum of its contents, and wait until the disk has it."""
    state = json.loads(json.dumps(state))  # as it will be read: keys are text, lists are lists
    with open(path, "w") as file:
        json.dump({**state, _CHECKSUM: _checksum(state)}, file)
        file.flush()
        os.fsync(file.fileno())


def _checksum(state: dict[str, Any]) -> str:
    return digest(json.dumps(state, sort_keys=True).encode())


# --- read -----------------------------------------------------------------------------------------


def read_sealed(path: Path) -> tuple[dict[str, Any], bool]:
    """Return what `write_sealed` has written, and whether it has a checksum.

    A file of an earlier version has none. Raise `Damage` if it is not what was written, and OSError
    if it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        state = json.loads(text)
    except (ValueError, RecursionError) as error:
        what = "it is empty" if not path.stat().st_size else f"it is not JSON: {one_line(error)}"
        raise Damage(f"{path.name}: {what}") from error
    if not isinstance(state, dict):
        raise Damage(f"{path.name}: it holds a {type(state).__name__}, not a table")
    written = state.pop(_CHECKSUM, None)
    if written is not None and written != _checksum(state):
        raise Damage(f"{path.name}: it is not what was written")
    return state, written is not None


def check_sizes(folder: Path, files: dict[str, Any]) -> None:
    """Raise `Damage` unless the folder holds each file of a manifest with its size.

    Raise OSError if that cannot be looked up.
    """
    for name, entry in files.items():
        size = entry["bytes"] if isinstance(entry, dict) else entry
        path = folder / name
        if not path.exists():
            raise Damage(f"{name} is missing")
        if not path.is_file():
            raise Damage(f"{name} is not a file")
        if (found := path.stat().st_size) != size:
            raise Damage(f"{name} has {found} of {size} bytes")


def check_file(name: str, data: bytes, files: dict[str, Any]) -> None:
    """Raise `Damage` if `data`, which is all of a file, is not what the manifest says of it.

    The manifest of an earlier version has no hashes.
    """
    entry = files.get(name)
    if isinstance(entry, dict) and digest(data) != entry["xxh3"]:
        raise Damage(f"{name}: its bytes are not those that were saved")


def check_piece(name: str, offset: int, data: bytes, known: dict[tuple[str, int], Any]) -> None:
    """Raise `Damage` if `data` is not the piece of the file that begins at `offset`."""
    if known.get((name, offset)) != (len(data), digest(data)):
        raise Damage(
            f"{name}: the bytes {offset} to {offset + len(data)} are not those that were saved"
        )


def pieces_by_place(files: dict[str, Any]) -> dict[tuple[str, int], tuple[int, str]]:
    """Return length and hash of each piece of a manifest, by file and offset."""
    return {
        (name, offset): (length, found)
        for name, entry in files.items()
        if isinstance(entry, dict)
        for offset, length, found in entry.get("pieces", ())
    }


# --- a folder that is read by others --------------------------------------------------------------


def seal_folder(folder: Path, name: str, state: dict[str, Any]) -> None:
    """Write the manifest `name` of all files in a folder, when the disk has them all.

    The files get the mode that the umask asks for: safetensors are written for the owner alone.
    """
    mode = folder.stat().st_mode & 0o666
    for file in _files_in(folder):
        with suppress(OSError):  # some file systems have no modes
            file.chmod(mode)
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    files = describe_files(folder)  # before there is a file for the manifest itself
    with whole_file(folder / name) as partial:
        write_sealed(partial, {**state, "files": files})
    sync_folder(folder)


def expect_as_sealed(folder: Path, name: str, files: Collection[str]) -> None:
    """Raise `Damage` if `seal_folder` has sealed the folder, and files of it have changed since.

    name: the manifest, without which nothing is known of the folder. files: those to look at. They
    are read whole.
    """
    if not (folder / name).is_file():
        return
    state, is_sealed = read_sealed(folder / name)
    known = state.get("files", {}) if is_sealed else {}  # an earlier version has kept no hashes
    for file in files:
        if file in known and digest_of(folder / file) != known[file]["xxh3"]:
            raise Damage(f"{file}: its bytes are not those that were exported")


def read_sealed_folder(folder: Path, name: str) -> dict[str, Any] | None:
    """Return what `seal_folder` has written, or None if the folder is not whole. Reads all of it.

    Also None for a folder of an earlier version, which has no hashes.
    """
    try:
        state, is_sealed = read_sealed(folder / name)
        files = state["files"]
        check_sizes(folder, files)
        is_whole = is_sealed and all(
            digest_of(folder / name) == entry["xxh3"] for name, entry in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return state if is_whole else None


def unreadable(error: BaseException) -> str | None:
    """Return why bytes could not be read, if that does not say that they are damaged, else None.

    A file that is absent, or is a folder, is damage. No permission, or a disk that does not answer,
    is not: the bytes may be whole.
    """
    if not isinstance(error, OSError) or isinstance(
        error, (FileNotFoundError, IsADirectoryError, NotADirectoryError)
    ):
        return None
    return f"{error.filename or 'a file'}: {error.strerror or one_line(error)}"


def innermost(error: BaseException) -> BaseException:
    """Return the error of the first rank that failed, of which DCP has made its own exception."""
    if isinstance(error, CheckpointException) and error.failures:
        return innermost(next(iter(error.failures.values()))[0])
    return error


def cause(error: BaseException) -> str:
    """Return the innermost reason in one line: DCP wraps a rank's error in its own exception."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (inner, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {cause(inner)}"
    return one_line(error)
