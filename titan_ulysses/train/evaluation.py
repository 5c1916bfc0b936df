"""Log-probabilities of whole sequences, and losses of held-out data that do not depend on the mesh.

`log_probs` has gradients: it is for losses of whole completions, as DPO's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from titan_ulysses.config.schema import Config
from titan_ulysses.data.loader import Loader
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.mesh import Mesh
from titan_ulysses.distributed.sequence import IGNORE_INDEX, join_slices
from titan_ulysses.memory.losses import TokenStatistics
from titan_ulysses.observability.metrics import perplexity

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


def log_probs(
    model: PreTrainedModel, batch: dict[str, Any], *, temperature: float = 1.0
) -> TokenStatistics:
    """Return the statistics of each label of a batch of `shard`, [B, S], on all its ranks.

    S is the whole sequence, padded to a multiple of P. Entry t is about token t + 1. With gradient
    if gradients are on: let every rank compute the same loss from its sequences, divided by what
    all ranks count in the step (pairs, say), and call backward on it; gradients are summed over the
    mesh. Collective.
    """
    inputs = {key: value for key, value in batch.items() if key != "num_items_in_batch"}
    local = model(**inputs, reduction="statistics", temperature=temperature)
    return whole_statistics(local, model.sharding.mesh, batch.get("chunk_tokens"))


def whole_statistics(
    local: dict[str, Tensor], mesh: Mesh, chunk_tokens: int | None, *, scale: float = 1.0
) -> TokenStatistics:
    """Return the statistics [B, S] of whole sequences, from those [B, T] of each rank's slice.

    Their gradients are multiplied by scale on the way back. Collective.
    """
    fields = [local[name] for name in TokenStatistics._fields]
    whole = _Join.apply(mesh, chunk_tokens, scale, *fields)
    return TokenStatistics(*whole)


class _Join(torch.autograd.Function):
    """Joins the slices of tensors [B, T]; backward takes the slice of this rank."""

    @staticmethod
    def forward(ctx, mesh: Mesh, chunk_tokens: int | None, scale: float, *local: Tensor):
        ctx.mesh, ctx.chunk_tokens, ctx.scale = mesh, chunk_tokens, scale
        mine = torch.stack([x.to(local[0].dtype) for x in local])
        slices = [torch.empty_like(mine) for _ in range(mesh.sp.size())]
        dist.all_gather(slices, mine, group=mesh.sp.get_group())
        whole = join_slices(slices, chunk_tokens=chunk_tokens, dim=2)
        parts = tuple(w.to(x.dtype) for w, x in zip(whole.unbind(), local, strict=True))
        flows = zip(parts, local, strict=True)
        ctx.mark_non_differentiable(*(p for p, x in flows if not x.requires_grad))
        ctx.set_materialize_grads(False)
        return parts

    @staticmethod
    def backward(ctx, *upstream: Tensor | None):
        grads = (
            None
            if g is None
            else ctx.scale * ctx.mesh.local_slice(g, chunk_tokens=ctx.chunk_tokens)
            for g in upstream
        )
        return None, None, None, *grads


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


class TokenEvaluation(NamedTuple):
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

    def as_json(self) -> dict[str, Any]:
        return {**self._asdict(), "perplexity": perplexity(self.loss)}


class PairEvaluation(NamedTuple):
    """The mean loss of pairs of completions, the same on every rank and mesh."""

    loss: float
    pairs: int
    """Number of pairs that the loss is the mean of."""
    sequences: int
    """Number of sequences that were read (see `spread`)."""
    rewards: dict[str, float]
    """The mean rewards `chosen` and `rejected`, their `margins`, and `accuracies` (KTO: `kl`)."""

    def as_json(self) -> dict[str, Any]:
        return self._asdict()


REWARDS = ("chosen", "rejected", "margins", "accuracies")
"""Metrics of pairs: the rewards of both completions, their difference, and whether it is > 0."""


def pairs_of(documents: tuple[int, ...]) -> int:
    """Return how many pairs a row of these documents holds; an odd one is padding."""
    return len(documents) // 2


Evaluation = TokenEvaluation | PairEvaluation
"""The loss of held-out data: of tokens, or of pairs of completions."""


def together(evaluations: Iterable[Evaluation]) -> Evaluation:
    """Return the evaluation of the data of several sets, in which every token has the same weight,
    or every pair of completions.
    """
    found = [*evaluations]
    if len(found) == 1:
        return found[0]
    sequences = sum(one.sequences for one in found)
    if of_pairs := [one for one in found if isinstance(one, PairEvaluation)]:
        pairs = sum(one.pairs for one in of_pairs)
        loss = sum(one.loss * one.pairs for one in of_pairs) / pairs
        rewards = {
            name: sum(one.rewards[name] * one.pairs for one in of_pairs) / pairs
            for name in of_pairs[0].rewards
        }
        return PairEvaluation(loss, pairs, sequences, rewards)
    of_tokens = [one for one in found if isinstance(one, TokenEvaluation)]
    sums: dict[int, tuple[float, int]] = {}
    for first, loss, labels in (each for one in of_tokens for each in one.by_position):
        total, count = sums.get(first, (0.0, 0))
        sums[first] = total + loss * labels, count + labels
    tokens = sum(one.tokens for one in of_tokens)
    loss = sum(one.loss * one.tokens for one in of_tokens) / tokens
    by_position = [(first, total / n, n) for first, (total, n) in sorted(sums.items())]
    return TokenEvaluation(loss, tokens, sequences, by_position)


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


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Switch dropout off in this context."""
    trains = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(trains)


@torch.no_grad()
def evaluate(
    model: PreTrainedModel, loader: Loader, mesh: Mesh, *, sequences: int = 0
) -> TokenEvaluation:
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
    with evaluating(model):
        for indices in batches:
            batch = loader.read(indices).to(mesh.device)
            losses = model(**batch.inputs(), reduction="none").loss.double()
            is_label = (batch.labels != IGNORE_INDEX).double()
            positions = batch.position_ids
            positions = positions if positions.ndim == 2 else positions[0]
            places = torch.bucketize(positions.flatten(), borders, right=True)
            sums[0].index_add_(0, places, losses.flatten())
            sums[1].index_add_(0, places, is_label.flatten())
    dist.all_reduce(sums, group=mesh.loss.get_group())
    losses, counts = sums.tolist()
    read, tokens = sum(map(len, batches)), int(sum(counts))
    if not tokens:
        raise UserError(
            f"validation: the {read} held-out sequence(s) have no label. Raise "
            "validation.steps, or set it to 0 to read all of the data."
        )
    ranges = [
        (edge, loss / n, int(n)) for edge, loss, n in zip(edges, losses, counts, strict=True) if n
    ]
    return TokenEvaluation(sum(losses) / tokens, tokens, read, ranges)


class Best:
    """The best value of validation.metric so far, the same on every rank.

    It is kept in run.json of each checkpoint, so that a run that goes on knows it. The validation
    before the first step does not count: nothing is trained yet.
    """

    def __init__(self, config: Config) -> None:
        self.metric, self.patience = config.validation.metric, config.validation.patience
        self.keeps = config.checkpoint.keep_best
        """whether its checkpoint is kept"""
        self.step: int | None = None
        self.value = float("inf")
        self.waited = 0
        """validations in a row that were not better"""

    def note(self, step: int, sets: Mapping[str, Evaluation], together: Evaluation) -> bool:
        """Note a validation; return whether it is the best one. Collective."""
        if step == 0:
            return False
        found = together if self.metric == "loss" else sets[self.metric.removesuffix("/loss")]
        value = torch.tensor(found.loss, dtype=torch.float64)
        dist.broadcast(value, src=0)  # the ranks must agree to the last bit
        if value.item() < self.value:
            self.step, self.value, self.waited = step, value.item(), 0
            return True
        self.waited += 1
        return False

    @property
    def kept_step(self) -> int | None:
        """The step of the best checkpoint, if it is kept and there is one."""
        return self.step if self.keeps else None

    @property
    def ends_run(self) -> bool:
        return 0 < self.patience <= self.waited

    def state(self) -> dict[str, Any] | None:
        """Return what run.json keeps; None before the first validation that counts."""
        if self.step is None:
            return None
        return {
            "metric": self.metric,
            "step": self.step,
            "value": self.value,
            "waited": self.waited,
            "keep": self.keeps,
        }

    def load(self, state: dict[str, Any] | None) -> str | None:
        """Go on from `state`; return a warning if it is of no use here."""
        if state is None:
            return None
        if self.keeps and not state["keep"]:
            return (
                "WARNING: checkpoint.keep_best = true, and it was false before: the best "
                "checkpoint is tracked from here on."
            )
        if state["metric"] != self.metric:
            return (
                f'WARNING: validation.metric = "{self.metric}", and it was "{state["metric"]}" '
                "before: the best checkpoint is tracked from here on."
            )
        self.step, self.value, self.waited = state["step"], state["value"], state["waited"]
        return None

    def describe(self) -> str:
        return f"{self.metric} {self.value:.4f} at step {self.step}"
