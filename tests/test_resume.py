"""A run goes on from its checkpoint on any mesh, and what may change when it does.

The matrix is of all pairs of meshes of 1, 2 and 4 ranks, for full training, LoRA, and optimizers of
8 and 4 bits: a slice of it always, in which each mesh is left and entered once, all of it with
--slow. The table of docs/runs.md says what happens for each setting that a resumed run has changed.
"""

from __future__ import annotations

import re
import shutil
from fnmatch import fnmatch
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import pytest

from helpers.meshes import Degrees
from helpers.ranks import run_on_ranks
from helpers.runs import Settings, learned, logged, train, write_documents, write_run
from titan_ulysses.config.load import load_config
from titan_ulysses.config.schema import KEYS
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.train.trainer import Trainer

DOCS = Path(__file__).resolve().parents[1] / "docs"

MESHES: list[Degrees] = [
    (1, 1, 1),
    (2, 1, 1),
    (1, 2, 1),
    (1, 1, 2),
    (4, 1, 1),
    (1, 4, 1),
    (1, 1, 4),
    (2, 2, 1),
    (2, 1, 2),
    (1, 2, 2),
]
"""dp_replicate x dp_shard x sp: all of 1, 2 and 4 ranks."""
CYCLE = [
    ((1, 1, 1), (2, 2, 1)),
    ((2, 2, 1), (1, 1, 2)),
    ((1, 1, 2), (1, 4, 1)),
    ((1, 4, 1), (2, 1, 2)),
    ((2, 1, 2), (1, 2, 1)),
    ((1, 2, 1), (1, 1, 4)),
    ((1, 1, 4), (2, 1, 1)),
    ((2, 1, 1), (1, 2, 2)),
    ((1, 2, 2), (4, 1, 1)),
    ((4, 1, 1), (1, 1, 1)),
]
KINDS: dict[str, Settings] = {
    "full": {},
    "lora": {"lora.rank": 4, "optimizer.lr": 1e-2},
    "adamw8bit": {"optimizer.name": "adamw8bit"},
    "adamw4bit": {"optimizer.name": "adamw4bit"},
}
SAVED, LAST = 2, 4


def settings_of(kind: str, degrees: Degrees) -> Settings:
    replicate, shard, sequence = degrees
    return KINDS[kind] | {
        "parallelism.data_parallel_replicate_degree": replicate,
        "parallelism.data_parallel_shard_degree": shard,
        "parallelism.sequence_parallel_degree": sequence,
        "training.local_batch_size": 1,
        "training.global_batch_size": 4,
        "training.steps": LAST,
        "checkpoint.interval": SAVED,
        "checkpoint.keep_latest_k": 0,
        # Enough to be quantized on four ranks, in blocks that each mesh can have.
        "model.config": MODEL,
        "lr_scheduler.decay_type": "constant",
    }


MODEL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 264,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 256,
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory):
    """The folder of a run on a mesh that was never interrupted. Each is made once."""

    @cache
    def run(kind: str, degrees: Degrees) -> Path:
        folder = tmp_path_factory.mktemp("undisturbed")
        run_on_ranks(prod(degrees), train, write_run(folder), settings_of(kind, degrees))
        return folder

    return run


PAIRS = [(one, other) for one in MESHES for other in MESHES]
ALWAYS = {
    "full": CYCLE[1:2],
    "lora": CYCLE[4:5],
    "adamw8bit": [((1, 4, 1), (2, 1, 2))],
    "adamw4bit": [((1, 1, 2), (1, 1, 2))],
}
"""The slice of the matrix that always runs."""
CASES = [
    pytest.param(
        kind,
        *pair,
        id=f"{kind} {'x'.join(map(str, pair[0]))} to {'x'.join(map(str, pair[1]))}",
        marks=[] if pair in ALWAYS[kind] else [pytest.mark.slow],
    )
    for kind in KINDS
    for pair in PAIRS
]


@pytest.mark.parametrize(("kind", "before", "after"), CASES)
def test_resume_anywhere(
    kind: str, before: Degrees, after: Degrees, undisturbed: Any, tmp_path: Path
) -> None:
    first = undisturbed(kind, before)
    config = write_run(tmp_path)
    run = tmp_path / "outputs" / "run"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copytree(
        first / "outputs/run/checkpoints" / f"step-{SAVED}", run / f"checkpoints/step-{SAVED}"
    )
    run_on_ranks(prod(after), train, config, settings_of(kind, after))
    expected = [line for line in learned(first / "outputs" / "run") if line[0] > SAVED]
    found = learned(run)
    assert [step for step, *_ in found] == [*range(SAVED + 1, LAST + 1)]
    if before == after:
        assert found == expected
    for (_, loss, norm), (_, its_loss, its_norm) in zip(found, expected, strict=True):
        # The order of sums differs; a quantized state rounds to another of its 256 or 16 numbers.
        tolerance = {"adamw8bit": 1e-4, "adamw4bit": 2e-3}.get(kind, 2e-6)
        assert loss == pytest.approx(its_loss, rel=tolerance)
        assert norm == pytest.approx(its_norm, rel=20 * tolerance)
    # The position in the data is one number, whatever the mesh.
    assert logged(run)[-1]["epoch"] == logged(first / "outputs" / "run")[-1]["epoch"]


# --- what a resumed run may change ----------------------------------------------------------------

STOPPED, END = 3, 6  # 48 sequences, more than there are: what is held out of them shows
OUTCOMES = {
    "goes on exactly": "exact",
    "trains differently from there": "other",
    "goes on, with a warning": "warned",
    "is refused": "refused",
    "is another run": "begins",
}
EXAMPLES: dict[str, list[tuple[str, Any]]] = {
    "goes on exactly": [
        ("activation_checkpoint.mode", "none"),
        ("activation_checkpoint.offload", "disk"),
        ("memory.mlp_tile_tokens", 7),
        ("memory.loss_tile_tokens", 5),
        ("memory.stream_chunk_tokens", 8),
        ("model.attention", "sdpa"),
        ("training.local_batch_size", 1),
        ("training.skip_nonfinite", 3),
        ("training.deterministic", True),
        ("checkpoint.interval", 2),
        ("checkpoint.async_mode", "async"),
        ("checkpoint.initial_load_path", "{earlier}"),
        ("metrics.log_interval", 1),
        ("comm.timeout_s", 77.0),
        ("data.cache_folder", "{earlier}/cache"),
        ("data.bad_lines", "skip"),
    ],
    "trains differently from there": [
        ("training.steps", 7),
        ("training.global_batch_size", 4),
        ("training.max_norm", 0.1),
        ("training.z_loss", 0.1),
        ("training.param_dtype", "bfloat16"),
        ("optimizer.lr", 1e-2),
        ("optimizer.betas", [0.5, 0.5]),
        ("optimizer.eps", 1e-3),
        ("optimizer.weight_decay", 0.9),
        ("lr_scheduler.warmup_steps", 5),
        ("lr_scheduler.decay_type", "constant"),
        ("lr_scheduler.min_lr_ratio", 0.9),
        ("model.rope_scaling", {"rope_type": "linear", "factor": 8.0}),
    ],
    "goes on, with a warning": [
        ("training.seed", 1),
        ("training.seq_len", 16),
        ("data.path", "{more}"),
        ("data.packing", "best_fit"),
        ("validation.enable", True),
    ],
    "is refused": [
        ("model.config", MODEL),
        ("model.freeze", ["model.embed_tokens.*"]),
        ("lora.rank", 4),
        ("optimizer.name", "adamw8bit"),
    ],
    "is another run": [
        ("job.name", "other"),
        ("job.dump_folder", "{earlier}/elsewhere"),
        ("checkpoint.folder", "kept"),
    ],
}
ALWAYS_CHANGED = {
    "memory.stream_chunk_tokens",
    "checkpoint.async_mode",
    "training.global_batch_size",
    "optimizer.lr",
    "training.seq_len",
    "model.freeze",
    "optimizer.name",
    "checkpoint.folder",
}
CHANGES = [
    pytest.param(
        outcome,
        key,
        value,
        id=f"{key} {outcome}",
        marks=[] if key in ALWAYS_CHANGED else [pytest.mark.slow],
    )
    for outcome, examples in EXAMPLES.items()
    for key, value in examples
]


def table() -> dict[str, list[str]]:
    """The table of docs/runs.md: what happens, and the patterns of keys for which it does."""
    text = (DOCS / "runs.md").read_text().split("## What a resumed run may change", 1)[1]
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", text.split("\n## ", 1)[0], re.MULTILINE)
    return {what: re.findall(r"`([a-z_.0-9*]+)`", keys) for what, keys in rows[1:]}


def test_the_table_has_every_key() -> None:
    found = table()
    assert found.keys() == OUTCOMES.keys()
    for key in KEYS:
        rows = [what for what, patterns in found.items() if any(fnmatch(key, p) for p in patterns)]
        assert len(rows) == 1, (key, rows)
    for what, examples in EXAMPLES.items():
        for key, _ in examples:
            assert any(fnmatch(key, pattern) for pattern in found[what]), (what, key)


def resume_changed(config: Path, settings: Settings) -> tuple[str, list[str], int]:
    """The refusal, the warnings, and at which step the run began."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_say", lambda self, text: said.append(text))
        try:
            trainer = Trainer(load_config(config, settings.items()))
            first = trainer.state.step
            trainer.train()
        except UserError as error:
            return str(error), said, -1
    return "", [text for text in said if "WARNING" in text], first


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    """A run of one rank that has been stopped at STOPPED of its END steps, and what it would do."""
    whole, half = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("half")
    for folder in (whole, half):
        run_on_ranks(1, train, write_run(folder), BASE)
    shutil.rmtree(half / f"outputs/run/checkpoints/step-{END}")
    return half, learned(whole / "outputs/run")


BASE: Settings = {
    "training.steps": END,
    "training.global_batch_size": 8,
    "checkpoint.interval": STOPPED,
    "checkpoint.keep_latest_k": 0,
    "lr_scheduler.warmup_steps": 1,
    "memory.stream_chunk_tokens": "off",
    "metrics.log_interval": STOPPED,
}


@pytest.mark.parametrize("what", ["a character", "a file more"])
def test_data_that_has_changed_is_said(
    what: str, stopped: tuple[Path, list], tmp_path: Path
) -> None:
    """The position is a number of a sequence, whatever the sequences are."""
    half, _ = stopped
    shutil.copytree(half / "outputs", tmp_path / "outputs")
    settings = BASE | {"job.dump_folder": str(tmp_path / "outputs")}
    (half / "data").rename(half / "kept")
    try:
        shutil.copytree(half / "kept", half / "data")
        if what == "a character":
            file = sorted((half / "data").iterdir())[7]
            file.write_text("X" + file.read_text()[1:])
        else:
            (half / "data" / "99.txt").write_text("one more")
        [(refused, warnings, began)] = run_on_ranks(1, resume_changed, half / "run.toml", settings)
    finally:
        shutil.rmtree(half / "data")
        (half / "kept").rename(half / "data")
    assert (refused, began, len(warnings)) == ("", STOPPED, 1)
    assert "WARNING: data.path: the documents have changed since step 3 was saved" in warnings[0]


@pytest.mark.parametrize(("outcome", "key", "value"), CHANGES)
def test_what_a_resumed_run_may_change(
    outcome: str, key: str, value: Any, stopped: tuple[Path, list], tmp_path: Path
) -> None:
    half, whole = stopped
    shutil.copytree(half / "outputs", tmp_path / "outputs")
    config, run = half / "run.toml", tmp_path / "outputs" / "run"
    before = learned(run)
    write_documents(tmp_path / "more", documents=30, seed=1)
    if isinstance(value, str):
        earlier = half / f"outputs/run/checkpoints/step-{STOPPED}"
        value = value.format(earlier=earlier, more=tmp_path / "more")
    [(refused, warnings, began)] = run_on_ranks(
        1, resume_changed, config, BASE | {"job.dump_folder": str(run.parent)} | {key: value}
    )
    assert bool(refused) == (outcome == "is refused"), refused
    if refused:
        assert began == -1 and learned(run) == before
        return
    assert began == (0 if outcome == "is another run" else STOPPED)
    assert bool(warnings) == (outcome == "goes on, with a warning"), warnings
    assert all(key in warning for warning in warnings)
    if outcome == "is another run":
        return
    found = {step: (loss, norm) for step, loss, norm in learned(run)}
    loss, norm = found[END]
    expected = whole[-1]
    if outcome == "goes on exactly":
        assert loss == pytest.approx(expected[1], rel=1e-6)
        assert norm == pytest.approx(expected[2], rel=1e-5)
    else:
        assert (loss, norm) != expected[1:]
