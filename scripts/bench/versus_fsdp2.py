"""transformers on FSDP2 as a contender of versus.py: without sequence parallelism, and with torch's
offload of activation checkpoints.

The offload of transformers (`activation_checkpointing_enable(offload=True)`) uses page-locked
memory, which needs a GPU. torch's offload does the same and runs everywhere.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from common import sequence


def build_step(args: Namespace) -> Callable[..., tuple[Any, Any]]:
    """Build, on every rank, a function of (S, index) that trains a step on that sequence and
    returns the loss and the gradient norm.

    Data-parallel ranks usually have different sequences. Here all ranks have the same one, so that
    the average of their gradients is the gradient of one sequence, and losses can be compared. A
    step still does the work of P sequences.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        checkpoint_wrapper,
        offload_wrapper,
    )
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import AutoModelForCausalLM

    dist.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(
        args.folder,
        dtype=torch.float32,
        attn_implementation="sdpa",
        trust_remote_code=False,
    ).train()
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, args.dtype), reduce_dtype=torch.float32
    )
    layers = model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = fully_shard(offload_wrapper(checkpoint_wrapper(layer)), mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **args.optimizer)

    def step(seq_len: int, index: int) -> tuple[Any, Any]:
        ids = sequence(index, seq_len)[None]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach(), norm

    return step
