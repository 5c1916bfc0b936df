"""Compare the step time and peak memory of two sequence-parallel ranks with those of one plain
transformers process.

    python scripts/bench/step.py  2 ranks at S = 16,384; plain up to the longest S that it can do
    python scripts/bench/step.py --seq-len 8192

For the plain process, S doubles until it runs out of memory or time (--minutes for each S). Every
process has an allocator that returns freed memory, so that the peak of its resident set shows the
memory in use.
"""

from __future__ import annotations

import os
import statistics
from itertools import count
from typing import Any

from common import ALLOCATOR, LLAMA, child, measure, parser_of, sequence, training_step


def plain_step():
    """Build a step of unmodified transformers, with sdpa, its own loss, fused AdamW and no
    activation checkpointing.
    """
    import torch
    import torch.distributed as dist
    from transformers import AutoConfig, AutoModelForCausalLM

    dist.init_process_group("gloo")
    config = AutoConfig.for_model(**LLAMA)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step(seq_len: int, index: int):
        ids = sequence(index, seq_len)[None]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach(), norm

    return step


def steps(what: str, seq_len: int, repeats: int) -> dict[str, Any]:
    """On a rank: measure steps of what is compared, of which the first one warms up."""
    step = training_step(LLAMA) if what == "sharded" else plain_step()
    return measure(step, [seq_len] * (1 + repeats))


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--seq-len", type=int, default=16_384)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--minutes", type=float, default=5, help="patience a try of the plain process"
    )
    args = parser.parse_args()
    cores, steps_of = os.cpu_count() or 1, f"median of {args.repeats} steps"
    print(f"llama, 4 layers, h 256, vocab 32,000, fp32, {cores} cores, {steps_of}")

    def show(what: str, seq_len: int, ranks: int, **limits: Any) -> bool:
        """Run the steps and print their time and memory. Return whether they could be run."""
        limits |= {"threads": max(1, cores // ranks), "env": ALLOCATOR}
        found = child(steps, what, seq_len, args.repeats, ranks=ranks, **limits)
        if isinstance(found, str):
            print(f"{what:<7} S {seq_len:>7,}  {found}")
            return False
        for rank, one in enumerate(found):
            print(
                f"{what:<7} S {seq_len:>7,}  rank {rank}  step "
                f"{statistics.median(one['seconds'][1:]):7.2f} s  peak {one['peak'] / 2**30:6.2f} "
                f"GiB  (before the first step {one['before'] / 2**30:.2f})"
            )
        return True

    show("sharded", args.seq_len, args.ranks, minutes=20)
    # The longest S of the plain process, within the memory of this machine.
    memory = int(0.9 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    limits = {"minutes": args.minutes, "memory": memory}
    for doubled in count():
        if not show("plain", args.seq_len // 4 * 2**doubled, 1, **limits):
            break
    longest = args.seq_len // 4 * 2 ** (doubled - 1)
    if doubled and longest != args.seq_len:
        show("sharded", longest, args.ranks, minutes=20)


if __name__ == "__main__":
    main()
