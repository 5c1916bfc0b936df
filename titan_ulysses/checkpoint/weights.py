"""The weights of a step-N folder, for a run that begins with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from titan_ulysses.checkpoint.hosts import expect_all_hosts
from titan_ulysses.checkpoint.manifest import Damage, cause
from titan_ulysses.checkpoint.reader import open_checkpoint
from titan_ulysses.checkpoint.run_file import RUN_FILE, read_run_file
from titan_ulysses.checkpoint.state import first_difference
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.model.freezing import fingerprint
from titan_ulysses.model.names import is_adapter, plain


def is_checkpoint(path: str) -> bool:
    """Return whether path is a step-N folder saved by a run, not a folder of safetensors."""
    return bool(path) and (Path(path) / RUN_FILE).exists()


def check_weights(path: str) -> None:
    """Raise `UserError` if the step-N folder at path is damaged. Needs no model.

    The message names checkpoint.initial_load_path.
    """
    state = _initial_state(path)
    expect_all_hosts(state, f"checkpoint.initial_load_path = {path}")


def needs_base(path: str) -> bool:
    """Return whether the step-N folder at path lacks parameters, because they were frozen."""
    return bool(_initial_state(path)["frozen"])


def _initial_state(path: str) -> dict[str, Any]:
    """Return run.json of checkpoint.initial_load_path. Raise `UserError` if it is damaged."""
    try:
        return read_run_file(Path(path))
    except Damage as error:
        raise UserError(
            f"checkpoint.initial_load_path = {path}: the checkpoint is damaged ({error})."
        ) from error


def load_weights(path: str, model: nn.Module) -> None:
    """Fill the model with the weights of the step-N folder at path, from any mesh. Collective.

    Only the weights that were trained in that run are loaded, and no optimizer state. All other
    parameters must have been frozen in that run and must be in the model already, except for
    adapters, which may be new. Raise `UserError`, before anything changes, if names, shapes or
    frozen values do not match.
    """
    saved = _initial_state(path)
    wanted = {plain(name): x for name, x in get_model_state_dict(model).items()}
    shapes = {
        name: list(tensor.shape)
        for name, tensor in wanted.items()
        # Frozen parameters are not saved, and adapters may be new.
        if name in saved["parameters"] or not (is_adapter(name) or saved["frozen"])
    }
    if difference := first_difference(saved["parameters"], shapes):
        hint = ""
        if is_adapter(difference.name):
            hint = " Set lora.rank and lora.target_modules as that run had them."
        raise UserError(
            f"checkpoint.initial_load_path = {path} holds another model: {difference.text} "
            f"here.{hint}"
        )
    if saved["frozen"] and saved["frozen"] != fingerprint(model):
        raise UserError(
            f"checkpoint.initial_load_path = {path}: what was frozen there is not what is frozen "
            "here, and only the rest is saved. Begin with the export/ of that run, or with its "
            "model.path, model.freeze and [lora]."
        )
    tensors = {name: wanted[name] for name in saved["parameters"]}
    try:
        where = f"checkpoint.initial_load_path = {path}"
        reader = open_checkpoint(Path(path), saved["files"], where=where)
        dcp.load({"model": tensors}, storage_reader=reader)  # in place
    except (CheckpointException, OSError, ValueError) as error:
        raise UserError(
            f"checkpoint.initial_load_path = {path}: the checkpoint is damaged ({cause(error)})."
        ) from error
