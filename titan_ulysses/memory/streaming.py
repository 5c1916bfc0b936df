"""Streaming: a block works through the sequence chunk by chunk, forward and backward.

What a block holds beside its input and its output then has the size of a chunk, whatever the length
of the sequence. Only the keys and values of one layer are of the whole sequence, for the heads of
this rank, or of the part of it that is still read (`sequence.Reach`), and the states of linear
attention at the borders of chunks (`ulysses/states.py`). The block itself is unmodified: it is
called with the slices of one chunk, and its attention (`ulysses/streamed.py`) remembers the keys
and values of the chunks before.

    forward     chunk 0: keys, attention, MLP -> output 0
                chunk 1: keys, attention to chunks 0 and 1, MLP -> output 1, and so on
    backward    keys of chunks 0, 1, ..., C - 2, from the block's input
                chunk C - 1: forward again as a graph; its gradients, those of all keys it saw too
                chunk C - 2: forward again; now the gradients of its own keys are complete, because
                no earlier query sees them; and so on to chunk 0

Where a window or the end of a document hides keys, the keys of a chunk are computed again when the
first chunk that reads them comes, and forgotten after the chunk's own turn.

The result is exact. Only the block's input is kept, which is what `checkpointing.py` keeps too:
where the block is the last of a segment, recomputing the segment does not run it. The gradient of
the input is written where the gradient of the output stood. Gradients of parameters, keys and
values are summed in fp32 or wider.

With C chunks and k blocks per segment, a block's MLP and attention run forward 3 - 1/k times per
step (attention once where its outputs are kept), and its projections of queries, keys and values
(C - 1)/C times more. On P > 1 ranks a chunk takes two all-to-alls in forward, which are repeated
where a forward is. Backward takes two more, and one for the keys of each chunk that later ones
read, which are all but the last: per step and block 2C * (3 - 1/k) + 2C + C - 1. FSDP gathers the
parameters of a block twice and reduces its gradients once, whatever C is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from contextvars import copy_context
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.parts import visited, visited_with_next
from titan_ulysses.distributed.sequence import Chunk, KeysKnown, Reach, running
from titan_ulysses.memory.checkpointing import block_memo, output_is_needed, without_output
from titan_ulysses.memory.offload import OffloadedTensor, Store
from titan_ulysses.memory.replay import (
    accumulate,
    add_gradients,
    autocast_state,
    replayed,
    rng_state,
    stand_ins,
)
from titan_ulysses.memory.stream_offload import SequenceStore

KeepAttention = Literal["none", "auto", "all"]


def stream_blocks(
    blocks: nn.ModuleList,
    *,
    keep_attention: KeepAttention = "none",
    store: Store | None = None,
    sequences: SequenceStore | None = None,
) -> None:
    """Make each block work through the chunks that its keyword `ulysses` says, in place.

    keep_attention: whether the outputs and log-sum-exps of attention are kept from forward to
    backward: "all" of them, or "auto", as many as store has room for. Without a store, "all" stay
    on the device, and "auto" keeps none. sequences: where the tensors of the whole sequence are;
    None: on the device.

    The `forward` of the instances is replaced, so parameters keep their names, and FSDP's hooks run
    around all chunks. A sequence of one chunk is computed as before.
    """
    for block in blocks:
        block.forward = StreamedBlock(block, keep_attention, store, sequences)


class StreamedBlock:
    """The forward of a block, chunk by chunk."""

    def __init__(
        self,
        block: nn.Module,
        keep_attention: KeepAttention,
        store: Store | None,
        sequences: SequenceStore | None,
    ):
        self.block, self.forward = block, block.forward
        self.keep_attention, self.store, self.sequences = keep_attention, store, sequences
        self.hold: Callable[[Sequence[Tensor]], Any] = lambda tensors: None
        """Called with tensors that are kept on the device. Its result is kept as long as they are.
        The planner sets it, to hold as much for the chunks that it does not compute.
        """
        self.draws_random_numbers = False  # whether the block does; set by the first forward
        self.dtype: torch.dtype | None = None  # dtype of the output; set by the first forward
        # What it returns beside its output, if it returns a tuple; set by the first forward.
        self.beside: tuple[None, ...] | None = None

    def __call__(self, hidden: Tensor, *args, **kwargs) -> Any:
        chunks = kwargs["ulysses"].chunks
        if len(chunks) == 1:
            return self.forward(hidden, *args, **kwargs)
        states = None
        if torch.is_grad_enabled():
            states = block_memo().setdefault(
                "states", _KeptTensors("states", self.store, always=True)
            )
            if (kept := self._kept()) is not None:
                chunks = [replace(chunk, kept=kept) for chunk in chunks]
        if self.sequences is not None:
            chunks = [replace(chunk, store=self.sequences) for chunk in chunks]
        device = hidden.device if self.sequences is None else self.sequences.device
        call = _Call(self, hidden.shape, device, chunks, states, args, kwargs)
        parameters = call.parameters if self.sequences is None else stand_ins(call.parameters)
        output = _StreamedFunction.apply(call, hidden, *call.differentiable(), *parameters)
        return output if self.beside is None else (output, *self.beside)

    def _kept(self) -> _KeptTensors | None:
        """Return where attention keeps its outputs, or None if it keeps none."""
        if self.keep_attention == "none" or self.keep_attention == "auto" and self.store is None:
            return None
        always = self.keep_attention == "all"
        new = _KeptTensors("attention", self.store, self.hold, always=always)
        return block_memo().setdefault("attention", new)

    def read(self, whole: Tensor, chunk: Chunk, then: Chunk | None, dim: int = 1) -> Tensor:
        """Return a chunk's part of a tensor of the whole sequence, on the device.

        then: the chunk that is read next. dim: the dimension of tokens.
        """
        part = whole.narrow(dim, *_range(chunk.local))
        if self.sequences is None:
            return part
        return self.sequences.read(
            part, None if then is None else whole.narrow(dim, *_range(then.local))
        )

    def write(self, whole: Tensor, chunk: Chunk, values: Tensor) -> None:
        """Write a chunk's part of a tensor of the whole sequence."""
        if self.sequences is None:
            whole[:, chunk.local] = values
        else:
            self.sequences.write(whole[:, chunk.local], values)

    def empty(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a tensor of the whole sequence, as `like` [B, T, h]."""
        if self.sequences is None:
            return torch.empty_like(like, dtype=dtype)
        return self.sequences.empty(like.shape, dtype)

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the block holds now; under FSDP, the gathered ones."""
        return list(self.block.parameters())


class _KeptTensors:
    """Tensors that wait for backward, in a store or on the device (see `sequence.Kept`)."""

    def __init__(
        self,
        kind: str,
        store: Store | None,
        hold: Callable[[Sequence[Tensor]], Any] = lambda tensors: None,
        *,
        always: bool,
    ):
        self._kind, self._store, self._hold, self._always = kind, store, hold, always
        self._tensors: dict[Any, list[Tensor | OffloadedTensor]] = {}
        self._held: dict[Any, Any] = {}

    def put(self, key: Any, tensors: Sequence[Tensor]) -> None:
        store = self._store
        if store is None:
            self._tensors[key], self._held[key] = list(tensors), self._hold(tensors)
        elif self._always or store.has_room(sum(x.numel() * x.element_size() for x in tensors)):
            self._tensors[key] = [
                store.keep(x.detach(), f"{self._kind} {i}") for i, x in enumerate(tensors)
            ]

    def take_all(self) -> dict[Any, Sequence[Tensor]]:
        """Return all that was put, by key, and keep it no longer."""
        return {key: self.get(key, last=True) or () for key in list(self._tensors)}

    def get(self, key: Any, *, last: bool) -> list[Tensor] | None:
        if key not in self._tensors:
            return None
        tensors = self._tensors[key]
        if last:
            del self._tensors[key]
            self._held.pop(key, None)
        return [self._store.get(x) if isinstance(x, OffloadedTensor) else x for x in tensors]


class _Call:
    """One call of a streamed block: its arguments, and what its backward needs."""

    def __init__(
        self,
        streamed: StreamedBlock,
        shape: torch.Size,
        device: torch.device,
        chunks: list[Chunk],
        states: _KeptTensors | None,
        args: tuple,
        kwargs: dict[str, Any],
    ):
        self.streamed, self.chunks, self.states = streamed, chunks, states
        self.leaves, self.spec = tree_flatten((args, kwargs))
        self.dims = [self._token_dim(leaf, shape) for leaf in self.leaves]
        self.sources = [
            i for i, x in enumerate(self.leaves) if isinstance(x, Tensor) and x.requires_grad
        ]
        self.parameters = streamed.parameters()
        self.device = device
        """that the block computes on"""
        self.random: list[Tensor] = []
        self.reach: Reach | None = None  # what the block's attention reads; set by the forward

    def _token_dim(self, leaf: Any, shape: torch.Size) -> int | None:
        """Return the dimension of an argument's tokens, or None if it has none."""
        if not isinstance(leaf, Tensor) or shape[1] not in leaf.shape:
            return None
        if leaf.ndim == 1:
            return 0
        if leaf.shape[1] == shape[1] and leaf.shape[0] in (1, shape[0]):
            return 1
        raise UserError(
            f"memory.stream_chunk_tokens: {type(self.streamed.block).__name__} takes a tensor of "
            f"{list(leaf.shape)}, whose dimension of tokens is not known. Set "
            'memory.stream_chunk_tokens = "off".'
        )

    def differentiable(self) -> list[Tensor]:
        """Return the arguments beside the hidden states that gradients may flow to."""
        return [self.leaves[i] for i in self.sources]

    def arguments(
        self, chunk: Chunk, then: Chunk | None
    ) -> tuple[tuple, dict[str, Any], list[Tensor]]:
        """Return the arguments of a chunk, and those of them that `differentiable` has whole.

        then: the chunk whose arguments are needed next.
        """
        leaves, sources = [], []
        for leaf, dim in zip(self.leaves, self.dims, strict=True):
            if isinstance(leaf, Tensor):
                needs_grad, part = leaf.requires_grad, leaf.detach()
                if dim is not None:
                    part = self.streamed.read(part, chunk, then, dim)
                leaf = part.requires_grad_(needs_grad)
                if needs_grad:
                    sources.append(leaf)
            leaves.append(leaf)
        args, kwargs = tree_unflatten(leaves, self.spec)
        return args, kwargs, sources

    # --- forward ----------------------------------------------------------------------------------

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the block's output [B, T, h], without gradients."""
        streamed = self.streamed
        if not output_is_needed() and streamed.dtype is not None:
            # An expanded scalar, which takes no memory. Its values are never read.
            return hidden.new_zeros((), dtype=streamed.dtype).expand(hidden.shape)
        memory, states = {}, {}
        output = None
        for chunk, then in visited_with_next(self.chunks, "growing"):
            self.random.append(rng_state(self.device))
            with running(replace(chunk, memory=memory, states=states)):
                x = streamed.read(hidden, chunk, then)
                y = self.run(x, *self.arguments(chunk, then)[:2])
            if output is None:
                output = streamed.empty(hidden, y.dtype)
            streamed.write(output, chunk, y)
        self.reach = _common(memory, self.chunks)
        streamed.dtype = output.dtype
        if self.states is not None:
            for layer, tensors in states.items():
                self.states.put(layer, tensors)
        first, last = self.random[0], rng_state(self.device)
        streamed.draws_random_numbers |= first.numpy().tobytes() != last.numpy().tobytes()
        if not streamed.draws_random_numbers:
            self.random = []
        return output

    def run(self, hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """Call the original block with the arguments of a chunk."""
        output = self.streamed.forward(hidden, *args, **kwargs)
        if isinstance(output, tuple) and all(other is None for other in output[1:]):
            output, *others = output
            self.streamed.beside = tuple(others)
        if not isinstance(output, Tensor):
            raise UserError(
                f"memory.stream_chunk_tokens: {type(self.streamed.block).__name__} returns more "
                'than its hidden state. Set memory.stream_chunk_tokens = "off".'
            )
        return output

    # --- backward ---------------------------------------------------------------------------------

    def backward(
        self, hidden: Tensor, upstream: Tensor, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """Return the gradients of hidden, `differentiable` and parameters, None if not needed.

        The gradient of hidden [B, T, h] takes the place of upstream [B, T, h]. Off the device,
        those of parameters have been added to them, and are None.
        """
        streamed = self.streamed
        memory: dict[Any, Any] = {}
        if not _can_be_written(upstream, hidden):
            given, upstream = upstream, streamed.empty(hidden, hidden.dtype)
            for chunk in visited(self.chunks):
                streamed.write(upstream, chunk, streamed.read(given, chunk, None))
        like = [hidden, *self.differentiable(), *self.parameters]
        wanted = [i for i, needed in enumerate(needs) if needed]
        totals: list[Tensor | None] = [None] * len(like)
        totals[0] = upstream
        states = self.states.take_all() if self.states is not None else {}
        for chunk, then in visited_with_next(self.chunks[::-1], "shrinking"):
            chunk = replace(chunk, states=states)
            self._compute_keys(hidden, chunk, memory)
            y, inputs = self._graph(hidden, chunk, then, memory, needs_input=needs[0])
            inputs += self.parameters
            gradient_of_y = streamed.read(upstream, chunk, then)
            found = torch.autograd.grad(
                y, [inputs[i] for i in wanted], gradient_of_y, allow_unused=True
            )
            del y, inputs
            for i, gradient in zip(wanted, found, strict=True):
                if i == 0:
                    streamed.write(upstream, chunk, gradient)
                elif gradient is not None:
                    totals[i] = self._add(totals[i], gradient, i - 1, chunk)
        for i in wanted:
            if totals[i] is None:
                totals[i] = torch.zeros_like(like[i])
        if streamed.sequences is not None:
            add_gradients(self.parameters, totals)
            if not streamed.sequences.has(hidden):  # the decoder has made it
                streamed.sequences.finish()
        return [
            None if total is None or not needed else total.to(x.dtype)
            for needed, x, total in zip(needs, like, totals, strict=True)
        ]

    def _compute_keys(self, hidden: Tensor, reader: Chunk, memory: dict[Any, Any]) -> None:
        """Let the block's attention know the earlier keys that a chunk reads, and no later one.

        The last chunk reads most of them, or all. Its own keys are not among them.
        """
        stop = min([reader.index, *map(self._first_read, self._next(reader))])
        for chunk, then in visited_with_next(self.chunks[self._first_read(reader) : stop]):
            with (
                running(self._in_backward(chunk, "keys", memory, reader=reader.whole)),
                self._replayed(chunk),
                torch.no_grad(),
                suppress(KeysKnown),
            ):
                x = self.streamed.read(hidden, chunk, then)
                self.run(x, *self.arguments(chunk, then)[:2])

    def _first_read(self, chunk: Chunk) -> int:
        """Return the index of the first chunk of which a chunk reads keys."""
        return chunk.index if self.reach is None else self.reach.of(chunk.whole).start // chunk.size

    def _next(self, chunk: Chunk) -> list[Chunk]:
        """Return the chunk after this one, if there is one."""
        return self.chunks[chunk.index + 1 : chunk.index + 2]

    def _in_backward(self, chunk: Chunk, goal: Any, memory: dict[Any, Any], **more: Any) -> Chunk:
        return replace(chunk, goal=goal, memory=memory, reach=self.reach, **more)

    def _graph(
        self,
        hidden: Tensor,
        chunk: Chunk,
        then: Chunk | None,
        memory: dict[Any, Any],
        *,
        needs_input: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        """Compute a chunk again: its output, and the inputs that it can be differentiated by.

        then: the chunk that is computed next.
        """
        x = self.streamed.read(hidden, chunk, then).detach().requires_grad_(needs_input)
        args, kwargs, sources = self.arguments(chunk, then)
        # Its keys are known if a later chunk has read them.
        known = any(self._first_read(x) <= chunk.index for x in self._next(chunk))
        with (
            running(self._in_backward(chunk, "gradient", memory, keys_known=known)),
            self._replayed(chunk),
            without_output(),
            torch.enable_grad(),
        ):
            return self.run(x, args, kwargs), [x, *sources]

    def _add(self, total: Tensor | None, gradient: Tensor, index: int, chunk: Chunk) -> Tensor:
        """Return total + a chunk's gradient by the index-th of `differentiable` and parameters."""
        source = self.sources[index] if index < len(self.sources) else None
        if source is None or (dim := self.dims[source]) is None:
            return accumulate(total, gradient)
        if total is None:
            total = torch.zeros_like(self.leaves[source])
        total.narrow(dim, *_range(chunk.local)).add_(gradient)
        return total

    def _replayed(self, chunk: Chunk) -> AbstractContextManager[None]:
        """Return a context with the random numbers of the chunk's first forward."""
        return replayed(self.device, self.random[chunk.index]) if self.random else nullcontext()


class _StreamedFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: _Call, hidden: Tensor, *inputs: Tensor) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(hidden)
        ctx.autocast = autocast_state(call.device.type)
        # What is computed again runs in the context of this forward (see model/router.py).
        ctx.variables = copy_context()
        return call.forward(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        (hidden,) = ctx.saved_tensors
        with ctx.autocast:
            return None, *ctx.variables.run(
                ctx.call.backward, hidden, upstream, ctx.needs_input_grad[1:]
            )


def _common(memory: dict[Any, Any], chunks: list[Chunk]) -> Reach | None:
    """Return what all attention of a block reads: the sequence so far, if they read differently."""
    reaches = {remembered.reach for remembered in memory.values()}
    if len(reaches) < 2:
        return next(iter(reaches), None)
    return Reach(((chunks[0].seq_len,),), None, chunks[0].size)


def _range(tokens: slice) -> tuple[int, int]:
    """Return the first of these tokens and their number, as `Tensor.narrow` takes them."""
    return tokens.start, tokens.stop - tokens.start


def _can_be_written(gradient: Tensor, like: Tensor) -> bool:
    """Return whether a gradient has memory of its own, in like's dtype, for each element."""
    return gradient.dtype == like.dtype and gradient.is_contiguous()
