"""Checks of a model before it is sharded: dropout, equal weights on all ranks, one dtype."""

from __future__ import annotations

import warnings
from collections import Counter
from functools import reduce

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel

from titan_ulysses.distributed.errors import UserError, first_failure
from titan_ulysses.distributed.mesh import Mesh
from titan_ulysses.model.freezing import bits


def check_dropout(model: PreTrainedModel) -> None:
    """Raise UserError if the model drops attention weights or whole layers in training.

    Model families have many names for these rates, so all numbers in the config and in modules
    whose name contains "drop" are looked at.
    """
    remedy = "in the model's config (from_pretrained takes it too)."
    nested = [value for value in vars(model.config).values() if isinstance(value, PreTrainedConfig)]
    holders = [("", vars(config)) for config in (model.config, *nested)]
    holders += [(f" in {name}", vars(module)) for name, module in model.named_modules()]
    for place, settings in holders:
        for key, rate in settings.items():
            if "drop" not in key or not isinstance(rate, float | int) or not rate:
                continue  # in some families the value is a module, which is visited by itself
            if "att" in key:
                raise UserError(
                    f"model: {key} = {rate}{place}: dropped attention weights would depend on the "
                    f"mesh, and no core supports them. Set {key} = 0.0 {remedy}"
                )
            if key in ("layerdrop", "decoder_layerdrop"):
                raise UserError(
                    f"model: {key} = {rate}{place}: each rank would skip different layers, and "
                    f"ranks would wait for each other forever. Set {key} = 0.0 {remedy}"
                )


def check_not_quantized(model: PreTrainedModel) -> None:
    """Raise UserError if transformers has loaded the model in a quantized form."""
    if getattr(model, "is_quantized", False):
        raise UserError(
            "model: it was loaded with quantized weights, which cannot be sharded in that form. "
            "Load it with dequantize=True in its quantization_config, or let train.py read the "
            "folder, rank by rank."
        )


def check_group(mesh: Mesh, *, parameter_offload: bool) -> None:
    """Raise UserError if parameters are to be on the host and the ranks' group is NCCL's alone.

    The norm of gradients that are on the host is summed there.
    """
    if not parameter_offload or mesh.device.type == "cpu":
        return
    group = mesh.loss.get_group()
    try:
        group._get_backend(torch.device("cpu"))
    except RuntimeError as error:
        raise UserError(
            "memory.parameter_offload = true needs a process group for CPU tensors too, and this "
            f'is "{dist.get_backend(group)}" alone. Create it with '
            'init_process_group("cpu:gloo,cuda:nccl"), or leave it to build_mesh.'
        ) from error


def check_same_weights(model: PreTrainedModel) -> None:
    """Raise UserError on every rank if the ranks hold different weights. Collective.

    Each rank keeps only its own shard of its weights, so the shards of different models would be
    mixed. Tensors on the meta device are not compared.
    """
    # One checksum per tensor, the sum of its bits; None where it has no data yet.
    with torch.no_grad():
        sums = {
            name: None if x.is_meta else bits(x).sum(dtype=torch.int64).item()
            for name, x in (*model.named_parameters(), *model.named_buffers())
        }
    first = [sums]
    dist.broadcast_object_list(first, src=0)
    differing = next((name for name, mine in sums.items() if mine != first[0].get(name)), None)
    why = None
    if differing is not None:
        why = f"{differing} on rank {dist.get_rank()} differs from that of rank 0"
        if (sums[differing] is None) != (first[0].get(differing) is None):
            why += ": only one of them is on the meta device, without data"
    if reason := first_failure(why):
        raise UserError(
            f"model: the ranks hold different weights: {reason}. Load the same checkpoint on every "
            "rank, or set the same seed before a random initialisation."
        )


def use_one_dtype(*modules: nn.Module) -> None:
    """Convert the trained, unsharded parameters of modules to the dtype that most elements have.

    FSDP needs one dtype per group of parameters, but transformers keeps routers in fp32 when it
    loads a mixture of experts in bf16. Warns if parameters lose precision.
    """
    trained = {
        name: parameter
        for module in modules
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and not isinstance(parameter, DTensor)
    }
    elements: Counter[torch.dtype] = Counter()
    for parameter in trained.values():
        elements[parameter.dtype] += parameter.numel()
    if len(elements) < 2:
        return
    dtype = elements.most_common(1)[0][0]
    widest = reduce(torch.promote_types, elements)
    odd = {name: p for name, p in trained.items() if p.dtype != dtype}
    for parameter in odd.values():
        parameter.data = parameter.data.to(dtype)
    if widest != dtype:
        warnings.warn(
            f"model: {', '.join(odd)} of {type(modules[0]).__name__} is now stored in {dtype}, "
            "like most of its parameters: FSDP shards parameters of one dtype. To keep more "
            f"precision, load the model in {widest} and give param_dtype={dtype}.",
            stacklevel=2,
        )
