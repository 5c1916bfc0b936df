"""ALST's tiled compute (arXiv 2506.13996, section 3.1): a function of hidden states, tile by tile.

A function of rows (tokens) is computed for one tile of them after the other, and each tile again in
backward. What is inside the function exists for one tile at a time, whatever the length of the
sequence. `tiled` does so for any function; `Tiled` for the MLPs and norms of a model's blocks
(ALST's "TiledMLP"), where the norms around an MLP are part of the same function.

How often an MLP runs per step: if every block is a checkpoint, it runs once in forward and once in
the tiles of backward. The recomputation of the checkpoint would run it a third time, for an output
that is not needed. There the function only saves its input (see `checkpointing.output_is_needed`).
In a segment of k blocks, the recomputation needs the output of every block but the last, so the MLP
runs 3 - 1/k times on average.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from contextvars import copy_context
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from titan_ulysses.distributed.parts import visited_with_next
from titan_ulysses.memory.checkpointing import output_is_needed
from titan_ulysses.memory.replay import accumulate, autocast_state, replayed, rng_state
from titan_ulysses.memory.sequences import ON_DEVICE, Sequences


def tiles(rows: int, tile_tokens: int) -> Iterable[slice]:
    """Return the tiles of so many rows as slices, in order; the last one may be smaller."""
    return (tile for tile, _ in tiles_with_next(rows, tile_tokens))


def tiles_with_next(rows: int, tile_tokens: int) -> Iterable[tuple[slice, slice | None]]:
    """Return the tiles of so many rows, each with the one after it; None after the last."""
    starts = range(0, rows, tile_tokens)
    return visited_with_next([slice(start, min(start + tile_tokens, rows)) for start in starts])


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
    lead = hidden.shape[:-1]
    pack: Callable[[Iterable[Tensor]], Any] = tuple
    for name, values in tokens.items():
        if values.shape[: len(lead)] != lead:
            raise ValueError(
                f"tiled: {name} is {list(values.shape)}, and hidden is {list(hidden.shape)}: both "
                f"must begin with {list(lead)}, the tokens. Bind arguments that are not per token "
                "to fn with functools.partial."
            )

    def of_tile(hidden: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        nonlocal pack
        output = fn(hidden, **dict(zip(tokens, others, strict=True)))
        if isinstance(output, Tensor):
            output, pack = (output,), lambda outputs: next(iter(outputs))
        elif hasattr(output, "_fields"):
            pack = type(output)._make
        for index, y in enumerate(output):
            if y.ndim and len(y) != len(hidden):
                raise ValueError(
                    f"tiled: output {index} of the function is {list(y.shape)} for a tile of "
                    f"{len(hidden)} tokens: return a sum over the tokens, or one entry a token."
                )
        return tuple(output)

    def held() -> list[Tensor]:
        return list(parameters.parameters() if isinstance(parameters, nn.Module) else parameters)

    outputs = _TiledCall(of_tile, tile_tokens, held, lead)(hidden, *tokens.values())
    return pack(outputs)


# --- the MLPs and norms of blocks -----------------------------------------------------------------


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
    mlp.forward = Tiled(_Chain(before, mlp, after), tile_tokens, ends_block=ends_block)
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
    """A module's function rows [..., h] -> [..., h], that runs on `tile_tokens` rows at a time.

    fn gets [1, n, h] and returns as many elements in any shape. Any number of rows is allowed; the
    last tile may be smaller. Only the rows are kept for backward. Parameters are inputs of the
    autograd function, and their gradients are accumulated over the tiles in fp32 or wider. Under
    FSDP fn is part of a gathered block, so parameters are gathered and gradients reduced once for
    all tiles. The recomputation replays random numbers and autocast. If fn is a chain that returns
    a tuple, as some MLPs do, the result is a tuple, as transformers expects.

    ends_block: whether everything that follows fn in its block only adds to fn's output, so that
    backward does not need that output.
    """

    def __init__(self, fn: nn.Module, tile_tokens: int, *, ends_block: bool = True):
        self.fn, self.tile_tokens, self.ends_block = fn, tile_tokens, ends_block
        self.draws_random_numbers = False  # whether fn does; set by the first forward
        self.dtype: torch.dtype | None = None  # dtype of the output; set by the first forward
        self.sequences = ON_DEVICE
        """How rows and output are read and written."""

    def __call__(self, rows: Tensor) -> Any:
        call = _TiledCall(
            self._of_tile,
            self.tile_tokens,
            lambda: list(self.fn.parameters()),
            rows.shape[:-1],
            self.sequences.in_use(),
        )
        call.differentiable = [True]
        # A recomputation may need only the rows. A function that draws random numbers is not
        # skipped: the numbers drawn after it in the block would no longer be those of the first
        # forward.
        if self.ends_block and not self.draws_random_numbers and not output_is_needed():
            call.skipped = self.dtype
        (output,) = call(rows)
        self.dtype = output.dtype
        self.draws_random_numbers |= call.draws_random_numbers
        return (output, None) if getattr(self.fn, "returns_tuple", False) else output

    def _of_tile(self, rows: Tensor) -> tuple[Tensor]:
        return (self.fn(rows[None]).view(rows.shape),)


# --- the autograd function ------------------------------------------------------------------------


class _TiledCall:
    """One call of a function of tiles: of_tile(*tiles of the inputs) -> a tuple of outputs."""

    def __init__(
        self,
        of_tile: Callable[..., tuple[Tensor, ...]],
        tile_tokens: int,
        parameters: Callable[[], list[Tensor]],
        lead: torch.Size,
        sequences: Sequences = ON_DEVICE,
    ):
        """parameters returns those of now; under FSDP these are the gathered ones. lead: the shape
        of the tokens.
        """
        self.of_tile, self.tile_tokens, self.parameters = of_tile, tile_tokens, parameters
        self.lead, self.sequences = lead, sequences
        self.differentiable: list[bool] = []
        """Which outputs have a gradient; if it is not known before, the first tile shows it."""
        self.skipped: torch.dtype | None = None
        """The dtype of an output that is not needed; None: it is."""
        self.draws_random_numbers = False

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        rows = [x.flatten(0, len(self.lead) - 1) for x in inputs]
        self.held = self.parameters()
        # As an argument: inside of an autograd function gradients are always off.
        differentiate = torch.is_grad_enabled()
        given = self.sequences.inputs_for(self.held)
        return _TiledFunction.apply(self, differentiate, len(rows), *rows, *given)

    def rows(self, values: Tensor) -> Tensor:
        """Return an output, or its gradient, as rows [N, ...]; a sum as it is."""
        return values.flatten(0, len(self.lead) - 1) if values.ndim else values

    def tiles(self, rows: Tensor) -> Iterable[tuple[slice, slice | None]]:
        # At least one tile, so that the outputs of no rows have their shapes too.
        return tiles_with_next(max(1, len(rows)), self.tile_tokens)

    def forward(self, inputs: Sequence[Tensor], differentiate: bool) -> tuple[Tensor, ...]:
        """Return the outputs of all rows [N, ...], in the shape of the tokens."""
        if self.skipped is not None:
            # An expanded scalar, which takes no memory. Its values are never read.
            nothing = inputs[0].new_zeros((), dtype=self.skipped)
            return (nothing.expand(*self.lead, *inputs[0].shape[1:]),)
        outputs: list[Tensor] = []
        device = self.sequences.device_of(inputs[0])
        before = rng_state(device)
        for tile, then in self.tiles(inputs[0]):
            parts = [self.sequences.read(x, tile, then, dim=0) for x in inputs]
            probes = differentiate and not self.differentiable
            if probes:  # as if all floating-point inputs needed a gradient
                parts = [x.detach().requires_grad_(x.is_floating_point()) for x in parts]
            with torch.set_grad_enabled(probes):
                results = self.of_tile(*parts)
            if not self.differentiable:
                self.differentiable = [y.requires_grad for y in results]
            # Not views of what has rows: FSDP warns of views.
            outputs = outputs or [self._empty(y) for y in results]
            for output, y in zip(outputs, results, strict=True):
                if output.ndim:
                    self.sequences.write(self.rows(output), tile, y.detach(), dim=0)
                else:
                    output += y.detach()
        # By their bytes: the planner's fake mode takes no real tensors.
        self.draws_random_numbers = before.numpy().tobytes() != rng_state(device).numpy().tobytes()
        return tuple(outputs)

    def _empty(self, part: Tensor) -> Tensor:
        """Return the memory of an output of all tokens, of which `part` is the first tile's."""
        if part.ndim == 0:
            return torch.zeros((), dtype=torch.float64, device=part.device)
        return self.sequences.empty(part, (*self.lead, *part.shape[1:]))

    def backward(
        self, inputs: Sequence[Tensor], upstream: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """Return the gradients of inputs [N, ...] and of the parameters, None if not needed."""
        count, parameters, sequences = len(inputs), self.parameters(), self.sequences
        everything = [*inputs, *parameters]
        wanted = [i for i, needed in enumerate(needs) if needed]
        grads: list[Tensor | None] = [
            sequences.empty(x) if needed and i < count else None
            for i, (x, needed) in enumerate(zip(everything, needs, strict=True))
        ]
        for tile, then in self.tiles(inputs[0]):
            leaves = [
                sequences.read(x, tile, then, dim=0).detach().requires_grad_(needed)
                for x, needed in zip(inputs, needs[:count], strict=True)
            ]
            with torch.enable_grad():
                outputs = self.of_tile(*leaves)
            used = []
            for y, g in zip(outputs, upstream, strict=True):
                if g is not None and y.requires_grad:
                    if g.ndim:
                        g = sequences.read(self.rows(g), tile, then, dim=0)
                    used.append((y, g.to(y.dtype)))
            sources = [(leaves + parameters)[i] for i in wanted]
            found: Sequence[Tensor | None] = [None] * len(wanted)
            if used:
                results, gradients = zip(*used, strict=True)
                found = torch.autograd.grad(results, sources, gradients, allow_unused=True)
            for i, gradient in zip(wanted, found, strict=True):
                if i < count:
                    gradient = torch.zeros_like(leaves[i]) if gradient is None else gradient
                    sequences.write(grads[i], tile, gradient, dim=0)
                elif gradient is not None:
                    alone = len(inputs[0]) <= self.tile_tokens
                    grads[i] = accumulate(grads[i], gradient, alone=alone)
        return [
            None if not needed else torch.zeros_like(x) if g is None else g.to(x.dtype)
            for needed, x, g in zip(needs, everything, grads, strict=True)
        ]


class _TiledFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, call: _TiledCall, differentiate: bool, count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """tensors: `count` inputs, then the parameters, or what stands in for them."""
        inputs = tensors[:count]
        ctx.call, ctx.device = call, call.sequences.device_of(inputs[0])
        ctx.save_for_backward(*inputs)
        ctx.random, ctx.autocast = rng_state(ctx.device), autocast_state(ctx.device.type)
        # The recomputation in backward runs in the context of this forward (see model/router.py).
        ctx.variables = copy_context()
        outputs = call.forward(inputs, differentiate)
        ctx.set_materialize_grads(False)
        pairs = zip(outputs, call.differentiable, strict=True)
        ctx.mark_non_differentiable(*(y for y, flows in pairs if not flows))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream: Tensor | None):
        call = ctx.call
        same_numbers = (
            replayed(ctx.device, ctx.random)
            if call.draws_random_numbers
            else contextlib.nullcontext()
        )
        with same_numbers, ctx.autocast:
            needs = ctx.needs_input_grad[3:]
            grads = ctx.variables.run(call.backward, ctx.saved_tensors, upstream, needs)
        call.sequences.add_gradients(call.held, grads)
        return None, None, None, *grads
