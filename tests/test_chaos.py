"""A slice of each campaign of scripts/chaos.py, and that the campaigns find what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.forked import start

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "chaos.py"


def play(*arguments: str, out: Path) -> tuple[int, str, list[dict]]:
    said = out.with_name(f"{out.name}-{len(list(out.parent.iterdir()))}")
    done = start(said, SCRIPT, *arguments, "--out", out)
    text = "".join(done.communicate(timeout=900))
    lines = [json.loads(line) for file in sorted(out.iterdir()) for line in file.open()]
    return done.returncode or 0, text, lines


def test_a_slice_of_each_campaign(tmp_path: Path) -> None:
    # Few of each: test_bad_input.py and test_fuzz.py have bad configs, data and bytes.
    cases = ["damage=1", "config=4", "data=2", "flips=1", "kill=1", "publish=1"]
    out = tmp_path / "out"
    # With this seed two ranks are killed once, while a checkpoint is written beside the steps.
    code, text, lines = play(*cases, "--seed=332", out=out)
    assert code == 0, text
    assert len(lines) == 10 and text.count("\n| ") == 8
    # What is done is not done again.
    code, again, lines = play("data=2", "--seed=332", out=out)
    assert code == 0 and len(lines) == 10 and "2 of 2" in again and "imports" not in again


@pytest.mark.slow
def test_a_slice_of_the_long_campaigns(tmp_path: Path) -> None:
    cases = ["reshape=2", "hang=1", "storage=3", "soak=1"]
    code, text, lines = play(*cases, "--soak-seconds=15", "--seed=3", out=tmp_path / "out")
    assert code == 0, text
    assert len(lines) == 7


@pytest.mark.slow
def test_flipped_bits_of_data_end_in_a_message(tmp_path: Path) -> None:
    code, text, lines = play("flips=300", "--seed=12", out=tmp_path / "out")
    assert code == 0, text
    assert {line["verdict"] for line in lines} == {"accepted", "refused"} and len(lines) == 300


@pytest.mark.slow
def test_without_hashes_damage_is_not_found(tmp_path: Path) -> None:
    code, text, lines = play("damage=12", "--without-hashes", out=tmp_path / "out")
    assert code == 1
    assert "undetected" in {line["verdict"] for line in lines}, text


def test_a_campaign_that_is_none() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "storm"], capture_output=True, text=True)
    assert (
        done.returncode == 2 and "storm is none of damage, config, data, flips, kill" in done.stderr
    )
