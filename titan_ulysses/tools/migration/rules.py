"""What each key of the recipes of other trainers becomes here. For `titan-ulysses migrate`.

A rule is (their key, what it becomes, why nothing is needed). `become(value, values)` returns our
settings by "section.key", and raises `Lost` with the reason where there is no counterpart. `values`
are all values of the recipe, and "--ranks".

ArcticTraining: arctic_training/config/, April 2026. accelerate 1.15: its `accelerate config` file.
axolotl: src/axolotl/utils/schemas/, July 2026. torchtitan 0.2.2: torchtitan/config/job_config.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Flat = dict[str, Any]
Become = Callable[[Any, Flat], Flat]


class Lost(Exception):
    """A key, or a value of it, that has no counterpart here; the message is the reason."""

    def __init__(self, why: str, kept: Flat | None = None):
        super().__init__(why)
        self.kept = kept or {}
        """our settings that follow from the rest of it"""


@dataclass(frozen=True)
class Rule:
    theirs: str
    """their key; `*` stands for any end of it"""
    become: Become
    ours: str = ""
    """our key, or words for it, for the table of the docs"""
    why: str = ""
    """why nothing is needed, or a note about what differs"""

    def describe(self) -> str:
        return "; ".join(filter(None, (self.ours, self.why)))


@dataclass(frozen=True)
class Format:
    name: str
    recognize: Callable[[dict[str, Any]], bool]
    rules: list[Rule]
    defaults: Flat = field(default_factory=dict)
    """their keys with the values that a recipe has where it does not set them"""
    includes: dict[str, str] = field(default_factory=dict)
    """their key that names a file -> the prefix of the keys of that file"""

    def rule_of(self, key: str) -> Rule | None:
        for rule in self.rules:
            end = rule.theirs.endswith("*")
            if key.startswith(rule.theirs[:-1]) if end else key == rule.theirs:
                return rule
        return None


# --- kinds of rules -------------------------------------------------------------------------------


def same(theirs: str, ours: str, why: str = "") -> Rule:
    return Rule(theirs, lambda value, _: {ours: value}, f"`{ours}`", why)


def needless(theirs: str, why: str) -> Rule:
    return Rule(theirs, lambda value, _: {}, "", why)


def lost(theirs: str, why: str) -> Rule:
    def become(value: Any, _: Flat) -> Flat:
        if value in (None, False, "", [], {}):
            return {}
        raise Lost(why)

    return Rule(theirs, become, f"no counterpart: {why}")


def only(theirs: str, allowed: tuple[Any, ...], why: str) -> Rule:
    """A key that must have one of these values; others have no counterpart."""

    def become(value: Any, _: Flat) -> Flat:
        if value in allowed:
            return {}
        raise Lost(why)

    values = " or ".join(f"`{one}`" for one in allowed)
    return Rule(theirs, become, f"{values} alone: {why}")


def words(theirs: str, ours: str, table: dict[Any, Flat | str], why: str = "") -> Rule:
    """A key whose values stand for settings; a text in their place says why there are none."""

    def become(value: Any, _: Flat) -> Flat:
        key = value.lower() if isinstance(value, str) else value
        if key not in table:
            raise Lost(f"known values are {', '.join(map(str, table))}")
        found = table[key]
        if isinstance(found, str):
            raise Lost(found)
        return found

    return Rule(theirs, become, ours, why)


def custom(theirs: str, ours: str, become: Become, why: str = "") -> Rule:
    return Rule(theirs, become, ours, why)


# --- what several formats share -------------------------------------------------------------------

SEQUENCE, SHARD = "parallelism.sequence_parallel_degree", "parallelism.data_parallel_shard_degree"
REPLICATE = "parallelism.data_parallel_replicate_degree"
FLASH = 'model.attention = "auto" takes the flash kernel of torch, or FlashAttention 3 or 4'
ATTENTION: dict[Any, Flat | str] = {
    "flash_attention_2": {},
    "flash_attention_3": {},
    "flash_attention_4": {},
    "sdpa": {"model.attention": "sdpa"},
    "flex_attention": {"model.attention": "flex"},
    "eager": "eager attention builds an S x S matrix",
}
DTYPE: dict[Any, Flat | str] = {
    **dict.fromkeys(("bf16", "bfloat16"), {"training.param_dtype": "bfloat16"}),
    **dict.fromkeys(("fp32", "float32", "no"), {"training.param_dtype": "float32"}),
    **dict.fromkeys(("fp16", "float16"), "fp16 needs loss scaling: take bf16"),
}
NO_TENSOR = "tensor parallelism: raise parallelism.sequence_parallel_degree instead"


def accumulation(steps: int, values: Flat, *, batch: str, sequence: Sequence[str]) -> Flat:
    """Return the sequences of a step of `steps` micro-batches a rank.

    batch, sequence: the keys of a micro-batch's size, and those that may have the degree of
    sequence parallelism.
    """
    if steps == 1:
        return {}
    ranks = values["--ranks"]
    if not ranks:
        raise Lost("training.global_batch_size depends on the number of GPUs: give --ranks")
    degree = max(int(values.get(key) or 1) for key in sequence)
    data, left = divmod(ranks, degree)
    if left:
        raise Lost(f"--ranks {ranks} cannot be divided by {degree} ranks of a sequence")
    return {"training.global_batch_size": steps * int(values.get(batch) or 1) * data}


def betas(ours_first: Any, ours_second: Any) -> Flat:
    return {"optimizer.betas": [float(ours_first), float(ours_second)]}


def deepspeed(prefix: str) -> list[Rule]:
    """The rules of a DeepSpeed config below a key."""
    zero = f"{prefix}.zero_optimization"
    auto = "auto: what other keys say"

    def unless_auto(theirs: str, ours: str) -> Rule:
        return custom(theirs, f"`{ours}`", lambda v, _: {} if v == "auto" else {ours: v}, "")

    return [
        needless(f"{zero}.stage", "FSDP2 shards parameters, gradients and optimizer state"),
        words(
            f"{zero}.offload_optimizer.device",
            "`cpu`: `memory.optimizer_offload = true`",
            {
                "cpu": {"memory.optimizer_offload": True},
                "none": {},
                "nvme": "optimizer state on a disk",
            },
        ),
        words(
            f"{zero}.offload_param.device",
            "`cpu`: `memory.parameter_offload = true`",
            {"cpu": {"memory.parameter_offload": True}, "none": {}, "nvme": "parameters on a disk"},
        ),
        needless(f"{zero}.*", "FSDP2 has no such knob: blocks are gathered one at a time"),
        needless(f"{prefix}.seq_parallel_communication_data_type", "the dtype of activations"),
        words(
            f"{prefix}.bf16.enabled",
            '`true`: `training.param_dtype = "bfloat16"`',
            {True: {"training.param_dtype": "bfloat16"}, False: {}, "auto": {}},
        ),
        words(
            f"{prefix}.fp16.enabled",
            "no counterpart: fp16",
            {True: "fp16 needs loss scaling: take bf16", False: {}, "auto": {}},
        ),
        needless(f"{prefix}.fp16.*", "of fp16"),
        unless_auto(f"{prefix}.gradient_clipping", "training.max_norm"),
        unless_auto(f"{prefix}.train_micro_batch_size_per_gpu", "training.local_batch_size"),
        only(f"{prefix}.gradient_accumulation_steps", (1, "auto"), auto),
        only(f"{prefix}.train_batch_size", ("auto",), auto),
        needless(f"{prefix}.activation_checkpointing.*", "activation_checkpoint.mode"),
        needless(f"{prefix}.steps_per_print", "metrics.log_interval"),
        needless(f"{prefix}.wall_clock_breakdown", "profiling"),
    ]


def warmup(share: float, steps: int) -> Flat:
    if not steps and share:
        raise Lost("a share of steps whose number the recipe does not say")
    return {"lr_scheduler.warmup_steps": int(share * steps)}
