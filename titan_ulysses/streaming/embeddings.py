"""Embedding and rotary embedding of a sequence whose hidden states are off the device.

They are computed chunk by chunk, and written where the blocks read them (`memory/sequences.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from titan_ulysses.distributed.parts import visited, visited_with_next
from titan_ulysses.distributed.sequence import computing, current_chunks
from titan_ulysses.memory.sequences import SequenceStore


def offload_embeddings(
    embedding: nn.Module, rotaries: list[nn.Module], store: SequenceStore
) -> None:
    """Let these modules write what they make of a sequence of several chunks to store, in place."""
    embedding.forward = _Embedding(embedding, store)
    for rotary in rotaries:
        rotary.forward = _Rotary(rotary, store)


class _Rotary:
    """The forward of a rotary embedding, chunk by chunk."""

    def __init__(self, rotary: nn.Module, store: SequenceStore):
        self.forward, self.store = rotary.forward, store

    def __call__(self, x: Tensor, position_ids: Tensor, *args, **kwargs) -> Any:
        chunks, store = current_chunks.get(), self.store
        here = x.new_empty(0, device=position_ids.device)  # only its dtype and device are read
        if len(chunks) < 2 or position_ids.ndim != 2:
            return self.forward(here, position_ids, *args, **kwargs)
        whole: tuple[Tensor, ...] = ()
        for chunk in visited(list(chunks)):
            with computing([chunk]):
                made = self.forward(here, position_ids[:, chunk.local], *args, **kwargs)
            parts = made if isinstance(made, tuple) else (made,)
            if not whole:
                tokens = position_ids.shape[1]
                whole = tuple(store.empty(x, (len(x), tokens, *x.shape[2:])) for x in parts)
            for x, part in zip(whole, parts, strict=True):
                store.write(x, chunk.local, part)
        if store.host_reads:
            store.finish()
        return whole if isinstance(made, tuple) else whole[0]


class _Embedding:
    """The forward of an embedding, chunk by chunk."""

    def __init__(self, embedding: nn.Module, store: SequenceStore):
        self.embedding, self.forward, self.store = embedding, embedding.forward, store

    def __call__(self, ids: Tensor) -> Tensor:
        if len(current_chunks.get()) < 2:
            return self.forward(ids)
        weight = self.store.inputs_for([self.embedding.weight])
        return _EmbeddingFunction.apply(self, ids, *weight)


class _EmbeddingFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, look_up: _Embedding, ids: Tensor, weight: Tensor):
        store, chunks = look_up.store, list(current_chunks.get())
        ctx.look_up, ctx.chunks, ctx.weight = look_up, chunks, look_up.embedding.weight
        ctx.save_for_backward(ids)
        ctx.shape, ctx.dtype = weight.shape, weight.dtype
        output = store.empty(weight, (*ids.shape, weight.shape[1]))
        for chunk in visited(chunks):
            store.write(output, chunk.local, look_up.forward(ids[:, chunk.local]))
        if store.host_reads:
            store.finish()
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        (ids,), embedding, store = ctx.saved_tensors, ctx.look_up.embedding, ctx.look_up.store
        wide = torch.promote_types(ctx.dtype, torch.float32)
        total = torch.zeros(ctx.shape, dtype=wide, device=ids.device)
        # gemma's embeddings multiply what they look up.
        scale = torch.as_tensor(
            getattr(embedding, "embed_scale", 1.0), dtype=ctx.dtype, device=ids.device
        )
        for chunk, then in visited_with_next(ctx.chunks):
            rows = ids[:, chunk.local].flatten()
            part = store.read(upstream, chunk.local, None if then is None else then.local)
            gradient = part.flatten(0, 1) * scale
            if embedding.padding_idx is not None:  # its row has no gradient
                padding = (rows == embedding.padding_idx)[:, None]
                gradient = gradient.masked_fill(padding, 0)
            total.index_add_(0, rows, gradient.to(wide))
        store.add_gradients([ctx.weight], [total])
        return None, None, None
