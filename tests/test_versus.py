"""scripts/bench/versus.py --peers: the parts that need no DeepSpeed."""

from __future__ import annotations

import sys
from argparse import Namespace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts" / "bench"))
import versus  # noqa: E402
import versus_peers  # noqa: E402

from helpers.ranks import run_on_ranks  # noqa: E402

SMALL = {**versus.SMALL, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SMALL |= {"vocab_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}


def losses(contender: str, folder: str, ranks: int) -> list[float]:
    settings = {"ranks": ranks, "folder": folder, "dtype": "float32", "lengths": [64] * 3}
    build_step = import_module(versus.MODULES[contender]).build_step
    with patch("torch.distributed.init_process_group"):  # these ranks have their group
        step = build_step(Namespace(**settings, optimizer=versus.OPTIMIZER))
    return [float(step(64, index)[0]) for index in range(3)]


@pytest.fixture
def agreed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that returns the rows of `agreement` on a small model."""
    monkeypatch.setattr(versus_peers, "FOLDER", tmp_path)
    versus.save_weights(tmp_path / "agreement", SMALL)

    def child(contender: str, what: str, dtype: str, lengths: list[int]) -> Any:
        assert (what, dtype, lengths) == ("agreement", "float32", [64] * 3)
        if contender in versus.DEEPSPEED:
            return f"{versus.UNABLE}: no DeepSpeed here"
        ranks = 1 if contender == "plain" else 2
        try:
            name = "library" if contender == "ours" else contender
            found = run_on_ranks(ranks, losses, name, str(tmp_path / "agreement"), ranks)
        except Exception as error:  # as the parent sees it of a child
            return f"{versus.UNABLE}: {error}" if "sharding strategy" in str(error) else str(error)
        return [{"loss": each} for each in found]

    args = Namespace(agreement_seq_len=64, ranks=2, minutes=3)
    return lambda: versus_peers.agreement(SimpleNamespace(args=args, child=child))


def test_all_train_what_one_process_trains(agreed: Any) -> None:
    """train.py with the TOML that is counted, an own loop, FSDP2. torch's ring says what it has
    not.
    """
    rows = {row["contender"]: row for row in agreed()}
    for name in ("ours", "library", "fsdp2", "train.py"):
        assert rows[name]["agrees"] and rows[name]["difference"] < 1e-5, rows[name]
        assert len(rows[name]["losses"]) == 3
    assert "_scaled_dot_product_flash_attention_for_cpu" in rows["ring"]["failed"]
    assert rows["ring"]["agrees"]


def test_what_does_not_agree() -> None:
    wrong = versus_peers.compared("alst", [5.0, 4.0, 3.0002], [5.0, 4.0, 3.0])
    assert not wrong["agrees"] and wrong["difference"] == pytest.approx(2e-4)
    assert not versus_peers.compared("alst", [5.0, float("nan"), 3.0], [5.0, 4.0, 3.0])["agrees"]
    assert not versus_peers.compared("alst", "out of memory", [5.0])["agrees"]
    assert versus_peers.compared("ring", f"{versus.UNABLE}: why", [5.0])["agrees"]


def test_a_disagreement_ends_with_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [versus_peers.compared("fsdp2", [5.0], [4.0])]
    monkeypatch.setattr(versus_peers, "FOLDER", tmp_path)
    monkeypatch.setattr(versus_peers, "Match", lambda args: None)
    monkeypatch.setattr(versus_peers, "agreement", lambda match: rows)
    with pytest.raises(SystemExit, match="1 did not train the same"):
        versus_peers.main(Namespace(what=["agreement"]))


def test_lines_of_code() -> None:
    source = '''"""A docstring."""
import os


def one(a):
    """Another,
    of two lines."""
    # A comment.

    text = """a string
    of two lines"""
    return (  # this is code
        a
    )


class Two:
    """Told."""
    x = 1
'''
    assert versus_peers.code_lines(source) == 1 + 1 + 2 + 3 + 2  # with the import
    assert versus_peers.lines_of("ours") == {"config": 15, "code": 0}
    for name in versus_peers.WRITTEN:
        assert sum(versus_peers.lines_of(name).values()) > 9


def test_the_table() -> None:
    found = {
        "lines": {"ours": {"config": 15, "code": 0}, "ring": {"config": 0, "code": 47}},
        "agreement": [
            {"contender": "ours", "difference": 2e-6},
            {"contender": "ring", "failed": "cannot"},
        ],
        "time": [{"contender": "ours", "seq_len": 4096, "seconds": 2.5, "cpu": 2.0}],
        "memory": [{"contender": "ours", "units": 10.31}],
    }
    assert versus_peers.table(found)[2:] == [
        "| ours | 15 | 0 | 2.0e-06 | 2.50 s (CPU 2.00) | 10.31 |",
        "| torch's ring + FSDP2 | 0 | 47 | cannot |  |  |",
    ]
