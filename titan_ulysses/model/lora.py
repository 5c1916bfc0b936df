"""LoRA (arXiv 2106.09685) through peft: adapters beside the linear layers of a frozen model.

peft's modules do the computing, and adapters are saved in peft's folder format. This module decides
when and where their numbers are made: adapters are built on meta, sharded with the layers that they
belong to, and filled from (seed, name).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from titan_ulysses.config.schema import LoRA
from titan_ulysses.config.toml import to_toml
from titan_ulysses.distributed.errors import UserError, one_line
from titan_ulysses.distributed.seeds import seed_of
from titan_ulysses.model import hf
from titan_ulysses.model.nf4 import is_nf4
from titan_ulysses.model.parameter_names import matching, plain
from titan_ulysses.model.torchao import suppress_torchao_warnings

if TYPE_CHECKING:  # importing transformers prints warnings, see model/__init__.py
    from transformers import PreTrainedModel

ADAPTER = "default"
"""The name that peft gives to a model's only adapter."""
_MLPS = {"mlp", "feed_forward", "block_sparse_moe", "shared_mlp", "moe"}
"""How families name the MLP of a block, dense or a mixture."""


def check_lora(settings: LoRA) -> None:
    """Raise UserError if LoRA is used and peft is not installed. Needs no model."""
    if settings.rank and importlib.util.find_spec("peft") is None:
        raise UserError(
            f"lora.rank = {settings.rank} needs peft, which is not installed: pip install peft"
        )


def add_adapters(model: PreTrainedModel, settings: LoRA) -> int:
    """Add an adapter to each chosen linear layer, freeze all else, and return how many were added.

    This is done in place and before sharding. `settings.target_modules` holds names or patterns
    (see `names.matching`). If it is empty, all linear layers except the head get an adapter, as
    with peft's "all-linear". The experts of a mixture get none, because they are not layers of
    their own. An adapted layer computes W x + (alpha / rank) B A dropout(x), with A [rank, in] and
    B [out, rank] in W's dtype. UserError for a pattern that matches no linear layer.
    """
    check_lora(settings)
    head, modules = model.get_output_embeddings(), model.named_modules()
    linear = {name: m for name, m in modules if isinstance(m, nn.Linear) and m is not head}
    targets = _targets(linear, model, settings)
    with suppress_torchao_warnings():  # peft imports torchao wherever it is installed
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=sorted(targets),
            task_type="CAUSAL_LM",
        )
        try:
            with torch.device(next(model.parameters()).device):
                inject_adapter_in_model(config, model, adapter_name=ADAPTER)
        except ValueError as error:
            names = _outside_mlps(linear, but=one_line(error))
            raise UserError(
                f"lora.target_modules: peft refuses them. {names} Peft says: {one_line(error)}"
            ) from error
    if other := sorted({name for name, _ in _adapted_layers(model)} ^ targets):
        # peft goes by names, and in some mixtures takes shared experts and dense MLPs for experts.
        raise UserError(
            f'lora.target_modules: in a "{model.config.model_type}" peft adapts {other[0]} as a '
            f"part of a mixture of experts, which cannot be sharded. {_outside_mlps(linear)}"
        )
    for _, layer in _adapted_layers(model):
        for part in (layer.lora_A, layer.lora_B):
            part.to(layer.base_layer.weight.dtype)
    return len(targets)


def _targets(linear: dict[str, nn.Linear], model: PreTrainedModel, settings: LoRA) -> set[str]:
    """The names of the layers that get an adapter."""
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

    The numbers are drawn from (seed, name) and then sliced.
    """
    for name, layer in _adapted_layers(model):
        a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        whole = {m: torch.empty(m.weight.shape, dtype=m.weight.dtype) for m in (a, b)}
        with (
            torch.random.fork_rng(devices=[]),
            hf.swap_parameters(a, {"weight": whole[a]}),
            hf.swap_parameters(b, {"weight": whole[b]}),
        ):
            torch.manual_seed(seed_of(seed, f"{name}.lora"))
            layer.reset_lora_parameters(ADAPTER, True)
        for module, values in whole.items():
            hf.fill(module.weight, values)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Let the model compute without its adapters in this context: what they add is scaled by 0.

    peft's own switch would change which parameters are trained, on which FSDP counts.
    """
    scales = [(layer.scaling, layer.scaling[ADAPTER]) for _, layer in _adapted_layers(model)]
    for scaling, _ in scales:
        scaling[ADAPTER] = 0.0
    try:
        yield
    finally:
        for scaling, scale in scales:
            scaling[ADAPTER] = scale


class Delta(NamedTuple):
    """What an adapter adds to a weight: scale * b @ a."""

    a: nn.Parameter
    b: nn.Parameter
    scale: float
    dtype: torch.dtype
    """The dtype of the merged weight: that of the adapter, but at least fp32. Of a weight in NF4 it
    is that of the computation, because 4 bits have no digits that fp32 would save.
    """

    def added_to(self, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return the merged weight; weight, a and b are whole tensors, gathered from all ranks."""
        wide = torch.promote_types(self.b.dtype, torch.float32)
        return (weight.to(wide) + self.scale * (b.to(wide) @ a.to(wide))).to(self.dtype)


def deltas(model: nn.Module) -> dict[str, Delta]:
    """Return the Delta of each weight that has an adapter, by the weight's plain name."""
    found = {}
    for name, layer in _adapted_layers(model):
        base, (a, b) = layer.base_layer.weight, (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER])
        wide = torch.promote_types(b.weight.dtype, torch.float32)
        dtype = base.dtype if is_nf4(base) else wide
        found[f"{name}.weight"] = Delta(a.weight, b.weight, layer.scaling[ADAPTER], dtype)
    return found


def _adapted_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            yield plain(name), module
