"""Layers that carry a state along the sequence: linear attention, state spaces, convolutions.

Their heads are as independent as those of attention, so the same exchange serves them. A layer
projects its own tokens, one all-to-all brings each rank its heads (and their channels of the
convolution) of the whole sequence, convolution and recurrence run there, each document from an
empty state, and a second all-to-all brings the output back for the gated norm and the output
projection (gated_deltanet.py, mamba2.py). A convolution alone needs no exchange of heads, but the
last tokens of the rank before (short_conv.py).

The modules are unmodified: their parameters, projections, norms and kernels are used, and only the
`forward` of the instances is replaced. Parameters of heads and channels are used by slices.

Where blocks stream (`streaming/`), the state at the end of a chunk is where the next one
begins. These states are kept from forward to backward, and are small. Backward goes from the last
chunk to the first and hands their gradients on (`streaming/`).

Bytes that rank r sends to other ranks, with x_p elements of a token that belong to rank p, of
hv_p value heads and hk_p key heads (heads and groups in Mamba-2):

    Gated DeltaNet    x_p = 2 * Dk * hk_p + (Dv + 2) * hv_p
    Mamba-2           x_p = 2 * N * hk_p + (D + 1) * hv_p
    to heads          B * T * itemsize * (sum_p x_p - x_r)
    to sequence       B * T * itemsize * (P - 1) * Dv * hv_r
    convolution       B * h * itemsize * (the tokens of its slice that others' windows of K - 1 see)
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256

from torch import nn

from titan_ulysses.distributed.errors import UserError
from titan_ulysses.ulysses.gated_deltanet import GatedDeltaNet
from titan_ulysses.ulysses.indexer import INDEXED
from titan_ulysses.ulysses.linear_kernels import check_kernels, describe_kernels
from titan_ulysses.ulysses.mamba2 import Mamba2
from titan_ulysses.ulysses.short_conv import ShortConv
from titan_ulysses.ulysses.states import StatefulLayer

KINDS = "Gated DeltaNet, Mamba-2 and short convolutions"
WITH_STATE = {"linear_attention", "conv", "hybrid"}
"""Types of layers, as configs name them, that have a layer with a state."""
WITHOUT_STATE = {"full_attention", "sliding_attention", "chunked_attention", "mlp", "moe"}
WITHOUT_STATE |= {INDEXED}
"""The other types that are known."""


def use_linear_attention(blocks: nn.ModuleList) -> None:
    """Make all layers of known kinds in blocks run sequence-parallel, in place."""
    for block in blocks:
        for module in block.modules():
            if (forward := _forward_of(module)) is not None:
                module.forward = forward


def is_linear_attention(module: nn.Module) -> bool:
    """Return whether a module is a layer of a known kind."""
    return _forward_of(module) is not None


def recurrence_flops(module: nn.Module) -> int:
    """Return the FLOPs of a token's recurrence in forward, in all layers inside a module.

    A head's state is read and written by outer products and products with a vector: three of them
    in Gated DeltaNet, two in Mamba-2. Kernels that compute in chunks do more.
    """
    return sum(
        forward.recurrence_flops for forward in map(_forward_of, module.modules()) if forward
    )


def linear_layers(block: nn.Module) -> list[nn.Module]:
    """Return the layers of known kinds in a block."""
    return [module for module in block.modules() if is_linear_attention(module)]


def describe_layers(model: nn.Module, device_type: str) -> str:
    """Return which layers of known kinds a model has, and by which code they run; "" if none."""
    layers = linear_layers(model)
    if not layers:
        return ""
    counts = Counter(type(layer).__name__ for layer in layers)
    names = ", ".join(f"{count} x {name}" for name, count in sorted(counts.items()))
    how = describe_kernels(_functions_of(layers), device_type)
    return f"linear attention: {names}, {how}; a call for each document"


def _functions_of(layers: Sequence[nn.Module]) -> list[str]:
    """Return the names of the functions of transformers that layers compute with."""
    recurrences = {x.recurrence for x in map(_forward_of, layers) if x and x.recurrence}
    return ["causal_conv1d_fn", *sorted(recurrences)] if layers else []


def check_layers(
    blocks: nn.ModuleList,
    layer_types: Sequence[str] | None,
    *,
    is_stateful: bool = False,
    device_type: str = "cpu",
) -> None:
    """Raise UserError for a block with a layer of no known kind, or with one that is to run on a
    GPU by an installed package that cannot.

    layer_types are those of the config, one for each block; None: the config has none.
    is_stateful: whether transformers says that the model carries a state (`_is_stateful`). Without
    types, its blocks are then taken to be of the kind of the first one.
    """
    known = [bool(linear_layers(block)) for block in blocks]
    if layer_types is None and is_stateful and not any(known):
        raise UserError(_refusal(f"model: {described(blocks[0])}"))
    for block, kind, is_known in zip(blocks, layer_types or (), known, strict=False):
        if kind in WITH_STATE and not is_known:  # other types: see `check_family`
            raise UserError(_refusal(f"model: {described(block)} is a layer of type {kind}, which"))
    if device_type == "cuda":
        check_kernels(_functions_of([layer for block in blocks for layer in linear_layers(block)]))


def described(block: nn.Module) -> str:
    """Return the classes of a block and of its parts, norms left out."""
    names = dict.fromkeys(type(x).__name__ for x in block.children())
    parts = ", ".join(name for name in names if "norm" not in name.lower())
    return f"{type(block).__name__} ({parts})"


def _refusal(what: str) -> str:
    return (
        f"{what} carries a state along the sequence, and is not of a kind that this version "
        f"supports: {KINDS}. Choose another model."
    )


_TESTED = {
    "BambaMixer": ("64dac9386589ece1", "0cea3348d9c64a81"),
    "FalconH1Mixer": ("0f51648956c3fa72", "c6b9855b826fc95b"),
    "GraniteMoeHybridMambaLayer": ("f54d060249fc83f6", "5118499dddc6d76e"),
    "Lfm2MoeShortConv": ("4d06364e9aec8b45",),
    "Lfm2ShortConv": ("768c3845b801317a",),
    "NemotronHMamba2Mixer": ("5dd30fe04890d863", "1e848f8b5227e9c4"),
    "OlmoHybridGatedDeltaNet": ("cede7f1269fe866f", "a329261d9df3f9be"),
    "Qwen3NextGatedDeltaNet": ("4774ace97d9207d6", "5dacf3484861124a"),
    "Qwen3_5GatedDeltaNet": ("65c43dc001d87456", "368f639b3e7e8092"),
    "Qwen3_5MoeGatedDeltaNet": ("7179b59c0584e9d1", "4920533b4da12746"),
}
"""SHA-256 of the sources of the classes that the tests have compared with, in transformers 5.24 and
5.17.
"""


def has_untested_layers(blocks: nn.ModuleList) -> bool:
    """Return whether a layer of a known kind is not built as in the version that was tested.

    transformers writes these layers anew from version to version.
    """
    kinds = {type(layer) for block in blocks for layer in linear_layers(block)}
    return any(_source_hash(kind) not in _TESTED.get(kind.__name__, ()) for kind in kinds)


def _source_hash(kind: type) -> str | None:
    try:
        return sha256(inspect.getsource(kind).encode()).hexdigest()[:16]
    except OSError:  # no file
        return None


def _forward_of(module: nn.Module) -> StatefulLayer | None:
    fitting = (kind for kind in (GatedDeltaNet, Mamba2, ShortConv) if kind.fits(module))
    return next((kind(module) for kind in fitting), None)
