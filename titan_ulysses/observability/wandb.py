"""Logs metrics to Weights & Biases. It is optional, and its failures never end a training run."""

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
    """Raise UserError where the package wandb is not installed."""
    if "wandb" not in sys.modules and find_spec("wandb") is None:
        raise UserError(
            "metrics.enable_wandb = true: the package wandb is not installed. Install it (pip "
            "install titan-ulysses[wandb]), or set it to false."
        )


class WandbRun:
    """The run at Weights & Biases for a run's folder. A resumed run continues the same one.

    wandb's own environment variables apply (WANDB_API_KEY, WANDB_MODE, WANDB_ENTITY, ...).
    WANDB_PROJECT and WANDB_NAME override the default project and `name`, and WANDB_DIR the folder
    of its files, which is the run's.
    """

    def __init__(
        self, folder: Path, *, name: str, config: dict[str, Any], say: Callable[[str], None]
    ):
        """config: the settings, shown on the run's page. say: called once with a message for the
        user if wandb fails.
        """
        self._say = say
        self._wandb: Any = None
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
            dir=os.environ.get("WANDB_DIR") or str(folder),
            config=config,
        )
        self._wandb = wandb

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Log the values of a step, as in metrics.jsonl.

        Steps that a killed run logged after its last checkpoint stay as they are: a resumed run
        repeats them with the same values.
        """
        if self._wandb:
            self._safely(self._log, step, values)

    def _log(self, step: int, values: dict[str, Any]) -> None:
        known = {name: value for name, value in values.items() if value is not None}
        if samples := known.get("validation_samples"):
            rows = [list(one) for one in samples.items()]
            table = self._wandb.Table(columns=["prompt", "text"], data=rows)
            known["validation_samples"] = table
        self._wandb.log(known, step=step)

    def close(self) -> None:
        if self._wandb:
            self._safely(self._wandb.finish)

    def _safely(self, act: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            act(*args, **kwargs)
        except Exception as error:  # training must go on, whatever wandb raises
            self._wandb = None
            self._say(
                f"wandb: {type(error).__name__}: {error}. Training goes on; nothing more is logged "
                "there."
            )
