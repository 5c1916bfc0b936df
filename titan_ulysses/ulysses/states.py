"""What layers that carry a state share: documents, convolutions, and what they are called with."""

from __future__ import annotations

import inspect
import sys
from abc import ABC, abstractmethod
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
from titan_ulysses.distributed.sequence import Documents
from titan_ulysses.ulysses.attention import Ulysses, checked

State = tuple[Tensor, ...]
"""What a layer carries along the sequence, [B, ...] each: the last inputs of its convolution, and
the state of its recurrence.
"""


# --- documents ------------------------------------------------------------------------------------


class DocumentPiece(NamedTuple):
    """The part of a document that lies in a range of tokens."""

    tokens: slice
    """Its tokens, counted from the start of the range."""
    before: int
    """How many tokens of its document come before the range."""


@lru_cache(maxsize=1024)
def pieces_of_row(row: tuple[int, ...], start: int, stop: int) -> tuple[DocumentPiece, ...]:
    """Return the documents' parts in tokens [start, stop) of a row of documents."""
    pieces = []
    for end, length in zip(accumulate(row), row, strict=True):
        first, last = max(end - length, start), min(end, stop)
        if first < last:
            before = max(0, start - (end - length))
            pieces.append(DocumentPiece(slice(first - start, last - start), before))
    return tuple(pieces)


RunPiece = Callable[[list[Tensor], State | None, DocumentPiece], tuple[Tensor, State | None]]
"""Computes a piece: its inputs [B, n, ...], the state before it (None: empty) -> output [B, n, ...]
and the state after it.
"""


def run_by_documents(
    run: RunPiece,
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
        f"model: {type(module).__name__} has no function {name} in its file, which this version "
        "of titan_ulysses needs. Install another version of transformers."
    )


# --- calls ---------------------------------------------------------------------------------------


class StatefulLayer(ABC):
    """The forward of a layer that carries a state, around a module of transformers."""

    recurrence: str | None = None
    """The name of the function of its recurrence in the file of the module's class."""

    def __init__(self, module: nn.Module):
        self.module = module

    @property
    def recurrence_flops(self) -> int:
        """FLOPs of a token's recurrence in forward."""
        return 0

    @staticmethod
    @abstractmethod
    def fits(module: nn.Module) -> bool:
        """Return whether a module is such a layer, by the names of its parts."""

    def __call__(
        self,
        hidden_states: Tensor,
        *_: Any,
        ulysses: Ulysses | None = None,
        attention_mask: Tensor | None = None,
        **__: Any,
    ) -> Tensor:
        """UserError for a call that cannot be served."""
        ulysses = checked(ulysses, self.module, attention_mask)
        if ulysses.extent.keys_only:  # nothing is needed of this layer: zeros, without memory
            return hidden_states.new_zeros(()).expand(hidden_states.shape)
        return self.compute(hidden_states, ulysses)

    @abstractmethod
    def compute(self, hidden: Tensor, ulysses: Ulysses) -> Tensor:
        """Return the output [B, t, h] of this rank's tokens of `ulysses.extent`."""
