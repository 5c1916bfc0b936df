"""LoRA (arXiv 2106.09685) through peft: adapters beside the linear layers of a frozen model.

peft's modules do the computing, and adapters are saved in peft's folder format. This module decides
when and where their numbers are made: adapters are built on meta, sharded with the layers that they
belong to, and filled from (seed, name).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import NamedTuple

import torch
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedModel

from titan_ulysses.config.schema import LoRA
from titan_ulysses.config.toml import to_toml
from titan_ulysses.distributed.errors import UserError, one_line
from titan_ulysses.distributed.seeds import seed_of
from titan_ulysses.distributed.tensors import local_shard
from titan_ulysses.model import hf
from titan_ulysses.model.expert_adapters import factors, wrapped_parameters
from titan_ulysses.model.nf4 import NF4Weight, is_nf4
from titan_ulysses.model.parameter_names import is_router, matching, plain
from titan_ulysses.model.torchao import suppress_torchao_warnings

ADAPTER = "default"
"""The name that peft gives to a model's only adapter."""
_MLPS = {"mlp", "feed_forward", "block_sparse_moe", "shared_mlp", "moe"}
"""How families name the MLP of a block, dense or a mixture."""


def check_lora(settings: LoRA) -> None:
    """Raise UserError if peft is not installed, or too old for what is asked. Needs no model."""
    if settings.rank and importlib.util.find_spec("peft") is None:
        raise UserError(
            f"lora.rank = {settings.rank} needs peft, which is not installed: pip install peft"
        )
    if settings.target_parameters and Version(version("peft")) < Version("0.17"):
        raise UserError(
            f"lora.target_parameters = {to_toml(settings.target_parameters)} needs peft 0.17 or "
            f"newer, and {version('peft')} is installed: pip install --upgrade peft"
        )


def add_adapters(model: PreTrainedModel, settings: LoRA) -> int:
    """Add an adapter to each chosen layer and parameter, freeze all else, and count the adapters.

    This is done in place and before sharding. `settings.target_modules` holds names or patterns
    (see `names.matching`) of linear layers, and `settings.target_parameters` those of parameters of
    experts. If both are empty, all linear layers except the head get an adapter, as with peft's
    "all-linear". An adapted layer computes W x + s B A dropout(x), with A [rank, in] and B [out,
    rank] in W's dtype, and s = alpha / rank, or alpha / sqrt(rank) by rsLoRA (arXiv 2312.03732).
    With DoRA (arXiv 2402.09353), each row of W + s B A is scaled to a length that is trained. For
    experts see expert_adapters.py. UserError for a pattern that matches nothing.
    """
    check_lora(settings)
    head, modules = model.get_output_embeddings(), model.named_modules()
    linear = {
        name: m
        for name, m in modules
        # An indexer of sparse attention has no gradient (ulysses/indexer.py).
        if _is_linear(name, m) and m is not head and ".indexer." not in name
    }
    targets, parameters = _targets(linear, model, settings), _target_parameters(model, settings)
    with suppress_torchao_warnings():  # peft imports torchao wherever it is installed
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            use_rslora=settings.use_rslora,
            use_dora=settings.use_dora,
            target_modules=sorted(targets),
            task_type="CAUSAL_LM",
            **({"target_parameters": sorted(parameters)} if parameters else {}),
        )
        try:
            with torch.device(next(model.parameters()).device):
                inject_adapter_in_model(config, model, adapter_name=ADAPTER)
        except ValueError as error:
            names = _outside_mlps(linear, but=one_line(error))
            raise UserError(
                f"lora.target_modules: peft refuses them. {names} Peft says: {one_line(error)}"
            ) from error
    wanted = {f"{name}.weight" for name in targets} | parameters
    if other := sorted(wanted ^ {name for name, _ in _adapted_weights(model)}):
        # peft goes by names, and in some mixtures takes shared experts and dense MLPs for experts.
        raise UserError(
            f'lora.target_modules: in a "{model.config.model_type}" peft adapts {other[0]} as a '
            f"part of a mixture of experts, not as asked. {_outside_mlps(linear)}"
        )
    for _, layer in _adapted_weights(model):
        for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
            part.to(_base(layer).dtype)
    return len(wanted)


def _is_linear(name: str, module: nn.Module) -> bool:
    """Return whether this is a linear layer; llama4's router is one that returns two tensors."""
    returns_more = is_router(name) and type(module).forward is not nn.Linear.forward
    return isinstance(module, nn.Linear) and not returns_more


def _targets(linear: dict[str, nn.Linear], model: PreTrainedModel, settings: LoRA) -> set[str]:
    """The names of the layers that get an adapter."""
    if not settings.target_modules and settings.target_parameters:
        return set()
    if not linear:
        raise UserError(
            f'lora.rank = {settings.rank}: "{model.config.model_type}" has no linear layers for '
            "adapters."
        )
    if not settings.target_modules:  # of a model of images and text, those of its text
        of_text = {*(model.get_decoder() if hf.has_vision(model.config) else model).modules()}
        return {name for name, module in linear.items() if module in of_text}
    setting, what = "lora.target_modules", "linear layer that can have an adapter"
    return matching(settings.target_modules, linear, setting=setting, what=what, tails=True)


def _target_parameters(model: PreTrainedModel, settings: LoRA) -> set[str]:
    """The names of the parameters of experts that get an adapter."""
    if not settings.target_parameters:
        return set()
    setting, what = "lora.target_parameters", "parameter of experts, [experts, ..., ...]"
    owners = [x for x in model.named_modules() if not isinstance(x[1], nn.Conv1d)]
    own = [(path, *x) for path, m in owners for x in m.named_parameters(recurse=False)]
    experts = [f"{path}.{name}" for path, name, p in own if p.ndim == 3]
    if not experts:
        raise UserError(
            f'{setting}: "{model.config.model_type}" has no parameters that experts share. Name '
            "linear layers, in lora.target_modules."
        )
    return matching(settings.target_parameters, experts, setting=setting, what=what, tails=True)


def _outside_mlps(linear: Iterable[str], but: str = "") -> str:
    """Say which of a model's linear layers to name: those that are in no MLP, and whose name is not
    quoted in peft's message `but`.
    """
    parts = [name.split(".") for name in linear]
    names = {path[-1] for path in parts if not _MLPS & {*path[:-1]} and f"'{path[-1]}'" not in but}
    return f"Name other layers, as in lora.target_modules = {to_toml(sorted(names))}."


@torch.no_grad()
def initialize_adapters(model: nn.Module, seed: int) -> None:
    """Fill the adapters, if any, as peft does: A with Kaiming uniform numbers, B with zeros.

    The numbers are drawn from (seed, name) and then sliced. The lengths that DoRA trains begin with
    those of the rows of the weights, which must be in the model already.
    """
    for name, layer in _adapted_weights(model):
        a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        whole = {m: torch.empty(m.weight.shape, dtype=m.weight.dtype) for m in (a, b)}
        with (
            torch.random.fork_rng(devices=[]),
            hf.swap_parameters(a, {"weight": whole[a]}),
            hf.swap_parameters(b, {"weight": whole[b]}),
        ):
            number = seed_of(seed, f"{name.removesuffix('.weight')}.lora")
            torch.default_generator.manual_seed(number)
            layer.reset_lora_parameters(ADAPTER, True)
        for module, values in whole.items():
            hf.fill(module.weight, values)
        for lengths in layer.lora_magnitude_vector.values():
            # A rank has as many rows of the weight as of their lengths.
            rows, own = local_shard(_base(layer)), local_shard(lengths.weight)
            rows = rows.dequantized() if isinstance(rows, NF4Weight) else rows
            own.copy_(torch.linalg.vector_norm(rows.to(own.dtype), dim=1))


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Let the model compute without its adapters in this context: what they add is scaled by 0.

    peft's own switch would change which parameters are trained, on which FSDP counts.
    """
    layers = [layer for _, layer in _adapted_weights(model)]
    before = [(layer.scaling[ADAPTER], dict(layer.lora_variant)) for layer in layers]
    for layer in layers:
        layer.scaling[ADAPTER] = 0.0
        layer.lora_variant.clear()  # DoRA, which would scale the rows
    try:
        yield
    finally:
        for layer, (scale, variants) in zip(layers, before, strict=True):
            layer.scaling[ADAPTER] = scale
            layer.lora_variant.update(variants)


class Delta(NamedTuple):
    """What an adapter adds to a weight: scale * b @ a, of experts that of each; and what DoRA does.

    Weights and parts are whole tensors, gathered from all ranks.
    """

    layer: nn.Module
    """The layer of peft that has the adapter."""
    parts: tuple[nn.Parameter, ...]
    """The parameters of the adapter: a, b and, with DoRA, the lengths of rows."""
    dtype: torch.dtype
    """The dtype of the merged weight: that of the adapter, but at least fp32. Of a weight in NF4 it
    is that of the computation, because 4 bits have no digits that fp32 would save.
    """

    def added_to(self, weight: Tensor, a: Tensor, b: Tensor, *lengths: Tensor) -> Tensor:
        """Return the merged weight."""
        wide = torch.promote_types(b.dtype, torch.float32)
        a, b, merged = a.to(wide), b.to(wide), weight.to(wide)
        left, right = factors(self.layer, a, b) if weight.ndim == 3 else (b, a)
        merged = merged + self.layer.scaling[ADAPTER] * (left @ right)
        for length in lengths:
            merged *= (length.to(wide) / torch.linalg.vector_norm(merged, dim=1))[:, None]
        return merged.to(self.dtype)


def deltas(model: nn.Module) -> dict[str, Delta]:
    """Return the Delta of each weight that has an adapter, by the weight's plain name."""
    found = {}
    for name, layer in _adapted_weights(model):
        base, b = _base(layer), layer.lora_B[ADAPTER].weight
        dtype = base.dtype if is_nf4(base) else torch.promote_types(b.dtype, torch.float32)
        lengths = (part.weight for part in layer.lora_magnitude_vector.values())
        found[name] = Delta(layer, (layer.lora_A[ADAPTER].weight, b, *lengths), dtype)
    return found


def _adapted_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield each of peft's layers with an adapter, with the plain name of the weight it adapts."""
    yield from wrapped_parameters(model)
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and not hasattr(module, "parameter_name"):
            yield f"{plain(name)}.weight", module


def _base(layer: nn.Module) -> Tensor:
    """Return the weight that a layer of peft adapts."""
    wraps_parameter = hasattr(layer, "parameter_name")
    return layer.get_param() if wraps_parameter else layer.get_base_layer().weight
