"""Losses, gradients and parameters that are not finite: found, explained, skipped if that is asked.

The numbers of a step stay on the device until somebody waits for it anyway: for a log line or a
checkpoint. Nothing is saved or exported before all of them were looked at.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titan_ulysses.config.schema import Config
from titan_ulysses.config.validate import MeshDegrees
from titan_ulysses.data.loader import Loader
from titan_ulysses.distributed.device import module_of
from titan_ulysses.distributed.errors import UserError, first_failure
from titan_ulysses.distributed.tensors import plain_pieces
from titan_ulysses.model.hf import named_parameters
from titan_ulysses.train.step import StepMetrics

_MOST_NAMED = 16


class Run(Protocol):
    """The attributes of a `Trainer` that are used here."""

    config: Config
    model: Any
    optimizer: torch.optim.Optimizer | None
    degrees: MeshDegrees
    loader: Loader | None
    step: int


class NonFinite:
    """Watches the numbers of a run, and ends it where they are not finite.

    latest: returns the step of the last checkpoint, for the message; say: prints a line.
    """

    def __init__(
        self, run: Run, *, latest: Callable[[], int | None], say: Callable[[str], None]
    ) -> None:
        self.run, self._latest, self._say = run, latest, say
        self.skipped = 0
        """Steps of this run that were skipped, those before it was resumed included."""
        self._unseen: list[tuple[int, Tensor, Tensor]] = []  # step, loss and gradient norm
        self._owners: list[int] = []
        # Of the first unseen step that is not finite: this rank's parts of it. On the device.
        self._found: Tensor | None = None
        self._parts: tuple[Tensor, ...] = ()

    def note(self, step: int, shown: StepMetrics) -> None:
        """Keep the numbers of a step for later. Does not wait for the device."""
        self._unseen.append((step, shown.loss, shown.grad_norm))
        parts, is_bad = (shown.own_losses, shown.own_norms), ~shown.is_finite
        if self._found is None:
            self._found, self._parts, self._owners = is_bad, parts, shown.norm_owners
            return
        found = self._found
        self._parts = tuple(
            torch.where(found.to(new.device), old, new)
            for old, new in zip(self._parts, parts, strict=True)
        )
        self._found = found | is_bad

    def expect_finite_steps(self) -> None:
        """Raise UserError if more steps had bad numbers than training.skip_nonfinite allows.

        Those that were skipped are said. Waits for the device. Collective if there is a bad one.
        """
        unseen, self._unseen = self._unseen, []
        found, self._found = self._found, None
        for step, loss, norm in unseen:
            values = loss.item(), norm.item()
            if all(map(math.isfinite, values)):
                continue
            what = f"The loss is {values[0]} and the gradient norm {values[1]} at step {step}"
            if found is not None:  # the parts are those of the first bad step
                what, found = f"{what} {self._origin(step)}".rstrip(), None
            allowed = self.run.config.training.skip_nonfinite
            if self.skipped >= allowed:
                after = f" after {allowed} skipped ones (training.skip_nonfinite)" * (allowed > 0)
                raise self._diverged(f"{what}{after}")
            self.skipped += 1
            self._say(f"WARNING: {what}. It is skipped, {self.skipped} of {allowed}.")

    def expect_finite_model(self) -> None:
        """Raise UserError if the model, or the optimizer's state, has diverged. Collective.

        That can be by steps that are not checked yet, or by the last update, which no loss shows.
        """
        self.expect_finite_steps()
        if name := not_finite(self.run.model, self.run.optimizer):
            raise self._diverged(
                f"The update of step {self.run.step} has left {name} with numbers that are not "
                "finite"
            )

    def _diverged(self, what: str) -> UserError:
        last, config = self._latest(), self.run.config
        kept = "" if last is None else f"; the last checkpoint is of step {last}"
        return UserError(
            f"{what}. Nothing of it is saved{kept}. Lower optimizer.lr = {config.optimizer.lr}, "
            "lengthen lr_scheduler.warmup_steps, or look at the data of this step."
        )

    def _origin(self, step: int) -> str:
        """Return where the bad numbers of a step were first, in brackets. Collective.

        The loss of one rank spreads to the gradients of all. So the ranks whose own part of the
        loss is bad are named, with their documents; and the bad gradients to which backward came
        first, those of the last block that has any.
        """
        losses, norms = (part.isfinite().tolist() for part in self._parts)
        bad_batches = [index for index, is_finite in enumerate(losses) if not is_finite]
        bad = [self._owners[index] for index, is_finite in enumerate(norms) if not is_finite]
        mine = {
            "documents": self._documents(step, bad_batches),
            "parameters": sorted(set(bad)),
        }
        of_ranks: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(of_ranks, mine)
        told = []
        if ranks := [rank for rank, one in enumerate(of_ranks) if one["documents"]]:
            documents = [name for rank in ranks for name in of_ranks[rank]["documents"]]
            told.append(f"the loss of {_named('rank', ranks)}, in {_named('document', documents)}")
        if bad := sorted({index for one in of_ranks for index in one["parameters"]}):
            trained = [name for name, p in named_parameters(self.run.model) if p.requires_grad]
            block = _block_of(trained[bad[-1]])
            names = [trained[index] for index in bad if _block_of(trained[index]) == block]
            told.append(f"the gradient of {_listed(names)}")
        return f"(first: {', then '.join(told)})" if told else ""

    def _documents(self, step: int, batches: Iterable[int]) -> list[str]:
        """Return the documents of some micro-batches of a step on this rank."""
        loader, per_step = self.run.loader, self.run.degrees.accumulation_steps
        assert loader is not None
        ended = (self.run.step - step + 1) * per_step
        return [name for batch in batches for name in loader.documents(ended - batch)]


def _named(what: str, names: list[Any]) -> str:
    return f"{what}{'s' * (len({*names}) > 1)} {_listed(names)}"


def _listed(names: list[Any]) -> str:
    """Return names, each once and not too many, as text."""
    once = [*dict.fromkeys(map(str, names))]
    more = f" and {len(once) - _MOST_NAMED} more" if len(once) > _MOST_NAMED else ""
    return ", ".join(once[:_MOST_NAMED]) + more


def _block_of(name: str) -> str:
    """Return the name of the block that a parameter is in, or its own."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return found[0] if found else name


def trained_state(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """Return what is trained, and the optimizer's state of it as "exp_avg of <name>", by name."""
    names = {p: name for name, p in named_parameters(model) if p.requires_grad}
    found: dict[str, Tensor] = {name: p for p, name in names.items()}
    for p, state in optimizer.state.items() if optimizer else ():
        found |= {f"{key} of {names[p]}": x for key, x in state.items() if isinstance(x, Tensor)}
    return found


def not_finite(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> str | None:
    """Return the name of what is trained and has a NaN or an infinity; None if all is finite.

    See `trained_state` for the names. The optimizer's state is looked at too: the square of a
    finite gradient may be infinite, and its parameter then stays where it is for ever. The result
    is the same on every rank. Waits for the device, and reads every shard once. Collective.
    """
    module_of().synchronize()  # offloaded state may still be on its way to the host
    named = trained_state(model, optimizer).items()
    pieces = [(name, x) for name, shard in named for x in plain_pieces(shard) if x.numel()]
    pieces = [(name, x) for name, x in pieces if x.is_floating_point()]  # the others are codes
    finite = [torch.linalg.vector_norm(x, math.inf).isfinite() for _, x in pieces]
    found = torch.stack([x.to(finite[0].device) for x in finite]).tolist() if finite else []
    bad = (name for (name, _), is_finite in zip(pieces, found, strict=True) if not is_finite)
    return first_failure(next(bad, None))
