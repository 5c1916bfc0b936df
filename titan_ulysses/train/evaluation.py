"""What a sharded model makes of text, without training on it: log-probabilities, and losses that
fit any mesh.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from titan_ulysses.data.loader import Loader
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.mesh import Mesh
from titan_ulysses.distributed.sequence import IGNORE_INDEX, join_slices
from titan_ulysses.observability.metrics import perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def score(model: PreTrainedModel, batch: dict[str, Any]) -> Tensor:
    """Log-probability of each label of a batch of `shard`, over the whole sequence and on each of
    its ranks.

    [B, S], S padded to a multiple of P, in fp32 or wider: entry t is about token t + 1 given those
    before it in its document, and 0 where there is no label. Logits exist a tile at a time.
    Collective; dropout, if any, is the model's mode.
    """
    local = -model(**batch, reduction="none").loss
    sp = model.ulysses_mesh.sp
    slices = [torch.empty_like(local) for _ in range(sp.size())]
    dist.all_gather(slices, local, group=sp.get_group())
    return join_slices(slices)


@contextmanager
def whole_sequences(model: PreTrainedModel) -> Iterator[Mesh]:
    """Run a sharded model with P = 1 for a while: no exchange, and whole sequences of its own on
    every rank.

    Yields the mesh that says so, for `shard(loader, mesh)`. Parameters stay sharded as they are, so
    all ranks must run the same number of forwards; losses, and gradients if wanted, are those of
    all ranks' sequences together.
    """
    sharded = model.ulysses_mesh
    model.ulysses_mesh = sharded.whole
    try:
        yield sharded.whole
    finally:
        model.ulysses_mesh = sharded


class Evaluation(NamedTuple):
    """Mean cross-entropies in nats, the same on every rank and mesh."""

    loss: float
    tokens: int
    """labels that it is the mean of"""
    sequences: int
    """sequences that were read, see `spread`"""
    by_position: list[tuple[int, float, int]]
    """(first position, mean loss, labels) of each range of positions that has a label; see
    `position_edges`
    """

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    def as_json(self) -> dict[str, Any]:
        return {**self._asdict(), "perplexity": self.perplexity}


def position_edges(seq_len: int) -> list[int]:
    """Where ranges of positions begin: 0, 1, 2, 4, 8, ... below seq_len.

    Position t of a document predicts its token t + 1 from t + 1 tokens, so each range has twice the
    context of the one before. A document that is cut by the end of a sequence goes on as a document
    of its own, from position 0.
    """
    return [0, *(2**power for power in range((seq_len - 1).bit_length()))]


def spread(total: int, count: int) -> list[int]:
    """Which `count` of `total` held-out sequences are read, evenly spread and in order; 0, or too
    many: all.
    """
    count = min(count or total, total)
    return [i * total // count for i in range(count)]


def held_out_batches(loader: Loader, sequences: int) -> list[list[int]]:
    """The indices of `sequences` held-out sequences (see `spread`), a list a global micro-batch."""
    chosen, size = spread(len(loader.sequences), sequences), loader.batch_size * loader.batch_degree
    return [chosen[first : first + size] for first in range(0, len(chosen), size)]


@torch.no_grad()
def evaluate(
    model: PreTrainedModel, loader: Loader, mesh: Mesh, *, sequences: int = 0
) -> Evaluation:
    """Mean cross-entropy of the loader's sequences (of so many of them, see `spread`; 0: all), in
    all and by position.

    It does not depend on the mesh or on how sequences are batched: rows that fill up a batch count
    nothing, nor does padding, and a router's loss, which is of a whole batch, is left out. Dropout
    is off. UserError where nothing that was read has a label. Collective.
    """
    batches = held_out_batches(loader, sequences)
    edges = position_edges(loader.sequences.seq_len)
    borders = torch.tensor(edges[1:], device=mesh.device)
    # Of cross-entropies; of labels.
    sums = torch.zeros(2, len(edges), dtype=torch.float64, device=mesh.device)
    trains = model.training
    model.eval()
    for indices in batches:
        batch = loader.read(indices).to(mesh.device)
        losses = model(**vars(batch), reduction="none").loss.double()
        places = torch.bucketize(batch.position_ids.flatten(), borders, right=True)
        for total, values in zip(
            sums, (losses, (batch.labels != IGNORE_INDEX).double()), strict=True
        ):
            total.index_add_(0, places, values.flatten())
    model.train(trains)
    dist.all_reduce(sums, group=mesh.loss.get_group())
    losses, counts = sums.tolist()
    read, tokens = sum(map(len, batches)), int(sum(counts))
    if not tokens:
        raise UserError(
            f"validation: none of the tokens of {read} held-out sequence(s) is a label. Raise "
            "validation.steps, or set it to 0 to read all of the data."
        )
    ranges = [
        (edge, loss / n, int(n)) for edge, loss, n in zip(edges, losses, counts, strict=True) if n
    ]
    return Evaluation(sum(losses) / tokens, tokens, read, ranges)
