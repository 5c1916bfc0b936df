"""Activation checkpointing: every k blocks form a segment, which keeps only its input for backward.

No other activation of a segment stays in memory between its forward and its backward, which
computes the segment again. torch's non-reentrant checkpoint does this. It replays the RNG state and
autocast, and blocks may take any keyword arguments. In the meantime the inputs can be moved to host
memory or to disk, see `offload.py`.

FSDP is applied to the blocks inside the segments. In forward they are gathered one at a time. From
the recomputation until their backward, all k blocks of the segment stay gathered. For every k,
parameters are therefore gathered twice per step and gradients reduced once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.fsdp import set_forward_root
from titan_ulysses.memory.offload import Store


def checkpoint_blocks(
    blocks: nn.ModuleList,
    *,
    every: int,
    store: Store | None,
    extra_outputs: tuple[None, ...] | None = None,
    device: torch.device | None = None,
) -> None:
    """Make each `every` consecutive blocks a segment, in place; the last one may be shorter.

    store keeps the inputs of segments; None leaves them on the device. extra_outputs is what a
    block returns after its hidden states; None: it does not return a tuple. device is where blocks
    draw random numbers; None: where their hidden states are. Parameter names do not change, because
    no module is wrapped around a block: the class of the block is replaced by a subclass, as FSDP
    does too.
    """
    for first in range(0, len(blocks), every):
        segment = _Segment(list(blocks[first : first + every]), store, extra_outputs, device)
        for position, block in enumerate(segment.blocks):
            block.__class__ = _checkpointed(type(block))  # type: ignore[arg-type]
            block.checkpoint_segment, block.checkpoint_position = segment, position


def output_is_needed() -> bool:
    """Return False while a block is computed again only for its gradients, and True otherwise.

    They need its intermediate values, but not its output. It is so for the last block of a segment,
    and for every chunk of a streamed block.
    """
    return not getattr(_phase, "output_unneeded", False)


def block_memo() -> dict[str, Any]:
    """Return what the running block of a segment remembers from its forward until its backward.

    It is the same object when the segment is recomputed.
    """
    return _phase.memo


# Per thread: CUDA's backward, and with it the recomputation, runs in a thread of its own.
_phase = threading.local()


class CheckpointedBlock(nn.Module):
    """A block that belongs to a segment.

    All blocks of a segment but the last only record their arguments; the last one runs them all.
    `__call__` is overridden instead of `forward`, because FSDP's hooks, which gather the block,
    have to run inside the checkpoint.
    """

    checkpoint_segment: _Segment
    checkpoint_position: int
    """Index of the block in its segment."""

    def __call__(self, hidden_states: Tensor, *args, **kwargs) -> Any:
        if not torch.is_grad_enabled():
            return self.run_block(hidden_states, *args, **kwargs)
        return self.checkpoint_segment.call(self.checkpoint_position, hidden_states, args, kwargs)

    def run_block(self, hidden_states: Tensor, *args, **kwargs) -> Any:
        """Call the original block."""
        return super().__call__(hidden_states, *args, **kwargs)


@cache
def _checkpointed(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (CheckpointedBlock, kind), {"__module__": __name__})


class _Segment:
    """Consecutive blocks that form one checkpoint and run when the last of them is called."""

    def __init__(
        self,
        blocks: list[nn.Module],
        store: Store | None,
        extra_outputs: tuple[None, ...] | None,
        device: torch.device | None,
    ):
        self.blocks, self.store, self.device = blocks, store, device
        self.extra_outputs = extra_outputs
        self.calls: list[tuple[tuple, dict[str, Any]]] = []
        self.handed_on: Tensor | None = None

    def call(self, position: int, hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Record the arguments of the block at position; at the last block, run the segment.

        Returns hidden unchanged before the last block, and the output of the segment there.
        """
        if position == 0:
            self.calls = []  # drops what an interrupted forward has recorded
        elif hidden is not self.handed_on:
            raise UserError(
                f"activation_checkpoint.every = {len(self.blocks)}: the decoder computes with "
                f"hidden states between its blocks (before {type(self.blocks[position]).__name__} "
                f"{position} of a segment), which a segment would leave out. Set "
                "activation_checkpoint.every = 1."
            )
        self.calls.append((args, kwargs))
        if len(self.calls) < len(self.blocks):
            self.handed_on = hidden
            return hidden if self.extra_outputs is None else (hidden, *self.extra_outputs)
        calls, self.calls, self.handed_on = self.calls, [], None
        memos: list[dict] = [{} for _ in calls]
        assert position == len(calls) - 1, "the decoder does not call its blocks in order"

        def run(hidden: Tensor, _: Tensor) -> Any:
            return self._run(hidden, calls, memos)

        # Checkpoint replays the random numbers of the devices that its arguments are on.
        here = hidden.new_empty(0, device=self.device)
        off_device = hidden.device != here.device
        with self.store.offload_saved_tensors() if self.store else nullcontext():
            return checkpoint(
                run,
                hidden,
                here,
                use_reentrant=False,
                context_fn=lambda: (nullcontext(), _Recomputation(self.blocks, off_device)),
            )

    def _run(
        self, hidden: Tensor, calls: list[tuple[tuple, dict[str, Any]]], memos: list[dict]
    ) -> Any:
        last = len(calls) - 1
        for position, (block, (args, kwargs)) in enumerate(zip(self.blocks, calls, strict=True)):
            recomputing = getattr(_phase, "recomputing", False)
            _phase.memo = memos[position]
            try:
                with without_output(recomputing and position == last):
                    output = block.run_block(hidden, *args, **kwargs)
            finally:
                del _phase.memo  # else what the last block keeps would outlive its model
            hidden = output if self.extra_outputs is None else output[0]
            if position < last and not isinstance(hidden, Tensor):
                raise UserError(
                    f"activation_checkpoint.every = {len(calls)}: {type(block).__name__} returns "
                    "more than its hidden state, so its decoder cannot have several blocks a "
                    "segment. Set activation_checkpoint.every = 1."
                )
        return output


class _Recomputation:
    """Context that marks a segment as being recomputed.

    It is a class because a context made by @contextmanager can be entered only once, and with
    retain_graph this one is entered again.
    """

    def __init__(self, blocks: list[nn.Module], off_device: bool):
        # FSDP takes the first module that is called for the root of a forward, and moves its inputs
        # to the device. Where hidden states are off it, it must know that there is a root: the last
        # block, whose own call changes nothing there, because its backward has begun.
        last = blocks[-1]
        self.root = last if off_device and isinstance(last, FSDPModule) else None

    def __enter__(self) -> None:
        _phase.recomputing = True
        if self.root is not None:
            set_forward_root(self.root, is_root=True)

    def __exit__(self, *_) -> None:
        _phase.recomputing = False
        if self.root is not None:
            set_forward_root(self.root, is_root=False)


@contextmanager
def without_output(unneeded: bool = True) -> Iterator[None]:
    """Let `output_is_needed` return not `unneeded` in this context."""
    before = getattr(_phase, "output_unneeded", False)
    _phase.output_unneeded = unneeded
    try:
        yield
    finally:
        _phase.output_unneeded = before
