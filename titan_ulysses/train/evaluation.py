"""Evaluation of a sharded model without training it.

It computes log-probabilities, and losses that do not depend on the mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from titan_ulysses.data.loader import Batch, Loader
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.mesh import Mesh
from titan_ulysses.distributed.sequence import IGNORE_INDEX, join_slices
from titan_ulysses.observability.metrics import (
    describe_pairs,
    describe_validation,
    perplexity,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def score(model: PreTrainedModel, batch: dict[str, Any]) -> Tensor:
    """Return the log-probability of each label of a batch of `shard`, [B, S], on all its ranks.

    S is the whole sequence, padded to a multiple of P, and the values are in fp32 or wider. Entry t
    is that of token t + 1, given those before it in its document; it is 0 where there is no label.
    Logits exist for one tile at a time. Dropout, if the model has any, follows the model's mode.
    Collective.
    """
    local = -model(**batch, reduction="none").loss
    sp = model.sharding.mesh.sp
    slices = [torch.empty_like(local) for _ in range(sp.size())]
    dist.all_gather(slices, local, group=sp.get_group())
    return join_slices(slices, chunk_tokens=batch.get("chunk_tokens"))


@contextmanager
def whole_sequences(model: PreTrainedModel) -> Iterator[Mesh]:
    """Run a sharded model with P = 1 in this context: each rank has whole sequences of its own.

    There is no exchange then. `shard(loader, model)` in this context yields whole sequences, and
    the mesh with P = 1 that this yields says which of them are for which rank. Parameters stay
    sharded as they are, so all ranks must run the same number of forwards. Losses, and gradients if
    wanted, are those of all ranks' sequences together.
    """
    sharded = model.sharding.mesh
    model.sharding.mesh = sharded.whole
    try:
        yield sharded.whole
    finally:
        model.sharding.mesh = sharded


class Evaluation(NamedTuple):
    """Mean cross-entropies in nats, the same on every rank and mesh."""

    loss: float
    tokens: int
    """Number of labels that the loss is the mean of."""
    sequences: int
    """Number of sequences that were read (see `spread`)."""
    by_position: list[tuple[int, float, int]]
    """(first position, mean loss, labels) of each range of positions that has a label.

    See `position_edges`.
    """

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    def as_json(self) -> dict[str, Any]:
        return {**self._asdict(), "perplexity": self.perplexity}

    def describe(self) -> list[str]:
        return describe_validation(self.loss, self.by_position)


class PairEvaluation(NamedTuple):
    """The mean DPO loss of pairs of completions, the same on every rank and mesh."""

    loss: float
    pairs: int
    """Number of pairs that the loss is the mean of."""
    sequences: int
    """Number of sequences that were read (see `spread`)."""
    rewards: dict[str, float]
    """The mean rewards `chosen` and `rejected`, their `margins`, and the `accuracies`."""

    def as_json(self) -> dict[str, Any]:
        return self._asdict()

    def describe(self) -> list[str]:
        return describe_pairs(self.loss, self.rewards)


REWARDS = ("chosen", "rejected", "margins", "accuracies")
"""Metrics of pairs: the rewards of both completions, their difference, and whether it is > 0."""


def pairs_of(documents: tuple[int, ...]) -> int:
    """Return how many pairs a row of these documents holds; an odd one is padding."""
    return len(documents) // 2


Found = Evaluation | PairEvaluation
"""What a loss says about held-out data."""


def together(evaluations: Iterable[Found]) -> Found:
    """Return the evaluation of the data of several sets, in which every token counts alike, or
    every pair of completions.
    """
    found = [*evaluations]
    if len(found) == 1:
        return found[0]
    sequences = sum(one.sequences for one in found)
    if of_pairs := [one for one in found if isinstance(one, PairEvaluation)]:
        pairs = sum(one.pairs for one in of_pairs)
        loss = sum(one.loss * one.pairs for one in of_pairs) / pairs
        rewards = {
            name: sum(one.rewards[name] * one.pairs for one in of_pairs) / pairs for name in REWARDS
        }
        return PairEvaluation(loss, pairs, sequences, rewards)
    of_tokens = [one for one in found if isinstance(one, Evaluation)]
    sums: dict[int, tuple[float, int]] = {}
    for first, loss, labels in (each for one in of_tokens for each in one.by_position):
        total, count = sums.get(first, (0.0, 0))
        sums[first] = total + loss * labels, count + labels
    tokens = sum(one.tokens for one in of_tokens)
    loss = sum(one.loss * one.tokens for one in of_tokens) / tokens
    by_position = [(first, total / n, n) for first, (total, n) in sorted(sums.items())]
    return Evaluation(loss, tokens, sequences, by_position)


def position_edges(seq_len: int) -> list[int]:
    """Return where ranges of positions begin: 0, 1, 2, 4, 8, ... below seq_len.

    Position t of a document predicts its token t + 1 from t + 1 tokens, so each range has twice the
    context of the one before. A document that is cut by the end of a sequence continues as a
    document of its own, from position 0.
    """
    return [0, *(2**power for power in range((seq_len - 1).bit_length()))]


def spread(total: int, count: int) -> list[int]:
    """Return the indices of `count` of `total` held-out sequences, evenly spread and in order.

    If count is 0 or larger than total, all are taken.
    """
    count = min(count or total, total)
    return [i * total // count for i in range(count)]


def held_out_batches(loader: Loader, sequences: int) -> list[list[int]]:
    """Return the indices of `sequences` held-out sequences, in one list per global micro-batch.

    See `spread`.
    """
    chosen, size = spread(len(loader.sequences), sequences), loader.batch_size * loader.batch_degree
    return [chosen[first : first + size] for first in range(0, len(chosen), size)]


@torch.no_grad()
def evaluate(
    model: PreTrainedModel, loader: Loader, mesh: Mesh, *, sequences: int = 0
) -> Evaluation:
    """Return the mean cross-entropy of held-out sequences, in total and by position.

    `sequences` is the number that is read (see `spread`); 0 reads all. The result does not depend
    on the mesh or on how sequences are batched. Padding and rows that fill up a batch do not count,
    and the router loss, which is over a whole batch, is left out. Dropout is off. UserError if
    nothing that was read has a label. Collective.
    """
    batches = held_out_batches(loader, sequences)
    edges = position_edges(loader.sequences.seq_len)
    borders = torch.tensor(edges[1:], device=mesh.device)
    # By range of positions: the sum of cross-entropies, and the number of labels.
    sums = torch.zeros(2, len(edges), dtype=torch.float64, device=mesh.device)
    trains = model.training
    model.eval()
    try:
        for indices in batches:
            batch = loader.read(indices).to(mesh.device)
            losses = model(**batch.inputs(), reduction="none").loss.double()
            is_label = (batch.labels != IGNORE_INDEX).double()
            places = torch.bucketize(batch.position_ids.flatten(), borders, right=True)
            sums[0].index_add_(0, places, losses.flatten())
            sums[1].index_add_(0, places, is_label.flatten())
    finally:
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


@torch.no_grad()
def evaluate_pairs(
    model: PreTrainedModel,
    loader: Loader,
    mesh: Mesh,
    of_pairs: Callable[[Batch], tuple[Tensor, Tensor]],
    *,
    sequences: int = 0,
) -> PairEvaluation:
    """Return the mean loss and rewards of held-out pairs (see `evaluate`).

    of_pairs returns the loss [N] and the REWARDS [N, 4] of each pair of this rank's rows.
    Collective.
    """
    batches = held_out_batches(loader, sequences)
    # The sum of losses, those of the rewards, and the number of pairs.
    sums = torch.zeros(2 + len(REWARDS), dtype=torch.float64, device=mesh.device)
    trains = model.training
    model.eval()
    try:
        for indices in batches:
            batch = loader.read(indices).to(mesh.device)
            each, rewards = of_pairs(batch)
            # Rows that fill up a batch come last.
            rows = max(0, len(indices) - loader.batch_rank * loader.batch_size)
            count = sum(map(pairs_of, batch.documents[:rows]))
            sums[0] += each[:count].sum()
            sums[1:-1] += rewards[:count].sum(dim=0)
            sums[-1] += count
    finally:
        model.train(trains)
    dist.all_reduce(sums, group=mesh.batch.get_group())
    loss, *rewards, pairs = sums.tolist()
    means = dict(zip(REWARDS, (value / pairs for value in rewards), strict=True))
    return PairEvaluation(loss / pairs, int(pairs), sum(map(len, batches)), means)
