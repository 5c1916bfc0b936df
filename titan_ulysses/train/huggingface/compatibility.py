"""What of a trainer would be wrong with sequence parallelism: refused by name, or a warning."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib.metadata import version
from inspect import signature
from typing import Any

from titan_ulysses.distributed.errors import UserError

_TRIED = {"Trainer", "SFTTrainer", "DPOTrainer", "GRPOTrainer", "KTOTrainer", "RewardTrainer"}
"""The trainers that the tests compare with one process."""
_TRIED_TRL = "1.16"
_REFUSED = {
    "fp16": "parallelize has no loss scaling; take bf16",
    "fsdp": "the model is sharded already",
    "deepspeed": "the model is sharded already",
    "parallelism_config": "give mesh = build_mesh(...)",
    "torch_compile": 'give options = {"compile": {"enable": True}}',
    "use_liger_kernel": "it replaces parts that are replaced already",
    "neftune_noise_alpha": "its noise would differ between the ranks of a sequence",
    "auto_find_batch_size": "one rank that runs out of memory would leave the others waiting",
    "fp16_full_eval": "it converts the model's shards",
    "bf16_full_eval": "it converts the model's shards",
    "push_to_hub": "save_model writes a folder to upload",
    "activation_offloading": 'give options = {"activation_checkpoint": {"offload": "host"}}',
    "precompute_ref_log_probs": "it runs the reference before the model is sharded",
    "sync_ref_model": "policy and reference are sharded",
    "use_weighting": "it was not tried",
    "use_vllm": "it would need the whole weights; give rollout_func",
    "cast_lm_head_to_fp32": "the head computes in fp32 from its logits on",
}
"""Options of trainers that would be wrong here or have no effect, with the reason."""
_REFUSED_ARGUMENTS = {
    "compute_metrics": "it needs the logits of all tokens",
    "preprocess_logits_for_metrics": "it needs the logits of all tokens",
    "compute_loss_func": "it needs the logits of all tokens; see docs/trainers.md for own losses",
    "optimizers": "they hold parameters of the unsharded model; give optimizer_cls_and_kwargs",
    "model_init": "give the model",
    "quantization_config": "quantized weights cannot be sharded",
}


_REFUSED_OPTIMIZERS = {
    "adafactor": "it reads rows and columns of whole matrices, of which each rank has a part",
    "rprop": "torch's does not take sharded parameters",
}


def is_of_trl(kind: type) -> bool:
    """Return whether a class of trainers is made of one of TRL."""
    return any(parent.__module__.startswith("trl") for parent in kind.__mro__)


def check(kind: type, args: Any, more: Mapping[str, Any]) -> None:
    """Raise UserError for what would be wrong; warn of what was not tried."""
    _check_arguments(kind, args, more)
    parent = _check_kind(kind, more)
    remedy = "Compare the losses of its first steps with those of the same run on one rank."
    if parent.__name__ not in _TRIED:
        warnings.warn(
            f"{parent.__name__} was not tried with UlyssesTrainer, only "
            f"{', '.join(sorted(_TRIED))}. {remedy}",
            stacklevel=3,
        )
    is_trl = parent.__module__.startswith("trl")
    if is_trl and version("trl").split(".")[:2] != _TRIED_TRL.split("."):
        warnings.warn(
            f"trl {version('trl')} was not tried with UlyssesTrainer, only {_TRIED_TRL}. {remedy}",
            stacklevel=3,
        )


def _check_arguments(kind: type, args: Any, more: Mapping[str, Any]) -> None:
    """Raise UserError for arguments with which a trainer would be wrong."""
    if args is None:
        raise UserError(
            f"args = None: {kind.__name__} reads the trainer's arguments before the trainer does. "
            "Give TrainingArguments(output_dir=...), or the trainer's own, as SFTConfig(...)."
        )
    optimizer = getattr(args, "optim", "")
    if given := more.get("optimizer_cls_and_kwargs"):
        optimizer = given[0].__name__.lower()
    optimizer = getattr(optimizer, "value", optimizer)  # TrainingArguments makes it an enum
    if reason := _REFUSED_OPTIMIZERS.get(optimizer):
        raise UserError(f'optim = "{optimizer}": {reason}. Take "adamw_torch", or another.')
    if (smoothing := getattr(args, "label_smoothing_factor", 0.0)) and is_of_trl(kind):
        raise UserError(
            f"label_smoothing_factor = {smoothing}: TRL's trainers need the logits of all tokens "
            "for it. Set it to 0.0, or take transformers' Trainer."
        )
    for name, reason in _REFUSED.items():
        if value := getattr(args, name, None):
            raise UserError(f"{name} = {value}: not with UlyssesTrainer: {reason}.")
    for name, reason in _REFUSED_ARGUMENTS.items():
        if more.get(name) not in (None, (None, None)):
            raise UserError(f"{name}: not with UlyssesTrainer: {reason}.")
    if getattr(args, "load_best_model_at_end", False) and args.save_only_model:
        raise UserError(
            "load_best_model_at_end = True with save_only_model = True: the best model is loaded "
            "from the shards of its checkpoint, which would not be there. Set save_only_model = "
            "False."
        )
    if getattr(args, "train_sampling_strategy", None) == "batch_rebalance":
        raise UserError(
            'train_sampling_strategy = "batch_rebalance": it would give the ranks of a sequence '
            'different batches. Take "random" or "group_by_length".'
        )


def _check_kind(kind: type, more: Mapping[str, Any]) -> type:
    """Return the trainer class of trl or transformers that UlyssesTrainer is combined with.

    UserError if it is none, or one that needs more than a causal language model.
    """
    parents = [parent for parent in kind.__mro__ if parent.__module__.startswith(("trl", "transf"))]
    if not parents:
        raise UserError(
            f"{kind.__name__}: name a trainer after UlyssesTrainer, as in class "
            f"{kind.__name__}(UlyssesTrainer, SFTTrainer)."
        )
    generates = any(hasattr(parent, "_generate_and_score_completions") for parent in parents)
    if generates and more.get("rollout_func") is None:
        takes_completions = any("rollout_func" in signature(p).parameters for p in parents)
        by = "by rollout_func, or train" if takes_completions else "to GRPOTrainer, or train"
        raise UserError(
            f"{parents[0].__name__}: it generates with the model it trains, and a sharded model "
            f"cannot generate. Give completions that were generated elsewhere {by} on them with "
            "clipped_policy_loss: see docs/trainers.md."
        )
    return parents[0]
