"""`titan-ulysses plan MODEL` and `init MODEL`: no TOML file, one that a run takes, and refusals."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers.models import write_byte_model
from helpers.ranks import run_on_ranks
from helpers.runs import learned, train, working_in
from titan_ulysses.__main__ import main
from titan_ulysses.config.load import load_config
from titan_ulysses.config.model_cli import Gpus, parse_gpus, parse_model_command, parse_tokens
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.hardware import gpu_of_device
from titan_ulysses.plan import init
from titan_ulysses.plan.fastest import Candidate
from titan_ulysses.plan.planner import Setup, set_up

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model of 512 positions and a tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_byte_model(folder, max_position_embeddings=512)
    return folder


# --- what is asked for ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "gpus"),
    [
        ("8xH100", Gpus(8, "H100-80GB", 8)),
        ("1 x h200", Gpus(1, "H200", 8)),
        ("4x8xB200", Gpus(32, "B200", 8)),
        ("2x4xA100-80GB", Gpus(8, "A100-80GB", 4)),
        ("1xa100", Gpus(1, "A100-80GB", 8)),
        ("1xRTX 4090", Gpus(1, "RTX-4090", 8)),
        ("1x72xgb200", Gpus(72, "GB200", 72)),
        ("8xH100 NVL", Gpus(8, "H100-NVL", 8)),
    ],
)
def test_gpus(text: str, gpus: Gpus) -> None:
    assert parse_gpus(text) == gpus


def test_a_device_is_no_gpu_whose_name_is_only_part_of_its_own() -> None:
    for device, name in [
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX-PRO-6000"),
        ("NVIDIA RTX 6000 Ada Generation", None),
        ("NVIDIA GB10", "DGX-Spark"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA RTX A1000 Laptop GPU", None),
    ]:
        found = gpu_of_device(device)
        assert (found and found.name) == name, device


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("131072", 131072), ("1_000", 1000), ("500K", 512000), ("1M", 2**20), ("3.7m", 3_879_936)],
)
def test_tokens(text: str, tokens: int) -> None:
    assert parse_tokens(text) == tokens
    assert tokens % 1024 == 0 or not text[-1].isalpha()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "plan: MODEL comes first"),
        (["m"], "plan m: --gpus is missing, as in --gpus 8xH100"),
        (["m", "--gpus"], "--gpus: needs a value"),
        (["m", "--gpus", "H100"], "--gpus H100: needs a number and a name, as in --gpus 8xH100"),
        (
            ["m", "--gpus", "8xV100"],
            "--gpus 8xV100: V100 is not known; near it: H100-80GB, A100-80GB",
        ),
        (["m", "--gpus", "1xA10"], "--gpus 1xA10: A10 is not known; near it: A100-80GB"),
        (["m", "--gpus", "8xH10"], "--gpus 8xH10: H10 is not known; near it: H100-80GB"),
        (["m", "--gpus", "8xB20"], "--gpus 8xB20: B20 is not known; near it: B200, GB200"),
        (
            ["m", "--gpus", "8xTPU"],
            "--gpus 8xTPU: TPU is not known. Known are A100-80GB, H100-80GB",
        ),
        (["m", "--gpus", "0xH100"], "--gpus 0xH100: needs from 1 to 1,048,576 GPUs"),
        (["m", "--gpus", "8xH100", "--seq-len", "long"], "--seq-len long: needs a number"),
        (["m", "--gpus", "8xH100", "--seq-len", "1.5"], "--seq-len 1.5: needs a number"),
        (["m", "--gpus", "8xH100", "--seq-len", "9999M"], "--seq-len 9999M: needs a number"),
        (["m", "--gpus", "8xH100", "--config", "x.toml"], "plan: give either MODEL or --config"),
        (["m", "--gpus", "8xH100", "--evaluate"], "--evaluate: plan MODEL has no such option"),
        (["m", "--gpus", "8xH100", "--output", "x"], "--output: no such option"),
        (["m", "n", "--gpus", "8xH100"], "n: unexpected"),
        (
            ["m", "--gpus", "8xH100", "--training.seq_len", "9"],
            "--training.seq_len: here it is plan",
        ),
    ],
)
def test_arguments_that_cannot_be(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}") as error:
        parse_model_command(arguments, writes=False)
    assert error.value.exit_code == 2


@pytest.mark.parametrize("command", ["plan", "init"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("usage: titan-ulysses plan MODEL --gpus GPUS")


def test_settings_that_the_search_chooses_are_refused(model: Path) -> None:
    for key, value in (("activation_checkpoint.every", "2"), ("memory.mlp_tile_tokens", "512")):
        with pytest.raises(UserError, match=f"--{key}: the search for the fastest settings"):
            main(["plan", str(model), "--gpus", "1xH100", f"--{key}", value])


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='model.path = ".*absent": no such folder'):
        main(["init", str(tmp_path / "absent"), "--gpus", "1xH100"])


# --- what is found --------------------------------------------------------------------------------


def test_init_writes_a_file_that_plans_and_trains(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Longer than the model's positions; trained on two ranks as it is, but for fewer steps."""
    with working_in(tmp_path):
        main(["init", str(model), "--gpus", "2xH100", "--seq-len", "2K", "--data.path", "texts"])
        out = capsys.readouterr().out
        text = (tmp_path / "tiny.toml").read_text()
        config = load_config("tiny.toml")
        with pytest.raises(UserError, match="tiny.toml is there already: give another --output"):
            main(["init", str(model), "--gpus", "2xH100"])
    assert "fastest settings for 2,048 tokens on 2 x H100-80GB" in out
    # The hours are those of the steps in the file, with all sequences of a step.
    planned = set_up(config)
    assert planned.degrees.global_batch_size == 2
    assert f"the run: {1000 * planned.tokens_per_step:,} tokens in" in out
    assert config.training.seq_len == 2048 and config.data.path == "texts"
    assert config.model.rope_scaling == {"rope_type": "yarn", "factor": 4.0}
    assert config.plan.world_size == 2 and config.job.name == "tiny"
    assert (
        "torchrun --standalone --nproc-per-node 2 -m titan_ulysses train --config tiny.toml" in out
    )
    assert all(len(line) <= 100 for line in text.splitlines())
    # Each setting below what the schema says of it, and the plan in front of all.
    assert re.search(r"\n# Peak learning rate\..*\n(#.*\n)*lr = 1e-05\n", text)
    assert "# Planned, not measured: a step " in text
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    more = {"training.steps": 2, "lr_scheduler.warmup_steps": 1, "data.path": f"{tmp_path}/texts"}
    more |= {"job.dump_folder": f"{tmp_path}/outputs", "training.param_dtype": "float32"}
    run_on_ranks(2, train, tmp_path / "tiny.toml", more)
    assert [step for step, *_ in learned(tmp_path / "outputs" / "tiny")] == [1, 2]
    assert (tmp_path / "outputs" / "tiny" / "export" / "config.json").exists()


@pytest.mark.slow
def test_plan_of_a_model_without_a_file(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All its positions, where no length is given; {stdlib} is written as it is."""
    with working_in(tmp_path):
        main(["plan", str(model), "--gpus", "2x4xH200"])
        written = json.loads(Path("outputs/tiny/plan.json").read_text())
        main(["init", str(model), "--gpus", "1xH100", "--output", "one.toml"])
        text = Path("one.toml").read_text()
    out = capsys.readouterr().out
    assert written["fits"] and written["gpu"] == "H200"
    assert (written["world_size"], written["seq_len"]) == (8, 512)
    assert "512 tokens on 8 x H200 fit." in out
    assert 'path = "{stdlib}/*.py"' in text and "rope_scaling" not in text


class NothingFits:
    """A search that has tried one thing in vain; the real one is in tests/test_fastest.py."""

    is_interrupted = False

    def __init__(self, setup: Setup) -> None:
        self.setup, self.tried, self.refusal = setup, {(): None}, "why it is refused"

    def run(self) -> list[Candidate]:
        return []

    def nearest(self) -> None:
        return None


def test_what_does_not_fit(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`plan` plans what comes closest; `init` writes nothing."""
    monkeypatch.setattr(init, "Search", NothingFits)
    small = ["--gpus", "1xH100", "--plan.gpu_memory_gib", "0.5"]
    with working_in(tmp_path):
        main(["plan", str(model), *small])
        assert "do not fit." in " ".join(capsys.readouterr().out.split())
        with pytest.raises(UserError, match="tiny.toml is not written, because nothing fits"):
            main(["init", str(model), *small])
        assert "All are refused: why it is refused" in capsys.readouterr().out
        assert not Path("tiny.toml").exists()
        with pytest.raises(UserError, match="there is no folder absent"):
            main(["init", str(model), "--gpus", "1xH100", "--output", "absent/a.toml"])
        monkeypatch.setattr(os, "access", lambda *_: False)
        with pytest.raises(UserError, match=r"--output a.toml: cannot write to the folder \. \(it"):
            main(["init", str(model), "--gpus", "1xH100", "--output", "a.toml"])


# --- outside of the repository --------------------------------------------------------------------


@pytest.mark.slow
def test_the_wheel_from_install_to_export_in_five_minutes(tmp_path: Path) -> None:
    """In an environment of its own: init, plan, two steps, an export, a step of an own loop.

    What the wheel needs is taken from this environment: the time is that of the project, and not of
    a download of torch. `bash scripts/check_wheel.sh --first-hour` installs all of it.
    """
    packages = Path(torch.__file__).resolve().parents[1]
    started = time.perf_counter()
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "check_wheel.sh"), "--first-hour"],
        env=os.environ | {"PYTHON": sys.executable, "PACKAGES": str(packages)},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    seconds = time.perf_counter() - started
    print(done.stdout)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert str(ROOT) not in done.stdout.splitlines()[0]
    assert "an own loop: step 1, loss" in done.stdout
    assert seconds < 300, f"{seconds:.0f} s"
