"""Unmodified transformers models, built and filled so that no place ever needs a whole model.

A model is built on the meta device (`build_on_meta`), sharded by `parallelize`, and then filled in
place: from random numbers that do not depend on the mesh (`initialize`), or from a folder of
safetensors (`checkpoint/safetensors.py`).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from titan_ulysses.config.paths import GIVE_A_MODEL, check_model_path
from titan_ulysses.distributed.errors import UserError, one_line
from titan_ulysses.distributed.seeds import seed_of
from titan_ulysses.model import prediction
from titan_ulysses.model.parameter_names import is_adapter, plain
from titan_ulysses.model.remote_code import check_model_code

_MOST_LAYERS = 10_000


def load_model_config(
    path: str, table: dict | None, *, setting: str = "model.path"
) -> PreTrainedConfig:
    """Return the transformers config of a folder, a hub name or the table `[model.config]`.

    `path` is that of `setting`, and is not read if there is a table. UserError if transformers
    cannot make a config of either.
    """
    if table is not None:
        settings = copy.deepcopy(table)
        _check_layer_count(settings, "model.config")
        check_model_code(settings, "model.config")
        model_type = settings.pop("model_type", None)
        try:
            return AutoConfig.for_model(model_type, **settings)
        except Exception as error:  # transformers raises whatever its config classes raise
            raise UserError(f"model.config: transformers refuses it: {one_line(error)}") from error
    check_model_path(path, setting=setting)
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)  # it logs each retry; the result is reported once, below
    try:
        settings, _ = PreTrainedConfig.get_config_dict(path)
        check_model_code(settings, f'{setting} = "{path}"')
        _check_layer_count(settings, f'{setting} = "{path}"')
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f'{setting} = "{path}": no transformers model there ({one_line(error)}). {GIVE_A_MODEL}'
        ) from error
    finally:
        hub.setLevel(level)


def _check_layer_count(settings: dict, where: str) -> None:
    """Raise UserError for a huge number of layers: transformers would make lists and modules of
    them.
    """
    for key, value in settings.items():
        if isinstance(value, dict):
            _check_layer_count(value, where)
        elif key.endswith(("layers", "layer")) and isinstance(value, int) and value > _MOST_LAYERS:
            raise UserError(f"{where}: {key} = {value} is more than {_MOST_LAYERS}: correct it.")


def has_vision(config: PreTrainedConfig) -> bool:
    """Return whether transformers builds a model of images and text of this config."""
    known = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return known and "vision_config" in config.sub_configs


def auto_class(config: PreTrainedConfig, *, classifier: bool = False) -> Any:
    """Return the class of transformers that builds and loads the model of this config."""
    if classifier:
        return AutoModelForSequenceClassification
    return AutoModelForImageTextToText if has_vision(config) else AutoModelForCausalLM


def make_reward_model(config: PreTrainedConfig) -> None:
    """Let config be that of a classifier with one score. UserError if its type has none."""
    if has_vision(config) or type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise UserError(
            f'loss.name = "reward": transformers has no model for the classification of texts of '
            f'type "{config.model_type}". Choose another model.'
        )
    config.num_labels = 1


def build_on_meta(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    *,
    classifier: bool = False,
    predicts: bool = False,
) -> PreTrainedModel:
    """Build the model class that transformers chooses for config, on meta; config is not changed.

    It is that of a causal LM, with its prediction layer if it `predicts`, or of a classifier of
    sequences.

    All its parameters have dtype, also those that transformers would keep in fp32 (routers),
    because FSDP takes only one dtype.
    """
    try:
        with torch.device("meta"):
            model = auto_class(config, classifier=classifier).from_config(
                copy.deepcopy(config),
                dtype=dtype,
                experts_implementation=experts_path(dtype),
                trust_remote_code=False,
            )
    except Exception as error:  # a family's own code raises whatever it likes
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not has_vision(config):
            raise UserError(
                f'model: "{config.model_type}" has no causal language model in transformers.'
            ) from error
        unset = [
            key for key in ("head_dim", "num_key_value_heads") if getattr(config, key, 0) is None
        ]
        raise UserError(
            f'model: transformers cannot build a "{config.model_type}" of this config '
            f"({type(error).__name__}: {one_line(error)})."
            + (f" Set the missing keys ({', '.join(unset)}) in the config." if unset else "")
        ) from error
    if predicts:
        with torch.device("meta"):
            prediction.add_layer(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def experts_path(dtype: torch.dtype) -> str | None:
    """Return the transformers implementation of mixture-of-experts layers to use in dtype.

    None is transformers' own choice, "grouped_mm". It keeps the number of tokens of each expert on
    the device, so that no shape depends on data on the host. It has no fp64. "batched_mm" has fp64,
    at the price of a copy of the weights for each token.
    """
    return "batched_mm" if dtype == torch.float64 else None


def output_layer(model: PreTrainedModel) -> Any:
    """Return the head of a causal LM, or the layer that gives a classifier of sequences its scores.

    None if there is neither.
    """
    return model.get_output_embeddings() or (model.score if classifies(model) else None)


def classifies(model: PreTrainedModel) -> bool:
    """Return whether a model scores whole sequences, as AutoModelForSequenceClassification does."""
    return class_name(model).endswith("ForSequenceClassification") and hasattr(model, "score")


def class_name(model: PreTrainedModel) -> str:
    """Return the name of the model's transformers class, from which FSDP has derived its own."""
    return next(c.__name__ for c in type(model).__mro__ if c.__module__.startswith("transformers."))


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield each parameter once, named as in the unwrapped transformers model.

    A tied parameter has its first name.
    """
    for name, parameter in model.named_parameters():
        yield plain(name), parameter


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers under transformers' names, without LoRA adapters.

    Tied parameters appear under each of their names. For adapters see lora.py.
    """
    state = model.state_dict(keep_vars=True)
    return {plain(name): tensor for name, tensor in state.items() if not is_adapter(name)}


def allocate(
    model: PreTrainedModel, device: torch.device, *, parameter_offload: bool = False
) -> None:
    """Allocate memory on device for this rank's shards of a sharded meta model.

    The values of parameters are undefined. Buffers that transformers computes and does not save
    (RoPE frequencies) are computed. With parameter_offload the shards are in host memory, and the
    buffers are on device.
    """
    # Note which modules share a parameter, to tie them again after `to_empty`.
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(parameter, []).append((module, name))
    model.to_empty(device="cpu" if parameter_offload else device)
    for (first, first_name), *others in owners.values():
        for module, name in others:
            setattr(module, name, getattr(first, first_name))
    with torch.no_grad():
        for module in model.modules():
            if not (buffers := dict(module.named_buffers(recurse=False))):
                continue
            for buffer in buffers.values():
                if buffer.is_floating_point():
                    buffer.fill_(torch.nan)
            # Parameters beside a buffer, as in a scaled embedding, must not be initialized here:
            # meta tensors take their places.
            with _own_parameters_of(module, device="meta"):
                _init_weights(model, module)
            _fill_by_owners(model, module, module.buffers)
            for name in buffers:
                setattr(module, name, getattr(module, name).to(device))


@torch.no_grad()
def initialize(model: PreTrainedModel, seed: int, only: nn.Module | None = None) -> None:
    """Fill the model with transformers' own random initialization, except its adapters; or only
    one of its modules.

    The numbers of a module are drawn from (seed, module name) and then sliced. So they are the same
    on every mesh and for every number of ranks. Needs the memory of the largest module at a time.
    Adapters are filled by `initialize_adapters` in lora.py. UserError if transformers leaves a
    parameter unfilled.
    """
    seen: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        own = module.named_parameters(recurse=False)
        sharded = {k: p for k, p in own if p not in seen}
        if not sharded or is_adapter(f"{name}.") or only not in (None, module):
            continue
        seen.update(sharded.values())
        whole = {k: torch.full(p.shape, torch.nan, dtype=p.dtype) for k, p in sharded.items()}
        with torch.random.fork_rng(devices=[]), swap_parameters(module, whole):
            # torch.manual_seed also notes the caller's stack for each kind of device, in 2 ms.
            torch.default_generator.manual_seed(seed_of(seed, plain(name)))
            _init_weights(model, module)
            _fill_by_owners(model, module, module.parameters)
        for key, parameter in sharded.items():
            if whole[key].isnan().any():
                raise UserError(
                    f"model: transformers {transformers.__version__} cannot initialize "
                    f"{plain(name)}.{key}. Begin with weights (model.path), or take a newer "
                    "transformers."
                )
            fill(parameter, whole[key])


def _fill_by_owners(
    model: PreTrainedModel, module: nn.Module, tensors: Callable[..., Iterator[Tensor]]
) -> None:
    """Let the modules around `module` fill those of its tensors that still have NaN.

    Some families initialize the weights of a router with the block of experts around it, and the
    buffers of all layers with the decoder.
    """

    def is_unfilled() -> bool:
        floats = (x for x in tensors(recurse=False) if x.is_floating_point() and not x.is_meta)
        return any(bool(x.isnan().any()) for x in floats)

    if not is_unfilled():
        return
    path = next(name for name, other in model.named_modules() if other is module)
    while path and is_unfilled():
        path = path.rpartition(".")[0]
        owner = model.get_submodule(path)
        with _own_parameters_of(owner, device="cpu"):
            _init_weights(model, owner)


def _init_weights(model: PreTrainedModel, module: nn.Module) -> None:
    """Initialize a module as the innermost transformers model around it does.

    A tower or a text in a model of images and text has a config of its own.
    """
    path = next(name for name, other in model.named_modules() if other is module)
    while path and not isinstance(model.get_submodule(path), PreTrainedModel):
        path = path.rpartition(".")[0]
    model.get_submodule(path)._init_weights(module)


@contextmanager
def swap_parameters(module: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Replace module's own parameters by tensors within the context.

    transformers then initializes these tensors instead of shards, by `model._init_weights(module)`:
    it has no public way to do so for one module.
    """
    own = {name: getattr(module, name) for name in tensors}
    for name, tensor in tensors.items():
        setattr(module, name, nn.Parameter(tensor))
    try:
        yield
    finally:
        for name, parameter in own.items():
            setattr(module, name, parameter)


def _own_parameters_of(module: nn.Module, *, device: str) -> AbstractContextManager[None]:
    """Replace module's own parameters within the context by tensors that are thrown away."""
    own = module.named_parameters(recurse=False)
    return swap_parameters(module, {k: torch.empty(p.shape, device=device) for k, p in own})


def fill(parameter: Tensor, whole: Tensor) -> None:
    """Copy the values of `whole` into a parameter, or this rank's part of them into its shard."""
    if isinstance(parameter, DTensor):
        # src_data_rank=None: every rank has the whole tensor and cuts its own shard, without
        # communication.
        shard = distribute_tensor(
            whole.to(parameter.device),
            parameter.device_mesh,
            parameter.placements,
            src_data_rank=None,
        )
        parameter.to_local().copy_(shard.to_local())
    else:
        parameter.copy_(whole)
