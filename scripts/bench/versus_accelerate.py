"""accelerate with DeepSpeed's ZeRO-3 and sequence parallelism as a contender of versus.py: what the
documentation of accelerate and TRL says (`sp_backend: deepspeed` in versus_accelerate.yaml).

It is ALST without its tiles. transformers' own activation checkpoints are on. The loss of all ranks
together is computed as in that documentation.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from common import sequence


class Sequences:
    """The sequences of all steps, as a data set."""

    def __init__(self, lengths: list[int]):
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        import torch

        ids = sequence(index, self.lengths[index])
        return {"input_ids": ids, "labels": ids, "position_ids": torch.arange(len(ids))}


def build_step(args: Namespace) -> Callable[..., tuple[Any, Any]]:
    """Build, on every rank in DeepSpeed's environment, a function that trains a step on the next
    sequence and returns the loss and the gradient norm.
    """
    import torch
    from accelerate import Accelerator
    from deepspeed.utils import groups
    from torch.distributed.nn.functional import all_gather
    from torch.utils.data import DataLoader, DistributedSampler
    from transformers import AutoModelForCausalLM

    accelerator = Accelerator()
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32)
    model.gradient_checkpointing_enable()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **args.optimizer)
    # The ranks' sequences of one turn must have one length: gloo gathers no others.
    sequences = Sequences(args.lengths + args.lengths[-1:] * (args.ranks - 1))
    # DeepSpeed's adapter takes a sequence from each rank in turn. On a GPU accelerate would deal
    # them to the ranks; on a CPU with DeepSpeed, accelerate 1.15 takes every rank for the only one.
    sampler = DistributedSampler(sequences, shuffle=False)
    loader = DataLoader(sequences, batch_size=1, sampler=sampler)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    group = groups._get_sequence_parallel_group()
    batches = iter(loader)

    def step(seq_len: int, index: int) -> tuple[Any, Any]:
        batch = next(batches)
        labels = batch["shift_labels"]
        loss = model(**batch, labels=labels, use_cache=False).loss
        losses = torch.stack(all_gather(loss, group=group))
        labelled = torch.stack(all_gather((labels != -100).sum(), group=group))
        loss = (losses * labelled).sum() / labelled.sum()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach(), model.get_global_grad_norm()

    return step
