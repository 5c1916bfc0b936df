"""The attention function that transformers calls in every layer: exchange, core attention, exchange back.

It is registered once, under a name of its own, and holds no state: what a model's attention needs to know (its mesh,
its core, the batch's documents) comes with each call as the keyword `ulysses`, which transformers hands down from the
model's forward. So two models in one process, on different meshes, cannot touch each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface

from titan_ulysses.ulysses.cores import Core, Documents
from titan_ulysses.ulysses.exchange import HEADS, SEQUENCE, heads_to_sequence, sequence_to_heads
from titan_ulysses.ulysses.heads import HeadPlan, plan_heads

ATTENTION_NAME = "ulysses"


@dataclass(frozen=True)
class Ulysses:
    """What one forward pass tells every attention layer."""

    mesh: DeviceMesh
    """The 1-D sequence-parallel mesh of P ranks."""
    core: Core
    documents: Documents


def ulysses_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    ulysses: Ulysses | None = None,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B, Hq, T, D], key and value [B, Hkv, T, D] -> [B, T, Hq, D].

    Causal inside each document of `ulysses.documents`. A mask is refused: documents say all that one could.
    """
    name = type(module).__name__
    assert ulysses is not None, f"{name} did not receive the keyword `ulysses`: its model does not hand keywords down"
    assert attention_mask is None, f"{name} was given an attention mask"
    for keyword in ("sliding_window", "softcap", "s_aux"):
        window_is_idle = keyword == "sliding_window" and (kwargs.get(keyword) or 0) >= sum(ulysses.documents[0])
        assert kwargs.get(keyword) is None or window_is_idle, f"{name} needs {keyword}, which the core cannot do"
    assert not kwargs.get("dropout"), f"{name} asks for attention dropout"

    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if ulysses.mesh.size() == 1:
        return ulysses.core(q, k, v, documents=ulysses.documents, scale=scale), None

    mesh = ulysses.mesh
    plan = plan_heads(q.shape[2], k.shape[2], mesh.size())
    placed = (DTensor.from_local(x, mesh, (SEQUENCE,), run_check=False) for x in (q, k, v))
    q, k, v = (_local(x) for x in sequence_to_heads(*placed, plan))
    output = _local_heads(q, k, v, plan, mesh.get_local_rank(), ulysses, scale)
    if plan.is_even:
        output = DTensor.from_local(output, mesh, (HEADS,), run_check=False)
    return heads_to_sequence(output, plan, mesh).to_local(), None


def _local_heads(q: Tensor, k: Tensor, v: Tensor, plan: HeadPlan, rank: int, ulysses: Ulysses, scale: float) -> Tensor:
    """Core attention over this rank's heads, one call a group size."""
    outputs = [
        ulysses.core(q[:, :, queries], k[:, :, keys], v[:, :, keys], documents=ulysses.documents, scale=scale)
        for queries, keys in plan.runs(rank)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


AttentionInterface.register(ATTENTION_NAME, ulysses_attention)
