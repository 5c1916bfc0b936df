"""A folder of safetensors: which file holds which tensor, and each file open while it is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from titan_ulysses.checkpoint.layout import Read
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.failure import one_line

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_AGAIN = "Copy or download it again."

Get = Callable[[str], Any]
"""A tensor of the files by its name there, as a slice that is read when it is indexed."""


def find(path: str, *, setting: str = "model.path") -> dict[str, Path]:
    """Which file of the folder (or hub snapshot) `path` holds each tensor. UserError where there
    are none.

    As in transformers: model.safetensors, or the files that the index names; where there is
    neither, all of them. setting: what the user calls the path.
    """
    folder, where = _folder(path, setting), f'{setting} = "{path}"'
    index: dict[str, str] | None = None
    if (folder / SINGLE_FILE).exists():
        files = [folder / SINGLE_FILE]
    elif (folder / INDEX_FILE).exists():
        index = _read_index(folder, where)
        files = [folder / name for name in sorted(set(index.values()))]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{where}: the folder holds no *.safetensors. Save the model with "
            "`save_pretrained(folder)` of a current transformers, or use [model.config] for random "
            "weights."
        )
    held = {file: _names_in(file, where) for file in files}
    if index is None:
        return {name: file for file, names in held.items() for name in names}
    for name, file in index.items():
        if name not in held[folder / file]:
            raise UserError(
                f"{where}: {INDEX_FILE} says that {file} holds {name}, and it does not. {_AGAIN}"
            )
    return {name: folder / file for name, file in index.items()}


def _folder(path: str, setting: str) -> Path:
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        # What vendors put beside the files of transformers is as large, and not wanted.
        aside = ["*/*", "consolidated*"]
        return Path(
            snapshot_download(
                path, allow_patterns=["*.safetensors", "*.json"], ignore_patterns=aside
            )
        )
    except Exception as error:
        raise UserError(
            f'{setting} = "{path}": neither a folder nor to be had from the hub '
            f"({one_line(error)}). Give a folder with config.json and *.safetensors, or the name "
            "of a model on the hub."
        ) from error


def _read_index(folder: Path, where: str) -> dict[str, str]:
    """The file of each tensor as the folder's index has it; all of them are there."""
    try:
        index = dict(json.loads((folder / INDEX_FILE).read_text())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{where}: {INDEX_FILE} is damaged ({one_line(error)}). {_AGAIN}"
        ) from error
    files = sorted(set(index.values()))
    if absent := [name for name in files if not (folder / name).exists()]:
        raise UserError(
            f"{where}: {len(absent)} of the {len(files)} files that {INDEX_FILE} names are not "
            f"there: {some(absent)}. Copy or download them."
        )
    return index


def _names_in(file: Path, where: str) -> set[str]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return set(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{where}: {file.name} is damaged ({one_line(error)}). {_AGAIN}") from error


def some(names: Sequence[str]) -> str:
    """The first names of what may be many."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def opened(reads: list[Read], files: dict[str, Path]) -> Iterator[tuple[Get, Read]]:
    """Each read with its files open; what is mapped counts as memory, so they are closed when it is
    over.
    """

    def of(read: Read) -> list[Path]:
        return sorted({files[name] for name in read.names})

    for needed, group in groupby(sorted(reads, key=of), key=of):
        with ExitStack() as stack:
            tensors = {
                file: stack.enter_context(safe_open(file, framework="pt")) for file in needed
            }

            def get(name: str, tensors: dict[Path, Any] = tensors) -> Any:
                return tensors[files[name]].get_slice(name)

            for read in group:
                yield get, read


def without_data(stored: Any) -> Tensor:
    """A tensor of a file on meta: its shape, and its dtype, for which nothing is read."""
    shape = stored.get_shape()
    return torch.empty(
        shape, dtype=stored[tuple(slice(0, 0) for _ in shape) or ...].dtype, device="meta"
    )
