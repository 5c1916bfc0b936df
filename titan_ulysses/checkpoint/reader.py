"""Reads DCP checkpoints without executing code from them.

DCP stores the table of contents of a checkpoint, `.metadata`, as a pickle, and a pickle can call
any function that it names. Here it may name only the few classes that DCP writes. It may describe
only tensors in files of its own folder, which DCP reads with `weights_only`. DCP would unpickle an
entry of any other kind, so the class for such entries is not among those allowed.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from titan_ulysses.checkpoint.manifest import (
    TABLE_FILE,
    Damage,
    check_file,
    check_piece,
    pieces_by_place,
)
from titan_ulysses.distributed.errors import UserError, first_failure, one_line

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

    files: the entries of the manifest. Whatever is read is compared with their hashes, if they have
    any. A piece is read whole into host memory for that, also where a rank needs a part of it.
    """

    def __init__(self, folder: Path, files: dict[str, Any]):
        super().__init__(folder)
        self._metadata: Metadata | None = None
        self._files, self._pieces = files, pieces_by_place(files)

    def read_metadata(self) -> Metadata:
        """Return the table of contents.

        Raise `Refused` if it asks for more than a checkpoint of tensors needs.
        """
        if self._metadata is None:
            data = (Path(self.path) / TABLE_FILE).read_bytes()
            check_file(TABLE_FILE, data, self._files)
            metadata = _unpickled(io.BytesIO(data))
            _expect_own_files(Path(self.path), metadata)
            metadata.storage_meta = metadata.storage_meta or StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            self._metadata = metadata
        return self._metadata

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        """Return a stored piece as a file, after comparing its hash with the manifest."""
        if not self._pieces:
            return super()._slice_file(file, sinfo)  # saved by an earlier version
        file.seek(sinfo.offset)
        data = file.read(sinfo.length)
        check_piece(sinfo.relative_path, sinfo.offset, data, self._pieces)
        return io.BytesIO(data)


def open_checkpoint(folder: Path, files: dict[str, Any], *, where: str) -> CheckpointReader:
    """Return a reader of the checkpoint in folder, after reading its metadata. Collective.

    files: the entries of its manifest. where: the name of the checkpoint in messages. On every
    rank, raise `UserError` if the metadata is refused, or `Damage` if it is damaged.
    """
    reader, refusal, damage = CheckpointReader(folder, files), None, None
    try:
        reader.read_metadata()
    except Refused as error:
        refusal = str(error)
    except Damage as error:
        damage = str(error)
    except Exception as error:  # a damaged pickle can raise anything
        damage = f".metadata: {one_line(error)}"
    if refusal := first_failure(refusal):
        raise UserError(
            f"{where} is refused: {refusal}. Nothing of it was run or read. Take checkpoints from "
            "those you trust."
        )
    if damage := first_failure(damage):
        raise Damage(damage)
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
            f"its .metadata names {module}.{name}, which no checkpoint of tensors needs, and which "
            "might run"
        )


def _unpickled(file: Any) -> Metadata:
    before = [dict(vars(kind)) for kind in _CLASSES]
    metadata = _Unpickler(file).load()
    # A pickle can also set attributes of the classes that it names.
    if before != [dict(vars(kind)) for kind in _CLASSES]:
        raise Refused("its .metadata changes the classes that it names")
    if not isinstance(metadata, Metadata):
        raise ValueError(f"it holds a {type(metadata).__name__}")
    return metadata


def _expect_own_files(folder: Path, metadata: Metadata) -> None:
    """Raise `Refused` if the metadata names a file outside of the folder.

    This includes absolute paths, "..", and symbolic links.
    """
    for path in sorted({info.relative_path for info in metadata.storage_data.values()}):
        if not (folder / path).resolve().is_relative_to(folder.resolve()):
            raise Refused(
                f"its .metadata names the file {path}, which is not in the checkpoint's folder"
            )
