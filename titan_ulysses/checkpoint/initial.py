"""The weights that a run begins with: random ones, those of a model, or those of another run."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from titan_ulysses.checkpoint import safetensors as weights
from titan_ulysses.checkpoint.dcp import check_weights, is_checkpoint, load_weights, needs_base
from titan_ulysses.config.schema import Config
from titan_ulysses.model import hf
from titan_ulysses.model.embeddings import fill_new_rows, token_parameters
from titan_ulysses.model.lora import initialize_adapters

if TYPE_CHECKING:  # importing transformers first is noisy, see model/__init__.py
    from transformers import PreTrainedModel


class Safetensors(NamedTuple):
    """A folder, or a name on the hub, and the setting that says so."""

    path: str
    setting: str


def base_weights(config: Config) -> Safetensors | None:
    """Where the model's own weights come from; None where they are random or in a checkpoint of
    this project.
    """
    initial = config.checkpoint.initial_load_path
    if is_checkpoint(initial):  # of frozen parameters it holds nothing
        return _model_path(config) if needs_base(initial) else None
    return Safetensors(initial, "checkpoint.initial_load_path") if initial else _model_path(config)


def _model_path(config: Config) -> Safetensors | None:
    return Safetensors(config.model.path, "model.path") if config.model.path else None


def check_initial_weights(config: Config) -> None:
    """UserError where there are no weights to begin with, or where they are damaged. Reads none of
    them.
    """
    if is_checkpoint(config.checkpoint.initial_load_path):
        check_weights(config.checkpoint.initial_load_path)
    if base := base_weights(config):
        weights.find(base.path, setting=base.setting)


def initialize(model: PreTrainedModel, config: Config) -> str | None:
    """Fill a sharded model as a run that begins has it. Collective. UserError where the weights do
    not fit.

    Returns a line about tensors that are there and that the model does not have, if any.
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
    """A line on where the weights of a run at step come from, or nothing."""
    initial = config.checkpoint.initial_load_path
    if step:
        return f"resumed from step {step}" + (
            f"; {initial} is for runs that begin" if initial else ""
        )
    return f"begins with the weights of {initial}" if initial else ""
