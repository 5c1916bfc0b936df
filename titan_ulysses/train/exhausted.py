"""Out of memory: a message that says what to lower, from the plan if there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from titan_ulysses.distributed.errors import UserError, one_line
from titan_ulysses.train.preflight import Preflight

_OF_CPU = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")
_REMEDIES = {
    "parameters": "use more ranks (parallelism.data_parallel_shard_degree), or set "
    "memory.parameter_offload = true",
    "optimizer state": 'set memory.optimizer_offload = true, or optimizer.name = "adamw8bit"',
    "checkpoints": 'set activation_checkpoint.offload = "host"',
    "loss head": "lower memory.loss_tile_tokens",
    "MLP": "lower memory.mlp_tile_tokens",
}
"""What lowers a component of the plan most."""
_ALWAYS = (
    "lower training.seq_len or training.local_batch_size, or raise "
    "parallelism.sequence_parallel_degree"
)


@contextmanager
def named_out_of_memory(
    part: Callable[[], str], preflight: Callable[[], Preflight | None]
) -> Iterator[None]:
    """Turn an error for lack of memory into a UserError that says what to lower.

    part: returns what the run is in, in words; preflight: returns its plan. Both are called then.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _exhausted(error, part(), preflight()) from error
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _OF_CPU):
            raise
        raise _exhausted(error, part(), preflight()) from error


def _exhausted(error: BaseException, part: str, preflight: Preflight | None) -> UserError:
    place = "GPU" if isinstance(error, torch.OutOfMemoryError) else "host"
    plan = preflight.plan if preflight else None
    remedies, components = [], ""
    if preflight and plan is not None:
        remedies = [_REMEDIES[name] for name in plan["components"] if name in _REMEDIES][:2]
        components = f"\n{preflight.components()}"
    return UserError(
        f"out of {place} memory in {part or 'the start'} ({one_line(error)}). To need less, "
        f"{'; '.join([*remedies, _ALWAYS])}. `train.py --plan` says what fits.{components}"
    )
