"""The keywords of `parallelize` for tables of tests."""

from __future__ import annotations

from typing import Any

from titan_ulysses.config.schema import ActivationCheckpoint, Memory


def sections(
    *, checkpoint_every: int = 1, compile: bool = False, **settings: Any
) -> dict[str, Any]:
    """Return the keywords of `parallelize` for keys of [activation_checkpoint] and [memory], and
    for others that it takes as they are.

    checkpoint_every: 0 makes no activation checkpoints.
    """
    tables: dict[str, dict[str, Any]] = {
        "activation_checkpoint": {"every": checkpoint_every}
        if checkpoint_every
        else {"mode": "none"},
        "memory": {},
        "compile": {"enable": compile},
    }
    others = {}
    for key, value in settings.items():
        if key in ActivationCheckpoint.model_fields:
            tables["activation_checkpoint"][key] = value
        elif key in Memory.model_fields:
            tables["memory"][key] = value
        else:
            others[key] = value
    return tables | others
