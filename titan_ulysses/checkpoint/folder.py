"""Folders of safetensors: finds the file of each tensor, opens files while they are read, and says
whether an export is what a run has written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from titan_ulysses.checkpoint.layout import Read
from titan_ulysses.checkpoint.manifest import (
    Damage,
    digest_of,
    entry_of,
    expect_sizes,
    read_json,
    write_json,
)
from titan_ulysses.distributed.errors import UserError, failing_together, one_line
from titan_ulysses.model.released import form_of, weights_in

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
STEP_FILE = "training_step.json"
"""The manifest of an export: the step of its run, and the hashes of its files."""
_AGAIN = "Copy or download it again."

Get = Callable[[str], Any]
"""Returns a tensor by its name in the files, as a lazy slice that is read when it is indexed."""


@dataclass
class Stored:
    """The tensors of a folder. A quantized weight, which several stored tensors make, is one."""

    files: dict[str, Path]
    """The file of each stored tensor."""
    quantization: dict[str, Any] = field(default_factory=dict)
    """quantization_config of config.json; empty if there is none."""

    def __post_init__(self) -> None:
        form, names = form_of(self.quantization), set(self.files)
        self.form = form
        self.quantized: dict[str, dict[str, str]] = {}
        """The stored names of the parts of each quantized weight."""
        used: set[str] = set()
        if form:
            self.quantized, used = weights_in(names, form)
        self.names = (names - used) | set(self.quantized)

    @property
    def folder(self) -> Path:
        return next(iter(self.files.values())).parent

    def files_of(self, name: str) -> set[Path]:
        return {self.files[part] for part in self.quantized.get(name, {"": name}).values()}

    def get(self, name: str, tensors: dict[Path, Any]) -> Any:
        """Return a tensor from open files, as a lazy slice or a `Quantized`, which is like one."""
        parts = {
            part: tensors[self.files[stored]].get_slice(stored)
            for part, stored in self.quantized.get(name, {"": name}).items()
        }
        if name not in self.quantized:
            return parts[""]
        assert self.form is not None
        return self.form(parts, self.quantization)

    def describe(self) -> str:
        """Return a sentence about quantized weights; empty if there are none."""
        if not self.quantized or self.form is None:
            return ""
        return (
            f"{len(self.quantized)} weights are stored in {self.form.form}, and read as the "
            "numbers that they stand for; an export has these"
        )


def find(path: str, *, setting: str = "model.path") -> Stored:
    """Return the tensors in the folder (or hub snapshot) `path`.

    As in transformers, the files are model.safetensors or those that the index names; if there is
    neither, all *.safetensors. setting: the name of the path in messages. Raise `UserError` if
    there are no such files, or if they are incomplete or damaged.
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
    held: dict[Path, set[str]] = {}
    for file in files:
        try:
            if not file.is_file():
                raise OSError("it is no file")  # opening a pipe would wait for ever
            with safe_open(file, framework="pt") as tensors:
                held[file] = set(tensors.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{where}: {file.name} is damaged ({one_line(error)}). {_AGAIN}"
            ) from error
    quantization = _quantization(folder, where)
    if index is None:
        found = {name: file for file, names in held.items() for name in names}
        return Stored(found, quantization)
    for name, place in index.items():
        if name not in held[folder / place]:
            raise UserError(
                f"{where}: {INDEX_FILE} says that {place} holds {name}, but it does not. {_AGAIN}"
            )
    return Stored({name: folder / place for name, place in index.items()}, quantization)


def _quantization(folder: Path, where: str) -> dict[str, Any]:
    """Return quantization_config of the folder's config.json; empty if there is none."""
    if not (folder / CONFIG_FILE).is_file():
        return {}
    try:
        settings = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        quantization = settings.get("quantization_config") or {}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{where}: {CONFIG_FILE} is damaged ({one_line(error)}).") from error
    return quantization if isinstance(quantization, dict) else {}


def _folder(path: str, setting: str) -> Path:
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        # Skip weights in a vendor's own format, which are as large as those of transformers.
        aside = ["*/*", "consolidated*"]
        wanted = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py", "LICENSE*"]
        return Path(snapshot_download(path, allow_patterns=wanted, ignore_patterns=aside))
    except Exception as error:
        raise UserError(
            f'{setting} = "{path}": not a folder, and not available from the hub '
            f"({one_line(error)}). Give a folder with config.json and *.safetensors, or the name "
            "of a model on the hub."
        ) from error


def _read_index(folder: Path, where: str) -> dict[str, str]:
    """Return each tensor's file name from the index. Raise `UserError` if a file is missing."""
    try:
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
        for name, file in index.items():
            if not isinstance(file, str) or not file or "\0" in file:
                raise ValueError(f"the file of {name} is {file!r}, which is not the name of one")
            if Path(file).name != file or file == "..":
                raise ValueError(f"the file of {name} is {file}, which is not in this folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{where}: {INDEX_FILE} is damaged ({one_line(error)}). {_AGAIN}"
        ) from error
    files = sorted(set(index.values()))
    if absent := [name for name in files if not (folder / name).exists()]:
        raise UserError(
            f"{where}: {len(absent)} of the {len(files)} files that {INDEX_FILE} names are "
            f"missing: {some(absent)}. Copy or download them."
        )
    return index


def some(names: Sequence[str]) -> str:
    """Return the first three names, for messages."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def opened(reads: list[Read], stored: Stored) -> Iterator[tuple[Get, Read]]:
    """Yield each read with a function that gets tensors from its open files.

    Reads are grouped by the files that they need. The files are closed after each group, because
    mapped pages count as memory of the process.
    """

    def of(read: Read) -> list[Path]:
        return sorted({file for name in read.names for file in stored.files_of(name)})

    for needed, group in groupby(sorted(reads, key=of), key=of):
        with ExitStack() as stack:
            tensors = {
                file: stack.enter_context(safe_open(file, framework="pt")) for file in needed
            }

            def get(name: str, tensors: dict[Path, Any] = tensors) -> Any:
                return stored.get(name, tensors)

            for read in group:
                yield get, read


def without_data(stored: Any) -> Tensor:
    """Return an empty meta tensor with the shape and dtype of a stored tensor, reading no data."""
    shape = stored.get_shape()
    return torch.empty(
        shape, dtype=stored[tuple(slice(0, 0) for _ in shape) or ...].dtype, device="meta"
    )


# --- an export ------------------------------------------------------------------------------------


def write_manifest(folder: Path, step: int | None) -> None:
    """Write the manifest of all files in a folder, when the disk has them all.

    The files get the mode that the umask asks for: safetensors are written for the owner alone.
    """
    mode, files = folder.stat().st_mode & 0o666, {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        with suppress(OSError):  # some file systems have no modes
            file.chmod(mode)
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
        files[file.relative_to(folder).as_posix()] = entry_of(file)
    write_json(folder / STEP_FILE, {"step": step, "files": files})


def expect_as_exported(files: dict[str, Path], where: str) -> None:
    """Raise UserError, on every rank, if an export has changed since it was written. Collective.

    The ranks of a host share the files, which are read once more for that. Without a manifest
    nothing is known of a folder.
    """
    rank = int(os.environ.get("LOCAL_RANK", 0))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    manifest = next(iter(files.values())).parent / STEP_FILE

    def damaged(damage: str) -> UserError:
        return UserError(
            f"{where}: the export is damaged ({damage}). Copy or export it again; if it was "
            f"changed on purpose, remove its {STEP_FILE}."
        )

    with failing_together(Damage, OSError, error=damaged):
        known = read_json(manifest)["files"] if manifest.is_file() else {}
        for name in sorted({file.name for file in files.values()})[rank::ranks]:
            if name in known and digest_of(manifest.parent / name) != known[name]["xxh3"]:
                raise Damage(f"{name}: its contents differ from what was exported")


def exported_step(folder: Path) -> int | None:
    """Return the step of the export in folder, or None if there is none that is whole.

    Reads all of it: the export is finished when the hashes of its manifest are those of its files.
    """
    try:
        state = read_json(folder / STEP_FILE)
        expect_sizes(folder, state["files"])
        is_whole = all(
            digest_of(folder / name) == entry["xxh3"] for name, entry in state["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return state.get("step") if is_whole else None
