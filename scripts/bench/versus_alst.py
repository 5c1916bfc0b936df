"""DeepSpeed's ALST as a contender of versus.py.

The step combines ALST's parts (deepspeed.runtime.sequence_parallel.ulysses_sp) as their docstrings
say: ZeRO-3 with its default settings, UlyssesSPAttentionHF over sdpa, TiledMLP with ceil(T / h)
tiles, TiledFusedLogitsLoss, and the activation checkpointing of transformers, reentrant or not.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

from common import sequence


class _Samples:
    """The data of one rank: every P-th sequence, because the adapter takes a sequence from each
    rank in turn.
    """

    def __init__(self, lengths: list[int], rank: int, degree: int):
        self.lengths, self.rank, self.degree = lengths, rank, degree

    def __iter__(self) -> Iterator[dict[str, Any]]:
        import torch

        index = self.rank
        # Endless, because the adapter asks every rank for a sequence, also beyond the last one.
        while True:
            ids = sequence(index, self.lengths[min(index, len(self.lengths) - 1)])[None]
            yield {
                "input_ids": ids,
                "labels": ids,
                "position_ids": torch.arange(ids.shape[1])[None],
            }
            index += self.degree


def build_step(args: Namespace) -> Callable[..., tuple[Any, Any]]:
    """Build, on every rank in DeepSpeed's environment, a function that trains a step on the next
    sequence and returns the loss and the gradient norm.
    """
    import deepspeed
    import deepspeed.comm as dist
    import torch
    from deepspeed.runtime.sequence_parallel.ulysses_sp import (
        UlyssesSPAttentionHF,
        UlyssesSPDataLoaderAdapter,
    )
    from transformers import AutoModelForCausalLM

    deepspeed.init_distributed("gloo")
    rank, degree = dist.get_rank(), dist.get_world_size()
    model = AutoModelForCausalLM.from_pretrained(
        args.folder,
        dtype=torch.float32,
        attn_implementation="sdpa",
        trust_remote_code=False,
    ).train()
    mpu = UlyssesSPAttentionHF.register_with_transformers(
        model, core_attn_implementation="sdpa", sequence_parallel_size=degree, micro_batch_size=1
    )
    model.activation_checkpointing_enable({"use_reentrant": args.contender == "alst-reentrant"})
    tile(model, degree, args.loss_tile_tokens)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **args.optimizer)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "sequence_parallel_size": degree,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": args.dtype == "bfloat16"},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=mpu)
    group = mpu.get_sequence_parallel_group()
    batches = UlyssesSPDataLoaderAdapter(
        _Samples(args.lengths, rank, degree),
        sp_rank=rank,
        sp_group=group,
        sp_world_size=degree,
        device="cpu",
    )

    def step(seq_len: int, index: int) -> tuple[Any, Any]:
        batch = next(batches)
        assert batch["input_ids"].shape[1] * degree == seq_len
        labels = batch["shift_labels"]
        num_items = (labels != -100).sum()
        dist.all_reduce(num_items, group=group)
        loss = engine(**batch, num_items=num_items)
        engine.backward(loss)
        engine.step()
        total = loss.detach() / degree
        dist.all_reduce(total, group=group)
        return total, engine.get_global_grad_norm()

    return step


def tile(model: Any, degree: int, loss_tile_tokens: int) -> None:
    """Give the model TiledMLP, and a forward that ends in TiledFusedLogitsLoss and returns P times
    this rank's part of the loss.
    """
    import torch.nn.functional as F
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss, TiledMLP

    def mlp_rows(mlp, x):
        return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))

    def mlp_forward(mlp, x):
        tiles = math.ceil(x.shape[1] / x.shape[2])
        return TiledMLP.apply(
            mlp_rows,
            mlp,
            x,
            tiles,
            [mlp.down_proj.weight, mlp.gate_proj.weight, mlp.up_proj.weight],
        )

    def forward(model, input_ids, position_ids, shift_labels, num_items):
        def loss_of_rows(model, x, labels):
            # The loss is scaled here, because the gradient of lm_head is computed together with it:
            # a factor that is applied later would not reach that gradient. The factor P is there
            # because ZeRO-3 averages gradients over the ranks.
            total = F.cross_entropy(model.lm_head(x).float(), labels, reduction="sum")
            return total * degree / num_items

        hidden = model.model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        tiles = math.ceil(shift_labels.numel() / loss_tile_tokens)
        weights = [model.lm_head.weight]
        return TiledFusedLogitsLoss.apply(
            loss_of_rows, model, hidden, shift_labels, None, tiles, weights, "sum"
        )

    for layer in model.model.layers:
        layer.mlp.forward = MethodType(mlp_forward, layer.mlp)
    model.forward = MethodType(forward, model)
