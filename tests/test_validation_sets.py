"""Several named validation sets, the best checkpoint, and an early end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.ranks import run_on_ranks
from helpers.runs import logged, train, write_documents, write_run
from titan_ulysses.checkpoint.step_folder import read_run_file
from titan_ulysses.config.load import load_config
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.observability.metrics import scalars
from titan_ulysses.observability.pictures import COLORS
from titan_ulysses.train.evaluation import Best, TokenEvaluation, together

ROOT = Path(__file__).resolve().parent.parent
SP2 = {"parallelism.sequence_parallel_degree": 2}


def write(folder: Path) -> tuple[Path, dict[str, Any]]:
    """A config, and the settings of two sets of its validation."""
    config = write_run(folder)
    for name, seed in (("one", 1), ("two", 2)):
        write_documents(folder / name, documents=3, seed=seed)
    sets = [
        {"name": "one", "path": str(folder / "one"), "packing": "none"},
        {"name": "two", "path": str(folder / "two")},
    ]
    settings = {"validation.enable": True, "validation.sets": sets, "validation.steps": 0}
    settings |= {"checkpoint.enable": False, "training.steps": 2, "lr_scheduler.warmup_steps": 0}
    settings |= {"training.global_batch_size": 2}
    return config, settings


def run(config: Path, ranks: int = 1, **settings: Any) -> list[dict[str, Any]]:
    """Its validations, from metrics.jsonl."""
    named = {key.replace("__", "."): value for key, value in settings.items()}
    run_on_ranks(ranks, train, config, named | (SP2 if ranks == 2 else {}), timeout=300)
    name = named.get("job.name", "run")
    return [line for line in logged(config.parent / "outputs" / name) if "validation_loss" in line]


def test_each_set_has_the_loss_that_it_has_alone(tmp_path: Path) -> None:
    config, settings = write(tmp_path)
    first, last = run(config, ranks=2, **settings)
    assert first["validation_sets"].keys() == last["validation_sets"].keys() == {"one", "two"}
    for name, packing in (("one", "none"), ("two", "concat")):
        changed = {"validation.sets": [], "validation.path": str(tmp_path / name)}
        alone = run(config, **settings | changed | {"data.packing": packing, "job.name": name})[0]
        found = first["validation_sets"][name]
        assert found["tokens"] == alone["validation_tokens"]
        assert found["sequences"] == alone["validation_sequences"]
        assert found["loss"] == pytest.approx(alone["validation_loss"], rel=1e-6)
    one, two = last["validation_sets"].values()
    tokens = one["tokens"] + two["tokens"]
    mean = (one["loss"] * one["tokens"] + two["loss"] * two["tokens"]) / tokens
    assert last["validation_loss"] == pytest.approx(mean, rel=1e-9)
    assert last["validation_tokens"] == tokens
    assert sum(labels for *_, labels in last["validation_by_position"]) == tokens


def test_sets_together() -> None:
    one = TokenEvaluation(2.0, 3, 1, [(0, 1.0, 1), (1, 2.5, 2)])
    two = TokenEvaluation(5.0, 1, 2, [(0, 5.0, 1)])
    found = together([one, two])
    assert found == TokenEvaluation(2.75, 4, 3, [(0, 3.0, 2), (1, 2.5, 2)])
    assert together([one]) is one


def test_sets_in_pictures_and_tensorboard(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    from titan_ulysses.tools import plot

    ranges = [(0, 4.0, 1), (1, 3.0, 2)]
    for run_name in ("a", "b"):
        lines = []
        for step in (0, 5, 9):
            sets = {
                name: {"loss": 4.0 - step / 9 + number, "by_position": ranges}
                for number, name in enumerate(("one", "two"))
            }
            line = {"step": step, "validation_loss": 4.0, "validation_by_position": ranges}
            lines.append(line | {"validation_sets": sets})
        (tmp_path / run_name).mkdir()
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / run_name / "metrics.jsonl").write_text(text)
    plot.main([str(tmp_path / "a")])
    plot.main([str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "both")])
    for file in (tmp_path / "a" / "plots" / "sets.png", tmp_path / "both" / "sets.png"):
        pixels = torch.tensor(image.imread(file)[..., :3])
        for color in COLORS[:2]:
            wanted = torch.tensor([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
            assert ((pixels - wanted).abs().amax(-1) < 0.02).sum() > 100, (file, color)
    found = dict(scalars({"validation_sets": sets}))
    assert found["validation_sets/one/loss"] == sets["one"]["loss"]
    assert found["validation_sets/two/by_position/from_1"] == 3.0


def test_what_a_resumed_run_knows_of_the_best(tmp_path: Path) -> None:
    config = write_run(tmp_path)

    def best(**settings: Any) -> Best:
        named = {key.replace("__", "."): value for key, value in settings.items()}
        return Best(load_config(config, ({"validation.enable": True} | named).items()))

    saved = {"metric": "loss", "step": 4, "value": 1.5, "waited": 1, "keep": False}
    goes_on = best(validation__patience=2)
    assert goes_on.load(saved) is None and goes_on.load(None) is None
    assert (goes_on.step, goes_on.value, goes_on.ends_run) == (4, 1.5, False)
    assert goes_on.state() == saved
    anew = best(checkpoint__keep_best=True)
    assert "checkpoint.keep_best = true, and it was false" in anew.load(saved)
    assert anew.step is None and anew.state() is None
    assert 'and it was "a/loss"' in goes_on.load(saved | {"metric": "a/loss"})


def test_the_best_checkpoint_is_kept_and_exported_and_the_run_ends_early(tmp_path: Path) -> None:
    config, settings = write(tmp_path)
    settings |= {
        "validation.interval": 1,
        "validation.metric": "two/loss",
        "validation.patience": 2,
        "checkpoint.enable": True,
        "checkpoint.keep_best": True,
        "checkpoint.keep_latest_k": 1,
        "checkpoint.interval": 100,
        "checkpoint.export": True,
        "optimizer.lr": 0.3,
        "lr_scheduler.decay_type": "constant",
    }
    found = run(config, **settings | {"training.steps": 40})
    values = {line["step"]: line["validation_sets"]["two"]["loss"] for line in found}
    steps, best, waited = [*values][1:], 1, 0
    for step in steps:
        best, waited = (step, 0) if step == 1 or values[step] < values[best] else (best, waited + 1)
        assert waited < 2 or step == steps[-1]
    assert waited == 2 and steps[-1] < 40
    folder = tmp_path / "outputs" / "run"
    kept = {path.name for path in (folder / "checkpoints").iterdir()}
    assert kept == {f"step-{best}", f"step-{steps[-1]}"}
    saved = read_run_file(folder / "checkpoints" / f"step-{steps[-1]}")["best"]
    assert (saved["step"], saved["value"], saved["waited"]) == (best, values[best], 2)
    # What is exported is what a run of so many steps ends with.
    short = {"job.name": "short", "training.steps": best, "validation.enable": False}
    off = {"checkpoint.keep_best": False, "validation.patience": 0, "validation.metric": "loss"}
    run(config, **settings | short | off)
    exported, expected = (
        load_file(tmp_path / "outputs" / name / "export" / "model.safetensors")
        for name in ("run", "short")
    )
    assert exported.keys() == expected.keys()
    assert all(exported[name].equal(expected[name]) for name in expected)
    # Interrupted and resumed, on two ranks: the same end.
    parts = settings | {"job.name": "parts"}
    run(config, ranks=2, **parts | {"training.steps": steps[-1] - 1})
    again = run(config, ranks=2, **parts | {"training.steps": 40})
    assert [line["step"] for line in again] == [0, *steps]
    kept = {path.name for path in (tmp_path / "outputs/parts/checkpoints").iterdir()}
    assert kept == {f"step-{best}", f"step-{steps[-1]}"}
    # The same command once more does nothing, and more patience goes on.
    assert run(config, **settings | {"training.steps": 40}) == found
    more = run(config, **settings | {"training.steps": 40, "validation.patience": 3})
    assert len(more) > len(found)


SET = {"name": "a", "path": "texts"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"validation.sets": [SET], "validation.metric": "b/loss", "validation.patience": 1},
            'validation.metric = "b/loss": no validation set has it. Choose from "loss", "a/loss"',
        ),
        ({"validation.metric": "accuracy"}, "no validation set has it"),
        (
            {"validation.sets": [SET], "validation.metric": "a/loss"},
            'validation.metric = "a/loss" has no effect',
        ),
        ({"validation.sets": [SET, SET]}, 'validation.sets[1].name = "a" is another set\'s too'),
        ({"validation.sets": [{"path": "texts"}]}, 'validation.sets[0].name = "" is not set'),
        ({"validation.sets": [{"name": "a"}]}, "validation.sets[0].path is not set"),
        (
            {"validation.sets": [SET | {"name": "a/b"}]},
            'validation.sets[0].name = "a/b": needs letters',
        ),
        ({"validation.sets": [SET | {"packing": "tight"}]}, "validation.sets[0].packing"),
        ({"validation.sets": [SET], "validation.path": "texts"}, "are both set"),
        (
            {"validation.sets": [SET | {"source": "hf", "streaming": True}]},
            "validation.sets[0].streaming = true: held-out data is read as a whole",
        ),
        (
            {"validation.sets": [SET | {"path": "nowhere"}]},
            'validation.sets[0].path = "nowhere" does not exist',
        ),
        (
            {"validation.enable": False, "validation.patience": 3},
            "validation.patience = 3 needs validations",
        ),
        (
            {"checkpoint.keep_best": True, "checkpoint.enable": False},
            "checkpoint.keep_best = true with checkpoint.enable = false",
        ),
    ],
)
def test_what_is_refused(
    settings: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from titan_ulysses.config.paths import path_problems

    monkeypatch.chdir(tmp_path)
    write_documents(tmp_path / "texts", documents=2, seed=0)
    config = write_run(tmp_path)
    try:
        problems = path_problems(
            load_config(config, ({"validation.enable": True} | settings).items())
        )
        told = "\n".join(problems)
    except UserError as error:
        told = str(error)
        assert error.exit_code == 2
    assert message in told
