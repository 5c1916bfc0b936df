"""A run of a block over one chunk: what its layers ask for that is not in the chunk itself.

Attention asks for the keys of earlier chunks, and a layer that carries a state for the state before
the chunk. Which of the three kinds a run is decides what they get and what is remembered of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan_ulysses.distributed.sequence import Chunk, Documents
from titan_ulysses.memory.checkpointing import without_output
from titan_ulysses.memory.offload import OffloadedTensor, Store
from titan_ulysses.memory.sequences import ON_DEVICE, Sequences
from titan_ulysses.streaming.attention import ChunkAttention, attend
from titan_ulysses.streaming.keys import AttentionSpan, KeyBlocks, KeysAndValues
from titan_ulysses.ulysses.attention import Extent, Ulysses
from titan_ulysses.ulysses.exchange import (
    SEQUENCE,
    heads_to_sequence,
    keys_to_heads,
    sequence_to_heads,
)
from titan_ulysses.ulysses.heads import HeadPlan, deal_heads
from titan_ulysses.ulysses.indexer import gather_sequence, scores_to_train
from titan_ulysses.ulysses.indexer_loss import (
    IndexerScores,
    differentiate,
    differentiate_all,
    sum_for_owners,
    with_indexer_loss,
)
from titan_ulysses.ulysses.pieces import pieces_of
from titan_ulysses.ulysses.states import State

RESIDENT_CHUNKS = 4
"""The keys of so many chunks stay on the device, where no chunk reads more: because of a window, or
because documents are short.
"""


class KeptTensors:
    """Tensors of a block that wait from its forward to its backward, in a store or on the device.

    hold: called with tensors that stay on the device; its result is kept as long as they are.
    always: whether they are kept also where the store has no room for others after them.
    """

    def __init__(
        self,
        kind: str,
        store: Store | None,
        *,
        always: bool,
        hold: Callable[[Sequence[Tensor]], Any] = lambda tensors: None,
    ):
        self._kind, self._store, self._hold, self._always = kind, store, hold, always
        self._tensors: dict[Any, Sequence[Tensor | OffloadedTensor]] = {}
        self._held: dict[Any, Any] = {}

    def put(self, key: Any, tensors: Sequence[Tensor]) -> None:
        """Keep the tensors, if there is room."""
        store = self._store
        if store is None:
            self._tensors[key], self._held[key] = list(tensors), self._hold(tensors)
        elif self._always or store.has_room(sum(x.numel() * x.element_size() for x in tensors)):
            self._tensors[key] = [
                store.keep(x.detach(), f"{self._kind} {i}") for i, x in enumerate(tensors)
            ]

    def get(self, key: Any, *, last: bool) -> list[Tensor] | None:
        """Return what was put, or None; after the last use it is not kept any longer."""
        if key not in self._tensors:
            return None
        tensors = self._tensors[key]
        if last:
            del self._tensors[key]
            self._held.pop(key, None)
        return [self._store.get(x) if isinstance(x, OffloadedTensor) else x for x in tensors]

    def take_all(self) -> dict[Any, tuple[Tensor, ...]]:
        """Return all that was put, by key, and keep it no longer."""
        return {key: tuple(self.get(key, last=True) or ()) for key in list(self._tensors)}


@dataclass
class Sweep:
    """One way of a block through the chunks, forward or backward: what is remembered on it."""

    chunks: list[Chunk]
    documents: Documents
    sequences: Sequences
    outputs: KeptTensors | None
    """Outputs of attention, kept until backward."""
    span: AttentionSpan | None = None
    """What attention reads, where that is known from the block's forward."""
    states: dict[nn.Module, State] = field(default_factory=dict)
    """By layer, the states before each chunk, [C, B, ...]."""
    state_gradients: dict[nn.Module, Sequence[Tensor]] = field(default_factory=dict)
    """By layer, the gradients of the state before the chunk that was differentiated last."""
    keys: dict[nn.Module, KeysAndValues] = field(default_factory=dict)

    def keys_of(self, layer: nn.Module, documents: Documents, window: int | None) -> KeysAndValues:
        """Return what remembers the keys and values of a layer."""
        if layer not in self.keys:
            kind, sequences = KeysAndValues, self.sequences
            span = self.span or AttentionSpan(documents, window, self.chunks[0].whole.stop)
            if not sequences.is_direct:
                if span.longest > RESIDENT_CHUNKS * span.size:
                    kind = KeyBlocks
                else:
                    sequences = ON_DEVICE
            self.keys[layer] = kind(span, sequences)
        return self.keys[layer]

    def common_span(self) -> AttentionSpan | None:
        """Return what all attention reads: the sequence so far, if the layers read differently."""
        spans = {keys.span for keys in self.keys.values()}
        if len(spans) < 2:
            return next(iter(spans), None)
        whole = ((self.chunks[-1].whole.stop,),)
        return AttentionSpan(whole, None, self.chunks[0].whole.stop)


class ChunkForward(Extent):
    """A run for the block's output, without gradients."""

    tokens: slice
    in_backward = False
    """Whether the chunk is computed again, from the same random numbers. What was kept of its
    forward is then needed for the last time.
    """

    def __init__(self, sweep: Sweep, chunk: Chunk):
        self.sweep, self.chunk, self.tokens = sweep, chunk, chunk.whole
        self.held = chunk.whole
        """The tokens of the chunk whose queries read the keys next."""

    def run(self, block: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Call the block."""
        with torch.no_grad():
            return block()

    # --- attention --------------------------------------------------------------------------------

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        module: nn.Module,
        ulysses: Ulysses,
        layer: dict[str, Any],
    ) -> Tensor:
        """Compute a layer's attention for the queries of the chunk: -> [B, t, Hq, Dv].

        q is [B, t, Hq, D], k [B, t, Hkv, D] and v [B, t, Hkv, Dv]: this rank's t tokens of the
        chunk. The core must have pieces. Earlier runs have kept what is read of the chunks before.
        """
        mesh, pieces = ulysses.mesh, pieces_of(ulysses.core)
        assert pieces is not None, ulysses.core
        plan = deal_heads(q.shape[2], k.shape[2], mesh.size())
        keys = self.sweep.keys_of(module, layer["documents"], layer["window"])
        keys.hold(keys.span.of(self.held))
        if mesh.size() > 1:
            q, k, v = (DTensor.from_local(x, mesh, (SEQUENCE,), run_check=False) for x in (q, k, v))
        queries, k, v = self.to_heads(q, k, v, plan, keys)
        if layer["chosen"] is not None:
            layer["chosen"] = gather_sequence(layer["chosen"], mesh)
        kept = partial(self.kept_outputs, module)
        rank = mesh.get_local_rank()
        call = ChunkAttention(pieces, keys, self.tokens, plan, rank, layer, [], kept)
        outputs, scores = attend(call, k, v, queries), scores_to_train(module)
        output = outputs[0]
        if mesh.size() > 1:
            output = heads_to_sequence(outputs, plan, mesh).to_local()
        if scores is None or ulysses.label_share is None:
            return output
        of_queries = [x.detach() for x in queries]
        of_indexer = self.sweep.keys[module.indexer]
        gradients = partial(self._indexer_gradients, ulysses, of_indexer, call, of_queries)
        return with_indexer_loss(output, scores, gradients)

    def _indexer_gradients(
        self,
        ulysses: Ulysses,
        kept: KeysAndValues,
        call: ChunkAttention,
        queries: Sequence[Tensor],
        scores: IndexerScores,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of what an indexer has made for the chunk, and add those of earlier
        keys to what is known.
        """
        seen = slice(kept.span.of(self.tokens).start, self.tokens.stop)

        def blocks(with_gradients: bool) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
            for block, (keys,) in kept.read(seen):
                sums = kept.gradients_of(block) if with_gradients else None
                yield block, keys[:, :, 0], None if sums is None else sums[0][:, :, 0]
                if sums is not None:
                    kept.put_gradients(block, sums)

        def dense_blocks(with_gradients: bool) -> Iterator[tuple]:
            pairs = zip(blocks(with_gradients), call.keys.read(seen), strict=True)
            for of_indexer, (_, (keys, _)) in pairs:
                yield *of_indexer, partial(call.weights_of_all, queries, keys)

        mesh, tokens = ulysses.mesh, scores.keys.shape[1]
        share = ulysses.label_share[:, self.chunk.local]
        if scores.chosen is not None:
            target = sum_for_owners(call.summed_weights(queries), mesh)
            dq, dw = differentiate(scores, target, share, blocks)
        else:
            start, heads = self.start + mesh.get_local_rank() * tokens, call.plan.query_heads
            dq, dw = differentiate_all(
                scores, ulysses.places, start, heads, share, dense_blocks, mesh
            )
        (dk,) = kept.complete_gradients(self.tokens)
        return dq, dw, sum_for_owners(dk[:, :, 0], ulysses.mesh)

    def to_heads(
        self, q: Tensor, k: Tensor, v: Tensor, plan: HeadPlan, keys: KeysAndValues
    ) -> tuple[Sequence[Tensor], Tensor, Tensor]:
        """Return this rank's queries (for each part of the plan), keys and values of all the chunk,
        after which `keys` has the chunk's own.
        """
        queries, k, v = sequence_to_heads(q, k, v, plan) if plan.degree > 1 else ((q,), k, v)
        keys.put(self.tokens, k, v)
        return queries, k, v

    def index_keys(
        self, indexer: nn.Module, keys: Tensor, documents: Documents
    ) -> Iterable[tuple[slice, Tensor]] | None:
        kept = self.sweep.keys_of(indexer, documents, None)
        kept.hold(kept.span.of(self.held))
        kept.put(self.tokens, keys[:, :, None])
        if self.keys_only:
            return None
        blocks = kept.read(slice(kept.span.of(self.tokens).start, self.tokens.stop))
        return ((tokens, x[:, :, 0]) for tokens, (x,) in blocks)

    def kept_outputs(self, module: nn.Module, compute: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Return what attention computes for the chunk, or what was kept of that."""
        if (kept := self.sweep.outputs) is None:
            return compute()
        key = self.chunk.index, module
        found = kept.get(key, last=self.in_backward)
        if found is None:
            found = compute()
            if not self.in_backward:
                kept.put(key, found)
        return found

    # --- layers that carry a state ----------------------------------------------------------------

    @property
    def hands_state_on(self) -> bool:
        return crosses(self.sweep.documents, self.tokens.stop)

    def state_before(self, layer: nn.Module, anchors: Sequence[Tensor | None]) -> State | None:
        if not crosses(self.sweep.documents, self.tokens.start):
            return None
        return tuple(x[self.chunk.index] for x in self.sweep.states[layer])

    def state_after(self, layer: nn.Module, output: Tensor, state: State | None) -> Tensor:
        if state is not None and self.hands_state_on:
            states, count = self.sweep.states, len(self.sweep.chunks)
            if layer not in states:
                states[layer] = tuple(x.new_empty(count, *x.shape) for x in state)
            for of_chunks, x in zip(states[layer], state, strict=True):
                of_chunks[self.chunk.index + 1] = x.detach()
        return output


class ChunkKeys(ChunkForward):
    """A run for the keys and values of attention alone, which a later chunk reads."""

    keys_only = in_backward = True

    class _Known(Exception):
        """Ends the run. An unmodified block has no other end before that of its MLP."""

    def __init__(self, sweep: Sweep, chunk: Chunk, reader: Chunk):
        super().__init__(sweep, chunk)
        self.held = reader.whole

    def run(self, block: Callable[[], list[Tensor]]) -> None:  # type: ignore[override]
        with torch.no_grad(), suppress(self._Known):
            block()

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor, plan: HeadPlan, keys: KeysAndValues) -> Any:
        keys.put(self.tokens, *(keys_to_heads(k, v, plan) if plan.degree > 1 else (k, v)))
        raise self._Known


class ChunkBackward(ChunkForward):
    """A run again as a graph for autograd, given the keys that it reads."""

    in_backward = True

    def __init__(self, sweep: Sweep, chunk: Chunk, *, keys_known: bool):
        """keys_known: whether a later chunk has read the chunk's own keys, so they are here."""
        super().__init__(sweep, chunk)
        self.keys_known = keys_known

    def run(self, block: Callable[[], list[Tensor]]) -> list[Tensor]:
        with torch.enable_grad(), without_output():
            return block()

    def to_heads(
        self, q: Tensor, k: Tensor, v: Tensor, plan: HeadPlan, keys: KeysAndValues
    ) -> tuple[Sequence[Tensor], Tensor, Tensor]:
        if not self.keys_known:
            return super().to_heads(q, k, v, plan, keys)
        if plan.degree == 1:
            return (q,), k, v
        return sequence_to_heads(q, k, v, plan, known=keys.of(self.tokens))

    def state_before(self, layer: nn.Module, anchors: Sequence[Tensor | None]) -> State | None:
        state = super().state_before(layer, anchors)
        if state is None:
            return None
        return _Begin.apply(self.sweep.state_gradients, layer, len(anchors), *anchors, *state)

    def state_after(self, layer: nn.Module, output: Tensor, state: State | None) -> Tensor:
        if state is None or not self.hands_state_on:
            return output
        return _End.apply(self.sweep.state_gradients, layer, output, *state)


def crosses(documents: Documents, place: int) -> bool:
    """Return whether a document of any row goes on from token place - 1 to token `place`."""
    return any(0 < place < sum(row) and place not in accumulate(row) for row in documents)


class _Begin(torch.autograd.Function):
    """The state before a chunk. Backward keeps its gradient for the chunk before."""

    @staticmethod
    def forward(ctx, gradients: dict, layer: nn.Module, count: int, *tensors: Tensor | None):
        """tensors: `count` that the layer computes with, then the state. The gradients of one of
        them make autograd come here.
        """
        ctx.gradients, ctx.layer, ctx.inputs = gradients, layer, len(tensors)
        return tuple(x.view_as(x) for x in tensors[count:])

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        ctx.gradients[ctx.layer] = gradients
        return None, None, None, *([None] * ctx.inputs)


class _End(torch.autograd.Function):
    """The output of a chunk. Backward adds the gradient of the state after it."""

    @staticmethod
    def forward(ctx, gradients: dict, layer: nn.Module, output: Tensor, *state: Tensor):
        ctx.gradients, ctx.layer, ctx.count = gradients, layer, len(state)
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        # None where nothing after the chunk has a gradient.
        of_state = ctx.gradients.pop(ctx.layer, [None] * ctx.count)
        return None, None, gradient, *of_state
