"""Room on the disk, before the first step: the estimate against what is written, and a run that has
none.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.ranks import run_on_ranks
from helpers.runs import Settings, train, write_run
from titan_ulysses.checkpoint.disk import DiskNeeds, disk_needs
from titan_ulysses.config.schema import Config
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.train import run_folder

SETTINGS: Settings = {
    "parallelism.sequence_parallel_degree": 2,
    "training.steps": 3,
    "training.global_batch_size": 2,
    "checkpoint.export": True,
    "model.config.hidden_size": 256,
    "model.config.intermediate_size": 512,
    "model.config.vocab_size": 4096,
    "model.config.tie_word_embeddings": True,
}


def train_and_estimate(config: Path, settings: Settings) -> DiskNeeds:
    seen: list[DiskNeeds] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            run_folder, "disk_needs", lambda *a, **k: seen.append(disk_needs(*a, **k)) or seen[0]
        )
        train(config, settings)
    return seen[0]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_the_estimate_is_what_is_written(optimizer: str, tmp_path: Path) -> None:
    if optimizer != "adamw":
        pytest.importorskip("torchao")
    settings = SETTINGS | {"optimizer.name": optimizer}
    found, other = run_on_ranks(2, train_and_estimate, write_run(tmp_path), settings)
    run = tmp_path / "outputs" / "run"
    written = sum(file.stat().st_size for file in (run / "checkpoints" / "step-3").iterdir())
    assert found.model + found.optimizer == pytest.approx(written, rel=0.03)
    assert found.export == pytest.approx(
        (run / "export" / "model.safetensors").stat().st_size, rel=0.02
    )
    assert (found.checkpoints, found.model, found.export) == (1, other.model, other.export)


def try_with_full_disk(config: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
        try:
            train(config, SETTINGS)
        except UserError as error:
            return str(error)
    raise AssertionError("nothing was refused")


def test_a_run_whose_checkpoint_has_no_room_is_refused(tmp_path: Path) -> None:
    for message in run_on_ranks(2, try_with_full_disk, write_run(tmp_path)):
        assert message.startswith(
            f"job.dump_folder = {tmp_path / 'outputs'}: a checkpoint takes about 0.0"
        )
        assert "optimizer" in message and "and 0.00 GiB are free. Free space" in message
    assert not (tmp_path / "outputs").exists()


def needs(**changes) -> DiskNeeds:
    checkpoint = {
        "interval": 10,
        **{k: v for k, v in changes.items() if k in ("interval", "keep_latest_k", "enable")},
    }
    table = {
        "model": {"config": {"model_type": "llama"}},
        "checkpoint": checkpoint,
        "training": {"steps": 95},
    }
    place = {"there": changes.get("there", 0), "done": changes.get("done", 0)}
    return disk_needs(
        Config.model_validate(table), Path("nowhere"), model=1, optimizer=2, export=1, **place
    )


def test_how_many_checkpoints_there_will_be() -> None:
    assert needs(keep_latest_k=2).checkpoints == 3  # the third is complete before the first goes
    assert needs(keep_latest_k=2, there=2).checkpoints == 1
    assert needs(keep_latest_k=0).checkpoints == 10  # 10, 20, ..., 90 and the last step
    assert needs(keep_latest_k=0, done=50, there=5).checkpoints == 5
    assert needs(keep_latest_k=5, done=90, there=5).checkpoints == 1
    assert needs(done=95).checkpoints == needs(enable=False).checkpoints == 0


def test_what_is_said() -> None:
    sizes = {
        "folder": "outputs",
        "model": 2**30,
        "optimizer": 2**31,
        "checkpoints": 3,
        "export": 2**30,
    }
    assert DiskNeeds(free=1000 * 2**30, **sizes).lines() == []
    [line] = DiskNeeds(free=20 * 2**30, **sizes).lines()
    assert (
        line
        == "disk: 3 checkpoints of 3.00 GiB and an export of 1.00 GiB to be written, 20.00 GiB are "
        "free"
    )
    tight = DiskNeeds(free=7 * 2**30, **sizes)
    _, line = tight.lines()
    assert "THE DISK WILL BE FULL. Free 3.00 GiB, lower checkpoint.keep_latest_k" in line
    assert tight.obstacle() is None
    assert "a checkpoint takes about 3.00 GiB" in DiskNeeds(free=2 * 2**30, **sizes).obstacle()
    assert DiskNeeds(free=0, **{**sizes, "checkpoints": 0}).obstacle() is None
