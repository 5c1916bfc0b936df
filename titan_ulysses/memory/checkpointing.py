"""Activation checkpointing: every k blocks are a segment that keeps only its input, on the device
or off it.

A segment's input is all that lives from its forward to its backward, where the segment is computed
again; torch's non-reentrant checkpoint does that (RNG and autocast replayed, any keywords). Inputs
can go to host memory or to disk meanwhile: see `offload.py`.

FSDP is applied to the blocks inside. In forward they are gathered one at a time; from the
recomputation to their backward all k stay gathered. So parameters are gathered twice a step and
gradients reduced once, whatever k is.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from titan_ulysses.distributed.errors import UserError
from titan_ulysses.memory.offload import Store


def checkpoint_blocks(blocks: nn.ModuleList, *, every: int, store: Store | None) -> None:
    """Make every `every` blocks, in place, a segment whose input is kept in store (None: where it
    is).

    No name changes, because no module is put around a block: it gets a class of its own, as FSDP
    gives it one. The last segment may be shorter.
    """
    for first in range(0, len(blocks), every):
        segment = _Segment(list(blocks[first : first + every]), store)
        for position, block in enumerate(segment.blocks):
            block.__class__ = _checkpointed(type(block))  # type: ignore[arg-type]
            block.checkpoint_segment, block.checkpoint_position = segment, position


def output_is_needed() -> bool:
    """False while a segment's last block is computed again: its gradients need what is inside, not
    what comes out.
    """
    return not getattr(_phase, "in_last_block", False)


# CUDA's backward, and with it the recomputation, has a thread of its own.
_phase = threading.local()


class CheckpointedBlock(nn.Module):
    """What a block of a segment becomes. Of a segment, all but the last only note what they are
    called with.

    The call changes, and not `forward`: the hooks of FSDP, which gather the block, are to run
    inside the checkpoint.
    """

    checkpoint_segment: _Segment
    checkpoint_position: int
    """in the segment"""

    def __call__(self, hidden_states: Tensor, *args, **kwargs) -> Any:
        if not torch.is_grad_enabled():
            return self.run_block(hidden_states, *args, **kwargs)
        return self.checkpoint_segment.call(self.checkpoint_position, hidden_states, args, kwargs)

    def run_block(self, hidden_states: Tensor, *args, **kwargs) -> Any:
        """The call of the block itself."""
        return super().__call__(hidden_states, *args, **kwargs)


@cache
def _checkpointed(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (CheckpointedBlock, kind), {"__module__": __name__})


class _Segment:
    """Blocks that are one checkpoint, run when the last of them is called."""

    def __init__(self, blocks: list[nn.Module], store: Store | None):
        self.blocks, self.store = blocks, store
        self.calls: list[tuple[tuple, dict[str, Any]]] = []

    def call(self, position: int, hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Note the arguments of the block at position and hand hidden through; at the last one run
        them all.
        """
        if position == 0:
            self.calls = []  # of a forward that was broken off
        self.calls.append((args, kwargs))
        if len(self.calls) < len(self.blocks):
            return hidden
        calls, self.calls = self.calls, []
        assert position == len(calls) - 1, "the decoder does not call its blocks in order"

        def run(hidden: Tensor) -> Any:
            return self._run(hidden, calls)

        with self.store.offload_saved_tensors() if self.store else nullcontext():
            return checkpoint(
                run,
                hidden,
                use_reentrant=False,
                context_fn=lambda: (nullcontext(), _Recomputation()),
            )

    def _run(self, hidden: Tensor, calls: list[tuple[tuple, dict[str, Any]]]) -> Any:
        last = len(calls) - 1
        for position, (block, (args, kwargs)) in enumerate(zip(self.blocks, calls, strict=True)):
            with _last_block() if position == last else nullcontext():
                hidden = block.run_block(hidden, *args, **kwargs)
            if position < last and not isinstance(hidden, Tensor):
                raise UserError(
                    f"activation_checkpoint.every = {len(calls)}: {type(block).__name__} returns "
                    "more than its hidden state, so its decoder cannot have several blocks a "
                    "segment. Set activation_checkpoint.every = 1."
                )
        return hidden


class _Recomputation:
    """Says that a segment is being computed again. A class, because with retain_graph it is entered
    more than once.
    """

    def __enter__(self) -> None:
        _phase.recomputing = True

    def __exit__(self, *_) -> None:
        _phase.recomputing = False


@contextmanager
def _last_block() -> Iterator[None]:
    _phase.in_last_block = getattr(_phase, "recomputing", False)
    try:
        yield
    finally:
        _phase.in_last_block = False
