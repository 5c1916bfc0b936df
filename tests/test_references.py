"""DPO's reference, asked once before the first step: against plain transformers, and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as load_tensors

from helpers.meshes import DP2, ONE, SP2, Degrees
from helpers.ranks import run_on_ranks
from helpers.runs import Settings, logged
from test_loss_settings import (
    MESHES,
    PACKED,
    PAIRS,
    compare,
    dpo,
    in_batches,
    on_ranks,
    plain_dpo,
    same,
    write_material,
)

BEFORE = {"loss.precompute_reference": True}
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_material(tmp_path_factory.mktemp("references"))


@pytest.mark.parametrize("degrees", MESHES)
def test_a_reference_computed_before_training(
    degrees: Degrees, material: Path, tmp_path: Path
) -> None:
    """The same losses and gradients, and no step has the reference."""
    expected = run_on_ranks(1, plain_dpo, material)[0]
    wanted = dpo(material) | BEFORE | in_batches(degrees)
    for found in on_ranks(tmp_path, wanted, degrees):
        compare(found, expected)
        assert not found.has_second_model


@pytest.mark.parametrize(
    "more", [pytest.param({}, id="all"), pytest.param({"lora.rank": 4}, id="lora", marks=SLOW)]
)
def test_a_resumed_run_reads_what_was_computed(
    more: Settings, material: Path, tmp_path: Path
) -> None:
    """Without the reference, from another mesh, packed, with held-out pairs, and from a mixture."""
    if more:
        pytest.importorskip("peft")
    (material / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS[::-1][:4]))
    entries = [
        {"source": "preference", "path": f"{material}/{name}.jsonl"} for name in ("pairs", "few")
    ]
    live = dpo(material) | PACKED | {"training.seq_len": 96, "training.global_batch_size": 4}
    live |= {"data.source": "text", "data.path": "", "data.mixture": entries, "loss.reference": ""}
    live |= {"validation.enable": True, "validation.steps": 0, "training.steps": 3, **more}
    live |= {"checkpoint.enable": True, "checkpoint.interval": 1, "optimizer.lr": 1e-3}
    for name in ("live", "before"):
        (tmp_path / name).mkdir()
    expected = on_ranks(tmp_path / "live", live, ONE)[0]
    wanted, folder = live | BEFORE, tmp_path / "before"
    on_ranks(folder, wanted | {"training.steps": 1}, DP2)
    file = folder / "run" / "reference.safetensors"
    written = file.read_bytes()
    assert not on_ranks(folder, wanted | {"training.steps": 2}, SP2)[0].has_second_model
    assert file.read_bytes() == written, "it was computed again"
    file.write_bytes(written[:-1] + bytes([written[-1] ^ 1]))  # of which a hash tells
    same(on_ranks(folder, wanted, SP2)[0], expected)
    for name, table in load_tensors(written).items():
        again = load_tensors(file.read_bytes())[name]
        torch.testing.assert_close(again, table, rtol=1e-12, atol=1e-12)
    validated = [
        [line for line in logged(one / "run") if "validation_loss" in line][-1]
        for one in (folder, tmp_path / "live")
    ]
    assert validated[0]["step"] == validated[1]["step"] == 3
    for key in ("validation_loss", "validation_rewards"):
        assert validated[0][key] == pytest.approx(validated[1][key], rel=1e-11)
