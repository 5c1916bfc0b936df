"""What the tests of whole runs share: documents and a TOML file to train on, one run on a rank, and
what it logged.
"""

from __future__ import annotations

import io
import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

SEQ_LEN = 32
LLAMA_TOML = """
[model]
tokenizer = "bytes"

[model.config]
model_type = "llama"
vocab_size = 257
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
max_position_embeddings = 128
initializer_range = 0.2
bos_token_id = 256
eos_token_id = 256
"""
RUN_TOML = """
[training]
seq_len = 32
local_batch_size = 2
global_batch_size = 4
steps = 20
param_dtype = "float32"

[optimizer]
lr = 3e-3

[lr_scheduler]
warmup_steps = 3

[checkpoint]
interval = 4
export = false

[metrics]
enable_report = false
"""
Settings = dict[str, Any]


def write_documents(folder: Path, *, documents: int, seed: int) -> Path:
    """Text files of 5 to 150 characters, so that most sequences of 32 tokens hold a border of
    documents.
    """
    folder.mkdir(parents=True)
    draw = random.Random(seed)
    for number in range(documents):
        words = " ".join("".join(draw.choices("etaoinsh", k=draw.randint(1, 9))) for _ in range(30))
        (folder / f"{number:02d}.txt").write_text(words[: draw.randint(5, 150)])
    return folder


def write_run(folder: Path, *, documents: int = 20) -> Path:
    """A tiny byte-level llama and documents for it in `folder`; its run writes to
    <folder>/outputs/run.
    """
    data = write_documents(folder / "data", documents=documents, seed=0)
    paths = f'[job]\ndump_folder = "{folder / "outputs"}"\n[data]\npath = "{data}"\n'
    (folder / "run.toml").write_text(LLAMA_TOML + RUN_TOML + paths)
    return folder / "run.toml"


def train(config: Path, settings: Settings) -> None:
    """One run, on the ranks that call this."""
    from titan_ulysses.config.load import load_config
    from titan_ulysses.train.trainer import Trainer

    Trainer(load_config(config, settings.items())).train()


def said_by(config: Path, settings: Settings) -> str:
    """One run, as above; what it printed."""
    with redirect_stdout(io.StringIO()) as said:
        train(config, settings)
    return said.getvalue()


def refusal(config: Path, settings: Settings) -> str:
    """Why such a run does not start."""
    from titan_ulysses.distributed.errors import UserError

    try:
        train(config, settings)
    except UserError as error:
        return str(error)
    raise AssertionError("it started")


def logged(run: Path) -> list[dict[str, Any]]:
    """The objects of a run's metrics.jsonl; a line that is still being written is not one yet."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def learned(run: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of each logged training step."""
    return [
        (line["step"], line["loss"], line["grad_norm"]) for line in logged(run) if "loss" in line
    ]


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """The working directory of this process, for a while."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
