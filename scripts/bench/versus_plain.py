"""Plain transformers in one process: what the contenders of versus.py must agree with."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from common import sequence


def build_step(args: Namespace) -> Callable[..., tuple[Any, Any]]:
    """Build, on the only rank, a function of (S, index) that trains a step on that sequence and
    returns the loss and the gradient norm.
    """
    import torch
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM

    dist.init_process_group("gloo")  # for versus.py
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=getattr(torch, args.dtype))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **args.optimizer)

    def step(seq_len: int, index: int) -> tuple[Any, Any]:
        ids = sequence(index, seq_len)[None]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach(), norm

    return step
