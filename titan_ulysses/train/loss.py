"""The loss of a run, as [loss] asks for it: cross-entropy, DPO, or distillation.

`train_step` calls it for each micro-batch. A loss is a sum over labels (or over pairs) of all
ranks, divided by their number in the whole step. DPO and distillation read a second, frozen model
beside the one that is trained: it has the same mesh and reads the same batches, without gradient.
"""

from __future__ import annotations

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
    evaluate_pairs,
    pairs_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from titan_ulysses.config.schema import Config
    from titan_ulysses.setup.resolve import RunSpec
    from titan_ulysses.train.step import StepMetrics


class Part(NamedTuple):
    """What one micro-batch adds to the loss and the metrics of its step."""

    loss: Tensor
    """A scalar, the same on all ranks. Its gradient is that of this rank's own part."""
    rows: Tensor | None
    """[2, B] fp64: the summed losses of each of this rank's rows, and how many; None: not known."""
    router_loss: Tensor | None = None
    metrics: dict[str, Tensor] = {}  # noqa: RUF012  a default that nobody changes
    """Metrics by name, of all ranks, which add up over the micro-batches."""


class CrossEntropy:
    """The cross-entropy of the next token."""

    frozen: PreTrainedModel | None = None
    """The second model; None where there is none."""
    _fingerprint: int | None = None

    def __init__(self, model: PreTrainedModel, mesh: Mesh):
        self.model, self.mesh = model, mesh

    def count(self, batches: list[Batch]) -> Tensor:
        """Return how many labels the loss of a step is the mean over. Collective."""
        labels = torch.stack([(batch.labels != IGNORE_INDEX).sum() for batch in batches]).sum()
        dist.all_reduce(labels, group=self.mesh.loss.get_group())
        return labels

    def __call__(self, batch: Batch, count: Tensor) -> Part:
        """Return the part of a micro-batch in a step of `count` labels. Collective."""
        output = self._forward(batch, count)
        # A model that was parallelized in another way has another head.
        rows = getattr(self.model.get_output_embeddings(), "row_losses", None)
        if rows is not None:
            rows = torch.stack([rows, (batch.labels != IGNORE_INDEX).sum(dim=1).double()])
        return Part(output.loss, rows, output.get("aux_loss"))

    def evaluate(self, loader: Loader, sequences: int) -> Evaluation:
        """Return the mean cross-entropy of held-out sequences (see `evaluate`). Collective."""
        return evaluate(self.model, loader, self.mesh, sequences=sequences)

    def _forward(self, batch: Batch, count: Tensor) -> Any:
        return self.model(**batch.inputs(), num_items_in_batch=count)

    def allocate(self, *, parameter_offload: bool) -> None:
        """Allocate this rank's shards of the second model, if there is one, without values."""
        if self.frozen is not None:
            hf.allocate(self.frozen, self.mesh.device, parameter_offload=parameter_offload)

    def fill(self, config: Config) -> None:
        """Fill the second model, if there is one. Collective."""

    def prepare(self) -> None:
        """Gather what every step needs of the second model, once it is filled. Collective."""

    def describe(self, config: Config) -> str:
        """Return a line about the loss; empty for cross-entropy."""
        return ""

    def fingerprint(self) -> int:
        """Return a checksum of the weights of the second model; 0 if there is none. Collective."""
        if self._fingerprint is None:  # the second model is frozen: once is enough
            self._fingerprint = 0 if self.frozen is None else fingerprint(self.frozen)
        return self._fingerprint


class _WithFrozen(CrossEntropy):
    """A loss that reads a second model, filled from the folder of a setting."""

    setting = ""

    def __init__(self, model: PreTrainedModel, mesh: Mesh, frozen: PreTrainedModel | None):
        super().__init__(model, mesh)
        self.frozen = frozen

    def fill(self, config: Config) -> None:
        path = getattr(config.loss, self.setting)
        if self.frozen is not None and path:
            weights.load(self.frozen, path, setting=f"loss.{self.setting}")
        elif self.frozen is not None:
            initialize(self.frozen, config)
        self.prepare()


class DPO(_WithFrozen):
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
        """Return how many pairs the loss of a step is the mean over. Collective."""
        pairs = sum(pairs_of(row) for batch in batches for row in batch.documents)
        count = torch.tensor(pairs, device=self.mesh.device)
        dist.all_reduce(count, group=self.mesh.batch.get_group())
        return count

    def __call__(self, batch: Batch, count: Tensor) -> Part:
        each, rewards = self.of_pairs(batch)
        loss = each.sum() / count.clamp(min=1)
        # The ranks that share a sequence compute the same loss: each owns a part of it.
        self.model.own_loss = loss.detach() / self.mesh.sp.size()
        of_rows = [pairs_of(row) for row in batch.documents]
        sums = torch.stack([part.sum() for part in each.detach().split(of_rows)])
        rows = torch.stack([sums, sums.new_tensor(of_rows)]) / self.mesh.sp.size()
        data_parallel = self.mesh.batch.get_group()
        shown = rewards.sum(dim=0) / count.clamp(min=1)
        dist.all_reduce(shown, group=data_parallel)
        total = SumOverRanks.apply(loss, torch.float64, data_parallel)
        return Part(total, rows, metrics=dict(zip(REWARDS, shown.unbind(), strict=True)))

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

    def evaluate(self, loader: Loader, sequences: int) -> PairEvaluation:  # type: ignore[override]
        """Return the mean loss and rewards of held-out pairs. Collective."""
        return evaluate_pairs(self.model, loader, self.mesh, self.of_pairs, sequences=sequences)

    @contextmanager
    def _reference(self) -> Iterator[PreTrainedModel]:
        if self.frozen is not None:
            yield self.frozen
            return
        trains = self.model.training
        self.model.eval()
        try:
            with adapters_off(self.model):
                yield self.model
        finally:
            self.model.train(trains)

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


class Distillation(_WithFrozen):
    """The divergence from a teacher, beside cross-entropy (see `distillation_losses`).

    The teacher's hidden states are computed for each micro-batch. Its logits exist for a tile at a
    time, as the student's do. Each rank holds the whole weight of the teacher's head. Without a
    second model, the teacher's largest log-probabilities come with the batches (data/records.py).
    """

    setting = "teacher"

    def __init__(
        self, model: PreTrainedModel, mesh: Mesh, frozen: PreTrainedModel | None, loss: Any
    ):
        super().__init__(model, mesh, frozen)
        self._settings = loss
        self._function: Callable[..., Tensor] | None = None

    def describe(self, config: Config) -> str:
        loss = self._settings
        teacher = loss.teacher or "what a teacher has said in the data,"
        return (
            f"loss: {loss.teacher_share:g} of the divergence from {teacher} at temperature "
            f"{loss.temperature:g}, {1 - loss.teacher_share:g} of cross-entropy"
        )

    def prepare(self) -> None:
        shares = {
            "temperature": self._settings.temperature,
            "cross_entropy": 1 - self._settings.teacher_share,
        }
        self._function = partial(distillation_losses, **shares, **self._head())
        # It is a sum over tokens. The check would read values, which the planner has not.
        self.model.get_output_embeddings().checked = self._function

    def _head(self) -> dict[str, Any]:
        """Return the teacher's head, as the divergence takes it. Collective."""
        if self.frozen is None:
            return {}
        head = self.frozen.get_output_embeddings()
        if head.bias is not None:
            raise UserError(
                f'loss.teacher = "{self._settings.teacher}": its head has a bias, which the '
                "divergence by tiles does not read. Take another teacher."
            )
        weight = head.weight.detach()
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
        shape = (head.scale, head.softcap)
        return {"teacher_weight": whole.to(self.mesh.device), "teacher_shape": shape}

    def _forward(self, batch: Batch, count: Tensor) -> Any:
        assert self._function is not None
        inputs = batch.loss_inputs
        if self.frozen is not None:
            with torch.no_grad():
                hidden = self.frozen(**batch.inputs(), reduction="hidden").last_hidden_state
            inputs = {"teacher_hidden": hidden}
        return self.model(
            **batch.inputs(),
            num_items_in_batch=count,
            loss_function=self._function,
            loss_inputs=inputs,
        )


def build_loss(
    spec: RunSpec,
    model: PreTrainedModel,
    mesh: Mesh,
    *,
    wrap: Callable[..., Any] = parallelize,
    stored: int | None = None,
) -> CrossEntropy:
    """Return the loss of a run, with its second model built on meta, if it has one.

    stored: the checksum of the reference whose log-probabilities come with the batches; no model is
    built then.
    """
    loss = spec.config.loss
    if loss.name == "cross_entropy":
        return CrossEntropy(model, mesh)
    frozen = None
    if spec.frozen is not None and stored is None:
        frozen = build_frozen(spec.frozen, mesh, wrap=wrap)
    if loss.name == "dpo":
        return DPO(model, mesh, frozen, beta=loss.beta, stored=stored)
    return Distillation(model, mesh, frozen, loss)


def details(shown: StepMetrics, loader: Loader, mesh: Mesh) -> dict[str, Any]:
    """Return the metrics of the last step that not every run has, by name. Collective.

    `router_loss` (None without routers), `rewards` of DPO, and of a mixture `loss_by_source`: the
    mean over the labels (or pairs) of each source that the step has, where the loss knows it.
    """
    router_loss = shown.router_loss
    found: dict[str, Any] = {"router_loss": None if router_loss is None else router_loss.item()}
    if shown.metrics:
        found["rewards"] = {name: value.item() for name, value in shown.metrics.items()}
    names = loader.sequences.source_names
    if names and shown.rows:
        found["loss_by_source"] = _by_source(shown.rows, loader, names, mesh)
    return found


def _by_source(
    rows: list[Tensor], loader: Loader, names: list[str], mesh: Mesh
) -> dict[str, float]:
    sums = torch.zeros(2, len(names), dtype=torch.float64)
    for batch, of_batch in enumerate(rows):
        sources = loader.sources(len(rows) - batch)
        places = torch.tensor([names.index(name) for name in sources])
        sums.index_add_(1, places, of_batch.cpu())
    sums = sums.to(mesh.device)
    dist.all_reduce(sums, group=mesh.loss.get_group())
    of_sources = zip(names, *sums.tolist(), strict=True)
    return {name: total / count for name, total, count in of_sources if count}
