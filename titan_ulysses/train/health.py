"""Checks of what a run computes: that it is finite, and the same on the ranks that share it.

The numbers of a step stay on the device until somebody waits for it anyway: for a log line or a
checkpoint. Nothing is saved or exported before all of them were looked at.

Replicas compute the same update from the same sum of gradients, and the ranks of a sequence read
the same sample. Where a memory chip or a library errs on one of them, nothing fails: the loss is
only a little wrong. So each rank makes a fingerprint, and all compare them.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from titan_ulysses.checkpoint.manifest import digest
from titan_ulysses.distributed.device import module_of
from titan_ulysses.distributed.errors import UserError, first_failure, of_all_ranks
from titan_ulysses.distributed.tensors import plain_pieces
from titan_ulysses.model.freezing import bits
from titan_ulysses.model.hf import named_parameters
from titan_ulysses.train.step import StepMetrics, TrainState

_MOST_NAMED = 16


class Fingerprint(NamedTuple):
    """A checksum of something that this rank shares with others."""

    what: str
    copy: tuple[int, ...]
    """which copy of it this rank has: ranks with the same numbers must have the same"""
    sums: dict[str, str]
    """checksums by name"""


class Health:
    """Watches a run, and ends it where its numbers are not finite, or its ranks differ.

    hosts: the host of each rank; latest: returns the step of the last checkpoint. Both are for the
    messages. say: prints a line.
    """

    def __init__(
        self,
        state: TrainState,
        *,
        hosts: list[str],
        latest: Callable[[], int | None],
        say: Callable[[str], None],
    ) -> None:
        self.state, self._hosts, self._latest, self._say = state, hosts, latest, say
        self._unseen: list[tuple[int, Tensor, Tensor]] = []  # step, loss and gradient norm
        # Of the first unseen step that is not finite: this rank's parts of it. On the device.
        self._is_bad: Tensor | None = None
        self._parts: tuple[Tensor, ...] = ()
        self._owners: list[int] = []

    def note(self, step: int, metrics: StepMetrics) -> None:
        """Keep the numbers of a step for later. Does not wait for the device."""
        self._unseen.append((step, metrics.loss, metrics.grad_norm))
        parts, is_bad = (metrics.own_losses, metrics.own_norms), ~metrics.is_finite
        before = self._is_bad
        if before is None:
            self._is_bad, self._parts, self._owners = is_bad, parts, metrics.norm_owners
            return
        self._parts = tuple(
            torch.where(before.to(new.device), old, new)
            for old, new in zip(self._parts, parts, strict=True)
        )
        self._is_bad = before | is_bad

    def expect_finite_steps(self) -> None:
        """Raise UserError if more steps had bad numbers than training.skip_nonfinite allows.

        Those that were skipped are said. Waits for the device. Collective if there is a bad one.
        """
        unseen, self._unseen = self._unseen, []
        origin_is_known, self._is_bad = self._is_bad is not None, None
        for step, loss, norm in unseen:
            values = loss.item(), norm.item()
            if all(map(math.isfinite, values)):
                continue
            what = f"The loss is {values[0]} and the gradient norm {values[1]} at step {step}"
            if origin_is_known:  # the parts are those of the first bad step
                what, origin_is_known = f"{what} {self._origin(step)}".rstrip(), False
            allowed = self.state.config.training.skip_nonfinite
            if self.state.skipped >= allowed:
                after = f" after {allowed} skipped ones (training.skip_nonfinite)" * (allowed > 0)
                raise self._diverged(f"{what}{after}")
            self.state.skipped += 1
            self._say(f"WARNING: {what}. It is skipped, {self.state.skipped} of {allowed}.")

    def expect_finite_model(self) -> None:
        """Raise UserError if the model, or the optimizer's state, has diverged. Collective.

        That can be by steps that are not checked yet, or by the last update, which no loss shows.
        """
        self.expect_finite_steps()
        if name := _not_finite(self.state.model, self.state.optimizer):
            raise self._diverged(
                f"The update of step {self.state.step} has left {name} with values that are not "
                "finite"
            )

    def expect_ranks_agree(self) -> None:
        """Raise UserError, on every rank, if ranks differ in what they must share. Collective.

        Waits for the device, and reads replicated state once.
        """
        fingerprints = _fingerprints(self.state)
        digests = [
            (one.copy, digest(json.dumps(one.sums, sort_keys=True).encode()))
            for one in fingerprints
        ]
        of_ranks = of_all_ranks(digests)
        for number, one in enumerate(fingerprints):
            if odd := _odd_ranks([digests_of_rank[number] for digests_of_rank in of_ranks]):
                raise self._drifted(one, odd)

    def _nothing_is_saved(self) -> str:
        last = self._latest()
        kept = "" if last is None else f"; the last checkpoint is of step {last}"
        return f"Nothing of it is saved{kept}."

    def _diverged(self, what: str) -> UserError:
        return UserError(
            f"{what}. {self._nothing_is_saved()} Lower optimizer.lr = "
            f"{self.state.config.optimizer.lr}, lengthen lr_scheduler.warmup_steps, or look at the "
            "data of this step."
        )

    def _origin(self, step: int) -> str:
        """Return where the bad numbers of a step were first, in brackets. Collective.

        The loss of one rank spreads to the gradients of all. So the ranks whose own part of the
        loss is bad are named, with their documents; and the bad gradients to which backward came
        first, those of the last block that has any.
        """
        losses, norms = (part.isfinite().tolist() for part in self._parts)
        bad_batches = [index for index, is_finite in enumerate(losses) if not is_finite]
        bad = {self._owners[index] for index, is_finite in enumerate(norms) if not is_finite}
        of_ranks = of_all_ranks((self._documents(step, bad_batches), bad))
        origins = []
        if ranks := [rank for rank, (documents, _) in enumerate(of_ranks) if documents]:
            documents = [name for rank in ranks for name in of_ranks[rank][0]]
            origins.append(
                f"the loss of {_named('rank', ranks)}, in {_named('document', documents)}"
            )
        if bad := set().union(*(bad_of_rank for _, bad_of_rank in of_ranks)):
            trained = [name for name, p in named_parameters(self.state.model) if p.requires_grad]
            block = _block_of(trained[max(bad)])
            names = [trained[index] for index in sorted(bad) if _block_of(trained[index]) == block]
            origins.append(f"the gradient of {_listed(names)}")
        return f"(first: {', then '.join(origins)})" if origins else ""

    def _documents(self, step: int, batches: Iterable[int]) -> list[str]:
        """Return the documents of some micro-batches of a step on this rank."""
        loader, per_step = self.state.loader, self.state.spec.degrees.accumulation_steps
        assert loader is not None
        ended = (self.state.step - step + 1) * per_step
        return [name for batch in batches for name in loader.documents(ended - batch)]

    def _drifted(self, one: Fingerprint, odd: dict[int, int]) -> UserError:
        of_ranks, hosts, differences = of_all_ranks(one.sums), self._hosts, []
        for rank, usual in odd.items():
            names = of_ranks[rank].keys() | of_ranks[usual].keys()
            differ = [n for n in one.sums if of_ranks[rank].get(n) != of_ranks[usual].get(n)]
            first = (differ or sorted(names))[0]
            differences.append(
                f"rank {rank} on {hosts[rank]} differs from rank {usual} on {hosts[usual]} in "
                f"{one.what} ({first}"
                f"{f' and {len(differ) - 1} more' if len(differ) > 1 else ''})"
            )
        return UserError(
            f"the ranks have drifted apart at step {self.state.step}: {'; '.join(differences)}. "
            f"{self._nothing_is_saved()} Test the memory and the device of that host, and run the "
            "same command again to go on."
        )


def _odd_ranks(copies: list[tuple[tuple[int, ...], str]]) -> dict[int, int]:
    """Return the ranks that differ from most of those they share a copy with, and one of these.

    copies: of each rank, which copy it has and its digest.
    """
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for rank, (copy, _) in enumerate(copies):
        groups[copy].append(rank)
    odd = {}
    for ranks in groups.values():
        digests = {rank: copies[rank][1] for rank in ranks}
        usual = Counter(digests.values()).most_common(1)[0][0]
        first = next(rank for rank in ranks if digests[rank] == usual)
        odd |= {rank: first for rank in ranks if digests[rank] != usual}
    return odd


def _fingerprints(state: TrainState) -> list[Fingerprint]:
    mesh, found = state.mesh, []
    coordinate = mesh.world.get_coordinate()
    assert coordinate is not None and state.loader is not None
    replica, shard, sequence = coordinate
    if mesh.world.size(0) > 1:
        sums = _sums(_trained_state(state.model, state.optimizer))
        what = "the replicated parameters and their optimizer"
        found.append(Fingerprint(what, (shard, sequence), sums))
    saved = state.model.state_dict().keys()
    buffers = {name: x for name, x in state.model.named_buffers() if name in saved}
    found.append(Fingerprint("the buffers of the model", (), _sums(buffers)))
    position = {"position in the data": json.dumps(state.loader.state_dict(), sort_keys=True)}
    position["step"] = str(state.step)
    found.append(Fingerprint("what was done", (), position))
    batch = {"the last batch": state.loader.fingerprint()}
    found.append(Fingerprint("the data", (replica, shard), batch))
    return found


@torch.no_grad()
def _sums(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Return a checksum of the bits of each tensor. Waits for the device."""
    pieces = [(name, x) for name, tensor in tensors.items() for x in plain_pieces(tensor)]
    sums = [bits(x.contiguous()).sum(dtype=torch.int64) for _, x in pieces]
    found: dict[str, str] = {}
    for (name, _), value in zip(pieces, sums, strict=True):
        found[name] = f"{found.get(name, '')} {value.item()}".strip()
    return found


def _trained_state(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """Return what is trained, and the optimizer's state of it as "exp_avg of <name>", by name."""
    names = {p: name for name, p in named_parameters(model) if p.requires_grad}
    found: dict[str, Tensor] = {name: p for p, name in names.items()}
    for p, state in optimizer.state.items() if optimizer else ():
        found |= {f"{key} of {names[p]}": x for key, x in state.items() if isinstance(x, Tensor)}
    return found


def _not_finite(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> str | None:
    """Return the name of what is trained and has a NaN or an infinity; None if all is finite.

    See `_trained_state` for the names. The optimizer's state is looked at too: the square of a
    finite gradient may be infinite, and its parameter then stays where it is for ever. The result
    is the same on every rank. Waits for the device, and reads every shard once. Collective.
    """
    module_of().synchronize()  # offloaded state may still be on its way to the host
    named = _trained_state(model, optimizer).items()
    pieces = [(name, x) for name, shard in named for x in plain_pieces(shard) if x.numel()]
    pieces = [(name, x) for name, x in pieces if x.is_floating_point()]  # the others are codes
    finite = [torch.linalg.vector_norm(x, math.inf).isfinite() for _, x in pieces]
    found = torch.stack([x.to(finite[0].device) for x in finite]).tolist() if finite else []
    bad = (name for (name, _), is_finite in zip(pieces, found, strict=True) if not is_finite)
    return first_failure(next(bad, None))


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
