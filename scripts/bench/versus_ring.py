"""transformers on FSDP2 with torch's context parallelism (ring attention) as a contender of
versus.py, as the tutorial of torch does it: `context_parallel` cuts the batch and replaces the
attention function while a step runs.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from common import sequence


def causal(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Ask for causal attention without a mask, as accelerate does: the ring deals each rank the
    first and the last tokens of a sequence, in which transformers sees several documents.
    """
    return args, kwargs | {"attention_mask": None, "is_causal": True}


def build_step(args: Namespace) -> Callable[..., tuple[Any, Any]]:
    """Build, on every rank, a function of (S, index) that trains a step on that sequence and
    returns the loss and the gradient norm.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor.experimental import context_parallel
    from transformers import AutoModelForCausalLM

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    model = AutoModelForCausalLM.from_pretrained(
        args.folder, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
    ).train()
    model.gradient_checkpointing_enable()
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, args.dtype), reduce_dtype=torch.float32
    )
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(causal, with_kwargs=True)
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **args.optimizer)

    def step(seq_len: int, index: int) -> tuple[Any, Any]:
        ids = sequence(index, seq_len)[None]
        # Shifted before they are cut: a label of one rank is a token of the next one.
        labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
        batch = [ids, labels, torch.arange(seq_len)[None]]
        with context_parallel(
            mesh, buffers=batch, buffer_seq_dims=[1, 1, 1], no_restore_buffers=set(batch)
        ):
            ids, labels, position_ids = batch
            # FSDP averages over the ranks, hence their number.
            loss = (
                mesh.size()
                * model(
                    input_ids=ids,
                    position_ids=position_ids,
                    labels=labels,
                    shift_labels=labels,
                    num_items_in_batch=seq_len - 1,
                    use_cache=False,
                ).loss
            )
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach() / mesh.size()
        dist.all_reduce(total)
        return total, norm

    return step
