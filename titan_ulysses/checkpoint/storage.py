"""DCP's files of a checkpoint: written with hashes, and read without executing code from them.

DCP stores the table of contents of a checkpoint, `.metadata`, as a pickle, and a pickle can call
any function that it names. Here it may name only the few classes that DCP writes. It may describe
only tensors in files of its own folder, which DCP reads with `weights_only`. DCP would unpickle an
entry of any other kind, so the class for such entries is not among those allowed.

DCP has no public way to see the bytes of a piece when they are written or read, to name the classes
of its pickle, or to save a part of a model. So what is used of its private parts is in this file.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
from collections import ChainMap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import (
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StorageWriterTransforms
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan

from titan_ulysses.checkpoint.manifest import (
    TABLE_FILE,
    Damage,
    PieceHashes,
    expect_saved,
    saved_pieces,
)
from titan_ulysses.distributed.errors import UserError, first_failure, one_line

# --- errors ---------------------------------------------------------------------------------------


def cause(error: BaseException) -> str:
    """Return the innermost reason in one line: DCP wraps a rank's error in its own exception."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (inner, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {cause(inner)}"
    return one_line(error)


@contextmanager
def errors_of_all_ranks() -> Iterator[None]:
    """Raise, on every rank, what goes wrong on one of them in this context. Collective at the end.

    Raise `UserError` as it is; OSError where bytes cannot be read, which may be whole (a disk that
    does not answer, no permission); and otherwise `Damage`. Of several, the first of these.
    """
    found: dict[type[Exception], str] = {}
    try:
        yield
    except UserError as error:
        found[UserError] = str(error)
    except (CheckpointException, OSError, ValueError) as error:
        inner: BaseException = error
        while isinstance(inner, CheckpointException) and inner.failures:
            inner = next(iter(inner.failures.values()))[0]
        # A file that is absent, or is a folder, is damage.
        is_absent = isinstance(inner, FileNotFoundError | IsADirectoryError | NotADirectoryError)
        if isinstance(inner, OSError) and not is_absent:
            found[OSError] = f"{inner.filename or 'a file'}: {inner.strerror or one_line(inner)}"
        else:
            found[Damage] = cause(error)
    for kind in (UserError, OSError, Damage):
        if reason := first_failure(found.get(kind)):
            raise kind(reason)


# --- written --------------------------------------------------------------------------------------


class HashingWriter(dcp.FileSystemWriter):
    """DCP's writer, which hashes each piece of a tensor while it is written, into `pieces`.

    ranks: the numbers in the names of files, if not those of the ranks that save together.
    """

    def __init__(self, folder: Path, *, ranks: Sequence[int] = (), **options: Any):
        super().__init__(folder, **options)
        self.pieces: PieceHashes = {}
        self.transforms = _Hashing(self.pieces)
        self._ranks = ranks

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        if not self._ranks:
            return super().prepare_global_plan(plans)
        # DCP takes the position of a plan as its number.
        by_rank = dict(zip(self._ranks, plans, strict=True))
        spread = [by_rank.get(rank, plans[0]) for rank in range(max(by_rank) + 1)]
        numbered = super().prepare_global_plan(spread)
        return [numbered[rank] for rank in self._ranks]


class _Hashing(_StorageWriterTransforms):
    def __init__(self, pieces: PieceHashes):
        super().__init__()
        self._pieces = pieces

    def transform_save_stream(self, write_item: Any, raw_stream: Any) -> tuple[Any, list[str]]:
        return _HashedPiece(raw_stream, self._pieces), []


class _HashedPiece(io.RawIOBase):
    """Writes a piece to an open file. Closing it notes its hash, and does not close the file."""

    def __init__(self, file: Any, pieces: PieceHashes):
        self._file, self._pieces, self._hasher = file, pieces, xxhash.xxh3_128()
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
            piece = self._offset, self._length, self._hasher.hexdigest()
            self._pieces.setdefault(Path(self._file.name).name, []).append(piece)
            super().close()


class IncompletePlanner(DefaultSavePlanner):
    """DCP's planner without its check that the ranks hold every tensor completely."""

    def _create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = create_default_global_save_plan(self._dedup_save_plans(all_plans))
        paths = dict(ChainMap(*(plan.planner_data for plan in plans)))
        return plans, dataclasses.replace(metadata, planner_data=paths)


# --- read -----------------------------------------------------------------------------------------

_CLASSES = (
    Metadata,
    StorageMeta,
    TensorStorageMetadata,
    TensorProperties,
    ChunkStorageMetadata,
    MetadataIndex,
    _StorageInfo,
    _MEM_FORMAT_ENCODING,
)
_NAMED = {(kind.__module__, kind.__name__): kind for kind in (*_CLASSES, torch.Size)} | {
    ("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)
}


class Refused(ValueError):
    """Raised if the metadata of a checkpoint asks for something that is not allowed."""


class CheckpointReader(dcp.FileSystemReader):
    """DCP's file system reader with a restricted unpickler. It reads the metadata only once.

    files: the entries of the manifest. Whatever is read is compared with their hashes. A piece is
    read whole into host memory for that, also where a rank needs a part of it.
    """

    def __init__(self, folder: Path, files: dict[str, Any]):
        super().__init__(folder)
        self._metadata: Metadata | None = None
        self._saved = saved_pieces(files)

    def read_metadata(self) -> Metadata:
        """Return the table of contents.

        Raise `Refused` if it asks for more than a checkpoint of tensors needs.
        """
        if self._metadata is None:
            folder = Path(self.path)
            data = (folder / TABLE_FILE).read_bytes()
            expect_saved(TABLE_FILE, 0, data, self._saved)
            metadata = _unpickled(data)
            for path in sorted({info.relative_path for info in metadata.storage_data.values()}):
                # By an absolute path, "..", or a symbolic link.
                if not (folder / path).resolve().is_relative_to(folder.resolve()):
                    raise Refused(
                        f"its .metadata names the file {path}, which is not in the checkpoint's "
                        "folder"
                    )
            metadata.storage_meta = metadata.storage_meta or StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            self._metadata = metadata
        return self._metadata

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        """Return a stored piece as a file, after comparing its hash with the manifest."""
        file.seek(sinfo.offset)
        data = file.read(sinfo.length)
        expect_saved(sinfo.relative_path, sinfo.offset, data, self._saved)
        return io.BytesIO(data)


def open_checkpoint(folder: Path, files: dict[str, Any], *, where: str) -> CheckpointReader:
    """Return a reader of the checkpoint in folder, after reading its metadata. Collective.

    files: the entries of its manifest. where: the name of the checkpoint in messages. On every
    rank, raise `UserError` if the metadata is refused, and else as `errors_of_all_ranks`.
    """
    reader = CheckpointReader(folder, files)
    with errors_of_all_ranks():
        try:
            reader.read_metadata()
        except Refused as error:
            raise UserError(
                f"{where} is refused: {error}. None of it was executed or read. Use checkpoints "
                "from sources that you trust."
            ) from error
        except (Damage, OSError):
            raise
        except Exception as error:  # a damaged pickle can raise anything
            raise Damage(f"{TABLE_FILE}: {one_line(error)}") from error
    return reader


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        named = (module, name)
        if named in _NAMED:
            return _NAMED[named]
        if named == ("torch.serialization", "_get_layout"):
            return {"torch.strided": torch.strided}.__getitem__
        if module in ("pathlib", "pathlib._local") and name in ("PosixPath", "WindowsPath"):
            return lambda *parts: "/".join(parts)  # the path where it was saved, which is not used
        raise Refused(
            f"its .metadata names {module}.{name}, which no checkpoint of tensors needs, and "
            "which could execute code"
        )


def _unpickled(data: bytes) -> Metadata:
    before = [dict(vars(kind)) for kind in _CLASSES]
    metadata = _Unpickler(io.BytesIO(data)).load()
    # A pickle can also set attributes of the classes that it names.
    if before != [dict(vars(kind)) for kind in _CLASSES]:
        raise Refused("its .metadata changes the classes that it names")
    if not isinstance(metadata, Metadata):
        raise ValueError(f"it holds a {type(metadata).__name__}")
    return metadata
