"""Tiling: a function of rows (tokens) applied tile by tile in forward, and recomputed tile by tile
in backward.

What it makes inside lives for one tile at a time, whatever the sequence length. ALST's "TiledMLP"
(arXiv 2506.13996, section 3.1.1) is this applied to a block's MLP; here the norms around the MLP
are part of the same function.

Counting the MLP's forwards of a step: where every block is a checkpoint, it runs once in forward
and once in the tiles of backward. The recomputation of the checkpoint would run it a third time,
for an output that nothing needs: there the function only notes its input (see
`checkpointing.output_is_needed`). In segments of k blocks the outputs of the others are needed, so
that the mean is 3 - 1/k.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar, copy_context
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from titan_ulysses.memory.checkpointing import output_is_needed

_visit: ContextVar[Callable[[list[slice]], Iterable[slice]]] = ContextVar("_visit", default=iter)


def tiles(rows: int, tile_tokens: int) -> Iterable[slice]:
    """The tiles of so many rows, in order; the last one may be smaller."""
    return _visit.get()(
        [slice(start, min(start + tile_tokens, rows)) for start in range(0, rows, tile_tokens)]
    )


@contextlib.contextmanager
def override_tiles(visit: Callable[[list[slice]], Iterable[slice]]) -> Iterator[None]:
    """Let visit say which tiles are computed at all, on this thread: for who computes no values, as
    the planner.
    """
    token = _visit.set(visit)
    try:
        yield
    finally:
        _visit.reset(token)


def tile_mlp(
    mlp: nn.Module,
    before: nn.Module | None,
    after: nn.Module | None,
    *,
    tile_tokens: int,
    ends_block: bool = True,
) -> None:
    """Make mlp's forward that of `after(mlp(before(x)))`, tile by tile, and those of the norms
    around it nothing.

    In place and by instance, so parameters keep their modules and names. What the MLP returns
    besides the hidden state (router logits) is left out: None. ends_block: see `Tiled`.
    """
    mlp.forward = _TiledMLP(_Chain(before, mlp, after), tile_tokens, ends_block=ends_block)
    for norm in (before, after):
        if norm is not None:
            norm.forward = _identity


def tile_norm(norm: nn.Module, *, tile_tokens: int) -> None:
    """Make norm's forward run tile by tile: in fp32 its backward would hold several copies of all
    rows.
    """
    norm.forward = Tiled(_Chain(norm), tile_tokens, ends_block=False)


def _identity(x: Tensor) -> Tensor:
    return x


class _Chain(nn.Module):
    """Modules one after the other, as they were before their forward was replaced. Their
    parameters, nothing else.
    """

    def __init__(self, *modules: nn.Module | None):
        super().__init__()
        self.links = nn.ModuleList(module for module in modules if module is not None)
        self.returns_tuple = False  # one of them does; known from the first forward on

    def forward(self, x: Tensor) -> Tensor:
        for module in self.links:
            x = type(module).forward(module, x)
            if isinstance(x, tuple):
                self.returns_tuple, x = True, x[0]
        return x


class Tiled:
    """rows [..., h] -> fn(rows) [..., h], `tile_tokens` rows at a time: [1, n, h] to as many, in
    any shape.

    Only the rows are kept for backward. Parameters are inputs of the autograd function, and their
    gradients are accumulated over the tiles in fp32 or wider. Any number of rows; the last tile may
    be smaller. Under FSDP fn is a part of a gathered block, so that parameters are gathered and
    gradients reduced once for all tiles. Random numbers and autocast are replayed. ends_block:
    whatever follows fn in its block only adds to its output.
    """

    def __init__(self, fn: nn.Module, tile_tokens: int, *, ends_block: bool = True):
        self.fn, self.tile_tokens, self.ends_block = fn, tile_tokens, ends_block
        self.draws_random_numbers = False  # known from the first forward on
        self.dtype: torch.dtype | None = None  # of the output, likewise

    def __call__(self, rows: Tensor) -> Tensor:
        return _TiledFunction.apply(self, rows, *self.parameters())

    def parameters(self) -> list[nn.Parameter]:
        """Those that fn holds now: under FSDP the gathered ones."""
        return list(self.fn.parameters())

    def can_skip(self) -> bool:
        """Whether this is a recomputation that only needs the rows. Random numbers that others draw
        must not move.
        """
        return self.ends_block and not self.draws_random_numbers and not output_is_needed()

    def forward(self, rows: Tensor) -> Tensor:
        """fn of all rows [N, h], without gradients."""
        if self.can_skip():
            # No memory: nobody looks at it.
            return rows.new_zeros((), dtype=self.dtype).expand(rows.shape)
        before, output = _rng_state(rows.device), None
        for tile in tiles(len(rows), self.tile_tokens):
            y = self.fn(rows[None, tile])
            if output is None:
                output = y.new_empty(rows.shape)
            output[tile] = y.view(-1, rows.shape[1])
        if output is None:  # no rows
            return torch.empty_like(rows)
        self.dtype = output.dtype
        self.draws_random_numbers |= (
            before.numpy().tobytes() != _rng_state(rows.device).numpy().tobytes()
        )
        return output

    def backward(
        self, rows: Tensor, upstream: Tensor, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """Gradients of rows [N, h] and of the parameters, where needed."""
        inputs = [rows, *self.parameters()]
        wanted = [i for i, needed in enumerate(needs) if needed]
        grads: list[Tensor | None] = [None] * len(inputs)
        if needs[0]:
            grads[0] = torch.empty_like(rows)
        for tile in tiles(len(rows), self.tile_tokens):
            x = rows[None, tile].detach().requires_grad_(needs[0])
            with torch.enable_grad():
                y = self.fn(x).view(x.shape)
            sources = [x if i == 0 else inputs[i] for i in wanted]
            found = torch.autograd.grad(y, sources, upstream[None, tile], allow_unused=True)
            for i, gradient in zip(wanted, found, strict=True):
                if i == 0:
                    grads[0][tile] = gradient[0]
                elif gradient is not None:
                    grads[i] = _accumulate(grads[i], gradient, alone=len(rows) <= self.tile_tokens)
        return [
            None if not needed else torch.zeros_like(x) if g is None else g.to(x.dtype)
            for needed, x, g in zip(needs, inputs, grads, strict=True)
        ]


class _TiledMLP(Tiled):
    """As transformers calls it: some MLPs return a tuple."""

    def __call__(self, hidden: Tensor) -> Any:
        output = super().__call__(hidden)
        return (output, None) if self.fn.returns_tuple else output


class _TiledFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tiled: Tiled, rows: Tensor, *parameters: Tensor) -> Tensor:
        ctx.tiled = tiled
        ctx.save_for_backward(rows)
        ctx.random = _rng_state(rows.device)
        ctx.autocast = _autocast_state(rows.device.type)
        # What is computed again belongs to this forward (see model/router.py)
        ctx.variables = copy_context()
        return tiled.forward(rows.flatten(0, -2)).view(rows.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        (rows,) = ctx.saved_tensors
        replayed = (
            _replayed(rows.device, ctx.random)
            if ctx.tiled.draws_random_numbers
            else contextlib.nullcontext()
        )
        with replayed, ctx.autocast:
            inputs = rows.flatten(0, -2), upstream.flatten(0, -2), ctx.needs_input_grad[1:]
            grads = ctx.variables.run(ctx.tiled.backward, *inputs)
        if grads[0] is not None:
            grads[0] = grads[0].view(rows.shape)
        return None, *grads


def _accumulate(total: Tensor | None, gradient: Tensor, *, alone: bool) -> Tensor:
    """The sum in fp32 or wider: in bf16, sums over 64 tiles would cost six times the error. One
    tile is its own sum.
    """
    if total is None:
        wide = gradient.dtype if alone else torch.promote_types(gradient.dtype, torch.float32)
        return gradient.to(wide)
    return total.add_(gradient)


def _rng_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextlib.contextmanager
def _replayed(device: torch.device, state: Tensor) -> Iterator[None]:
    """Draw the random numbers that followed state; afterwards go on as if none had been drawn."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(
            state
        )
        yield


def _autocast_state(device_type: str) -> torch.autocast:
    return torch.autocast(
        device_type,
        dtype=torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
        cache_enabled=torch.is_autocast_cache_enabled(),
    )
