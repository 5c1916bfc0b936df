"""What a sharded model makes of text, without training on it: log-probabilities, and losses that fit any mesh."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from titan_ulysses.data.loader import Loader
from titan_ulysses.data.packing import IGNORE_INDEX
from titan_ulysses.mesh import Mesh

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def score(model: PreTrainedModel, batch: dict[str, Any]) -> Tensor:
    """Log-probability of each label of a batch of `shard`, over the whole sequence and on each of its ranks.

    [B, S], S padded to a multiple of P, in fp32 or wider: entry t is about token t + 1 given those before it in its
    document, and 0 where there is no label. Logits exist a tile at a time. Collective; dropout, if any, is the model's
    mode.
    """
    local = -model(**batch, reduction="none").loss
    sp = model.ulysses_mesh.sp
    slices = [torch.empty_like(local) for _ in range(sp.size())]
    dist.all_gather(slices, local, group=sp.get_group())
    return torch.cat(slices, dim=1)


@contextmanager
def whole_sequences(model: PreTrainedModel) -> Iterator[Mesh]:
    """Run a sharded model with P = 1 for a while: no exchange, and whole sequences of its own on every rank.

    Yields the mesh that says so, for `shard(loader, mesh)`. Parameters stay sharded as they are, so all ranks must run
    the same number of forwards; losses, and gradients if wanted, are those of all ranks' sequences together.
    """
    sharded = model.ulysses_mesh
    model.ulysses_mesh = sharded.whole
    try:
        yield sharded.whole
    finally:
        model.ulysses_mesh = sharded


@torch.no_grad()
def mean_loss(model: PreTrainedModel, loader: Loader, mesh: Mesh, *, sequences: int) -> tuple[float, int]:
    """Mean cross-entropy of the loader's first sequences (at most all there are), and the number of labels in them.

    It does not depend on the mesh: rows beyond the last sequence, which fill up a batch, count nothing, and a
    router's loss, which is of a whole batch, is left out. Collective.
    """
    sequences = min(sequences, len(loader.sequences))
    loader.load_state_dict({"sequences_consumed": 0})
    sums = torch.zeros(2, dtype=torch.float64, device=mesh.device)  # of cross-entropy, and the number of labels
    model.eval()
    for first in range(0, sequences, loader.batch_size * loader.batch_degree):
        batch = loader.next_batch().to(mesh.device)
        rows = torch.arange(loader.batch_size, device=mesh.device) + first + loader.batch_rank * loader.batch_size
        batch.labels[rows >= sequences] = IGNORE_INDEX
        sums[0] += model(**vars(batch), reduction="none").loss.sum(dtype=torch.float64)
        sums[1] += (batch.labels != IGNORE_INDEX).sum()
    model.train()
    dist.all_reduce(sums, group=mesh.loss.get_group())
    total, count = sums.tolist()
    return total / max(count, 1), int(count)
