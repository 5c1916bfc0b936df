"""What layers that carry a state share: documents, convolutions, and states between chunks."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.sequence import Chunk, Documents, current_chunk
from titan_ulysses.ulysses.attention import Ulysses

State = tuple[Tensor, ...]
"""What a layer carries along the sequence, [B, ...] each: the last inputs of its convolution, and
the state of its recurrence.
"""


# --- documents ------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """The part of a document that lies in a range of tokens."""

    tokens: slice
    """Its tokens, counted from the start of the range."""
    before: int
    """How many tokens of its document come before the range."""


@lru_cache(maxsize=1024)
def pieces_of_row(row: tuple[int, ...], start: int, stop: int) -> tuple[Piece, ...]:
    """Return the documents' parts in tokens [start, stop) of a row of documents."""
    pieces = []
    for end, length in zip(accumulate(row), row, strict=True):
        first, last = max(end - length, start), min(end, stop)
        if first < last:
            before = max(0, start - (end - length))
            pieces.append(Piece(slice(first - start, last - start), before))
    return tuple(pieces)


def crosses(documents: Documents, place: int) -> bool:
    """Return whether a document of any row goes on from token place - 1 to token `place`."""
    return any(0 < place < sum(row) and place not in accumulate(row) for row in documents)


Run = Callable[[list[Tensor], State | None, Piece], tuple[Tensor, State | None]]
"""Computes a piece: its inputs [B, n, ...], the state before it (None: empty) -> output [B, n, ...]
and the state after it.
"""


def run_by_documents(
    run: Run,
    inputs: Sequence[Tensor],
    documents: Documents,
    start: int,
    state: State | None = None,
) -> tuple[Tensor, State | None]:
    """Run each document of each row by itself: inputs [B, n, ...] of tokens from `start` on.

    state is that before the first token; a document that begins later does not see it. Returns the
    output [B, n, ...] and the state after the last token. Rows with equal documents are one batch.
    """
    stop = start + inputs[0].shape[1]
    cuts = [pieces_of_row(row, start, stop) for row in documents]
    if all(pieces == cuts[0] for pieces in cuts):
        batches = [(slice(None), cuts[0])]
    else:
        batches = [(slice(i, i + 1), pieces) for i, pieces in enumerate(cuts)]
    outputs, states = [], []
    for rows, pieces in batches:
        parts = []
        for piece in pieces:
            known = None
            if piece.before and state is not None:
                known = tuple(x[rows] for x in state)
            part, last = run([x[rows, piece.tokens] for x in inputs], known, piece)
            parts.append(part)
        outputs.append(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))
        states.append(last)
    if len(batches) == 1:
        return outputs[0], states[0]
    joined = None
    if states[0] is not None:
        joined = tuple(torch.cat(parts) for parts in zip(*states, strict=True))
    return torch.cat(outputs), joined


def convolve(
    module: nn.Module,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    activation: str | None = None,
) -> Tensor:
    """Causal depthwise convolution of x [B, C, n] by weight [C, K], as `module` does it.

    tail [B, C, K - 1] is what comes before x; None: zeros. The function is the one that the file of
    the module's class holds: causal_conv1d where it is installed, else torch's.
    """
    if tail is not None:
        x = torch.cat([tail, x], dim=-1)
    function = function_of(module, "causal_conv1d_fn", x.device)
    y = function(x, weight, bias, activation=activation)
    return y if tail is None else y[..., tail.shape[-1] :]


def last_inputs(x: Tensor, tail: Tensor | None, count: int) -> Tensor:
    """Return the last `count` of tail and x [B, C, n] along the last dimension, after zeros."""
    if tail is not None and x.shape[-1] < count:
        x = torch.cat([tail, x], dim=-1)
    return F.pad(x[..., max(0, x.shape[-1] - count) :], (max(0, count - x.shape[-1]), 0))


_replaced: ContextVar[Mapping[str, Callable[..., Any]] | None] = ContextVar(
    "replaced", default=None
)


@contextmanager
def replaced_functions(functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Let `function_of` return these, by name, in this context: for simulation."""
    token = _replaced.set(functions)
    try:
        yield
    finally:
        _replaced.reset(token)


def function_of(module: nn.Module, name: str, device: torch.device) -> Callable[..., Any]:
    """Return a function of the file that defines the module's class.

    transformers chooses there, at import, between the kernels of a package and its own code, which
    its decorator wraps. On a CPU it is its own code, whatever is installed.
    """
    replaced = _replaced.get()
    if replaced is not None and name in replaced:
        return replaced[name]
    for kind in type(module).__mro__:
        function = getattr(sys.modules[kind.__module__], name, None)
        if callable(function):
            return inspect.unwrap(function) if device.type == "cpu" else function
    raise UserError(
        f"model: {type(module).__name__} has no function {name} in its file, which this version of "
        "titan_ulysses computes it with. Take another version of transformers."
    )


# --- states between chunks ------------------------------------------------------------------------


class Chunked(NamedTuple):
    """The states of a layer at the borders of the chunks that its block works through."""

    chunk: Chunk | None
    """None: the whole sequence is computed at once."""
    documents: Documents
    name: Any

    @property
    def is_wanted(self) -> bool:
        """Whether a later chunk needs the state after this one."""
        return self.chunk is not None and crosses(self.documents, self.chunk.whole.stop)

    def before(self, anchors: Sequence[Tensor | None]) -> State | None:
        """Return the state before this chunk, with a gradient if it is computed for backward.

        anchors are the tensors that the layer computes with; the gradients of one of them make
        autograd come here.
        """
        chunk = self.chunk
        if chunk is None or not crosses(self.documents, chunk.whole.start):
            return None
        state = tuple(x[chunk.index] for x in chunk.states[self.name])
        if chunk.goal != "gradient":
            return state
        return _Begin.apply(chunk, self.name, len(anchors), *anchors, *state)

    def after(self, output: Tensor, state: State | None) -> Tensor:
        """Keep the state after this chunk; in backward, its gradient flows into `output`'s node."""
        chunk = self.chunk
        if chunk is None or state is None or not self.is_wanted:
            return output
        if chunk.goal == "gradient":
            return _End.apply(chunk, self.name, output, *state)
        if self.name not in chunk.states:
            chunks = -(-chunk.seq_len // (chunk.whole.stop - chunk.whole.start))
            chunk.states[self.name] = tuple(x.new_empty(chunks, *x.shape) for x in state)
        for of_chunks, x in zip(chunk.states[self.name], state, strict=True):
            of_chunks[chunk.index + 1] = x.detach()
        return output


class _Begin(torch.autograd.Function):
    """The state before a chunk. Backward keeps its gradient for the chunk before."""

    @staticmethod
    def forward(ctx, chunk: Chunk, name: Any, count: int, *tensors: Tensor | None):
        ctx.memory, ctx.key, ctx.inputs = chunk.memory, (name, "gradient"), len(tensors)
        return tuple(x.view_as(x) for x in tensors[count:])

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        ctx.memory[ctx.key] = gradients
        return None, None, None, *([None] * ctx.inputs)


class _End(torch.autograd.Function):
    """The output of a chunk. Backward adds the gradient of the state after it."""

    @staticmethod
    def forward(ctx, chunk: Chunk, name: Any, output: Tensor, *state: Tensor):
        ctx.memory, ctx.key, ctx.count = chunk.memory, (name, "gradient"), len(state)
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        # None where nothing after the chunk has a gradient.
        of_state = ctx.memory.pop(ctx.key, [None] * ctx.count)
        return None, None, gradient, *of_state


# --- calls ---------------------------------------------------------------------------------------


def chunk_of(
    module: nn.Module, ulysses: Ulysses | None, attention_mask: Tensor | None
) -> Chunk | None:
    """Return the chunk that is computed, or None. UserError for a call that cannot be served."""
    name = type(module).__name__
    if ulysses is None:
        raise UserError(
            f"model: {name} is not told of documents and ranks: this version of transformers does "
            "not hand keywords down to it. Take a newer one."
        )
    if attention_mask is not None:
        raise UserError(
            f"model: {name} has a mask of its own, where documents say all that is masked here."
        )
    return None if ulysses.chunk_tokens is None else current_chunk.get()


def nothing_of(hidden: Tensor) -> Tensor:
    """Return zeros like hidden, without memory: of this layer nothing is needed."""
    return hidden.new_zeros(()).expand(hidden.shape)
