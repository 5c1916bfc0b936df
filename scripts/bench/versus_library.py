"""This library in a training loop of one's own as a contender of versus.py: docs/library.md."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from common import sequence


def build_step(args: Namespace) -> Callable[..., tuple[Any, Any]]:
    """Build, on every rank, a function that trains a step on the next sequence and returns the loss
    and the gradient norm.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from titan_ulysses import build_mesh, parallelize, shard

    mesh = build_mesh(sequence=args.ranks)
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32)
    model = parallelize(model, mesh, param_dtype=getattr(torch, args.dtype))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **args.optimizer)
    loader = ({"input_ids": sequence(i, n)[None]} for i, n in enumerate(args.lengths))
    batches = shard(loader, model)

    def step(seq_len: int, index: int) -> tuple[Any, Any]:
        loss = model(**next(batches)).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach(), norm

    return step
