"""What versus.py shows of our own step: the tensors that are alive at its peak, and the operators
that take its time.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from common import LLAMA, training_step

_SHOWN = 0.02
"""Units per token. Entries that cost less are added up in one line."""


def main(args: argparse.Namespace, match: type) -> None:
    start = match(args)
    for dtype in args.dtypes:
        if args.breakdown:
            show_breakdown(start, dtype, args.seq_lens[:2])
        if args.profile:
            seq_len = args.seq_lens[0]
            found = start.child("ours", "time", dtype, [seq_len] * 2, by=profile)
            said = found if isinstance(found, str) else found[0]
            print(f"\n{dtype}, S = {seq_len:,}, one step of rank 0\n{said}")


# ---------------------------------------------------------------- on the ranks


def profile(settings: dict[str, Any]) -> str:
    """Return torch.profiler's table of the second step."""
    import torch

    step, second = warm_step(settings)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step(second)
    return profiler.key_averages().table(
        sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60
    )


def warm_step(settings: dict[str, Any]) -> tuple[Callable[[int], Any], int]:
    """Return our step after its first one, and the length of the second one."""
    memory = {"loss_tile_tokens": settings["loss_tile_tokens"]}
    step = training_step(settings["folder"], dtype=settings["dtype"], memory=memory)
    first, second = settings["lengths"]
    step(first)
    return step, second


def breakdown(settings: dict[str, Any]) -> dict[str, int]:
    """Return the bytes that are alive at the peak of the second step, by what made them. Only
    tensors that were made in that step count.
    """
    import torch
    from torch.distributed.tensor import DTensor
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Living(TorchDispatchMode):
        """A dispatch mode that checks after each operator which of the storages made so far are
        still alive.
        """

        alive: dict[int, tuple[StorageWeakRef, int, str]] = {}
        highest, at_peak = 0, Counter()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            # DTensor runs first. The operators that it calls arrive here again.
            if DTensor in types:
                return NotImplemented
            kwargs = kwargs or {}
            taken = {
                x.untyped_storage()._cdata
                for x in tree_leaves((args, kwargs))
                if isinstance(x, torch.Tensor)
            }
            result = func(*args, **kwargs)
            self.alive = {key: one for key, one in self.alive.items() if not one[0].expired()}
            # A storage is new if no argument has it and it is not known yet.
            for x in tree_leaves(result):
                if isinstance(x, torch.Tensor):
                    storage = x.untyped_storage()
                    if storage._cdata not in taken and storage._cdata not in self.alive:
                        one = StorageWeakRef(storage), storage.nbytes(), _maker(func)
                        self.alive[storage._cdata] = one
            total = sum(size for _, size, _ in self.alive.values())
            if total > self.highest:
                self.highest, self.at_peak = total, Counter()
                for _, size, maker in self.alive.values():
                    self.at_peak[maker] += size
            return result

    step, second = warm_step(settings)
    with Living() as living:
        step(second)
    return dict(living.at_peak)


def _maker(operator: Any) -> str:
    """Describe what is making a tensor now: the pass, the line of code in the model or in this
    library, and the operator.
    """
    import torch

    node = torch._C._current_autograd_node()
    frame: FrameType | None = sys._getframe(2)
    when, line = "forward" if node is None else "backward", None
    while frame is not None:
        code = frame.f_code
        if line is None and (
            "/titan_ulysses/" in code.co_filename or "/transformers/models/" in code.co_filename
        ):
            line = f"{'/'.join(Path(code.co_filename).parts[-2:])}:{frame.f_lineno} {code.co_name}"
        if code.co_name == "recompute_fn":
            when = "recomputed"
        frame = frame.f_back
    made_by = str(operator.overloadpacket) + (f" of {node.name()}" if when == "backward" else "")
    return f"{when:<10}  {line or '?':<55}  {made_by}"


# ---------------------------------------------------------------- the report


def show_breakdown(start: Any, dtype: str, seq_lens: list[int]) -> None:
    """Print the memory at the peak by what made it, and how much of it a token costs, from the
    difference between two S.
    """
    if len(seq_lens) < 2:
        raise SystemExit("error: --breakdown compares two sequence lengths: --seq-lens 8192 16384")
    at = {s: start.child("ours", "memory", dtype, [s] * 2, by=breakdown) for s in seq_lens}
    if failed := next((found for found in at.values() if isinstance(found, str)), None):
        raise SystemExit(f"error: {dtype}: {failed}")
    short, long = (at[s][0] for s in seq_lens)
    unit = LLAMA["hidden_size"] * (2 if dtype == "bfloat16" else 4)
    tokens = (seq_lens[1] - seq_lens[0]) // start.args.ranks
    cost = {
        maker: (long.get(maker, 0) - short.get(maker, 0)) / unit / tokens
        for maker in {**short, **long}
    }
    print(
        f"\n{dtype}: what our step holds at its peak (rank 0), and what of it grows from S = "
        f"{seq_lens[0]:,}"
    )
    print(f"{'units/token':>11} {'MiB at S = ' + format(seq_lens[1], ','):>18}  when        who")
    rest = 0.0
    for maker in sorted(cost, key=lambda maker: -abs(cost[maker])):
        if abs(cost[maker]) < _SHOWN:
            rest += cost[maker]
        else:
            print(f"{cost[maker]:>11.2f} {long.get(maker, 0) / 2**20:>18.1f}  {maker}")
    print(
        f"{rest:>11.2f} {'':>18}  what costs less than {_SHOWN} each\n{sum(cost.values()):>11.2f} "
        f"{'':>18}  together"
    )
