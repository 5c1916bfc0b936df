"""Tiling: apply a function of rows (tokens) tile by tile, and recompute it so in backward.

The intermediate values of the function exist for one tile at a time, whatever the sequence length.
ALST's "TiledMLP" (arXiv 2506.13996, section 3.1.1) applies this to the MLP of a block. Here the
norms around the MLP are part of the same function.

How often the MLP runs per step: if every block is a checkpoint, it runs once in forward and once in
the tiles of backward. The recomputation of the checkpoint would run it a third time, for an output
that is not needed. There the function only saves its input (see `checkpointing.output_is_needed`).
In a segment of k blocks, the recomputation needs the output of every block but the last, so the MLP
runs 3 - 1/k times on average.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from titan_ulysses.distributed.parts import visited, visited_with_next
from titan_ulysses.distributed.sequence import current_chunks
from titan_ulysses.memory.checkpointing import output_is_needed
from titan_ulysses.memory.replay import (
    accumulate,
    add_gradients,
    autocast_state,
    replayed,
    rng_state,
    stand_ins,
)

if TYPE_CHECKING:
    from titan_ulysses.memory.stream_offload import SequenceStore


def tiles(rows: int, tile_tokens: int) -> Iterable[slice]:
    """Return the tiles of so many rows as slices, in order; the last one may be smaller."""
    return visited(_tiles(rows, tile_tokens))


def tiles_with_next(rows: int, tile_tokens: int) -> Iterable[tuple[slice, slice | None]]:
    """Return the tiles of so many rows, each with the one after it; None after the last."""
    return visited_with_next(_tiles(rows, tile_tokens))


def _tiles(rows: int, tile_tokens: int) -> list[slice]:
    return [slice(start, min(start + tile_tokens, rows)) for start in range(0, rows, tile_tokens)]


def tile_mlp(
    mlp: nn.Module,
    before: nn.Module | None,
    after: nn.Module | None,
    *,
    tile_tokens: int,
    ends_block: bool = True,
) -> None:
    """Make mlp's forward compute `after(mlp(before(x)))` tile by tile, and both norms the identity.

    The `forward` of these module instances is replaced in place, so parameters keep their modules
    and names. An MLP that returns a second value besides the hidden state (router logits) returns
    None for it. ends_block: see `Tiled`.
    """
    mlp.forward = _TiledMLP(_Chain(before, mlp, after), tile_tokens, ends_block=ends_block)
    for norm in (before, after):
        if norm is not None:
            norm.forward = _identity


def tile_norm(norm: nn.Module, *, tile_tokens: int) -> None:
    """Make norm's forward run tile by tile.

    Norms compute in fp32, and an untiled backward would hold several fp32 copies of all rows.
    """
    norm.forward = Tiled(_Chain(norm), tile_tokens, ends_block=False)


def _identity(x: Tensor) -> Tensor:
    return x


class _Chain(nn.Module):
    """Modules in sequence, each with the forward of its class.

    It calls the class's forward, because that of the instance may be replaced by a tiled one. The
    parameters of the chain are those of its modules.
    """

    def __init__(self, *modules: nn.Module | None):
        super().__init__()
        self.links = nn.ModuleList(module for module in modules if module is not None)
        self.returns_tuple = False  # whether a module returns a tuple; set by the first forward

    def forward(self, x: Tensor) -> Tensor:
        for module in self.links:
            x = type(module).forward(module, x)
            if isinstance(x, tuple):
                self.returns_tuple, x = True, x[0]
        return x


class Tiled:
    """A function rows [..., h] -> fn(rows) [..., h] that runs fn on `tile_tokens` rows at a time.

    fn gets [1, n, h] and returns as many elements in any shape. Any number of rows is allowed; the
    last tile may be smaller. Only the rows are kept for backward. Parameters are inputs of the
    autograd function, and their gradients are accumulated over the tiles in fp32 or wider. Under
    FSDP fn is part of a gathered block, so parameters are gathered and gradients reduced once for
    all tiles. The recomputation replays random numbers and autocast.

    ends_block: whether everything that follows fn in its block only adds to fn's output, so that
    backward does not need that output.
    """

    def __init__(self, fn: nn.Module, tile_tokens: int, *, ends_block: bool = True):
        self.fn, self.tile_tokens, self.ends_block = fn, tile_tokens, ends_block
        self.draws_random_numbers = False  # whether fn does; set by the first forward
        self.dtype: torch.dtype | None = None  # dtype of the output; set by the first forward
        self.sequences: SequenceStore | None = None
        """Where rows and output are if they are off the device (see `stream_offload.py`)."""

    def __call__(self, rows: Tensor) -> Tensor:
        parameters = self.parameters()
        inputs = parameters if self.sequences is None else stand_ins(parameters)
        return _TiledFunction.apply(self, parameters, rows, *inputs)

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that fn holds now; under FSDP these are the gathered ones."""
        return list(self.fn.parameters())

    def device_of(self, rows: Tensor) -> torch.device:
        """Return where fn computes."""
        return rows.device if self.sequences is None else self.sequences.device

    def can_skip(self) -> bool:
        """Return whether this is a recomputation that needs only the rows.

        A function that draws random numbers is not skipped: the numbers drawn after it in the block
        would no longer be those of the first forward.
        """
        return self.ends_block and not self.draws_random_numbers and not output_is_needed()

    def forward(self, rows: Tensor) -> Tensor:
        """Return fn of all rows [N, h], without gradients."""
        if self.can_skip():
            # An expanded scalar, which takes no memory. Its values are never read.
            return rows.new_zeros((), dtype=self.dtype).expand(rows.shape)
        device, output = self.device_of(rows), None
        before = rng_state(device)
        for tile, then in tiles_with_next(len(rows), self.tile_tokens):
            y = self.fn(self._read(rows, tile, then)[None])
            if output is None:
                output = self._empty(rows, y.dtype)
            self._write(output[tile], y.view(-1, rows.shape[1]))
        if output is None:  # no rows
            return torch.empty_like(rows)
        self.dtype = output.dtype
        self.draws_random_numbers |= before.numpy().tobytes() != rng_state(device).numpy().tobytes()
        return output

    def backward(
        self, rows: Tensor, upstream: Tensor, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """Return the gradients of rows [N, h] and of the parameters, None for those not needed."""
        inputs = [rows, *self.parameters()]
        wanted = [i for i, needed in enumerate(needs) if needed]
        grads: list[Tensor | None] = [None] * len(inputs)
        if needs[0]:
            grads[0] = self._empty(rows, rows.dtype)
        for tile, then in tiles_with_next(len(rows), self.tile_tokens):
            x = self._read(rows, tile, then)[None].detach().requires_grad_(needs[0])
            with torch.enable_grad():
                y = self.fn(x).view(x.shape)
            sources = [x if i == 0 else inputs[i] for i in wanted]
            gradient_of_y = self._read(upstream, tile, then)[None]
            found = torch.autograd.grad(y, sources, gradient_of_y, allow_unused=True)
            for i, gradient in zip(wanted, found, strict=True):
                if i == 0:
                    self._write(grads[0][tile], gradient[0])
                elif gradient is not None:
                    grads[i] = accumulate(grads[i], gradient, alone=len(rows) <= self.tile_tokens)
        return [
            None if not needed else torch.zeros_like(x) if g is None else g.to(x.dtype)
            for needed, x, g in zip(needs, inputs, grads, strict=True)
        ]

    def _read(self, rows: Tensor, tile: slice, then: slice | None) -> Tensor:
        """Return a tile of rows on the device; `then` is the tile that is read after it."""
        if self.sequences is None:
            return rows[tile]
        return self.sequences.read(rows[tile], None if then is None else rows[then])

    def _write(self, tile: Tensor, values: Tensor) -> None:
        if self.sequences is None:
            tile.copy_(values)
        else:
            self.sequences.write(tile, values)

    def _empty(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        if self.sequences is None or len(current_chunks.get()) < 2:
            return torch.empty_like(rows, dtype=dtype)
        return self.sequences.empty(rows.shape, dtype)


class _TiledMLP(Tiled):
    """A tiled MLP that returns a tuple if the original one does, as transformers expects."""

    def __call__(self, hidden: Tensor) -> Any:
        output = super().__call__(hidden)
        return (output, None) if self.fn.returns_tuple else output


class _TiledFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, tiled: Tiled, parameters: list[nn.Parameter], rows: Tensor, *inputs: Tensor
    ) -> Tensor:
        """inputs: the parameters, or their stand-ins where rows are off the device."""
        ctx.tiled, ctx.parameters = tiled, parameters
        ctx.save_for_backward(rows)
        ctx.device = tiled.device_of(rows)
        ctx.random = rng_state(ctx.device)
        ctx.autocast = autocast_state(ctx.device.type)
        # The recomputation in backward runs in the context of this forward (see model/router.py).
        ctx.variables = copy_context()
        return tiled.forward(rows.flatten(0, -2)).view(rows.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        (rows,) = ctx.saved_tensors
        same_numbers = (
            replayed(ctx.device, ctx.random)
            if ctx.tiled.draws_random_numbers
            else contextlib.nullcontext()
        )
        with same_numbers, ctx.autocast:
            inputs = rows.flatten(0, -2), upstream.flatten(0, -2), ctx.needs_input_grad[2:]
            grads = ctx.variables.run(ctx.tiled.backward, *inputs)
        if grads[0] is not None:
            grads[0] = grads[0].view(rows.shape)
        if ctx.tiled.sequences is not None:
            add_gradients(ctx.parameters, grads)
        return None, None, *grads
