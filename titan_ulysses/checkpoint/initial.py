"""The initial weights of a run: random, from a pretrained model, or from another run."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from titan_ulysses.checkpoint import safetensors as weights
from titan_ulysses.checkpoint.weights import (
    check_weights,
    is_checkpoint,
    load_weights,
    needs_base,
)
from titan_ulysses.config.schema import Config
from titan_ulysses.model import hf
from titan_ulysses.model.embeddings import fill_new_rows, token_parameters
from titan_ulysses.model.lora import initialize_adapters

if TYPE_CHECKING:  # importing transformers first is noisy, see model/__init__.py
    from transformers import PreTrainedModel


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
    if is_checkpoint(initial):  # it does not contain frozen parameters
        return _model_path(config) if needs_base(initial) else None
    return Safetensors(initial, "checkpoint.initial_load_path") if initial else _model_path(config)


def _model_path(config: Config) -> Safetensors | None:
    return Safetensors(config.model.path, "model.path") if config.model.path else None


def needs_initial_weights(config: Config, saved_steps: list[int]) -> bool:
    """Return whether a run with these checkpoints needs the weights that it began with.

    A resumed run with frozen parameters needs them too, because a checkpoint holds only what is
    trained, and so does one whose loss refers to them.
    """
    refers = config.loss.name == "dpo" and not config.loss.reference
    if config.lora.rank or config.model.freeze or refers or not config.checkpoint.enable:
        return True
    return not saved_steps


def check_initial_weights(config: Config) -> None:
    """Raise `UserError` if the initial weights are missing or damaged. Reads no tensor data."""
    if is_checkpoint(config.checkpoint.initial_load_path):
        check_weights(config.checkpoint.initial_load_path)
    if base := base_weights(config):
        weights.find(base.path, setting=base.setting)


def initialize(model: PreTrainedModel, config: Config) -> str | None:
    """Fill a sharded model with the initial weights of the run. Collective.

    Return a line about tensors in the files that the model does not have, or None. Raise
    `UserError` if the weights do not fit the model.
    """
    initial, seed, note = config.checkpoint.initial_load_path, config.training.seed, None
    if base := base_weights(config):
        growing = token_parameters(model) if config.model.resize_embeddings else ()
        loaded = weights.load(model, base.path, setting=base.setting, growing=growing)
        fill_new_rows(model, loaded.fewer_rows, seed)
        if loaded.unknown:
            note = weights.describe_unknown(loaded.unknown, model, base.path, setting=base.setting)
    else:
        hf.initialize(model, seed)
    initialize_adapters(model, seed)
    if is_checkpoint(initial):
        load_weights(initial, model)
    return note


def describe_initial_weights(config: Config, step: int) -> str:
    """Return a line that says where the weights of a run at `step` come from; it may be empty."""
    initial = config.checkpoint.initial_load_path
    if step:
        return f"resumed from step {step}" + (
            f"; {initial} is for runs that begin" if initial else ""
        )
    return f"begins with the weights of {initial}" if initial else ""
