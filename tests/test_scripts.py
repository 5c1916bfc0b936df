"""`titan-ulysses needle` against plain transformers; `titan-ulysses plot`; scripts/train.sh and
scripts/launch.py.
"""

from __future__ import annotations

import io
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.run import config_from_args

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import check_export  # noqa: E402
import launch  # noqa: E402

from helpers.families import model_of  # noqa: E402
from helpers.models import LLAMA, write_byte_model  # noqa: E402
from helpers.ranks import run_on_ranks  # noqa: E402
from titan_ulysses.data.tokenizer import load_tokenizer  # noqa: E402
from titan_ulysses.distributed.errors import UserError  # noqa: E402
from titan_ulysses.observability import run_pictures  # noqa: E402
from titan_ulysses.observability.pictures import has_matplotlib  # noqa: E402
from titan_ulysses.tools import needle, plot  # noqa: E402

TOKENIZER = load_tokenizer("bytes")

# --- the needle map -------------------------------------------------------------------------------

TEXT = [*("the quick brown fox jumps over the lazy dog. " * 20).encode()]


def trial(**changes: Any) -> needle.Trial:
    return needle.make_trial(
        TOKENIZER,
        TEXT,
        **{"length": 200, "depth": 0.5, "candidates": 8, "seed": "0 200 1"} | changes,
    )


def test_a_trial() -> None:
    """All of it has the length that was asked for; the needle stands at its depth; only one code is
    in the text.
    """
    made = {depth: trial(depth=depth) for depth in (0, 0.25, 0.5, 1)}
    texts = {depth: bytes(one.prompt).decode() for depth, one in made.items()}
    key = texts[0].removesuffix(" is").rpartition(" ")[2]
    code, *others = (bytes(one).decode() for one in made[0].answers)
    needle = f"\nThe secret code of {key} is{code}.\n"
    for depth, text in texts.items():
        assert len(text) + len(code) == 200 and text.endswith(f"\nThe secret code of {key} is")
        before, found, after = text.partition(needle)
        room = len(before) + len(after) - len(f"\nThe secret code of {key} is")
        assert found and len(before) == round(depth * room)
        assert text.count(code) == 1 and not any(other in text for other in others)
    # Of one seed, at every depth.
    assert len({code, *others}) == 8 and made[0].answers == made[1].answers
    assert trial() == made[0.5] and trial(seed="0 200 2").answers != made[0.5].answers


def test_trials_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"--lengths 60: needle and question alone are \d+ tokens"):
        trial(length=60)
    with pytest.raises(UserError, match="--lengths 2000: --text has 900 tokens only"):
        trial(length=2000)


def test_accuracy_is_of_the_right_code() -> None:
    """One that is as probable as another does not count as found."""
    nan = float("nan")
    one = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -3.0, -9.0]])
    two = torch.tensor([[-5.0, -5.0, -6.0], [nan, -1.0, -2.0]])
    trials = [trial(candidates=3, seed=f"0 200 {number}") for number in range(2)]
    # " 12345": 6 bytes.
    assert needle.result_of(200, 0.5, trials, one) == (200, 0.5, 0.5, pytest.approx(-2.5 / 6))
    assert needle.result_of(200, 0.5, trials, two).accuracy == 0


ARGUMENTS = shlex.split("--lengths 120 101 --depths 0 1 --trials 2 --candidates 3 --seed 5")


def needle_main(arguments: list[str]) -> str | None:
    """What is wrong, if anything."""
    try:
        return needle.main(arguments)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("table", [LLAMA, model_of("granitemoehybrid")], ids=["llama", "hybrid"])
def test_the_map_is_that_of_plain_transformers(table: dict[str, Any], tmp_path: Path) -> None:
    """Two ranks, of which the second has the question and a padded end."""
    text, output = tmp_path / "text.txt", tmp_path / "out"
    model = write_byte_model(tmp_path / "model", table)
    text.write_bytes(bytes(TEXT))
    arguments = [str(tmp_path / "model"), *ARGUMENTS, "--text", str(text), "--output", str(output)]
    assert run_on_ranks(2, needle_main, arguments) == [None, None]
    found = json.loads((output / "needle.json").read_text())
    assert found["chance"] == pytest.approx(1 / 3) and found["lengths"] == [101, 120]
    cells = iter(found["cells"])
    for length in (101, 120):
        for depth in (0, 1):
            trials = [
                trial(length=length, depth=depth, candidates=3, seed=f"5 {length} {n}")
                for n in range(2)
            ]
            sums = [
                [log_probability(model, one.prompt, code) for code in one.answers] for one in trials
            ]
            cell = next(cells)
            assert (cell["length"], cell["depth"]) == (length, depth)
            assert cell["accuracy"] == sum(max(row) == row[0] for row in sums) / 2
            assert cell["log_probability"] == pytest.approx(
                sum(row[0] for row in sums) / 2 / 6, rel=1e-5
            )
    assert (output / "needle.png").exists() == has_matplotlib()
    for message in run_on_ranks(2, needle_main, [*arguments, "--lengths", "257"]):
        assert message.startswith(
            "--lengths 257 is longer than the model's max_position_embeddings = 256"
        )


@torch.no_grad()
def log_probability(model: Any, prompt: list[int], code: list[int]) -> float:
    logits = model(input_ids=torch.tensor([[*prompt, *code]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(code)[:, None]).sum().item()


# --- pictures -------------------------------------------------------------------------------------


def write_metrics(
    folder: Path, *, steps: int, positions: bool = True, planned: float | None = None
) -> Path:
    folder.mkdir()
    draw, lines = random.Random(0), []
    for step in range(steps + 1):
        if step in (0, steps) and positions:
            ranges = [(first, 5 - step / steps - first / 50, 10) for first in (0, 1, 2, 4, 8)]
            lines.append(
                {
                    "step": step,
                    "validation_loss": 5 - step / steps,
                    "validation_by_position": ranges,
                }
            )
        if step:
            values = {
                "loss": 5 - step / steps + draw.random(),
                "tokens_per_second": 100.0,
                "step_seconds": 0.1,
            }
            lines.append(
                {
                    "step": step,
                    **values,
                    "peak_memory_gib": 0.5 + steps,
                    "planned_memory_gib": planned,
                }
            )
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 7, "lo'
    )
    return folder


def test_pictures_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = pytest.importorskip("matplotlib.image")
    long = write_metrics(tmp_path / "long", steps=300, planned=1.4)
    short = write_metrics(tmp_path / "short", steps=3, positions=False)
    plot.main([str(short)])
    assert sorted(file.name for file in (short / "plots").iterdir()) == [
        "loss.png",
        "memory.png",
        "speed.png",
    ]
    plot.main([str(short), str(long), "--output", str(tmp_path / "pictures")])
    names = ["loss.png", "memory.png", "positions.png", "speed.png"]
    assert sorted(file.name for file in (tmp_path / "pictures").iterdir()) == names
    assert len(capsys.readouterr().out.splitlines()) == 3 + 4
    for file in (tmp_path / "pictures").iterdir():
        pixels = image.imread(file)[..., :3]
        # A line of each run.
        for color in (
            run_pictures.COLORS[:2] if file.name != "positions.png" else run_pictures.COLORS[1:2]
        ):
            wanted = torch.tensor([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
            drawn = ((torch.tensor(pixels) - wanted).abs().amax(-1) < 0.02).sum().item()
            assert drawn > 20, (file, color, drawn)


def test_curves_that_coincide_are_told_apart(tmp_path: Path) -> None:
    """Three runs with the same numbers: each one's colour is in each picture. They go where they
    are told to go.
    """
    image = pytest.importorskip("matplotlib.image")
    runs = [str(write_metrics(tmp_path / name, steps=120, planned=1.4)) for name in "abc"]
    with pytest.raises(UserError, match="name one with --output FOLDER"):
        plot.main(runs)
    plot.main([*runs, "--output", str(tmp_path / "pictures")])
    assert not (tmp_path / "a" / "plots").exists()
    for file in (tmp_path / "pictures").iterdir():
        pixels = torch.tensor(image.imread(file)[..., :3])
        axes = pixels[: int(0.7 * len(pixels))]  # the legend is below
        for color in run_pictures.COLORS[:3]:
            wanted = torch.tensor([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
            assert ((axes - wanted).abs().amax(-1) < 0.02).sum() > 200, (file, color)


def test_pictures_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="metrics.jsonl is empty: the run has logged nothing yet"):
        run_pictures.read_runs([tmp_path])
    with pytest.raises(
        UserError,
        match="nowhere/metrics.jsonl: No such file or directory. Give the folder of a run",
    ):
        run_pictures.read_runs([tmp_path / "nowhere"])
    monkeypatch.setattr(plot, "has_matplotlib", lambda: False)
    with pytest.raises(UserError, match="needs matplotlib: pip install matplotlib"):
        plot.main([str(tmp_path)])


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (2, 2000, ["10", "100", "1,000"]),
        (2, 60, ["5", "10", "20"]),
        (4, 25, ["5", "10", "20"]),
        (6.5, 7.5, ["6.6", "6.8", "7"]),
    ],
)
def test_perplexities_beside_the_losses_are_round(
    low: float, high: float, ticks: list[str]
) -> None:
    pytest.importorskip("matplotlib")
    ranges = [[0, math.log(high), 9], [512, math.log(low), 9]]
    svg = io.StringIO()
    run_pictures.draw_positions({"a": [{"step": 1, "validation_by_position": ranges}]}, svg)
    shown = re.findall(r"<!-- (\S+) -->", svg.getvalue())  # matplotlib notes what it draws
    assert {*ticks} <= {*shown}, shown


# --- the launchers --------------------------------------------------------------------------------


def test_ranks_may_finish_a_long_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a signal: torchrun's own patience is 30 seconds."""
    seen = []
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    monkeypatch.setattr(
        launch, "run", lambda args: seen.append(config_from_args(args)[0].shutdown_timeout)
    )
    assert launch.main(["--standalone", "train.py"]) == 0
    assert seen == [24 * 60 * 60]


@pytest.fixture
def train_sh(tmp_path: Path) -> Callable[..., list[str]]:
    """What scripts/train.sh prints, in a clone whose Python says in which folder it is called with
    what.
    """
    clone, here = tmp_path / "clone", tmp_path / "here"
    for folder in (clone / "scripts", clone / ".venv" / "bin", here):
        folder.mkdir(parents=True)
    for name in ("scripts/train.sh", "scripts/env.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, clone / name)
    python = clone / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\necho "in $PWD: $*"\n')
    python.chmod(0o755)
    with open(clone / "pyproject.toml") as project:
        checksum = subprocess.run(
            ["cksum"], stdin=project, capture_output=True, text=True, check=True
        ).stdout
    (clone / ".venv" / "installed").write_text(f"{checksum.strip()} \n")

    def run(*arguments: str) -> list[str]:
        command = ["bash", "../clone/scripts/train.sh", *arguments]
        environment = os.environ | {"NPROC": "3"}
        done = subprocess.run(
            command, cwd=here, env=environment, capture_output=True, text=True, check=True
        )
        assert done.stderr == ""
        return done.stdout.replace(str(tmp_path), "~").splitlines()

    return run


def test_paths_count_from_where_the_user_stands(train_sh: Callable[..., list[str]]) -> None:
    start = (
        "in ~/here: ~/clone/scripts/launch.py --standalone --nproc-per-node 3 ~/clone/train.py "
        "--config"
    )
    assert train_sh("my.toml", "--data.path", "notes") == [f"{start} my.toml --data.path notes"]
    assert train_sh("--training.steps", "3") == [
        f"{start} ~/clone/configs/quickstart.toml --training.steps 3"
    ]


def test_help_is_printed_once(train_sh: Callable[..., list[str]]) -> None:
    """By one process, and not by every rank; likewise a plan."""
    *usage, settings = train_sh("--help")
    assert usage[0] == "Train from one TOML file, on a machine with nothing but Python installed."
    assert settings == "in ~/here: ~/clone/train.py --config ~/clone/configs/quickstart.toml --help"
    assert train_sh("my.toml", "--plan") == ["in ~/here: ~/clone/train.py --config my.toml --plan"]


# --- an export, and the first model folder --------------------------------------------------------


def test_an_export_without_what_it_is_compared_with(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(UserError, match="metrics.jsonl: not there; a run writes it"):
        check_export.main([str(run)])
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(UserError, match="the run has validated nothing, so .* validation.enable"):
        check_export.main([str(run)])
    with pytest.raises(UserError, match="evaluation.json: not there; --evaluate writes it"):
        check_export.main([str(run), "--model", str(tmp_path)])
    validated = {"validation_loss": 1.0, "validation_tokens": 8, "validation_sequences": 1}
    (run / "metrics.jsonl").write_text(json.dumps(validated))
    with pytest.raises(UserError, match="export: no such folder; a run writes export/ at its end"):
        check_export.main([str(run)])


def test_the_first_model_folder_needs_only_what_its_script_installs() -> None:
    """transformers names what it wants for GGUF, and nothing of it comes with the project."""
    import transformers.modeling_utils

    source = Path(transformers.modeling_utils.__file__).read_text()
    wanted = re.findall(r"required when loading a GGUF file `pip install (\w+)`", source)
    assert "accelerate" in wanted
    script = (ROOT / "scripts" / "examples" / "smollm2_prepare.sh").read_text()
    (installed,) = re.findall(r"--target \S+ (.*)", script)
    assert {"gguf", *wanted} <= {*installed.split()}
