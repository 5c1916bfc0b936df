"""What a training loop of one's own leaves: checkpoints to go on from, and a folder for
transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from titan_ulysses.checkpoint import safetensors as weights
from titan_ulysses.checkpoint.dcp import Checkpointer
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.failure import first_failure, one_line

_HOW = {"params", "foreach", "fused", "capturable", "differentiable"}
"""Of an optimizer's groups: what they hold, and how a step is computed, which is no part of a
training.
"""


class _Checkpoints(Checkpointer):
    setting, other, place = "folder", "another folder", "the folder"


def save_pretrained(
    model: PreTrainedModel, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Write folder as `AutoModelForCausalLM.from_pretrained` opens it: safetensors, configs, the
    tokenizer if given.

    Collective: every rank calls it, and rank 0 writes. Parameters keep the dtype that they are
    stored in, and no rank holds all of them at once. A folder that is there is replaced when the
    new one is complete. UserError, on every rank, where it cannot be written.
    """
    weights.export(model, tokenizer, Path(folder))


def save_checkpoint(
    folder: str | Path,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    keep: int = 0,
) -> None:
    """Write folder/step-N, N being state["step"], from which `load_checkpoint` goes on, on any
    number of ranks.

    state is what else the loop needs to go on, as JSON and the same on every rank: how many batches
    it has seen, the `state_dict()` of a scheduler. Written aside and renamed when complete; only
    the last `keep` stay (0: all). Collective. UserError, on every rank, where it cannot be written,
    or there is a step N already.
    """
    folder = Path(folder)
    text, step = _as_json(state), state["step"]
    checkpointer = _Checkpoints(folder, keep=keep)
    if first_failure("there" if step in checkpointer.steps() else None):
        raise UserError(
            f"save_checkpoint: {folder} has a step-{step} already: go on from it by "
            "load_checkpoint, or choose another folder."
        )
    kind = {"optimizer_class": type(optimizer).__name__, "optimizer_groups": _groups(optimizer)}
    checkpointer.save(step, model, optimizer, {"step": step, "loop": json.loads(text)} | kind)


def load_checkpoint(
    folder: str | Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Fill model and optimizer from the last step-N in folder, and return its state; {"step": 0}
    where there is none.

    The optimizer gets its learning rates and other settings as they were, too. Checkpoints of
    `train.py` will do. Collective. UserError, on every rank, where the checkpoint is damaged, or of
    another model or optimizer.
    """
    folder = Path(folder)
    checkpointer = _Checkpoints(folder, keep=0)
    last = [checkpointer.latest()]
    dist.broadcast_object_list(last, src=0)
    if last[0] is None:
        return {"step": 0}
    step = last[0]
    saved = checkpointer.read_state(step)
    if optimizer is not None and "optimizer_class" in saved:
        there, here = saved["optimizer_class"], type(optimizer).__name__
        counts = len(saved["optimizer_groups"]), len(optimizer.param_groups)
        if there != here or counts[0] != counts[1]:
            raise UserError(
                f"load_checkpoint: {folder}/step-{step} has the state of {there} with {counts[0]} "
                f"groups of parameters, and this is {here} with {counts[1]}: make the optimizer as "
                "it was, or pass none."
            )
    checkpointer.load(step, model, optimizer)
    if optimizer is not None:
        for group, values in zip(
            optimizer.param_groups, saved.get("optimizer_groups", []), strict=False
        ):
            _set(group, values)
    return saved.get("loop", {"step": step})


def _as_json(state: dict[str, Any]) -> str:
    """Collective. UserError, on every rank, where state is not what `save_checkpoint` can keep."""
    text, problem = "", None
    if not isinstance(state.get("step"), int):
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
            f"save_checkpoint: state {reason}. It is kept once for all ranks: give numbers, "
            'strings, lists and dicts that are the same on each, and "step".'
        )
    return text


def _groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The settings of each group of parameters: learning rate, betas, and whatever else is a
    number.
    """

    def number(value: Any) -> Any:
        return value.item() if isinstance(value, Tensor) else value

    return [
        {key: number(value) for key, value in group.items() if key not in _HOW}
        for group in optimizer.param_groups
    ]


def _set(group: dict[str, Any], values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(group.get(key), Tensor):
            group[key].fill_(value)
        else:
            group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
