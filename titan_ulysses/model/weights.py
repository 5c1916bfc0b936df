"""Safetensors in and out: a sharded model from a folder, of which each rank reads its own rows, and back to one.

`load` fills a sharded model in place; `export` gathers one tensor at a time. Neither needs a whole model in one
place.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from titan_ulysses.errors import UserError
from titan_ulysses.failure import first_failure, one_line
from titan_ulysses.model.hf import base_parameters, class_name, named_parameters
from titan_ulysses.model.lora import ADAPTER, Delta, deltas
from titan_ulysses.model.names import is_adapter

_EXPORT_FILE_BYTES = 4 * 2**30
_STEP_FILE = "training_step.json"


def find(path: str, *, setting: str = "model.path") -> dict[str, Path]:
    """Which file of the folder (or hub snapshot) `path` holds each tensor. UserError where there are none.

    setting: the one that names path.
    """
    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.json"]))
        except Exception as error:
            raise UserError(
                f'{setting} = "{path}": neither a folder nor to be had from the hub ({one_line(error)}). '
                "Give a folder with config.json and *.safetensors, or the name of a model on the hub."
            ) from error
    files: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                files.update(dict.fromkeys(tensors.keys(), file))
        except (SafetensorError, OSError) as error:
            raise UserError(
                f'{setting} = "{path}": {file.name} is damaged ({one_line(error)}). Copy or download it again.'
            ) from error
    if not files:
        raise UserError(
            f'{setting} = "{path}": the folder holds no *.safetensors. Save the model with '
            "`save_pretrained(folder)` of a current transformers, or use [model.config] for random weights."
        )
    return files


@torch.no_grad()
def load(
    model: PreTrainedModel, path: str, *, setting: str = "model.path", growing: Collection[str] = ()
) -> dict[str, int]:
    """Fill a sharded model from the safetensors at path; each rank reads its own rows of each tensor, nothing else.

    Parameters that are growing may have fewer rows there; returned is how many, of those that have.
    """
    files, fewer = find(path, setting=setting), {}
    base = model.base_model_prefix + "."
    wanted = dict(base_parameters(model))
    source = {name: next((n for n in (name, name.removeprefix(base)) if n in files), None) for name in wanted}
    if missing := [name for name, found in source.items() if found is None]:
        raise UserError(
            f'{setting} = "{path}": {len(missing)} of {len(wanted)} tensors of {class_name(model)} are '
            f"not in its safetensors: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}. "
            "A file is not there, or config.json is another model's: save or download it again."
        )
    by_file: dict[Path, list[str]] = {}
    for name, found in source.items():
        by_file.setdefault(files[found], []).append(name)
    for file, names in by_file.items():
        with safe_open(file, framework="pt") as tensors:
            for name in names:
                stored, parameter = tensors.get_slice(source[name]), wanted[name]
                rows = stored.get_shape()[0] if name in growing else len(parameter)
                if rows < len(parameter):
                    fewer[name] = rows
                _read_shard(parameter, stored, f'{setting} = "{path}": {source[name]}', rows=min(rows, len(parameter)))
    return fewer


def _read_shard(parameter: Tensor, stored, what: str, *, rows: int) -> None:
    """Fill the first rows of parameter, or of this rank's shard what belongs to them."""
    if tuple(stored.get_shape()) != (rows, *parameter.shape[1:]):
        raise UserError(
            f"{what} has shape {tuple(stored.get_shape())}, config.json says {tuple(parameter.shape)}. "
            "They belong to different models: save or download it again."
        )
    if not isinstance(parameter, DTensor):
        parameter[:rows].copy_(stored[:])
        return
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    shape = (min(shape[0], rows - offset[0]), *shape[1:])
    if shape[0] > 0 and all(shape):
        local = stored[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
        parameter.to_local()[: shape[0]].copy_(local)


@torch.no_grad()
def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, step: int) -> None:
    """Write folder as `AutoModelForCausalLM.from_pretrained` opens it: safetensors, config, tokenizer.

    Collective. Tensors are gathered one by one, and rank 0 writes a file whenever 4 GiB have come together, so no rank
    holds the whole model. Written aside and renamed when complete; a folder that is there already is replaced then.
    Parameters keep their storage dtype; adapters are merged into them, in the adapters'. `exported_step` tells the step
    again. UserError, on every rank, where it cannot be written.
    """
    aside, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("partial", "old"))
    writes = dist.get_rank() == 0
    parameters, added = dict(base_parameters(model)), deltas(model)
    sizes = {name: p.numel() * added.get(name, p).dtype.itemsize for name, p in parameters.items()}
    files = _plan_files(sizes)
    try:
        with _failing_together(folder):
            if writes:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
        for file in dict.fromkeys(files.values()):
            here = {name: p for name, p in parameters.items() if files[name] == file}
            tensors = {name: _gather_merged(p, added.get(name), keep=writes) for name, p in here.items()}
            with _failing_together(folder):
                if writes:
                    save_file(tensors, aside / file, metadata={"format": "pt"})
            del tensors  # before the next file's are gathered
        with _failing_together(folder):
            if writes:
                _write_index(files, sizes, aside)
                _exported_config(model).save_pretrained(aside)
                if model.generation_config is not None:
                    model.generation_config.save_pretrained(aside)
                tokenizer.save_pretrained(aside)
                (aside / _STEP_FILE).write_text(json.dumps({"step": step}))
                shutil.rmtree(old, ignore_errors=True)
                if folder.exists():  # moved, not removed in place: a folder of this name is always a whole export
                    folder.rename(old)
                aside.rename(folder)
                shutil.rmtree(old, ignore_errors=True)
    finally:
        if writes:
            shutil.rmtree(aside, ignore_errors=True)


def exported_step(folder: Path) -> int | None:
    """The step of the export in folder, or None where there is none."""
    try:
        return json.loads((folder / _STEP_FILE).read_text())["step"]
    except OSError:
        return None


def _gather(parameter: Tensor, *, keep: bool) -> Tensor | None:
    """Collective. The whole parameter in host memory, on the ranks that keep it."""
    whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return whole.detach().cpu().contiguous() if keep else None


def _gather_merged(parameter: Tensor, delta: Delta | None, *, keep: bool) -> Tensor | None:
    """Collective. The same with what an adapter adds to it."""
    whole = _gather(parameter, keep=keep)
    if delta is None:
        return whole
    a, b = (_gather(p, keep=keep) for p in (delta.a, delta.b))
    return delta.added_to(whole, a, b) if keep else None


@torch.no_grad()
def save_adapters(model: PreTrainedModel, folder: Path, *, base: str) -> None:
    """Write the adapters as `peft.PeftModel.from_pretrained(model, folder)` opens them. Collective, as `export` is.

    base: the folder or hub name of the model that they belong to, "" where it has none; noted with them.
    """
    aside, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("partial", "old"))
    writes = dist.get_rank() == 0
    adapters = {name: p for name, p in named_parameters(model) if is_adapter(name)}
    # peft leaves the adapter's name out, and has the model inside two modules of its own.
    names = {name: f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}" for name in adapters}
    tensors = {names[name]: _gather(p, keep=writes) for name, p in adapters.items()}
    with _failing_together(folder):
        if writes:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            save_file(tensors, aside / "adapter_model.safetensors", metadata={"format": "pt"})
            settings = copy.copy(model.peft_config[ADAPTER])
            settings.base_model_name_or_path = base or None
            settings.save_pretrained(aside)
            shutil.rmtree(old, ignore_errors=True)
            if folder.exists():
                folder.rename(old)
            aside.rename(folder)
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _failing_together(folder: Path) -> Iterator[None]:
    """Collective on leaving. Where a rank could not write, all raise UserError: no rank waits for one that has left."""
    failure = None
    try:
        yield
    except (OSError, SafetensorError) as error:
        failure = one_line(error)
    if reason := first_failure(failure):
        raise UserError(
            f"{folder}: the export failed ({reason}). "
            "Free space or change job.dump_folder, and run the same command again."
        )


def _plan_files(sizes: dict[str, int]) -> dict[str, str]:
    """The file of each tensor, known before any is gathered because the names hold the number of files."""
    number, room, numbers = 0, 0, {}
    for name, size in sizes.items():
        if size > room:
            number, room = number + 1, _EXPORT_FILE_BYTES
        room -= size
        numbers[name] = number
    if number == 1:
        return dict.fromkeys(sizes, "model.safetensors")
    return {name: f"model-{n:05d}-of-{number:05d}.safetensors" for name, n in numbers.items()}


def _write_index(files: dict[str, str], sizes: dict[str, int], folder: Path) -> None:
    if len(set(files.values())) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _exported_config(model: PreTrainedModel) -> PreTrainedConfig:
    config = copy.deepcopy(model.config)
    config.architectures = [class_name(model)]
    return config
