"""Saving in a custom training loop: checkpoints to resume from, and a folder for transformers."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from titan_ulysses.checkpoint import safetensors as weights
from titan_ulysses.checkpoint.dcp import Checkpointer
from titan_ulysses.checkpoint.storage import errors_of_all_ranks
from titan_ulysses.distributed.errors import UserError, first_failure, one_line

_UNSAVED_GROUP_KEYS = {"params", "foreach", "fused", "capturable", "differentiable"}
"""Keys of an optimizer's parameter groups that are not saved: the parameters themselves, and how a
step is computed, which does not affect the training.
"""


class _LoopCheckpointer(Checkpointer):
    setting, other, place = "folder", "another folder", "the folder"


def save_pretrained(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    origin: str = "",
) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` opens.

    It contains safetensors, configs and, if given, the tokenizer. With `origin`, the folder or hub
    name that the weights came from, it also has the tensors there that the model lacks, such as
    prediction layers, and all other files. Collective: every rank must call it, and rank 0 writes.
    Parameters keep their storage dtype, and no rank holds all of them at once. An existing folder
    is replaced when the new one is complete. Raise `UserError`, on every rank, if the folder cannot
    be written.
    """
    weights.export(model, tokenizer, Path(folder), origin=origin)


def save_checkpoint(
    folder: str | Path,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    keep: int = 0,
) -> None:
    """Write folder/step-N with N = state["step"], for `load_checkpoint` on any number of ranks.

    `state` is what else the loop needs to resume, for example the number of batches read or the
    `state_dict()` of a scheduler. It must be JSON-serializable and the same on every rank. The
    checkpoint is written under a temporary name and renamed when it is complete. Only the last
    `keep` checkpoints are kept (0: all). Collective. Raise `UserError`, on every rank, if the
    checkpoint cannot be written or step-N exists already.
    """
    folder = Path(folder)
    text, step = _as_json(state), state["step"]
    checkpointer = _LoopCheckpointer(folder, keep=keep)
    if first_failure("there" if step in checkpointer.steps() else None):
        raise UserError(
            f"save_checkpoint: {folder} already has a step-{step}: resume from it with "
            "load_checkpoint, or choose another folder."
        )
    kind = {"optimizer_class": type(optimizer).__name__, "optimizer_groups": _groups(optimizer)}
    checkpointer.save(step, model, optimizer, {"step": step, "loop": json.loads(text)} | kind)


def load_checkpoint(
    folder: str | Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Fill model and optimizer from the last step-N in folder that is whole; return its state.

    A warning names a later one that is damaged. With an optimizer, so that the loop goes on, it is
    renamed to step-N.damaged. The state is {"step": 0} if there is no checkpoint. The learning
    rates and other settings of the optimizer are restored too. Checkpoints of `train.py` can be
    loaded as well; they leave these settings unchanged. Collective. Raise `UserError`, on every
    rank, if no checkpoint is whole, or if it belongs to another model or optimizer.
    """
    folder = Path(folder)
    checkpointer = _LoopCheckpointer(folder, keep=0)
    seen: list[list[int]] = [[]]
    with errors_of_all_ranks():
        if dist.get_rank() == 0:
            seen = [checkpointer.steps()]
    dist.broadcast_object_list(seen, src=0)
    if not (steps := seen[0]):
        return {"step": 0}
    step, saved = checkpointer.load_newest(
        steps, model, optimizer, check=partial(_expect_optimizer, optimizer, folder)
    )
    if optimizer is not None:
        checkpointer.set_damaged_aside()
        for group, values in zip(
            optimizer.param_groups, saved.get("optimizer_groups", []), strict=False
        ):
            for key, value in values.items():
                if isinstance(group.get(key), Tensor):
                    group[key].fill_(value)
                else:
                    group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
    return saved.get("loop", {"step": step})


def _expect_optimizer(
    optimizer: torch.optim.Optimizer | None, folder: Path, saved: dict[str, Any]
) -> None:
    """Raise `UserError` if the saved state is that of an optimizer of another kind."""
    if optimizer is None or "optimizer_class" not in saved:
        return
    there, here = saved["optimizer_class"], type(optimizer).__name__
    counts = len(saved["optimizer_groups"]), len(optimizer.param_groups)
    if there != here or counts[0] != counts[1]:
        raise UserError(
            f"load_checkpoint: {folder}/step-{saved['step']} has the state of {there} with "
            f"{counts[0]} parameter groups, but this is {here} with {counts[1]}: create the same "
            "optimizer as before, or pass none."
        )


def _as_json(state: dict[str, Any]) -> str:
    """Return state as JSON. Raise `UserError`, on every rank, if it cannot be saved. Collective.

    It must have an integer "step" and be the same on every rank.
    """
    text, problem = "", None
    step = state.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        problem = f'has no number "step": {list(state)}'
    else:
        try:
            text = json.dumps(state, sort_keys=True)
        except (TypeError, ValueError) as error:
            problem = f"is not JSON ({one_line(error)})"
    of_first = [text]
    dist.broadcast_object_list(of_first, src=0)
    if text != of_first[0] and problem is None:
        problem = f"is {text[:80]} on rank {dist.get_rank()} and {of_first[0][:80]} on rank 0"
    if reason := first_failure(problem):
        raise UserError(
            f"save_checkpoint: state {reason}. It is saved once for all ranks: pass numbers, "
            'strings, lists and dicts that are the same on every rank, and "step".'
        )
    return text


def _groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the settings of each parameter group, such as learning rate and betas.

    Settings that are tensors become numbers.
    """
    return [
        {
            key: value.item() if isinstance(value, Tensor) else value
            for key, value in group.items()
            if key not in _UNSAVED_GROUP_KEYS
        }
        for group in optimizer.param_groups
    ]
