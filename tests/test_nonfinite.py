"""Steps whose loss or gradient is not finite: named, skipped if that is asked, and never in the way
of the steps after.
"""

from __future__ import annotations

import json
import re
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from helpers.ranks import run_on_ranks
from helpers.runs import Settings, learned, logged, refusal, train, write_run
from titan_ulysses.config.load import load_config
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.seeds import seed_of
from titan_ulysses.observability.metrics import LossSpikes
from titan_ulysses.train import trainer as trainer_module
from titan_ulysses.train.trainer import Trainer
from titan_ulysses.ulysses.cores import sdpa

BAD_STEPS: set[int] = set()
"""Steps, from 1, whose attention is bad. Set on each rank, because a core has no other argument."""
BAD_RANKS: set[int] = set()
IN_BACKWARD: list[bool] = []


def bad_core(q: Tensor, k: Tensor, v: Tensor, *, documents: Any, scale: float) -> Tensor:
    """sdpa, but NaN in some steps on some ranks: in its output, or in the gradient alone.

    `Trainer` seeds torch for each step, so that the seed tells the step.
    """
    out = sdpa(q, k, v, documents=documents, scale=scale)
    rank = dist.get_rank()
    steps = {seed_of(0, step - 1, rank) for step in BAD_STEPS}
    if torch.initial_seed() not in steps or rank not in BAD_RANKS:
        return out
    if IN_BACKWARD:
        if out.requires_grad:
            out.register_hook(lambda gradient: gradient * float("nan"))
        return out
    return out * float("nan")


def train_badly(
    config: Path, settings: Settings, steps: set[int], ranks: set[int], *, in_backward: bool = False
) -> tuple[str, list[str]]:
    """The refusal of a run with these bad steps, or "", and what it has said."""
    said: list[str] = []
    for known, now in ((BAD_STEPS, steps), (BAD_RANKS, ranks)):
        known.clear()
        known.update(now)
    IN_BACKWARD[:] = [True] * in_backward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_say", lambda self, text: said.append(text))
        try:
            train(config, settings)
        except UserError as error:
            return str(error), said
        finally:
            BAD_STEPS.clear()
    return "", said


def without_updates(config: Path, settings: Settings, steps: set[int]) -> None:
    """The reference: a run that computes these steps, and then leaves their update out."""
    train_step = trainer_module.train_step

    def skipping(model: Any, optimizer: Any, batches: Any, mesh: Any, **options: Any) -> Any:
        options.pop("skip_nonfinite")
        step = next(
            n for n in range(1, 100) if torch.initial_seed() == seed_of(0, n - 1, dist.get_rank())
        )
        if step not in steps:
            return train_step(model, optimizer, batches, mesh, **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(optimizer, "step", lambda: None)
            return train_step(model, optimizer, batches, mesh, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "train_step", skipping)
        train(config, settings)


MODEL = {"hidden_size": 96, "intermediate_size": 96}
CORE: Settings = {
    "model.attention": "test_nonfinite:bad_core",
    "activation_checkpoint.mode": "none",
    "training.steps": 6,
    "checkpoint.interval": 100,
}
SP2: Settings = CORE | {
    "parallelism.sequence_parallel_degree": 2,
    "training.global_batch_size": 2,
}


@pytest.mark.parametrize(
    ("optimizer", "rounds", "log_interval"),
    [
        ("adamw", False, 1),
        ("adamw8bit", True, 3),
        pytest.param("adamw", True, 1, marks=pytest.mark.slow),
        pytest.param("adamw8bit", False, 3, marks=pytest.mark.slow),
        pytest.param("adamw4bit", False, 1, marks=pytest.mark.slow),
    ],
)
def test_skipped_steps_change_nothing(
    optimizer: str, rounds: bool, log_interval: int, tmp_path: Path
) -> None:
    """On both ranks, though attention is bad on one of them alone; bit for bit."""
    config, outputs = write_run(tmp_path), tmp_path / "outputs"
    shape = load_config(config).model.config | MODEL  # large enough to be quantized
    settings = SP2 | {
        "model.config": shape,
        "optimizer.name": optimizer,
        "optimizer.stochastic_rounding": rounds,
        "training.param_dtype": "bfloat16" if rounds else "float32",
        "metrics.log_interval": log_interval,
    }
    run_on_ranks(2, without_updates, config, settings | {"job.name": "reference"}, {2, 3})
    skipping = settings | {"training.skip_nonfinite": 2}
    for message, said in run_on_ranks(2, train_badly, config, skipping, {2, 3}, {1}):
        assert message == ""
        warnings = [text for text in said if "WARNING" in text]
        start = "WARNING: The loss is nan and the gradient norm nan at step "
        assert [text.removeprefix(start)[0] for text in warnings] == ["2", "3"]
        assert "(first: the loss of ranks 0, 1, in document" in warnings[0]
        assert warnings[0].endswith("It is skipped, 1 of 2.")
    run, reference = outputs / "run", outputs / "reference"
    good = {1, 4, 5, 6}
    assert [x for x in learned(run) if x[0] in good] == [
        x for x in learned(reference) if x[0] in good
    ]
    assert [line["skipped_steps"] for line in logged(run)][-1] == 2
    if log_interval == 1:
        bad = [line for line in logged(run) if line["step"] in (2, 3)]
        assert [(line["loss"], line["grad_norm"], line["loss_spike"]) for line in bad] == [
            (None, None, True)
        ] * 2
    told = [
        json.loads((one / "checkpoints" / "step-6" / "run.json").read_text())["files"]
        for one in (run, reference)
    ]
    tensors = [{n: file.get("pieces") for n, file in files.items()} for files in told]
    assert tensors[0] == tensors[1] and any(tensors[0].values())


def test_one_step_too_many_ends_the_run(tmp_path: Path) -> None:
    """Also where the others were skipped before the run was resumed."""
    config, run = write_run(tmp_path), tmp_path / "outputs" / "run"
    first = SP2 | {"training.skip_nonfinite": 2, "training.steps": 4}
    for message, _ in run_on_ranks(2, train_badly, config, first, {2}, {0}):
        assert message == ""
    before = sorted(folder.name for folder in (run / "checkpoints").iterdir())
    more = first | {"training.steps": 10}
    for message, _ in run_on_ranks(2, train_badly, config, more, {6, 7}, {0}):
        assert message.startswith("The loss is nan and the gradient norm nan at step 7 (first: ")
        assert " after 2 skipped ones (training.skip_nonfinite). Nothing of it is saved" in message
    assert sorted(folder.name for folder in (run / "checkpoints").iterdir()) == before


def documents_of(config: Path, settings: Settings, step: int) -> str:
    """The documents of a step, counted by hand from the loader of another run."""
    trainer = Trainer(load_config(config, (settings | {"job.name": "other"}).items()))
    corpus = trainer.state.loader.sequences.corpus
    names = []
    for index in range(8 * (step - 1), 8 * step):
        sample = trainer.state.loader.sequences[index]
        at = 0
        for length in sample.document_lengths:
            ids = sample.input_ids[at : at + length].numpy()
            whole = [
                n
                for n in range(len(corpus))
                if bytes(ids.astype("u1")) in bytes(corpus[n].astype("u1"))
            ]
            names.append(whole)
            at += length
    return names


@pytest.mark.parametrize("in_backward", [False, True])
def test_the_message_names_where_it_began(in_backward: bool, tmp_path: Path) -> None:
    config = write_run(tmp_path)
    dp2 = CORE | {"parallelism.data_parallel_shard_degree": 2, "metrics.log_interval": 100}
    dp2["training.global_batch_size"] = 8
    run = partial(train_badly, in_backward=in_backward)
    [message, _], [again, _] = run_on_ranks(2, run, config, dp2, {3}, {1})
    assert message == again
    start = (
        "The loss is " if in_backward else "The loss is nan and the gradient norm nan at step 3 "
    )
    assert message.startswith(start), message
    if in_backward:
        # The gradient of attention is bad: in the last layer, of what is before its output.
        bad = [f"self_attn.{name}_proj" for name in "qkv"] + ["input_layernorm"]
        names = ", ".join(f"model.layers.1.{name}.weight" for name in bad)
        assert f"(first: the gradient of {names})" in message
    else:
        assert "(first: the loss of rank 1, in documents " in message
        assert ", then the gradient of lm_head.weight)" in message
        told = message.split(" in documents ")[1].split(", then")[0]
        numbers = {int(number) for number in told.split(", ")}
        [pieces] = run_on_ranks(1, documents_of, config, CORE, 3)
        # The last sequence of the step is one of rank 1.
        assert numbers <= {n for whole in pieces for n in whole}
        assert all(numbers & set(whole) for whole in pieces[-1:])


def test_without_the_setting_the_first_one_ends_the_run(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    for message, _ in run_on_ranks(2, train_badly, config, SP2, {2}, {0, 1}):
        assert message.startswith("The loss is nan and the gradient norm nan at step 2 (first: ")
        assert "the loss of ranks 0, 1, in documents " in message


# --- never saved ----------------------------------------------------------------------------------

BAD_UPDATE = 3
EXPORT: Settings = {"checkpoint.enable": False, "checkpoint.export": True, "training.steps": 3}
WAYS: dict[str, tuple[Settings, signal.Signals | None]] = {
    "at an interval": ({"checkpoint.interval": 3}, None),
    "while the last save is written": (
        {"checkpoint.interval": 1, "checkpoint.async_mode": "async"},
        None,
    ),
    "after the last step": ({"training.steps": 3}, None),
    "SIGTERM": ({}, signal.SIGTERM),
    "SIGTERM, in the background": ({"checkpoint.async_mode": "async"}, signal.SIGTERM),
    "Ctrl-C": ({}, signal.SIGINT),
    "another host joins": ({}, signal.SIGUSR1),
    "export alone": (EXPORT, None),
    "export of adapters": (EXPORT | {"lora.rank": 4}, None),
    "skipping": ({"training.steps": 3, "training.skip_nonfinite": 5}, None),
}
"""The ways in which a run comes to save or export what it has."""
ALWAYS = {"while the last save is written", "SIGTERM", "another host joins", "export of adapters"}


def refused_after_a_bad_update(
    config: Path, settings: Settings, number: signal.Signals | None, of: str
) -> str:
    """The refusal of a run that gets a signal in a step whose update is bad on one rank: of the
    parameters, which no loss shows, or of the second moment, which none ever shows.
    """
    step = Trainer._step

    def spoiling(trainer: Trainer, *args: Any) -> Any:
        state = trainer.state
        is_bad = state.step + 1 == BAD_UPDATE
        if is_bad and number is not None:
            signal.raise_signal(number)
            time.sleep(0.1)  # until the thread that listens to signals has noted it
        metrics = step(trainer, *args)
        if is_bad and dist.get_rank() == 1:
            trained = [p for p in state.model.parameters() if p.requires_grad]
            p = max(trained, key=lambda p: p.to_local().numel())
            spoiled = p.detach() if of == "parameter" else state.optimizer.state[p]["exp_avg_sq"]
            spoiled.to_local()[-1] = float("inf")
        return metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", spoiling)
        return refusal(config, settings)


@pytest.mark.parametrize(
    ("way", "of"),
    [
        pytest.param(way, of, marks=[] if way in ALWAYS else [pytest.mark.slow])
        for number, way in enumerate(WAYS)
        for of in (("parameter", "moment")[number % 2],)
    ],
)
def test_a_bad_update_is_never_saved(way: str, of: str, tmp_path: Path) -> None:
    settings, number = WAYS[way]
    config, run = write_run(tmp_path), tmp_path / "outputs" / "run"
    settings = {
        "parallelism.sequence_parallel_degree": 2,
        "training.steps": 6,
        "checkpoint.interval": 100,
        "metrics.log_interval": 100,
    } | settings
    for message in run_on_ranks(2, refused_after_a_bad_update, config, settings, number, of):
        name = "exp_avg_sq of " * (of == "moment") + r"\S+"
        assert re.match(
            rf"The update of step 3 has left {name} with values that are not finite\. Nothing of "
            "it is saved",
            message,
        ), message
    kept = sorted(path.name for path in run.glob("checkpoints/*"))
    assert kept == (["step-1", "step-2"] if "written" in way else [])
    assert not {"export", "adapter"} & {path.name for path in run.iterdir()}


# --- spikes ---------------------------------------------------------------------------------------


def test_a_spike_is_far_above_the_median() -> None:
    draw = torch.Generator().manual_seed(0)
    falling = [4 - 0.01 * n + 0.05 * torch.randn((), generator=draw).item() for n in range(100)]
    spikes = LossSpikes()
    assert [spikes.is_spike(loss) for loss in falling] == [False] * 100
    assert spikes.is_spike(5.0) and spikes.is_spike(float("nan"))
    assert not spikes.is_spike(3.0) and not spikes.is_spike(2.0)
    assert not LossSpikes([1.0] * 15).is_spike(9.0), "too few are known"
    assert LossSpikes([1.0] * 16).is_spike(9.0)
    assert not LossSpikes([1.0] * 32).is_spike(1.1), "a flat loss"
    level = LossSpikes([1.0] * 32)
    assert [level.is_spike(9.0) for _ in range(32)].count(False) == 16, "a new level"


def test_spikes_are_marked_also_after_a_run_was_resumed(tmp_path: Path) -> None:
    config, run = write_run(tmp_path), tmp_path / "outputs" / "run"
    settings: Settings = {"optimizer.lr": 1e-4, "checkpoint.interval": 17}
    run_on_ranks(1, train, config, settings | {"training.steps": 17})
    wild = {"optimizer.lr": 20.0, "training.steps": 20, "lr_scheduler.decay_type": "constant"}
    run_on_ranks(1, train, config, settings | wild)
    marked = [line["loss_spike"] for line in logged(run)]
    # The update of step 18 is the wild one.
    assert marked[:18] == [False] * 18 and marked[18:] == [True, True]
