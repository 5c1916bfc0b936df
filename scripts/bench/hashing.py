"""What the hashes of a checkpoint cost: saved and read with and without them, in turn.

python scripts/bench/hashing.py --mib 400 --rounds 5

Saving ends when the disk has the bytes (fsync), as in a run. A start is that of a run of one rank
which resumes from a checkpoint of that size, until its first step, without its plan. `--limit 0.05`
ends with exit code 1 if the hashes add more than that to the seconds of saving.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from io import StringIO
from pathlib import Path
from statistics import median
from unittest import mock

import torch
import torch.distributed.checkpoint as dcp
from common import parser_of

import titan_ulysses.model  # noqa: F401  imports transformers without its warnings
from titan_ulysses.checkpoint import storage
from titan_ulysses.checkpoint.manifest import describe_written
from titan_ulysses.checkpoint.storage import CheckpointReader, HashingWriter

_TENSORS = 48


def seconds(act: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds on the clock, and those of this process on a CPU."""
    clock, cpu = time.perf_counter(), time.process_time()
    act()
    return time.perf_counter() - clock, time.process_time() - cpu


RUN_TOML = """
job.dump_folder = "FOLDER/outputs"
data.path = "FOLDER/text.txt"
model.tokenizer = "bytes"
model.config = { model_type = "llama", vocab_size = 257, hidden_size = 256, \
intermediate_size = 1024, num_hidden_layers = LAYERS, num_attention_heads = 4, \
bos_token_id = 256, eos_token_id = 256 }
training = { seq_len = 128, steps = 1, param_dtype = "float32" }
checkpoint.export = false
"""
_LAYER_BYTES = 12 * (4 * 256**2 + 3 * 256 * 1024)
"""Of a layer in a checkpoint: its parameters and two moments in fp32."""


def starts(folder: Path, mib: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Return the seconds of starts of a resumed run, with and without comparing hashes."""
    from titan_ulysses.config.load import load_config
    from titan_ulysses.train import trainer as trainer_module
    from titan_ulysses.train.trainer import Trainer

    (folder / "text.txt").write_text("in the beginning was the word. " * 100)
    layers = max(1, round(mib * 2**20 / _LAYER_BYTES))
    text = RUN_TOML.replace("FOLDER", str(folder)).replace("LAYERS", str(layers))
    (folder / "run.toml").write_text(text)
    config = load_config(folder / "run.toml")
    with redirect_stdout(StringIO()):
        Trainer(config).train()
    found: dict[str, list[tuple[float, float]]] = {"start without": [], "start with": []}

    def start() -> None:
        # The plan is made by another process meanwhile, which takes longer than all the rest.
        without_plan = mock.patch.object(trainer_module, "start_preflight", lambda state: None)
        with redirect_stdout(StringIO()), without_plan:
            trainer = Trainer(config)
        assert trainer.state.step == 1
        trainer.run_folder.release()

    for _ in range(rounds):
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(storage, "expect_saved"))
            found["start without"].append(seconds(start))
        found["start with"].append(seconds(start))
    return found


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--mib", type=int, default=400, help="size of the checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, help="the largest ratio that saving may grow by")
    parser.add_argument("--folder", type=Path, help="where to save; default: a temporary folder")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    numbers = options.mib * 2**18 // _TENSORS
    tensors = {f"{n}": torch.randn(numbers) for n in range(_TENSORS)}
    target = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        for _ in range(options.rounds):
            for name, kind in {"without": dcp.FileSystemWriter, "with": HashingWriter}.items():
                folder = Path(temporary) / name
                shutil.rmtree(folder, ignore_errors=True)
                writer = kind(folder)

                def save(writer: dcp.FileSystemWriter = writer) -> None:
                    dcp.save(tensors, storage_writer=writer, no_dist=True)

                found.setdefault(f"save {name}", []).append(seconds(save))
                pieces = writer.pieces if isinstance(writer, HashingWriter) else {}
                files = describe_written(folder, pieces) if pieces else {}

                def load(folder: Path = folder, files: dict = files) -> None:
                    reader = (
                        CheckpointReader(folder, files) if files else dcp.FileSystemReader(folder)
                    )
                    dcp.load(target, storage_reader=reader, no_dist=True)

                found.setdefault(f"load {name}", []).append(seconds(load))
        found |= starts(Path(temporary), options.mib, options.rounds)
    for act in ("save", "load", "start"):
        rows = [
            [median(column) for column in zip(*found[f"{act} {name}"], strict=True)]
            for name in ("without", "with")
        ]
        (clock, cpu), (hashed_clock, hashed_cpu) = rows
        print(
            f"{act} of {options.mib} MiB: {clock:.2f} s without hashes, {hashed_clock:.2f} s with "
            f"({hashed_clock / clock - 1:+.1%}); CPU {cpu:.2f} s and {hashed_cpu:.2f} s "
            f"({hashed_cpu - cpu:+.2f} s)"
        )
        if act == "save" and options.limit and hashed_clock / clock - 1 > options.limit:
            sys.exit(f"error: hashing adds {hashed_clock / clock - 1:.1%}, more than the limit")


if __name__ == "__main__":
    main()
