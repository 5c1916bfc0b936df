"""Embeddings and heads that get new rows, for tokens that the model does not have yet."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel

from titan_ulysses.distributed.seeds import seed_of
from titan_ulysses.model import hf


def grow_vocabulary(config: PreTrainedConfig, *, num_token_ids: int, multiple: int) -> None:
    """Make config's vocabulary hold num_token_ids, in place.

    The new size is rounded up to a multiple of `multiple`. The vocabulary never shrinks.
    """
    if num_token_ids > config.vocab_size:
        config.vocab_size = -(-num_token_ids // multiple) * multiple


def token_parameters(model: PreTrainedModel) -> set[str]:
    """Return the names of the parameters with one row per token: those of embedding and head.

    Tied parameters are named once.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    own = {embedding.weight, head.weight, head.bias} - {None}
    return {name for name, p in hf.named_parameters(model) if p in own}


@torch.no_grad()
def fill_new_rows(model: PreTrainedModel, known: dict[str, int], seed: int) -> None:
    """Fill new rows of parameters as `resize_token_embeddings` does.

    `known` maps names to numbers of rows that are filled already; a parameter that it does not name
    is complete. New rows are drawn by transformers' own code, near the mean of the known rows
    (https://nlp.stanford.edu/~johnhew/vocab-expansion.html). The numbers follow from (seed, name),
    so they are the same on every mesh. Collective; needs the memory of three such parameters in
    fp32.
    """
    for name, parameter in hf.named_parameters(model):
        if (rows := known.get(name, len(parameter))) == len(parameter):
            continue
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.clone()
        new = whole[rows:]
        if not dist.is_initialized() or dist.get_rank() == 0:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_of(seed, name))
                new.copy_(_drawn(model, whole[:rows].cpu(), len(new)))
        # All ranks take rank 0's numbers: another kind of CPU might round differently.
        if dist.is_initialized():
            dist.broadcast(new, src=0)
        hf.fill(parameter, whole)


def _drawn(model: PreTrainedModel, known: Tensor, added: int) -> Tensor:
    """Return `added` new rows, drawn by transformers' own code from the known rows."""
    new = SimpleNamespace(weight=SimpleNamespace(data=known.new_empty(added, *known.shape[1:])))
    if known.dim() == 1:
        new.bias = new.weight
        model._init_added_lm_head_bias_with_mean(
            SimpleNamespace(bias=SimpleNamespace(data=known)), new, added
        )
    else:
        old = SimpleNamespace(weight=SimpleNamespace(data=known, dtype=known.dtype))
        model._init_added_embeddings_weights_with_mean(old, new, len(known), added)
    return new.weight.data
