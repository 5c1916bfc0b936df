"""The decoder blocks of a model: finding, tiling and compiling them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from inspect import signature

import torch
from torch import nn
from transformers import PreTrainedModel

from titan_ulysses.distributed.errors import UserError
from titan_ulysses.memory.tiled import Tiled, tile_mlp, tile_norm
from titan_ulysses.model.families import MLPLayout, mlp_layout
from titan_ulysses.model.float8 import is_float8
from titan_ulysses.model.hf import has_vision


def find_blocks(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    """Return the decoder and its list of blocks.

    Blocks are recognized by their class, which transformers lists in `_no_split_modules`. They may
    be sharded and checkpointed already: their class is then a subclass of the listed one.
    UserError if there is no such list, or if its owner does not take token ids. Of a model of
    images and text, those of its text are meant.
    """
    text = model.get_decoder() if has_vision(model.config) else model
    name, classes = type(model).__name__, {*(text._no_split_modules or ())}
    for module in text.modules():
        for child in module.children():
            if not isinstance(child, nn.ModuleList) or not len(child):
                continue
            if not classes & {kind.__name__ for kind in type(child[0]).__mro__}:
                continue
            if "input_ids" not in signature(module.forward).parameters:
                raise UserError(
                    f"model: {name} keeps its layers in a {type(module).__name__}, which takes no "
                    "token ids: this version trains models whose decoder goes from token ids to "
                    "hidden states."
                )
            return module, child
    raise UserError(f"model: {name} has no list of decoder layers that could be sharded.")


def tile_blocks(
    model: PreTrainedModel,
    decoder: nn.Module,
    blocks: nn.ModuleList,
    tile_tokens: int,
    *,
    norms_with_mlp: bool = True,
) -> None:
    """Tile what works on each token independently.

    This is the MLP of each block together with the norms around it, and all other norms.

    norms_with_mlp = False is for a family whose blocks are not structured as `mlp_layout` assumes.
    The MLP is then tiled without its norms, and runs in the recomputation of its block too.
    """
    for block in blocks:
        layout = mlp_layout(block)
        if layout is None and not hasattr(block, "mixer"):
            parts = ", ".join(dict(block.named_children()))
            warnings.warn(
                f'model: "{model.config.model_type}": no MLP was found in {type(block).__name__} '
                f"(which has {parts}). It is not tiled, and takes memory for all tokens at once.",
                stacklevel=2,
            )
        if layout is not None:
            if not norms_with_mlp:
                layout = MLPLayout(layout.mlp)
            tile_mlp(
                layout.mlp,
                layout.before,
                layout.after,
                tile_tokens=tile_tokens,
                ends_block=layout.ends_block,
            )
        taken = () if layout is None else (layout.before, layout.after)
        for norm in norms_of(block):
            if norm not in taken:
                tile_norm(norm, tile_tokens=tile_tokens)
    for norm in norms_of(decoder):
        tile_norm(norm, tile_tokens=tile_tokens)


def norms_of(module: nn.Module) -> Iterator[nn.Module]:
    """Return the norms that are direct children of module."""
    return (child for child in module.children() if "norm" in type(child).__name__.lower())


def compile_blocks(blocks: nn.ModuleList) -> int:
    """Compile the MLP and the norms of each block, and return the number of compiled parts.

    Linear layers in float8 outside the MLP are compiled too, each by itself: eager, a product takes
    several passes over its operands for their scales and casts.

    Each part, tiled or not, is one graph, except an MLP whose router is counted for a router loss:
    that hook breaks the graph in two. Attention is not compiled, because its document lengths
    change from step to step and each change would recompile it.
    """
    parts = []
    for block in blocks:
        layout = mlp_layout(block)
        modules = [*norms_of(block), *([layout.mlp] if layout else [])]
        tiled = [module.forward.fn for module in modules if isinstance(module.forward, Tiled)]
        parts += tiled or modules
        inside = {inner for part in parts for inner in part.modules()}
        parts += [m for m in block.modules() if is_float8(m) and m not in inside]
    for part in parts:
        # Not `part.compile()`: if the class is one of torch's own, such as nn.LayerNorm, Dynamo
        # skips everything that it calls.
        whole = not any(module._forward_hooks for module in part.modules())
        part.forward = torch.compile(part.forward, fullgraph=whole)
    return len(parts)
