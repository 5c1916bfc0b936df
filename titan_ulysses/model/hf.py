"""Build, fill and export unmodified transformers models, none of which ever needs a whole model in one place.

A model is built on the meta device (`build_on_meta`), sharded by `parallelize`, and then filled in place: from random
numbers that do not depend on the mesh (`initialize`), or from a folder of safetensors, of which each rank reads only
its own rows (`load_weights`). `export` gathers one tensor at a time.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from titan_ulysses.errors import UserError
from titan_ulysses.failure import first_failure, one_line

_EXPORT_FILE_BYTES = 4 * 2**30
_STEP_FILE = "training_step.json"
_WRAPPER_PREFIX = "_checkpoint_wrapped_module."


def load_model_config(path: str, table: dict | None) -> PreTrainedConfig:
    """The transformers config of `model.path` (a folder or hub name) or of the table `[model.config]`."""
    if table is not None:
        settings = copy.deepcopy(table)
        model_type = settings.pop("model_type", None)
        try:
            return AutoConfig.for_model(model_type, **settings)
        except Exception as error:  # transformers raises whatever its config classes raise
            raise UserError(f"model.config: transformers refuses it: {one_line(error)}") from error
    try:
        return AutoConfig.from_pretrained(path)
    except Exception as error:
        raise UserError(
            f'model.path = "{path}": no transformers model there ({one_line(error)}). '
            "Give a folder with config.json and *.safetensors, or the name of a model on the hub."
        ) from error


def build_on_meta(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model class that transformers chooses for config, with parameters on meta. config is not changed."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=dtype, experts_implementation=experts_path(dtype)
            )
    except ValueError as error:
        raise UserError(f'model: "{config.model_type}" has no causal language model in transformers.') from error
    except Exception as error:  # a family's own code raises whatever it likes
        raise UserError(
            f'model: transformers cannot build a "{config.model_type}" of this config ({one_line(error)}). '
            "Set what it lacks (head_dim, num_key_value_heads) in the config."
        ) from error
    return model


def experts_path(dtype: torch.dtype) -> str | None:
    """Which of transformers' implementations of mixture-of-experts layers computes in dtype; None: its own choice.

    That is "grouped_mm", which keeps the number of tokens of each expert on the device, so no shape depends on data on
    the host. It has no fp64; "batched_mm" has, at the price of a copy of the weights for each token.
    """
    return "batched_mm" if dtype == torch.float64 else None


def class_name(model: PreTrainedModel) -> str:
    """The name of the transformers class, which FSDP has put a class of its own in front of."""
    return next(c.__name__ for c in type(model).__mro__ if c.__module__.startswith("transformers."))


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Each parameter once (tied ones by their first name), under the names of the unwrapped transformers model."""
    for name, parameter in model.named_parameters():
        yield name.replace(_WRAPPER_PREFIX, ""), parameter


def allocate(model: PreTrainedModel, device: torch.device, *, parameter_offload: bool = False) -> None:
    """Give a sharded meta model memory on device, for its own shards only; values are undefined except for buffers.

    Buffers that transformers computes and does not save (RoPE frequencies) are computed. With parameter_offload the
    shards get host memory.
    """
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(parameter, []).append((module, name))
    model.to_empty(device="cpu" if parameter_offload else device)
    for (first, first_name), *others in owners.values():
        for module, name in others:  # `to_empty` makes tied parameters two
            setattr(module, name, getattr(first, first_name))
    with torch.no_grad():
        for module in model.modules():
            if module._buffers:  # a scaled embedding has parameters too, which are not to be touched
                shapes = {k: p.shape for k, p in module._parameters.items() if p is not None}
                with _standing_in(module, {k: torch.empty(shape, device="meta") for k, shape in shapes.items()}):
                    model._init_weights(module)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)


@torch.no_grad()
def initialize(model: PreTrainedModel, seed: int) -> None:
    """Fill the model with transformers' own random initialisation, drawn from (seed, module name), then sliced.

    Every mesh, and every number of ranks, gets the same numbers. Needs the memory of the largest module at a time.
    """
    seen: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        sharded = {k: p for k, p in module._parameters.items() if p is not None and p not in seen}
        if not sharded:
            continue
        seen.update(sharded.values())
        whole = {k: torch.full(p.shape, torch.nan, dtype=p.dtype) for k, p in sharded.items()}
        with torch.random.fork_rng(devices=[]), _standing_in(module, whole):
            torch.manual_seed(_seed_of(seed, name.replace(_WRAPPER_PREFIX, "")))
            model._init_weights(module)
        for key, parameter in sharded.items():
            assert not whole[key].isnan().any(), f"transformers does not initialise {name}.{key}"
            _fill(parameter, whole[key])


@contextmanager
def _standing_in(module: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Let tensors be module's own parameters for a while, so that transformers initialises them instead of shards."""
    own = {name: module._parameters[name] for name in tensors}
    module._parameters.update({name: nn.Parameter(tensor) for name, tensor in tensors.items()})
    try:
        yield
    finally:
        module._parameters.update(own)


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "little") >> 1


def _fill(parameter: Tensor, whole: Tensor) -> None:
    if isinstance(parameter, DTensor):
        # src_data_rank=None: every rank has the whole tensor and cuts its own shard, without communication.
        shard = distribute_tensor(
            whole.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
        )
        parameter.to_local().copy_(shard.to_local())
    else:
        parameter.copy_(whole)


# --- safetensors in ---------------------------------------------------------------------------------------------------


def find_weights(path: str) -> dict[str, Path]:
    """Which file of the folder (or hub snapshot) `path` holds each tensor. UserError where there are none."""
    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.json"]))
        except Exception as error:
            raise UserError(
                f'model.path = "{path}": neither a folder nor to be had from the hub ({one_line(error)}). '
                "Give a folder with config.json and *.safetensors, or the name of a model on the hub."
            ) from error
    files: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                files.update(dict.fromkeys(tensors.keys(), file))
        except (SafetensorError, OSError) as error:
            raise UserError(
                f'model.path = "{path}": {file.name} is damaged ({one_line(error)}). Copy or download it again.'
            ) from error
    if not files:
        raise UserError(
            f'model.path = "{path}": the folder holds no *.safetensors. Save the model with '
            "`save_pretrained(folder)` of a current transformers, or use [model.config] for random weights."
        )
    return files


@torch.no_grad()
def load_weights(model: PreTrainedModel, path: str) -> None:
    """Fill a sharded model from the safetensors at path; each rank reads its own rows of each tensor, nothing else."""
    files = find_weights(path)
    base = model.base_model_prefix + "."
    wanted = dict(named_parameters(model))
    source = {name: next((n for n in (name, name.removeprefix(base)) if n in files), None) for name in wanted}
    if missing := [name for name, found in source.items() if found is None]:
        raise UserError(
            f'model.path = "{path}": {len(missing)} of {len(wanted)} tensors of {class_name(model)} are '
            f"not in its safetensors: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}. "
            "A file is not there, or config.json is another model's: save or download it again."
        )
    by_file: dict[Path, list[str]] = {}
    for name, found in source.items():
        by_file.setdefault(files[found], []).append(name)
    for file, names in by_file.items():
        with safe_open(file, framework="pt") as tensors:
            for name in names:
                _read_shard(wanted[name], tensors.get_slice(source[name]), f'model.path = "{path}": {source[name]}')


def _read_shard(parameter: Tensor, stored, what: str) -> None:
    if tuple(stored.get_shape()) != tuple(parameter.shape):
        raise UserError(
            f"{what} has shape {tuple(stored.get_shape())}, config.json says {tuple(parameter.shape)}. "
            "They belong to different models: save or download it again."
        )
    if not isinstance(parameter, DTensor):
        parameter.copy_(stored[:])
        return
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    if all(shape):
        local = stored[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
        parameter.to_local().copy_(local)


# --- safetensors out --------------------------------------------------------------------------------------------------


@torch.no_grad()
def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, step: int) -> None:
    """Write folder as `AutoModelForCausalLM.from_pretrained` opens it: safetensors, config, tokenizer.

    Collective. Tensors are gathered one by one, and rank 0 writes a file whenever 4 GiB have come together, so no rank
    holds the whole model. Written aside and renamed when complete; a folder that is there already is replaced then.
    Parameters keep their storage dtype. `exported_step` tells the step again. UserError, on every rank, where it cannot
    be written.
    """
    aside, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("partial", "old"))
    writes = dist.get_rank() == 0
    parameters = dict(named_parameters(model))
    sizes = {name: p.numel() * p.element_size() for name, p in parameters.items()}
    files = _plan_files(sizes)
    try:
        with _failing_together(folder):
            if writes:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
        for file in dict.fromkeys(files.values()):
            tensors = {name: _gather(p, keep=writes) for name, p in parameters.items() if files[name] == file}
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
