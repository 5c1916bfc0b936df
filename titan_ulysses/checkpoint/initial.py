"""The initial weights of a run: random, from a pretrained model, or from another run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from transformers import PreTrainedModel

from titan_ulysses.checkpoint import safetensors as weights
from titan_ulysses.checkpoint.hosts import expect_all_hosts
from titan_ulysses.checkpoint.manifest import Damage
from titan_ulysses.checkpoint.state import first_difference
from titan_ulysses.checkpoint.step_folder import RUN_FILE, read_run_file
from titan_ulysses.checkpoint.storage import errors_of_all_ranks, open_checkpoint
from titan_ulysses.config.paths import is_no_hub_name
from titan_ulysses.config.schema import REFERRING, Config
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.model import hf
from titan_ulysses.model.freezing import fingerprint
from titan_ulysses.model.lora import initialize_adapters
from titan_ulysses.model.parameter_names import is_adapter, plain
from titan_ulysses.model.resize_embeddings import fill_new_rows, token_parameters


class Safetensors(NamedTuple):
    """A folder or hub name with safetensors, and the setting that names it."""

    path: str
    setting: str


def base_weights(config: Config) -> Safetensors | None:
    """Return the safetensors that contain the weights of the model.

    None if the weights are random or all in a checkpoint of this project. A checkpoint of a run
    with frozen parameters does not contain these, so model.path is loaded as well.
    """
    initial = config.checkpoint.initial_load_path
    if initial and not is_checkpoint(initial):
        return Safetensors(initial, "checkpoint.initial_load_path")
    if not config.model.path or (initial and not _run_file(initial)["frozen"]):
        return None
    return Safetensors(config.model.path, "model.path")


def origin_of(config: Config) -> str:
    """Return the folder or hub name that an export takes over from what the model lacks; it may be
    empty.
    """
    base = base_weights(config)
    path = base.path if base else config.model.path
    # A run from checkpoint.initial_load_path does without the folder that its weights came from.
    return "" if is_no_hub_name(path) and not Path(path).exists() else path


def needs_initial_weights(config: Config, saved_steps: list[int]) -> bool:
    """Return whether a run with these checkpoints needs the weights that it began with.

    A resumed run with frozen parameters needs them too, because a checkpoint holds only what is
    trained, and so does one whose loss refers to them.
    """
    refers = config.loss.name in REFERRING and not config.loss.reference
    if config.lora.rank or config.model.freeze or refers or not config.checkpoint.enable:
        return True
    return not saved_steps


def check_initial_weights(config: Config) -> None:
    """Raise `UserError` if the initial weights are missing or damaged. Reads no tensor data."""
    if is_checkpoint(config.checkpoint.initial_load_path):
        check_checkpoint(config.checkpoint.initial_load_path)
    if base := base_weights(config):
        weights.find(base.path, setting=base.setting)


def initialize(model: PreTrainedModel, config: Config) -> str | None:
    """Fill a sharded model with the initial weights of the run. Collective.

    Return lines about quantized weights and what the model does not have, or None. Raise
    `UserError` if the weights do not fit the model.
    """
    initial, seed, note = config.checkpoint.initial_load_path, config.training.seed, None
    if base := base_weights(config):
        growing = token_parameters(model) if config.model.resize_embeddings else ()
        # A language model has none of the layer that gives a reward model its scores.
        optional = ("score.weight",) if hf.classifies(model) else ()
        loaded = weights.load(
            model, base.path, setting=base.setting, growing=growing, optional=optional
        )
        fill_new_rows(model, loaded.fewer_rows, seed)
        lines = loaded.said.splitlines()
        if loaded.absent:
            hf.initialize(model, seed, only=model.score)
            lines.append("it has no score.weight, which begins with random numbers")
        note = "\n".join(f'{base.setting} = "{base.path}": {line}' for line in lines) or None
    else:
        hf.initialize(model, seed)
    initialize_adapters(model, seed)
    if is_checkpoint(initial):
        load_checkpoint_weights(initial, model)
    return note


def describe_initial_weights(config: Config, step: int) -> str:
    """Return a line that says where the weights of a run at `step` come from; it may be empty."""
    initial = config.checkpoint.initial_load_path
    if step:
        return f"resumed from step {step}" + (
            f"; {initial} is only read at the start of a new run" if initial else ""
        )
    return f"begins with the weights of {initial}" if initial else ""


# --- those in a step-N folder ---------------------------------------------------------------------


def is_checkpoint(path: str) -> bool:
    """Return whether path is a step-N folder saved by a run, not a folder of safetensors."""
    return bool(path) and (Path(path) / RUN_FILE).exists()


def check_checkpoint(path: str) -> None:
    """Raise `UserError` if the step-N folder at path is damaged. Needs no model.

    The message names checkpoint.initial_load_path.
    """
    expect_all_hosts(_run_file(path), f"checkpoint.initial_load_path = {path}")


def _run_file(path: str) -> dict[str, Any]:
    """Return run.json of checkpoint.initial_load_path. Raise `UserError` if it is damaged."""
    try:
        return read_run_file(Path(path))
    except Damage as error:
        raise _damaged(path, error) from error


def _damaged(path: str, why: Exception) -> UserError:
    return UserError(f"checkpoint.initial_load_path = {path}: the checkpoint is damaged ({why}).")


def load_checkpoint_weights(path: str, model: nn.Module) -> None:
    """Fill the model with the weights of the step-N folder at path, from any mesh. Collective.

    Only the weights that were trained in that run are loaded, and no optimizer state. All other
    parameters must have been frozen in that run and must be in the model already, except for
    adapters, which may be new. Raise `UserError`, before anything changes, if names, shapes or
    frozen values do not match.
    """
    saved, where = _run_file(path), f"checkpoint.initial_load_path = {path}"
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
        raise UserError(f"{where} holds a different model: {difference.text} here.{hint}")
    if saved["frozen"] and saved["frozen"] != fingerprint(model):
        raise UserError(
            f"{where}: that run froze other weights than this one, and a checkpoint does not hold "
            "frozen weights. Start from the export/ of that run, or use its model.path, "
            "model.freeze and [lora]."
        )
    tensors = {name: wanted[name] for name in saved["parameters"]}
    try:
        with errors_of_all_ranks():
            reader = open_checkpoint(Path(path), saved["files"], where=where)
            dcp.load({"model": tensors}, storage_reader=reader)  # in place
    except (Damage, OSError) as error:
        raise _damaged(path, error) from error
