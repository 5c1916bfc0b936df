"""Train a Hugging Face causal LM on long sequences.

`torchrun --nproc-per-node N train.py --config configs/X.toml` starts N ranks.
"""

from __future__ import annotations

import os
import sys

from titan_ulysses.config.cli import parse_command_line
from titan_ulysses.config.load import dump_toml, load_config
from titan_ulysses.distributed.failure import exit_on_error
from titan_ulysses.memory.allocator import expand_segments

EVALUATION = (
    ("validation.enable", True),
    # These avoid checks of what only training needs: room for activation checkpoints, and the
    # library of an optimizer.
    ("activation_checkpoint.offload", "none"),
    ("optimizer.name", "adamw"),
)
"""Settings that `--evaluate` changes."""


_ONE_PROCESS = {"-h", "--help", "--print-config", "--plan"}
"""Options that need only one process."""


def main(argv: list[str]) -> None:
    if os.environ.get("RANK", "0") != "0" and _ONE_PROCESS & {*argv}:
        return  # rank 0 answers, where several ranks are started
    command = parse_command_line(argv)
    config = load_config(
        command.config_path, [*command.overrides, *(EVALUATION if command.evaluate else ())]
    )
    if command.print_config:
        print(dump_toml(config), end="")
        return
    if command.plan:
        # The plan is then the same on every machine. This must come before torch is imported.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        from titan_ulysses.plan.report import plan_and_report

        return plan_and_report(config)
    expand_segments()
    # This imports torch and transformers: not earlier, so that --help is quick.
    from titan_ulysses.train.trainer import Trainer

    if command.evaluate:
        return Trainer(config, eval_only=True).evaluate()
    Trainer(config).train()


if __name__ == "__main__":
    with exit_on_error():
        main(sys.argv[1:])
