"""ALST's tiled compute (arXiv 2506.13996, section 3.1) for any function of hidden states.

`tiled` computes a function of rows (tokens) one tile after the other, and computes each tile again
in backward. What is inside the function exists for one tile at a time, whatever the length of the
sequence. `tiling.py` has the special case of the MLPs and norms of a model's blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import copy_context
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from titan_ulysses.memory.replay import accumulate, autocast_state, replayed, rng_state
from titan_ulysses.memory.tiling import tiles


def tiled(
    fn: Callable[..., Any],
    hidden: Tensor,
    *,
    tile_tokens: int,
    parameters: nn.Module | Sequence[Tensor] = (),
    **tokens: Tensor,
) -> Any:
    """Return fn(hidden, **tokens), computed for tile_tokens tokens at a time.

    hidden is [..., h], and each of `tokens` is [...] or [..., x]: what belongs to the same tokens,
    such as labels. fn gets their tiles as [n, h], [n] and [n, x]. It returns a tensor or a tuple
    (also a NamedTuple) of tensors. One that is a scalar is a sum over the tokens of the tile: the
    sums of the tiles are added, in fp64. Any other has the tile's tokens as its first dimension
    [n, ...], and comes back as [..., ...]. Outputs may be without a gradient (detached, or
    integers). Constants are bound to fn with `functools.partial`.

    `parameters`, a module or tensors, are what fn reads besides its arguments and what gets
    gradients: these are accumulated over the tiles in fp32 or wider. Tensors that are not named
    there get none. Of a module, the parameters that it holds at the time are used; in backward,
    under FSDP, it must be gathered. hidden and `tokens` get gradients too. Random numbers and
    autocast are replayed in backward. ValueError if an output is neither of the two kinds.
    """
    lead, names = hidden.shape[:-1], tuple(tokens)
    for name, values in tokens.items():
        if values.shape[: len(lead)] != lead:
            raise ValueError(
                f"tiled: {name} is {list(values.shape)}, and hidden is {list(hidden.shape)}: both "
                f"must begin with {list(lead)}, the tokens. Bind what is no token's own to fn with "
                "functools.partial."
            )
    function = _Function(fn, names, tile_tokens, parameters, lead)
    rows = [x.flatten(0, len(lead) - 1) for x in (hidden, *tokens.values())]
    outputs = _Tiled.apply(function, torch.is_grad_enabled(), *rows, *function.parameters())
    return function.pack(list(outputs))


class _Function:
    """fn, and what is known of its outputs after the first tile of forward."""

    def __init__(
        self,
        fn: Callable[..., Any],
        names: tuple[str, ...],
        tile_tokens: int,
        parameters: nn.Module | Sequence[Tensor],
        lead: torch.Size,
    ):
        self.fn, self.names, self.tile_tokens, self.lead = fn, names, tile_tokens, lead
        self._parameters = parameters
        self.pack: Callable[[list[Tensor]], Any] = tuple
        self.differentiable: list[bool] = []

    def parameters(self) -> list[Tensor]:
        """Return the parameters as they are now; under FSDP these are the gathered ones."""
        held = self._parameters
        return list(held.parameters() if isinstance(held, nn.Module) else held)

    def tiles(self, rows: Tensor) -> Any:
        # At least one tile, so that the outputs of no rows have their shapes too.
        return tiles(max(1, len(rows)), self.tile_tokens)

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the outputs of a tile, from its hidden states and token tensors."""
        output = self.fn(inputs[0], **dict(zip(self.names, inputs[1:], strict=True)))
        if isinstance(output, Tensor):
            self.pack = _only
            output = (output,)
        elif hasattr(output, "_fields"):
            self.pack = type(output)._make
        for index, y in enumerate(output):
            if y.ndim and len(y) != len(inputs[0]):
                raise ValueError(
                    f"tiled: output {index} of the function is {list(y.shape)} for a tile of "
                    f"{len(inputs[0])} tokens: return a sum over the tokens, or one entry a token."
                )
        return tuple(output)

    def forward(self, inputs: Sequence[Tensor], differentiate: bool) -> tuple[Tensor, ...]:
        """Return the outputs of all rows [N, ...], in the shape of the tokens."""
        outputs: list[Tensor] = []
        rows: list[Tensor] = []
        for tile in self.tiles(inputs[0]):
            first = not outputs
            # The first tile shows which outputs have a gradient.
            with torch.set_grad_enabled(differentiate and first):
                parts = self([x[tile] for x in (_leaves(inputs) if first else inputs)])
            if first:
                self.differentiable = [y.requires_grad for y in parts]
                # Not views of what has rows: FSDP warns of views.
                outputs = [_empty(y, self.lead) for y in parts]
                rows = [self.rows(y) for y in outputs]
            for output, part in zip(rows, parts, strict=True):
                if output.ndim:
                    output[tile] = part.detach()
                else:
                    output += part.detach()
        return tuple(outputs)

    def rows(self, values: Tensor) -> Tensor:
        """Return an output, or its gradient, as rows [N, ...]; a sum as it is."""
        return values.flatten(0, len(self.lead) - 1) if values.ndim else values

    def backward(
        self,
        inputs: Sequence[Tensor],
        upstream: Sequence[Tensor | None],
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        """Return the gradients of inputs [N, ...] and of the parameters, None if not needed."""
        parameters = self.parameters()
        everything = [*inputs, *parameters]
        upstream = [None if g is None else self.rows(g) for g in upstream]
        wanted = [i for i, needed in enumerate(needs) if needed]
        grads: list[Tensor | None] = [
            torch.zeros_like(x) if needed and i < len(inputs) else None
            for i, (x, needed) in enumerate(zip(everything, needs, strict=True))
        ]
        for tile in self.tiles(inputs[0]):
            leaves = [
                x[tile].detach().requires_grad_(needed)
                for x, needed in zip(inputs, needs[: len(inputs)], strict=True)
            ]
            with torch.enable_grad():
                outputs = self(leaves)
            used = [
                (y, (g if y.ndim == 0 else g[tile]).to(y.dtype))
                for y, g in zip(outputs, upstream, strict=True)
                if g is not None and y.requires_grad
            ]
            if not used:
                continue
            results, gradients = zip(*used, strict=True)
            sources = [(leaves + parameters)[i] for i in wanted]
            found = torch.autograd.grad(results, sources, gradients, allow_unused=True)
            for i, gradient in zip(wanted, found, strict=True):
                if gradient is None:
                    continue
                if i < len(inputs):
                    grads[i][tile] = gradient
                else:
                    grads[i] = accumulate(grads[i], gradient)
        return [
            None if not needed else torch.zeros_like(x) if g is None else g.to(x.dtype)
            for needed, x, g in zip(needs, everything, grads, strict=True)
        ]


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function: _Function, differentiate: bool, *tensors: Tensor) -> Any:
        count = 1 + len(function.names)
        inputs, device = tensors[:count], tensors[0].device
        ctx.function = function
        ctx.save_for_backward(*inputs)
        ctx.random, ctx.autocast = rng_state(device), autocast_state(device.type)
        ctx.variables = copy_context()  # the recomputation runs in the context of this forward
        # As an argument: inside of an autograd function gradients are always off.
        outputs = function.forward(inputs, differentiate)
        ctx.set_materialize_grads(False)
        pairs = zip(outputs, function.differentiable, strict=True)
        ctx.mark_non_differentiable(*(y for y, flows in pairs if not flows))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream: Tensor | None):
        inputs = ctx.saved_tensors
        with replayed(inputs[0].device, ctx.random), ctx.autocast:
            grads = ctx.variables.run(
                ctx.function.backward, inputs, upstream, ctx.needs_input_grad[2:]
            )
        return None, None, *grads


def _leaves(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the inputs as if all floating-point ones needed a gradient."""
    return [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]


def _empty(part: Tensor, lead: torch.Size) -> Tensor:
    """Return the memory of an output of tokens [...], of which `part` is the first tile's."""
    if part.ndim == 0:
        return torch.zeros((), dtype=torch.float64, device=part.device)
    return part.new_empty(*lead, *part.shape[1:])


def _only(outputs: list[Tensor]) -> Tensor:
    return outputs[0]
