"""The forward and backward of a block, chunk by chunk (see `streaming/__init__.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from contextvars import copy_context
from copy import copy
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.parts import visited, visited_with_next
from titan_ulysses.distributed.sequence import Chunk, computing
from titan_ulysses.memory.checkpointing import block_memo, output_is_needed
from titan_ulysses.memory.offload import Store
from titan_ulysses.memory.replay import accumulate, autocast_state, replayed, rng_state
from titan_ulysses.memory.sequences import Sequences, SequenceStore
from titan_ulysses.streaming.chunks import (
    ChunkBackward,
    ChunkForward,
    ChunkKeys,
    KeptTensors,
    Sweep,
)
from titan_ulysses.streaming.keys import AttentionSpan

KeepAttention = Literal["none", "auto", "all"]


def stream_blocks(
    blocks: nn.ModuleList,
    sequences: Sequences,
    *,
    keep_attention: KeepAttention = "none",
    store: Store | None = None,
) -> None:
    """Make each block work through the chunks that its keyword `ulysses` says, in place.

    sequences: where the tensors of the whole sequence are. keep_attention: whether the outputs and
    log-sum-exps of attention are kept from forward to backward: "all" of them, or "auto", as many
    as store has room for. Without a store, "all" stay on the device, and "auto" keeps none.

    The `forward` of the instances is replaced, so parameters keep their names, and FSDP's hooks run
    around all chunks. A sequence of one chunk is computed as before.
    """
    for block in blocks:
        block.forward = StreamedBlock(block, sequences, keep_attention, store)


class StreamedBlock:
    """The forward of a block, chunk by chunk."""

    def __init__(
        self,
        block: nn.Module,
        sequences: Sequences,
        keep_attention: KeepAttention,
        store: Store | None,
    ):
        self.block, self.forward = block, block.forward
        self.sequences, self.keep_attention, self.store = sequences, keep_attention, store
        self.hold: Callable[[Sequence[Tensor]], Any] = lambda tensors: None
        """Called with outputs of attention that are kept on the device. Its result is kept as long
        as they are. The planner sets it, to hold as much for the chunks that it does not compute.
        """
        self.draws_random_numbers = False  # whether the block does; set by the first forward
        self.dtype: torch.dtype | None = None  # dtype of the output; set by the first forward
        # If it returns a tuple: which of what follows its output are tensors, of int, and not None.
        self.extra_outputs: tuple[bool, ...] | None = None  # set by the first forward

    def __call__(self, hidden: Tensor, *args, **kwargs) -> Any:
        if len(kwargs["ulysses"].chunks) == 1:
            return self.forward(hidden, *args, **kwargs)
        call = _StreamedCall(self, hidden, args, kwargs)
        parameters = self.sequences.inputs_for(call.parameters)
        output, *extra = _StreamedFunction.apply(call, hidden, *call.differentiable(), *parameters)
        if self.extra_outputs is None:
            return output
        tensors = iter(extra)
        return (output, *(next(tensors) if x else None for x in self.extra_outputs))


class _StreamedCall:
    """One call of a streamed block: its arguments, and what its backward needs."""

    def __init__(
        self, streamed: StreamedBlock, hidden: Tensor, args: tuple, kwargs: dict[str, Any]
    ):
        self.streamed, self.sequences = streamed, streamed.sequences
        self.ulysses = kwargs["ulysses"]
        self.chunks: list[Chunk] = self.ulysses.chunks
        self.leaves, self.spec = tree_flatten((args, kwargs))
        self.dims = [self._token_dim(leaf, hidden.shape) for leaf in self.leaves]
        self.sources = [
            i for i, x in enumerate(self.leaves) if isinstance(x, Tensor) and x.requires_grad
        ]
        # Those that the block holds now; under FSDP, the gathered ones.
        self.parameters = list(streamed.block.parameters())
        self.device = self.sequences.device_of(hidden)
        """that the block computes on"""
        self.random: dict[int, Tensor] = {}
        """By chunk, the state of the random numbers before it; empty if none are drawn."""
        self.span: AttentionSpan | None = None  # what the block's attention reads; see `forward`
        self.states: KeptTensors | None = None
        """The states of layers at the borders of chunks, kept until backward."""
        self.outputs: KeptTensors | None = None
        """The outputs of attention that are kept until backward; None: they are computed again."""
        if torch.is_grad_enabled():
            memo, store, keep = block_memo(), streamed.store, streamed.keep_attention
            states = KeptTensors("states", store, always=True)
            self.states = memo.setdefault("states", states)
            if keep == "all" or keep == "auto" and store is not None:
                outputs = KeptTensors("attention", store, always=keep == "all", hold=streamed.hold)
                self.outputs = memo.setdefault("attention", outputs)

    def _token_dim(self, leaf: Any, shape: torch.Size) -> int | None:
        """Return the dimension of an argument's tokens, or None if it has none."""
        if not isinstance(leaf, Tensor) or shape[1] not in leaf.shape:
            return None
        if leaf.ndim == 1:
            return 0
        if leaf.shape[1:] == shape[:2] and not leaf.is_floating_point():  # positions of axes
            return 2
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

    def read(self, whole: Tensor, chunk: Chunk, then: Chunk | None, dim: int = 1) -> Tensor:
        """Return a chunk's part of a tensor, on the device. then: the chunk that is read next."""
        next_tokens = None if then is None else then.local
        return self.sequences.read(whole, chunk.local, next_tokens, dim=dim)

    def run(
        self, extent: ChunkForward, hidden: Tensor, then: Chunk | None, *, needs_input: bool = False
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Call the original block with the arguments of a chunk.

        then: the chunk whose arguments are needed next. Returns the output and the tensors of int
        [B, t, ...] beside it, and the hidden states and other arguments that the output can be
        differentiated by.
        """
        chunk, leaves = extent.chunk, []
        x = self.read(hidden, chunk, then).detach()
        inputs = [x.requires_grad_(needs_input)]
        for i, (leaf, dim) in enumerate(zip(self.leaves, self.dims, strict=True)):
            if isinstance(leaf, Tensor):
                leaf = leaf.detach()
                if dim is not None:
                    leaf = self.read(leaf, chunk, then, dim)
                if i in self.sources:
                    inputs.append(leaf.requires_grad_())
            leaves.append(leaf)
        args, kwargs = tree_unflatten(leaves, self.spec)
        kwargs["ulysses"] = replace(self.ulysses, extent=extent)
        numbers = self.random.get(chunk.index) if extent.in_backward else None
        same_numbers = nullcontext() if numbers is None else replayed(self.device, numbers)
        with computing([chunk]), same_numbers:
            return extent.run(lambda: self._block(inputs[0], args, kwargs)), inputs

    def _block(self, hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
        output, extra = self.streamed.forward(hidden, *args, **kwargs), list[Tensor | None]()
        if isinstance(output, tuple) and all(map(_is_extra, output[1:])):
            output, *extra = output
            self.streamed.extra_outputs = tuple(x is not None for x in extra)
        if not isinstance(output, Tensor):
            raise UserError(
                f"memory.stream_chunk_tokens: {type(self.streamed.block).__name__} returns more "
                'than its hidden state and indices. Set memory.stream_chunk_tokens = "off".'
            )
        return [output, *(x for x in extra if x is not None)]

    # --- forward ----------------------------------------------------------------------------------

    def forward(self, hidden: Tensor) -> list[Tensor]:
        """Return the block's output [B, T, h], without gradients, and its tensors of indices,
        [B, T, ...] each, where it has any.
        """
        streamed = self.streamed
        if not output_is_needed() and streamed.dtype is not None:
            # Expanded scalars, which take no memory. Their values are never read.
            extra = [hidden.new_zeros((), dtype=torch.int32).expand(hidden.shape)]
            output = hidden.new_zeros((), dtype=streamed.dtype).expand(hidden.shape)
            return [output, *extra * sum(streamed.extra_outputs or ())]
        sweep = Sweep(self.chunks, self.ulysses.documents, self.sequences, self.outputs)
        before, outputs = rng_state(self.device), list[Tensor]()
        for chunk, then in visited_with_next(self.chunks, "growing"):
            self.random[chunk.index] = rng_state(self.device)
            values, _ = self.run(ChunkForward(sweep, chunk), hidden, then)
            if not outputs:
                shapes = [(*hidden.shape[:2], *x.shape[2:]) for x in values]
                outputs = [
                    self.sequences.empty(hidden, shape, x.dtype)
                    for shape, x in zip(shapes, values, strict=True)
                ]
            for whole, x in zip(outputs, values, strict=True):
                self.sequences.write(whole, chunk.local, x)
        self.span = sweep.common_span()
        streamed.dtype = outputs[0].dtype
        if self.states is not None:
            for layer, tensors in sweep.states.items():
                self.states.put(layer, tensors)
        after = rng_state(self.device)
        streamed.draws_random_numbers |= before.numpy().tobytes() != after.numpy().tobytes()
        if not streamed.draws_random_numbers:
            self.random = {}
        return outputs

    # --- backward ---------------------------------------------------------------------------------

    def backward(
        self, hidden: Tensor, upstream: Tensor, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """Return the gradients of hidden, `differentiable` and parameters, None if not needed.

        The gradient of hidden [B, T, h] takes the place of upstream [B, T, h]. Off the device,
        those of parameters have been added to them, and are None.
        """
        sequences = self.sequences
        if upstream.dtype != hidden.dtype or not upstream.is_contiguous():  # cannot be written to
            given, upstream = upstream, sequences.empty(hidden)
            for chunk in visited(self.chunks):
                sequences.write(upstream, chunk.local, self.read(given, chunk, None))
        like = [hidden, *self.differentiable(), *self.parameters]
        wanted = [i for i, needed in enumerate(needs) if needed]
        totals: list[Tensor | None] = [None] * len(like)
        totals[0] = upstream
        sweep = Sweep(self.chunks, self.ulysses.documents, sequences, self.outputs, self.span)
        sweep.states = self.states.take_all() if self.states is not None else {}
        for chunk, then in visited_with_next(self.chunks[::-1], "shrinking"):
            self._compute_keys(sweep, hidden, chunk)
            # Its own keys are known if a later chunk has read them.
            known = any(self._first_read(x) <= chunk.index for x in self._after(chunk))
            again = ChunkBackward(sweep, chunk, keys_known=known)
            (y, *_), inputs = self.run(again, hidden, then, needs_input=needs[0])
            inputs += self.parameters
            gradient_of_y = self.read(upstream, chunk, then)
            found = torch.autograd.grad(
                y, [inputs[i] for i in wanted], gradient_of_y, allow_unused=True
            )
            del y, _, inputs
            for i, gradient in zip(wanted, found, strict=True):
                if i == 0:
                    sequences.write(upstream, chunk.local, gradient)
                elif gradient is not None:
                    totals[i] = self._add(totals[i], gradient, i - 1, chunk)
        for i in wanted:
            if totals[i] is None:
                totals[i] = torch.zeros_like(like[i])
        sequences.add_gradients(self.parameters, totals)
        if isinstance(sequences, SequenceStore) and not sequences.has(hidden):
            sequences.finish()  # the decoder has made it, and computes with its gradient
        return [
            None if total is None or not needed else total.to(x.dtype)
            for needed, x, total in zip(needs, like, totals, strict=True)
        ]

    def _compute_keys(self, sweep: Sweep, hidden: Tensor, reader: Chunk) -> None:
        """Let the block's attention know the earlier keys that a chunk reads, and no later one.

        The last chunk reads most of them, or all. Its own keys are not among them.
        """
        stop = min([reader.index, *map(self._first_read, self._after(reader))])
        for chunk, then in visited_with_next(self.chunks[self._first_read(reader) : stop]):
            self.run(ChunkKeys(sweep, chunk, reader), hidden, then)

    def _first_read(self, chunk: Chunk) -> int:
        """Return the index of the first chunk of which a chunk reads keys."""
        return (
            chunk.index if self.span is None else self.span.of(chunk.whole).start // self.span.size
        )

    def _after(self, chunk: Chunk) -> list[Chunk]:
        """Return the chunk after this one, if there is one."""
        return self.chunks[chunk.index + 1 : chunk.index + 2]

    def _add(self, total: Tensor | None, gradient: Tensor, index: int, chunk: Chunk) -> Tensor:
        """Return total + a chunk's gradient by the index-th of `differentiable` and parameters."""
        source = self.sources[index] if index < len(self.sources) else None
        if source is None or (dim := self.dims[source]) is None:
            return accumulate(total, gradient)
        if total is None:
            total = torch.zeros_like(self.leaves[source])
        start, stop = chunk.local.start, chunk.local.stop
        total.narrow(dim, start, stop - start).add_(gradient)
        return total


def _is_extra(x: Any) -> bool:
    """Return whether a block may return x beside its output: nothing, or indices of keys."""
    return x is None or isinstance(x, Tensor) and not x.is_floating_point()


class _StreamedFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: _StreamedCall, hidden: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.autocast = autocast_state(call.device.type)
        # What is computed again runs in the context of this forward (see model/router.py).
        ctx.variables = copy_context()
        output, *extra = call.forward(hidden)
        ctx.mark_non_differentiable(*extra)
        # The graph of all blocks keeps the call to the end of the step, but not what is saved here.
        tensors = [x if isinstance(x, Tensor) else None for x in call.leaves]
        ctx.save_for_backward(hidden, *tensors)
        call.leaves = [None if isinstance(x, Tensor) else x for x in call.leaves]
        return output, *extra

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor, *_: Tensor):
        hidden, *tensors = ctx.saved_tensors
        call = copy(ctx.call)
        pairs = zip(call.leaves, tensors, strict=True)
        call.leaves = [own if tensor is None else tensor for own, tensor in pairs]
        with ctx.autocast:
            return None, *ctx.variables.run(
                call.backward, hidden, upstream, ctx.needs_input_grad[1:]
            )
