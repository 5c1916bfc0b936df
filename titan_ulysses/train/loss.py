"""What a loss is (`TrainingLoss`), and those of `[loss]`: cross-entropy, preferences, distillation.

DPO, IPO, KTO and distillation read a second, frozen model besides the trained one: it has the same
mesh and reads the same batches, without gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_ulysses.checkpoint import safetensors as weights
from titan_ulysses.checkpoint.initial import initialize
from titan_ulysses.config.schema import REFERRING, Loss
from titan_ulysses.data.loader import Batch, Loader
from titan_ulysses.distributed.device import copied_to
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.mesh import Mesh
from titan_ulysses.distributed.sequence import IGNORE_INDEX
from titan_ulysses.memory.losses import (
    distillation_losses,
    dpo_loss,
    ipo_loss,
    kto_loss,
    odds_ratio_loss,
    simpo_loss,
)
from titan_ulysses.model import hf
from titan_ulysses.model.freezing import fingerprint
from titan_ulysses.model.lora import adapters_off
from titan_ulysses.setup.build import build_frozen
from titan_ulysses.setup.forward import Prediction, SumOverRanks
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

    from titan_ulysses.config.schema import Config
    from titan_ulysses.setup.resolve import RunSpec


LOSS_NAMES = {"dpo": "DPO", "ipo": "IPO", "simpo": "SimPO", "orpo": "ORPO", "kto": "KTO"}


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

    def __init__(
        self,
        model: PreTrainedModel,
        mesh: Mesh,
        frozen: PreTrainedModel | None = None,
        config: Loss | None = None,
        *,
        stored: int | None = None,
    ):
        """stored: the checksum of a second model whose results come with the batches."""
        self.model, self.mesh, self.config = model, mesh, config or Loss()
        self.frozen = frozen
        """The second model; None where there is none."""
        self._fingerprint = stored

    @abstractmethod
    def count(self, batches: list[Batch]) -> Tensor:
        """Return how many labels the loss of a step is the mean over, on all ranks; what `forward`
        takes. Of pairs, it is [2]: see there.
        """

    @abstractmethod
    def forward(self, batch: Batch, count: Tensor) -> BatchLoss:
        """Return the part of a micro-batch in the loss of a step that is over `count` labels."""

    @abstractmethod
    def evaluate(self, loader: Loader, sequences: int) -> Evaluation:
        """Return the mean loss of so many held-out sequences (0: all), without gradient."""

    def describe(self, config: Config) -> str:
        """Return a line about the loss; empty for plain cross-entropy."""
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
    """The cross-entropy of the next token, and of the one after it where a layer predicts that.

    The latter is a mean over its own labels.
    """

    def describe(self, config: Config) -> str:
        smoothing, weight, more = self.config.label_smoothing, self.config.prediction_weight, ""
        if smoothing:
            more += f", label smoothing {smoothing:g}"
        if weight:
            more += f", and {weight:g} of that of the prediction layer"
        return f"loss: cross-entropy{more}" if more else ""

    def count(self, batches: list[Batch]) -> Tensor:
        labels = torch.stack([(batch.labels != IGNORE_INDEX).sum() for batch in batches]).sum()
        if self.config.prediction_weight:
            ahead = torch.stack([(batch.next_labels != IGNORE_INDEX).sum() for batch in batches])
            labels = torch.stack([labels, ahead.sum()])
        dist.all_reduce(labels, group=self.mesh.loss.get_group())
        return labels

    def forward(self, batch: Batch, count: Tensor) -> BatchLoss:
        own, metrics, weight = self._loss_function(batch), {}, self.config.prediction_weight
        if weight:
            count, ahead = count.unbind()
            own["prediction"] = Prediction(weight, ahead, batch.next_ids, batch.next_labels)
        output = self.model(**batch.inputs(), num_items_in_batch=count, **own)
        if weight:
            metrics["prediction_loss"] = self.model.sharding.prediction_loss
        # A model that was parallelized in another way has another head.
        rows = getattr(self.model.get_output_embeddings(), "row_losses", None)
        if rows is not None:
            rows = torch.stack([rows, (batch.labels != IGNORE_INDEX).sum(dim=1).double()])
        own_loss, aux_loss = self.model.sharding.own_loss, output.get("aux_loss")
        return BatchLoss(output.loss, own_loss, rows, aux_loss, metrics)

    def evaluate(self, loader: Loader, sequences: int) -> Evaluation:
        return evaluate(self.model, loader, self.mesh, sequences=sequences)

    def _loss_function(self, batch: Batch) -> dict[str, Any]:
        """Return the arguments of the model's forward for another loss than cross-entropy."""
        return {}


class Completions(NamedTuple):
    """Sums over the tokens of the N completions of this rank's rows, each [N] fp64."""

    log_probs: Tensor
    """log-probabilities of the completion"""
    tokens: Tensor
    """their number"""
    with_prompt: Tensor
    """log-probabilities of all labels of the document; those of the prompt have some for ORPO"""

    def means(self) -> Tensor:
        return self.log_probs / self.tokens.clamp(min=1)


class PreferenceLoss(TrainingLoss):
    """DPO, IPO, SimPO and ORPO of pairs of completions (formulas: memory/losses.py).

    The documents of a row are chosen, rejected, chosen, rejected, ...; padding may follow. The
    labels are those of the completions. Without a second model the reference is the model itself,
    with its adapters off; or its log-probabilities come with the batches (see references.py), and
    `stored` is the checksum of its weights. SimPO and ORPO have no reference.
    """

    setting = "reference"

    @property
    def refers(self) -> bool:
        return self.config.name in REFERRING

    def count(self, batches: Iterable[Batch]) -> Tensor:
        """Return the number of pairs, and that of labels of the chosen with their prompts."""
        pairs = labels = 0
        for row in (row for batch in batches for row in batch.filled):
            pairs += pairs_of(row)
            labels += sum(length - 1 for length in row[: 2 * pairs_of(row) : 2])
        return self._of_all_ranks(torch.tensor([pairs, labels], device=self.mesh.device))

    def forward(self, batch: Batch, count: Tensor) -> BatchLoss:
        of_rows = [*map(pairs_of, batch.filled), *([0] * batch.fill_rows)]
        each, metrics = self._of_pairs(batch, count.clamp(min=1))
        each, pairs = each[: sum(of_rows)], count[0].clamp(min=1)
        loss = each.sum() / pairs
        sums = torch.stack([part.sum() for part in each.detach().split(of_rows)])
        totals = self._of_all_ranks(
            torch.stack([value[: len(each)].sum() for value in metrics.values()])
        )
        # The ranks that share a sequence compute the same loss: each owns a part of it.
        return BatchLoss(
            SumOverRanks.apply(loss, torch.float64, self.mesh.batch.get_group()),
            loss.detach() / self.mesh.sp.size(),
            torch.stack([sums, sums.new_tensor(of_rows)]) / self.mesh.sp.size(),
            metrics=dict(zip(metrics, totals.unbind(), strict=True)),
        )

    def _of_pairs(self, batch: Batch, count: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each pair of this rank's rows [N], and what it adds to the metrics.

        The losses have gradients. The metrics [N] are means over `count` pairs: beta times the
        logarithm of a completion's probability, or of its ratio to that of the reference.
        Collective.
        """
        config, smoothing = self.config, self.config.label_smoothing
        reference = self.reference_of(batch) if self.refers else None
        policy = self._completions(self.model, batch)
        scores = policy.means() if config.name in ("simpo", "orpo") else policy.log_probs
        if config.name == "dpo":
            own, other = _split(scores), _split(reference)
            each = dpo_loss(*own, *other, beta=config.beta, label_smoothing=smoothing)
        elif config.name == "ipo":
            other = _split(reference / policy.tokens.clamp(min=1))
            each = ipo_loss(*_split(policy.means()), *other, beta=config.beta)
        elif config.name == "simpo":
            gamma = config.simpo_gamma
            each = simpo_loss(
                *_split(scores), beta=config.beta, gamma=gamma, label_smoothing=smoothing
            )
        else:
            each = odds_ratio_loss(*_split(scores), beta=config.beta)
            # The cross-entropy of prompts and chosen completions is a mean over their tokens.
            each = each - policy.with_prompt[::2] * count[0] / count[1]
        rewards = scores.detach() if reference is None else scores.detach() - reference
        return each, self._rewards(config.beta * rewards, count)

    @staticmethod
    def _rewards(values: Tensor, count: Tensor) -> dict[str, Tensor]:
        """Return what the rewards [2 * N] of pairs add to the metrics, [N] each."""
        chosen, rejected = _split(values / count[0])
        accuracies = (chosen > rejected).double() / count[0]
        return dict(zip(REWARDS, (chosen, rejected, chosen - rejected, accuracies), strict=True))

    def reference_of(self, batch: Batch) -> Tensor:
        """Return the reference's log-probability of each completion of this rank's rows.

        [2 * pairs] fp64, those of the batch if it has them. Collective.
        """
        if batch.reference is not None:
            return batch.reference
        with torch.no_grad(), self._reference() as reference:
            return self._completions(reference, batch).log_probs

    def give_up_reference(self) -> None:
        """Drop the second model: from now on all batches have its log-probabilities. Collective."""
        self.fingerprint()
        self.frozen = None

    def describe(self, config: Config) -> str:
        loss = config.loss
        what = "completions, each good or bad" if loss.name == "kto" else "pairs of completions"
        found = f"loss: {LOSS_NAMES[loss.name]} of {what}, beta {loss.beta:g}"
        found += f", gamma {loss.simpo_gamma:g}" if loss.name == "simpo" else ""
        if loss.label_smoothing:
            found += f", label smoothing {loss.label_smoothing:g}"
        if not self.refers:
            return f"{found}, without a reference"
        where = loss.reference or "the weights that the run begins with"
        if config.lora.rank and not loss.reference:
            where = "the model without its adapters"
        before = ", computed before training" if loss.precompute_reference else ""
        return f"{found}, reference: {where}{before}"

    @torch.no_grad()
    def evaluate(self, loader: Loader, sequences: int) -> PairEvaluation:
        """All held-out batches are one step, of which the loss is computed."""
        chosen = held_out_batches(loader, sequences)

        def batches() -> Iterator[Batch]:
            return (loader.read(indices).to(self.mesh.device) for indices in chosen)

        loss, metrics = torch.zeros((), dtype=torch.float64), Counter[str]()
        with evaluating(self.model):
            count = self.count(batches())
            for batch in batches():
                found = self.forward(batch, count)
                loss = loss + found.loss.cpu()
                metrics.update({name: value.item() for name, value in found.metrics.items()})
        return PairEvaluation(loss.item(), int(count[0]), sum(map(len, chosen)), dict(metrics))

    def _of_all_ranks(self, sums: Tensor) -> Tensor:
        """Return the sum over the ranks with other rows. Those of a sequence have the same."""
        dist.all_reduce(sums, group=self.mesh.batch.get_group())
        return sums

    @contextmanager
    def _reference(self) -> Iterator[PreTrainedModel]:
        if self.frozen is not None:
            yield self.frozen
        else:
            with evaluating(self.model), adapters_off(self.model):
                yield self.model

    def _completions(self, model: PreTrainedModel, batch: Batch) -> Completions:
        """Return the sums of all completions of this rank's rows, 2 of each pair.

        They are those of all tokens, on each of the ranks that share them. Collective.
        """
        each = -model(**batch.inputs(), reduction="none").loss.flatten().double()
        is_label = (batch.labels != IGNORE_INDEX).flatten()
        own = batch.loss_inputs["completion"].flatten() if batch.loss_inputs else is_label
        numbers, count = _numbers(batch)
        place = self._local(numbers, batch).flatten()
        columns = torch.stack([each * own, own.double(), each])
        sums = torch.zeros(3, count + 1, dtype=torch.float64, device=each.device)
        sums = sums.index_add(1, place, columns)
        sums = SumOverRanks.apply(sums, torch.float64, self.mesh.sp.get_group())
        return Completions(*sums[:, :count].unbind())

    def _local(self, whole: Tensor, batch: Batch) -> Tensor:
        """Return this rank's part of what belongs to the tokens of whole rows, on its device."""
        part = self.mesh.local_slice(whole, chunk_tokens=batch.chunk_tokens)
        return copied_to(part, self.mesh.device)


def _numbers(batch: Batch) -> tuple[Tensor, int]:
    """Return which completion each token of whole rows is of [B, S], and their number.

    Padding has the number after the last.
    """
    count = 2 * sum(pairs_of(row) for row in batch.documents)
    wholes, first = [], 0
    for row in batch.documents:
        own = 2 * pairs_of(row)
        numbers = [*range(first, first + own), *([count] * (len(row) - own))]
        wholes.append(torch.tensor(numbers).repeat_interleave(torch.tensor(row)))
        first += own
    return torch.stack(wholes), count


class KTO(PreferenceLoss):
    """KTO of completions that are desirable or not (`kto_loss`).

    A row's pair is its own completion and that of another row, behind the same prompt. The mean
    logarithm of the latter's probability over that of the reference, over all rows of a step, is
    the estimate of the divergence, at least 0.
    """

    def __init__(self, *arguments: Any, **keywords: Any):
        super().__init__(*arguments, **keywords)
        self._kl: Tensor | None = None
        """of the step; None where a step has one batch, whose forward has what it takes"""
        self._known: deque[Tensor] = deque()
        """what the reference said of the batches of the step"""

    def count(self, batches: Iterable[Batch]) -> Tensor:
        """Return the number of rows, and that of desirable ones; compute the divergence."""
        one = len(batches) == 1 if isinstance(batches, list) else False
        count = torch.zeros(2, dtype=torch.int64, device=self.mesh.device)
        ratios = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        self._known.clear()
        for batch in batches:
            rows = sum(map(pairs_of, batch.filled))
            count += torch.stack([count.new_tensor(rows), batch.desirable[:rows].sum()])
            if not one:
                self._known.append(self.reference_of(batch))
                with torch.no_grad(), evaluating(self.model):
                    policy = self._completions(self.model, batch)
                ratios += (policy.log_probs - self._known[-1])[1 : 2 * rows : 2].sum()
        count = self._of_all_ranks(count)
        self._kl = None if one else self._divergence(ratios, count)
        return count

    def _divergence(self, ratios: Tensor, count: Tensor) -> Tensor:
        return (self._of_all_ranks(ratios) / count[0].clamp(min=1)).clamp(min=0)

    def _of_pairs(self, batch: Batch, count: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        config, desirable = self.config, batch.desirable
        reference = self._known.popleft() if self._known else self.reference_of(batch)
        assert desirable is not None
        policy = self._completions(self.model, batch)
        ratios, others = (policy.log_probs - reference).view(-1, 2).unbind(1)
        rows = sum(map(pairs_of, batch.filled))
        kl = self._divergence(others[:rows].detach().sum(), count) if self._kl is None else self._kl
        weights = config.desirable_weight, config.undesirable_weight
        each = kto_loss(ratios, desirable, kl, beta=config.beta, weights=weights)
        rewards = config.beta * ratios.detach()
        chosen = (rewards / count[1]).where(desirable, 0)
        rejected = (rewards / (count[0] - count[1]).clamp(min=1)).where(~desirable, 0)
        metrics = (chosen, rejected, chosen - rejected, (kl / count[0]).expand_as(chosen))
        return each, dict(zip((*REWARDS[:3], "kl"), metrics, strict=True))


class BradleyTerry(PreferenceLoss):
    """The loss of a reward model: the negative log-probability that the chosen completion of a pair
    is preferred, by the difference of both rewards (arXiv 2203.02155, eq. 1).

    center_rewards_coefficient weighs the square of their sum (arXiv 2312.09244, eq. 2). The reward
    of a completion is the score of its last token.
    """

    def _of_pairs(self, batch: Batch, count: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        numbers, count_here = _numbers(batch)
        is_last = (numbers != numbers.roll(-1, dims=1)) & (numbers < count_here)
        ends = self._local(numbers.where(is_last, IGNORE_INDEX), batch)
        inputs = batch.inputs() | {"labels": ends, "num_documents": count_here}
        rewards = self.model(**inputs).logits[:, 0].double()
        chosen, rejected = _split(rewards)
        each = -F.logsigmoid(chosen - rejected)
        each = each + self.config.center_rewards_coefficient * (chosen + rejected).square()
        return each, self._rewards(rewards.detach(), count)

    def describe(self, config: Config) -> str:
        center = config.loss.center_rewards_coefficient
        centered = f", centered by {center:g}" if center else ""
        return f"loss: Bradley-Terry of pairs of completions{centered}"


def _split(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return those [N] of the chosen and of the rejected completions, of values [2 * N]."""
    return values[::2], values[1::2]


class Distillation(CrossEntropy):
    """The divergence from a teacher, in addition to cross-entropy (see `distillation_losses`).

    The teacher's hidden states are computed for each micro-batch. Its logits exist for a tile at a
    time, as the student's do. Each rank holds the whole weight of the teacher's head. Without a
    second model, the teacher's largest log-probabilities come with the batches (data/records.py).
    """

    setting = "teacher"

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
    config, frozen = spec.config.loss, None
    if spec.frozen is not None and stored is None:
        frozen = build_frozen(spec.frozen, mesh, wrap=wrap)
    kinds: dict[str, type[TrainingLoss]] = {
        "cross_entropy": CrossEntropy,
        "distillation": Distillation,
        "kto": KTO,
        "reward": BradleyTerry,
    }
    kind = kinds.get(config.name, PreferenceLoss)
    return kind(model, mesh, frozen, config, stored=stored)
