"""What is logged, to Weights & Biases too. Optional, and never what a training run ends for."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from titan_ulysses.distributed.errors import UserError

_RUN_ID_FILE = "wandb_run_id"


def check_wandb() -> None:
    """UserError where the package is missing."""
    if "wandb" not in sys.modules and find_spec("wandb") is None:
        raise UserError(
            "metrics.enable_wandb = true: the package wandb is not installed. Install it (pip "
            "install titan-ulysses[wandb]), or set it to false."
        )


class WandbRun:
    """One run there for the run of this folder, also when it is resumed. wandb's own environment
    variables count (WANDB_API_KEY, WANDB_MODE, WANDB_ENTITY, ...), WANDB_PROJECT and WANDB_NAME
    before what is given here.
    """

    def __init__(
        self, folder: Path, *, name: str, config: dict[str, Any], say: Callable[[str], None]
    ):
        """config: the settings, to be shown there. say: tells the user what fails, once."""
        self._say, self._wandb = say, None
        self._safely(self._start, folder, name, config)

    def _start(self, folder: Path, name: str, config: dict[str, Any]) -> None:
        import wandb

        file = folder / _RUN_ID_FILE
        if not file.exists():
            file.write_text(uuid.uuid4().hex[:8])
        wandb.init(
            project=os.environ.get("WANDB_PROJECT", "titan_ulysses"),
            name=os.environ.get("WANDB_NAME", name),
            id=file.read_text(),
            resume="allow",
            dir=str(folder),
            config=config,
        )
        self._wandb = wandb

    def log(self, step: int, values: dict[str, Any]) -> None:
        """The object of a step in metrics.jsonl. What a killed run has logged of later steps
        stands: it is the same.
        """
        if self._wandb:
            known = {name: value for name, value in values.items() if value is not None}
            self._safely(self._wandb.log, known, step=step)

    def close(self) -> None:
        if self._wandb:
            self._safely(self._wandb.finish)

    def _safely(self, act: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            act(*args, **kwargs)
        except Exception as error:  # whatever it raises
            self._wandb = None
            self._say(
                f"wandb: {type(error).__name__}: {error}. Training goes on; nothing more is logged "
                "there."
            )
