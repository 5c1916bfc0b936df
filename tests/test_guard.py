"""Forward, backward, step, evaluation and exceptions in any order: the training beside them keeps
its bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from helpers.meshes import SP2
from helpers.models import LLAMA
from helpers.ranks import run_on_ranks
from helpers.rows import local_batch, make_rows
from helpers.training import Run
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.train.step import clip_gradients

ROWS = [
    make_rows([(10, 14), (24,)], masked="uneven", vocab_size=61, seed=seed) for seed in range(4)
]


class Interrupted(Exception):
    """What the tests raise and catch."""


class Loop:
    """A training loop of one's own, step by step, on (sp2)."""

    def __init__(self, *, tied: bool, **wrap: Any) -> None:
        self.run = Run(SP2, LLAMA | {"tie_word_embeddings": tied}, ROWS[0], wrap=wrap)
        self.model, self.optimizer = self.run.model, self.run.optimizer
        self.shown: list[float] = []

    def batch(self, index: int, *, labels: bool = True) -> dict[str, Any]:
        batch = local_batch(ROWS[index], self.run.mesh).inputs()
        if not labels:
            return {name: value for name, value in batch.items() if name != "labels"}
        return batch | {"num_items_in_batch": torch.tensor(24)}

    def step(self, index: int, between: Callable[[], Any] = lambda: None) -> None:
        """between is called at every place where a loop can do something else."""
        between()
        loss = self.model(**self.batch(index)).loss
        loss.backward()
        between()
        self.shown += [loss.item(), clip_gradients(list(self.model.parameters()), 0.5).item()]
        self.optimizer.step()
        between()
        self.optimizer.zero_grad()

    def whole(self) -> dict[str, Tensor]:
        return {name: p.detach().full_tensor().clone() for name, p in self.model.named_parameters()}

    # What else a loop may do

    def forward_alone(self) -> None:
        assert self.model(**self.batch(3)).loss.requires_grad

    def logits_alone(self) -> None:
        assert self.model(**self.batch(3, labels=False)).logits.requires_grad

    def evaluation(self) -> None:
        with torch.no_grad():
            self.model(**self.batch(3))

    def broken_off(self, error: type[BaseException], where: str) -> None:
        """A forward that raises in where, with gradients and without."""
        for mode in (torch.enable_grad, torch.no_grad):
            with suppress(error), mode(), raising(self.model.get_submodule(where), error):
                self.model(**self.batch(3))

    def broken_off_backward(self) -> None:
        """All that follows the middle of a block's backward is missing."""
        norm = self.model.model.layers[0].post_attention_layernorm
        handle = norm.register_full_backward_hook(raise_interrupted)
        loss = self.model(**self.batch(3)).loss
        with suppress(Interrupted):
            loss.backward()
        handle.remove()


@contextmanager
def raising(module: torch.nn.Module, error: type[BaseException]) -> Iterator[None]:
    def act(*_) -> None:
        raise error

    handle = module.register_forward_pre_hook(act)
    try:
        yield
    finally:
        handle.remove()


def raise_interrupted(*_) -> None:
    raise Interrupted


def in_any_order(tied: bool, every: int) -> tuple[list[list[float]], list[dict[str, Tensor]]]:
    """What is shown and left by three steps alone, and by three with everything else between their
    parts.
    """
    loops = [Loop(tied=tied, checkpoint_every=every) for _ in range(2)]
    disturbed = loops[1]
    visits = [
        disturbed.forward_alone,
        partial(disturbed.broken_off, Interrupted, "model.layers.1.mlp"),
        disturbed.evaluation,
        partial(disturbed.broken_off, KeyboardInterrupt, "model.norm"),
        disturbed.logits_alone,
        partial(disturbed.broken_off, Interrupted, "lm_head"),
    ]

    def between() -> None:
        for visit in visits:
            visit()
            assert all(isinstance(p, DTensor) for p in disturbed.model.parameters())

    for index in range(3):
        loops[0].step(index)
        disturbed.step(index, between)
    return [loop.shown for loop in loops], [loop.whole() for loop in loops]


@pytest.mark.parametrize(
    ("tied", "every"), [pytest.param(False, 1, marks=pytest.mark.slow), (True, 2)]
)
def test_what_is_left_out_or_broken_off_does_not_show(tied: bool, every: int) -> None:
    for shown, whole in run_on_ranks(2, in_any_order, tied, every):
        assert shown[0] == shown[1] and len(set(shown[0])) == 6
        assert all(torch.equal(whole[0][name], whole[1][name]) for name in whole[0])


def refused(act: Callable[[], Any]) -> str:
    try:
        act()
    except UserError as error:
        return str(error)
    return "not refused"


def after_a_broken_backward(
    tied: bool, older_torch: bool
) -> tuple[list[str], list[dict[str, Tensor]]]:
    """The messages of what must not go on, and two trainings, one of which goes on as they say."""
    with pytest.MonkeyPatch.context() as patch:
        if older_torch:
            patch.delattr(FSDPModule, "reset_iter_state")
        loops, messages = [Loop(tied=tied) for _ in range(2)], []
        for index in range(2):
            for loop in loops:
                loop.step(index)
        broken = loops[1]
        before = broken.whole()
        broken.broken_off_backward()
        messages.append(refused(broken.optimizer.step))
        messages.append(refused(lambda: broken.model(**broken.batch(2))))
        messages.append(refused(broken.evaluation))
        assert all(torch.equal(value, before[name]) for name, value in broken.whole().items())
        broken.optimizer.zero_grad()
        broken.evaluation()
        for loop in loops:
            loop.step(2)
        assert loops[0].shown == broken.shown
        return messages, [loop.whole() for loop in loops]


@pytest.mark.parametrize(("tied", "older_torch"), [(False, False), (True, True)])
def test_a_backward_that_was_broken_off(tied: bool, older_torch: bool) -> None:
    for messages, whole in run_on_ranks(2, after_a_broken_backward, tied, older_torch):
        for message in messages:
            assert "the last backward was interrupted by an exception" in message
            assert "Call optimizer.zero_grad() on every rank" in message
        assert all(torch.equal(whole[0][name], whole[1][name]) for name in whole[0])


def backward_after_a_step() -> tuple[str, list[dict[str, Tensor]]]:
    loops = [Loop(tied=False) for _ in range(2)]
    for loop in loops:
        loop.step(0)
    late = loops[1].model(**loops[1].batch(3)).loss
    for loop in loops:
        loop.step(1)
    message = refused(late.backward)
    loops[1].optimizer.zero_grad()
    for loop in loops:
        loop.step(2)
    return message, [loop.whole() for loop in loops]


def test_a_backward_whose_forward_was_before_the_last_step() -> None:
    """One process raises there too: a saved tensor has changed. Sharded, other values would be
    gathered.
    """
    for message, whole in run_on_ranks(2, backward_after_a_step):
        assert "an optimizer stepped between this forward and its backward" in message
        assert all(torch.equal(whole[0][name], whole[1][name]) for name in whole[0])


def two_models() -> str:
    """The optimizer of one model, while the gradients of the other one are a part."""
    loops = [Loop(tied=False) for _ in range(2)]
    loops[0].broken_off_backward()
    loops[1].step(0)
    return refused(loops[0].optimizer.step)


def test_another_model_goes_on() -> None:
    assert all("was interrupted" in message for message in run_on_ranks(2, two_models))


def trainer_steps() -> list[dict[str, Tensor]]:
    """The trainer's own step, with forwards between that nothing follows."""
    loops = [Loop(tied=False) for _ in range(2)]
    for _ in range(2):
        for loop in loops:
            loop.run.train(1)
        loops[1].forward_alone()
        loops[1].broken_off(Interrupted, "model.layers.0.self_attn")
    for loop in loops:
        loop.run.train(1)
    assert loops[0].run.losses == loops[1].run.losses
    return [loop.whole() for loop in loops]


def test_steps_of_the_trainer() -> None:
    for whole in run_on_ranks(2, trainer_steps):
        assert all(torch.equal(whole[0][name], whole[1][name]) for name in whole[0])
