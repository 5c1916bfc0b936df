"""What a loss is (`TrainingLoss`), and those of `[loss]`: cross-entropy, DPO, and distillation.

DPO and distillation read a second, frozen model besides the trained one: it has the same mesh and
reads the same batches, without gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_ulysses.checkpoint import safetensors as weights
from titan_ulysses.checkpoint.initial import initialize
from titan_ulysses.data.loader import Batch, Loader
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.mesh import Mesh
from titan_ulysses.distributed.sequence import IGNORE_INDEX
from titan_ulysses.memory.losses import distillation_losses, dpo_loss
from titan_ulysses.model import hf
from titan_ulysses.model.freezing import fingerprint
from titan_ulysses.model.lora import adapters_off
from titan_ulysses.setup.build import build_frozen
from titan_ulysses.setup.forward import SumOverRanks
from titan_ulysses.setup.parallelize import parallelize
from titan_ulysses.train.evaluation import (
    REWARDS,
    Evaluation,
    PairEvaluation,
    evaluate,
    evaluating,
    held_out_batches,
    pairs_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from titan_ulysses.config.schema import Config, Loss
    from titan_ulysses.setup.resolve import RunSpec


class BatchLoss(NamedTuple):
    """What one micro-batch adds to the loss and the metrics of its step."""

    loss: Tensor
    """A scalar, the same on all ranks. Its gradient is that of this rank's own part."""
    own_loss: Tensor
    """This rank's part of it, to find out which rank has one that is not finite. No gradient."""
    row_losses: Tensor | None
    """[2, B] fp64: this rank's part of the losses of its rows, summed, and of their number of
    labels (or pairs); None: not known."""
    router_loss: Tensor | None = None
    metrics: dict[str, Tensor] = {}  # noqa: RUF012  a default that nobody changes
    """Metrics by name, of all ranks, which add up over the micro-batches."""


class TrainingLoss(ABC):
    """What a run minimizes: a mean over the labels (or pairs) of a whole step, of all ranks.

    This is the way of a batch. The trainer takes the micro-batches of a step from
    `Loader.next_batch`. Each is a `Batch` with this rank's slice of B sequences: `input_ids`,
    `labels` (shifted, IGNORE_INDEX where there is none) and `position_ids`, all [B, T], and the
    lengths of its documents on the host. `train_step` does this:

        count = loss.count(batches)                        one number for the whole step
        for batch in batches:
            loss.forward(batch, count).loss.backward()     forward calls model(**batch.inputs())

    Each loss is divided by `count`, so the losses of a step, and their gradients, add up over
    micro-batches and ranks. FSDP sums gradients over the mesh. Every method is called by all ranks.

    For another loss of a token's logits no class is needed: see `loss_function` in
    docs/trainers.md, which works by tiles and under sequence parallelism.
    """

    setting = ""
    """The key of [loss] that names the folder of the second model."""

    def __init__(self, model: PreTrainedModel, mesh: Mesh, frozen: PreTrainedModel | None = None):
        self.model, self.mesh = model, mesh
        self.frozen = frozen
        """The second model; None where there is none."""
        self._fingerprint: int | None = None

    @abstractmethod
    def count(self, batches: list[Batch]) -> Tensor:
        """Return how many labels (or pairs) the loss of a step is the mean over, on all ranks."""

    @abstractmethod
    def forward(self, batch: Batch, count: Tensor) -> BatchLoss:
        """Return the part of a micro-batch in the loss of a step that is over `count` labels."""

    @abstractmethod
    def evaluate(self, loader: Loader, sequences: int) -> Evaluation:
        """Return the mean loss of so many held-out sequences (0: all), without gradient."""

    def describe(self, config: Config) -> str:
        """Return a line about the loss; empty for cross-entropy."""
        return ""

    def allocate(self, *, parameter_offload: bool) -> None:
        """Allocate this rank's shards of the second model, if there is one, without values."""
        if self.frozen is not None:
            hf.allocate(self.frozen, self.mesh.device, parameter_offload=parameter_offload)

    def fill(self, config: Config) -> None:
        """Fill the second model, if there is one, from its folder or with the initial weights."""
        path = getattr(config.loss, self.setting) if self.setting else ""
        if self.frozen is not None and path:
            weights.load(self.frozen, path, setting=f"loss.{self.setting}")
        elif self.frozen is not None:
            initialize(self.frozen, config)
        self.prepare()

    def prepare(self) -> None:  # noqa: B027  most have nothing to gather
        """Gather what every step needs of the second model, once it is filled."""

    def fingerprint(self) -> int:
        """Return a checksum of the weights of the second model; 0 if there is none."""
        if self._fingerprint is None:  # the second model is frozen: once is enough
            self._fingerprint = 0 if self.frozen is None else fingerprint(self.frozen)
        return self._fingerprint


class CrossEntropy(TrainingLoss):
    """The cross-entropy of the next token."""

    def count(self, batches: list[Batch]) -> Tensor:
        labels = torch.stack([(batch.labels != IGNORE_INDEX).sum() for batch in batches]).sum()
        dist.all_reduce(labels, group=self.mesh.loss.get_group())
        return labels

    def forward(self, batch: Batch, count: Tensor) -> BatchLoss:
        output = self.model(
            **batch.inputs(), num_items_in_batch=count, **self._loss_function(batch)
        )
        # A model that was parallelized in another way has another head.
        rows = getattr(self.model.get_output_embeddings(), "row_losses", None)
        if rows is not None:
            rows = torch.stack([rows, (batch.labels != IGNORE_INDEX).sum(dim=1).double()])
        return BatchLoss(output.loss, self.model.sharding.own_loss, rows, output.get("aux_loss"))

    def evaluate(self, loader: Loader, sequences: int) -> Evaluation:
        return evaluate(self.model, loader, self.mesh, sequences=sequences)

    def _loss_function(self, batch: Batch) -> dict[str, Any]:
        """Return the arguments of the model's forward for another loss than cross-entropy."""
        return {}


class DPO(TrainingLoss):
    """Sigmoid DPO of pairs of completions (arXiv 2305.18290, equation 7).

    The documents of a row are chosen, rejected, chosen, rejected, ...; padding may follow. The
    labels are those of the completions. Without a second model the reference is the model itself,
    with its adapters off; or its log-probabilities come with the batches (see references.py), and
    `stored` is the checksum of its weights.
    """

    setting = "reference"

    def __init__(
        self,
        model: PreTrainedModel,
        mesh: Mesh,
        frozen: PreTrainedModel | None,
        *,
        beta: float,
        stored: int | None = None,
    ):
        super().__init__(model, mesh, frozen)
        self.beta, self._fingerprint = beta, stored

    def count(self, batches: list[Batch]) -> Tensor:
        pairs = sum(pairs_of(row) for batch in batches for row in batch.documents)
        count = torch.tensor(pairs, device=self.mesh.device)
        dist.all_reduce(count, group=self.mesh.batch.get_group())
        return count

    def forward(self, batch: Batch, count: Tensor) -> BatchLoss:
        each, rewards = self.of_pairs(batch)
        loss = each.sum() / count.clamp(min=1)
        of_rows = [pairs_of(row) for row in batch.documents]
        sums = torch.stack([part.sum() for part in each.detach().split(of_rows)])
        data_parallel = self.mesh.batch.get_group()
        mean_rewards = rewards.sum(dim=0) / count.clamp(min=1)
        dist.all_reduce(mean_rewards, group=data_parallel)
        # The ranks that share a sequence compute the same loss: each owns a part of it.
        return BatchLoss(
            SumOverRanks.apply(loss, torch.float64, data_parallel),
            loss.detach() / self.mesh.sp.size(),
            torch.stack([sums, sums.new_tensor(of_rows)]) / self.mesh.sp.size(),
            metrics=dict(zip(REWARDS, mean_rewards.unbind(), strict=True)),
        )

    def of_pairs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss of each pair of this rank's rows, and its rewards, both in fp64.

        The losses [N] have gradients. The rewards [N, 4] are the REWARDS: beta times the logarithm
        of a completion's probability over that of the reference. Collective.
        """
        other = self.reference_of(batch)
        policy = self._completions(self.model, batch)
        each = dpo_loss(policy[::2], policy[1::2], other[::2], other[1::2], beta=self.beta)
        rewards = self.beta * (policy.detach() - other).view(-1, 2)
        margins = rewards[:, 0] - rewards[:, 1]
        return each, torch.stack([*rewards.unbind(1), margins, (margins > 0).double()], dim=1)

    def reference_of(self, batch: Batch) -> Tensor:
        """Return the reference's log-probability of each completion of this rank's rows.

        [2 * pairs] fp64, those of the batch if it has them. Collective.
        """
        if batch.reference is not None:
            return batch.reference
        with torch.no_grad(), self._reference() as reference:
            return self._completions(reference, batch)

    def give_up_reference(self) -> None:
        """Drop the second model: from now on all batches have its log-probabilities. Collective."""
        self.fingerprint()
        self.frozen = None

    def describe(self, config: Config) -> str:
        where = config.loss.reference or "the weights that the run begins with"
        if config.lora.rank and not config.loss.reference:
            where = "the model without its adapters"
        before = ", computed before training" if config.loss.precompute_reference else ""
        return f"loss: DPO of pairs of completions, beta {self.beta:g}, reference: {where}{before}"

    @torch.no_grad()
    def evaluate(self, loader: Loader, sequences: int) -> PairEvaluation:
        batches = held_out_batches(loader, sequences)
        # The sum of losses, those of the rewards, and the number of pairs.
        sums = torch.zeros(2 + len(REWARDS), dtype=torch.float64, device=self.mesh.device)
        with evaluating(self.model):
            for indices in batches:
                batch = loader.read(indices).to(self.mesh.device)
                each, rewards = self.of_pairs(batch)
                # Rows that fill up a batch come last.
                rows = max(0, len(indices) - loader.batch_rank * loader.batch_size)
                count = sum(map(pairs_of, batch.documents[:rows]))
                sums[0] += each[:count].sum()
                sums[1:-1] += rewards[:count].sum(dim=0)
                sums[-1] += count
        dist.all_reduce(sums, group=self.mesh.batch.get_group())
        loss, *rewards_sums, pairs = sums.tolist()
        rewards = dict(zip(REWARDS, (value / pairs for value in rewards_sums), strict=True))
        return PairEvaluation(loss / pairs, int(pairs), sum(map(len, batches)), rewards)

    @contextmanager
    def _reference(self) -> Iterator[PreTrainedModel]:
        if self.frozen is not None:
            yield self.frozen
        else:
            with evaluating(self.model), adapters_off(self.model):
                yield self.model

    def _completions(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Return the log-probability of each completion of this rank's rows, [2 * pairs] fp64.

        It is that of all its tokens, on each of the ranks that share them. Collective.
        """
        each = model(**batch.inputs(), reduction="none").loss
        place, count = self._places(batch)
        sums = torch.zeros(count + 1, dtype=torch.float64, device=each.device)
        sums = sums.index_add(0, place, -each.flatten().double())
        return SumOverRanks.apply(sums, torch.float64, self.mesh.sp.get_group())[:count]

    def _places(self, batch: Batch) -> tuple[Tensor, int]:
        """Return which completion each of this rank's tokens is of [B * T], and their number.

        Padding has the number after the last.
        """
        count = 2 * sum(pairs_of(row) for row in batch.documents)
        wholes, first = [], 0
        for row in batch.documents:
            own = 2 * pairs_of(row)
            numbers = [*range(first, first + own), *([count] * (len(row) - own))]
            wholes.append(torch.tensor(numbers).repeat_interleave(torch.tensor(row)))
            first += own
        place = self.mesh.local_slice(torch.stack(wholes), chunk_tokens=batch.chunk_tokens)
        return place.flatten().to(self.mesh.device), count


class Distillation(CrossEntropy):
    """The divergence from a teacher, in addition to cross-entropy (see `distillation_losses`).

    The teacher's hidden states are computed for each micro-batch. Its logits exist for a tile at a
    time, as the student's do. Each rank holds the whole weight of the teacher's head. Without a
    second model, the teacher's largest log-probabilities come with the batches (data/records.py).
    """

    setting = "teacher"

    def __init__(
        self,
        model: PreTrainedModel,
        mesh: Mesh,
        frozen: PreTrainedModel | None,
        config: Loss,
    ):
        super().__init__(model, mesh, frozen)
        self.config = config
        self._function: Callable[..., Tensor] | None = None

    def describe(self, config: Config) -> str:
        teacher = self.config.teacher or "a teacher's log-probabilities in the data,"
        return (
            f"loss: {self.config.teacher_share:g} of the divergence from {teacher} at temperature "
            f"{self.config.temperature:g}, {1 - self.config.teacher_share:g} of cross-entropy"
        )

    def prepare(self) -> None:
        self._function = partial(
            distillation_losses,
            temperature=self.config.temperature,
            cross_entropy=1 - self.config.teacher_share,
            **self._head(),
        )
        # It is a sum over tokens. The check would read values, which the planner has not.
        self.model.get_output_embeddings().checked = self._function

    def _head(self) -> dict[str, Any]:
        """Return the teacher's head, as the divergence takes it. Collective."""
        if self.frozen is None:
            return {}
        head = self.frozen.get_output_embeddings()
        if head.bias is not None:
            raise UserError(
                f'loss.teacher = "{self.config.teacher}": its head has a bias, which the tiled '
                "divergence does not support. Choose another teacher."
            )
        weight = head.weight.detach()
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
        shape = (head.scale, head.softcap)
        return {"teacher_weight": whole.to(self.mesh.device), "teacher_shape": shape}

    def _loss_function(self, batch: Batch) -> dict[str, Any]:
        inputs = batch.loss_inputs
        if self.frozen is not None:
            with torch.no_grad():
                hidden = self.frozen(**batch.inputs(), reduction="hidden").last_hidden_state
            inputs = {"teacher_hidden": hidden}
        return {"loss_function": self._function, "loss_inputs": inputs}


def build_loss(
    spec: RunSpec,
    model: PreTrainedModel,
    mesh: Mesh,
    *,
    wrap: Callable[..., Any] = parallelize,
    stored: int | None = None,
) -> TrainingLoss:
    """Return the loss of a run, with its second model built on meta, if it has one.

    stored: the checksum of the reference whose log-probabilities come with the batches; no model is
    built then.
    """
    config = spec.config.loss
    if config.name == "cross_entropy":
        return CrossEntropy(model, mesh)
    frozen = None
    if spec.frozen is not None and stored is None:
        frozen = build_frozen(spec.frozen, mesh, wrap=wrap)
    if config.name == "dpo":
        return DPO(model, mesh, frozen, beta=config.beta, stored=stored)
    return Distillation(model, mesh, frozen, config)
