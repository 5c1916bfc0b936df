"""Runs counted in epochs, shares and hours; the shapes of the learning rate."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from helpers.ranks import run_on_ranks
from helpers.runs import Settings, learned, said_by, write_run
from titan_ulysses.config.load import load_config
from titan_ulysses.config.schema import Config
from titan_ulysses.train.step import learning_rate

# 20 documents, one in each sequence, and 8 sequences a step: 2.5 steps an epoch.
EPOCHS: Settings = {"data.packing": "none", "data.long_documents": "drop", "training.seq_len": 152}
EPOCHS |= {"lr_scheduler.warmup_steps": 0, "model.config.max_position_embeddings": 160}
EPOCHS["training.global_batch_size"] = 8


def config_of(folder: Path, settings: Settings) -> Config:
    return load_config(folder / "run.toml", (EPOCHS | settings).items())


class Data:
    """A stream of so many sequences an epoch."""

    source_names: tuple[str, ...] = ()
    visual_counts: dict[str, int] = {}  # noqa: RUF012

    def __init__(self, sequences: Any):
        self.sequences = sequences

    def sequences_per_epoch(self) -> Any:
        return self.sequences


def count(settings: dict[str, Any], sequences: Any = 20) -> tuple[list[Any], list[str]]:
    from titan_ulysses.train.counting import counted

    sections: dict[str, Any] = {}
    for key, value in settings.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    config = Config.model_validate(sections)
    found, lines = counted(config, Data(sequences), sequences_per_step=8)  # type: ignore[arg-type]
    intervals = found.validation.interval, found.checkpoint.interval
    return [found.training.steps, found.lr_scheduler.warmup_steps, *intervals], lines


@pytest.mark.parametrize(
    ("settings", "expected", "said"),
    [
        ({}, [1000, 0, 100, 500], ""),
        ({"training.epochs": 3}, [8, 0, 100, 500], "training.epochs = 3: 8 step(s)"),
        (
            {"training.epochs": 3, "training.steps": 4, "lr_scheduler.warmup_steps": 10},
            [4, 4, 100, 500],
            "8 step(s); training.steps = 4 ends the run before\nlr_scheduler.warmup_steps = 10 is "
            "more than the 4 step(s) of the run: shortened to 4",
        ),
        (
            {"training.steps": 30, "checkpoint.interval": "0.1", "validation.interval": "epoch"},
            [30, 0, 3, 3],
            "checkpoint.interval = 0.1: every 3 step(s)",
        ),
        (
            {"training.epochs": 0.5, "checkpoint.interval": "0.25 epoch"},
            [2, 0, 100, 1],
            "checkpoint.interval = 0.25 epoch: every 1 step(s)",
        ),
        ({"training.steps": 70, "lr_scheduler.warmup_ratio": 0.03}, [70, 3, 100, 500], ""),
    ],
)
def test_all_is_counted_in_steps(settings: dict[str, Any], expected: list[int], said: str) -> None:
    found, lines = count(settings)
    assert found == expected
    assert said in "\n".join(lines)


def test_what_cannot_be_counted_is_refused(tmp_path: Path) -> None:
    from titan_ulysses.distributed.errors import UserError

    with pytest.raises(UserError, match="epochs = 2: the data is streamed"):
        count({"training.epochs": 2}, None)
    with pytest.raises(UserError, match='interval = "epoch": the data is streamed'):
        count({"checkpoint.interval": "epoch"}, None)
    write_run(tmp_path)
    for wrong in (0, 1.5, "often", -1, "0 epoch", True):
        with pytest.raises(UserError, match="validation.interval = .*needs a number of steps"):
            config_of(tmp_path, {"validation.interval": wrong})
    with pytest.raises(UserError, match="warmup_ratio = 0.1 and lr_scheduler.warmup_steps = 3"):
        load_config(tmp_path / "run.toml", [("lr_scheduler.warmup_ratio", 0.1)])


def test_a_mixture_counts_its_largest_source() -> None:
    from fractions import Fraction

    from titan_ulysses.data.mixture import MixedSequences

    parts: Any = {"few": Data(Fraction(10)), "many": Data(Fraction(90, 2))}
    for part in parts.values():
        part.seq_len = 8
    mixed = MixedSequences(parts, [1.0, 3.0], seed=0)
    assert (mixed.largest(), mixed.sequences_per_epoch()) == ("many", 60)


def train_until_late(config: Path, settings: Settings, step: int) -> str:
    """A run whose clock shows that its hours are over after a step; return what it says."""
    from titan_ulysses.train.trainer import Trainer

    said = StringIO()
    with redirect_stdout(said):
        trainer = Trainer(load_config(config, settings.items()))
    make_step = trainer._step

    def late(*arguments: Any) -> Any:
        metrics = make_step(*arguments)
        trainer._began -= 3600.0 * (trainer.state.step == step)
        return metrics

    trainer._step = late  # type: ignore[method-assign]
    with redirect_stdout(said):
        trainer.train()
    return said.getvalue()


def test_epochs_resume_bit_equal_and_hours_end_in_a_save(tmp_path: Path) -> None:
    """Two epochs at once, and the same in two parts, of which the clock ends the first."""
    settings = EPOCHS | {"training.epochs": 2, "training.max_hours": 1, "training.steps": 99}
    settings |= {"lr_scheduler.warmup_ratio": 0.3, "checkpoint.interval": "epoch"}
    found = {}
    for name in ("once", "parts"):
        (tmp_path / name).mkdir()
        toml, run = write_run(tmp_path / name), tmp_path / name / "outputs" / "run"
        if name == "parts":
            said = run_on_ranks(1, train_until_late, toml, settings, 2)[0]
            assert (run / "checkpoints" / "step-2").exists()
            assert "training.max_hours = 1 are over: stopped after step 2. The same" in said
        done = run_on_ranks(1, said_by, toml, settings)[0]
        found[name] = learned(run)
        assert "epochs = 2.0\n" in (run / "config.toml").read_text()
    assert "training.epochs = 2: 5 step(s)" in said
    assert "goes on with a larger training.epochs" in done
    assert "checkpoint.interval = epoch: every 3 step(s)" in said
    assert [step for step, *_ in found["once"]] == [1, 2, 3, 4, 5]
    assert found["parts"] == found["once"]


def lr(config: dict[str, Any], steps: int, **optimizer: Any) -> list[float]:
    whole = Config.model_validate(
        {"training": {"steps": steps}, "lr_scheduler": config, "optimizer": {"lr": 1.0}}
    )
    return [learning_rate(step, whole) for step in range(steps)]


@pytest.mark.parametrize(
    ("ours", "name", "theirs"),
    [
        ({"decay_type": "inverse_sqrt", "min_lr_ratio": 0.0}, "inverse_sqrt", {}),
        (
            {"decay_type": "cosine", "cycles": 3, "min_lr_ratio": 0.0},
            "cosine_with_restarts",
            {"num_cycles": 3},
        ),
        (
            {"decay_type": "linear", "decay_ratio": 0.25, "min_lr_ratio": 0.1},
            "warmup_stable_decay",
            {"num_decay_steps": 9, "min_lr_ratio": 0.1, "decay_type": "linear"},
        ),
    ],
)
def test_the_shapes_are_those_of_transformers(
    ours: dict[str, Any], name: str, theirs: dict[str, Any]
) -> None:
    """Theirs begin with a step of rate 0, and ours end with the lowest rate: one step less."""
    steps, warmup = 40, 4
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    rate = get_scheduler(
        name,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=steps - 1,
        scheduler_specific_kwargs=theirs,
    ).lr_lambdas[0]
    found = lr(ours | {"warmup_steps": warmup}, steps)
    assert found[:warmup] == [0.25, 0.5, 0.75, 1]
    assert found[warmup:] == pytest.approx([rate(step) for step in range(warmup, steps)], abs=1e-12)
    assert len(set(found)) > 8
