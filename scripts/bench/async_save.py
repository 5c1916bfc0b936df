"""How long training stands still for a checkpoint: saved in the background, and saved at once.

python scripts/bench/async_save.py --rounds 3

The model is that of configs/quickstart.toml, enlarged to about 100 million parameters (1.1 GiB with
AdamW's state). Both kinds of save are of the same run and the same memory, in turn.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import parser_of

from titan_ulysses.config.load import load_config
from titan_ulysses.train.trainer import Trainer

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.toml"
SMALLER_STEP = {
    "training.seq_len": 256,
    "training.global_batch_size": 1,
    "training.local_batch_size": 1,
    "training.steps": 2,
    "lr_scheduler.warmup_steps": 0,
    "parallelism.sequence_parallel_degree": 1,
    "validation.enable": False,
    "checkpoint.export": False,
    "checkpoint.keep_latest_k": 1,
}
HUNDRED_MILLION = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 11}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to save; default: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        shape = (load_config(QUICKSTART).model.config or {}) | HUNDRED_MILLION
        settings = SMALLER_STEP | {"job.dump_folder": temporary, "model.config": shape}
        trainer = Trainer(load_config(QUICKSTART, settings.items()))
        trainer.train()
        numbers = sum(p.numel() for p in trainer.state.model.parameters())
        at_once, pauses, written = [], [], []
        for _ in range(options.rounds):
            at_once.append(seconds_of_save(trainer, in_background=False))
            pauses.append(seconds_of_save(trainer, in_background=True))
            started = time.perf_counter()
            trainer.checkpointer.finish()
            written.append(pauses[-1] + time.perf_counter() - started)
    pause = median(pauses[1:] or pauses)  # the first one touches fresh memory
    print(
        f"{numbers:,} parameters, {options.rounds} rounds: saved at once {median(at_once):.2f} s; "
        f"in the background, training waits {pause:.2f} s (the first time {pauses[0]:.2f} s), and "
        f"the bytes are written after {median(written):.2f} s; ratio of the pauses "
        f"{pause / median(at_once):.3f}"
    )


def seconds_of_save(trainer: Trainer, *, in_background: bool) -> float:
    """Save a further step, and return for how long the caller waited."""
    trainer.state.step += 1
    trainer.checkpointer.in_background = in_background
    started = time.perf_counter()
    trainer.save()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
