"""What each key of the recipes of other trainers becomes here. For `titan-ulysses migrate`.

A rule says of one or several of their keys which of our settings follow from a value. It raises
`Lost` with the reason where there is no counterpart.

Each format names the version of its trainer, and the files that have its keys and their defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from titan_ulysses.config.toml import show

Flat = dict[str, Any]
"""Values by their keys, those of nested tables with dots: ours are "section.key"."""


class Lost(Exception):
    """A key, or a value of it, that has no counterpart here; the message is the reason."""

    def __init__(self, why: str, kept: Flat | None = None):
        super().__init__(why)
        self.kept = kept or {}
        """our settings that follow from the rest of it"""


@dataclass(frozen=True)
class Rule:
    theirs: str
    """their keys, with spaces between; `*` stands for any end of one"""
    become: Callable[[Any, Flat], Flat]
    """(value, all values of the recipe and "--ranks") -> our settings"""
    ours: str = ""
    """our key, or words for it, for the table of the docs"""
    why: str = ""
    """why nothing is needed, or a note about what differs"""

    def matches(self, key: str) -> bool:
        return any(
            key.startswith(one[:-1]) if one.endswith("*") else key == one
            for one in self.theirs.split()
        )

    def table_row(self) -> str:
        keys = ", ".join(f"`{key}`" for key in self.theirs.split())
        return f"| {keys} | {'; '.join(filter(None, (self.ours, self.why)))} |"


@dataclass(frozen=True)
class Format:
    name: str
    source: str
    """where its trainer has the keys and their defaults, and in which version"""
    recognize: Callable[[dict[str, Any]], bool]
    rules: list[Rule]
    """of those that match a key, the first one counts"""
    defaults: Flat = field(default_factory=dict)
    """their keys with the values that a recipe has where it does not set them"""
    includes: dict[str, str] = field(default_factory=dict)
    """their key that names a file -> the prefix of the keys of that file"""
    differs: Sequence[str] = ()
    """what no key of theirs or ours says, and is not the same"""

    def rule_of(self, key: str) -> Rule | None:
        return next((rule for rule in self.rules if rule.matches(key)), None)


_DECISIVE = (
    "training.seq_len",
    "training.local_batch_size",
    "training.seed",
    "training.max_norm",
    "training.param_dtype",
    "optimizer.name",
    "optimizer.lr",
    "optimizer.betas",
    "optimizer.eps",
    "optimizer.weight_decay",
    "lr_scheduler.decay_type",
    "data.packing",
    "data.long_documents",
    "data.train_on",
    "checkpoint.enable",
    "checkpoint.export",
    "validation.enable",
)


def decisive(settings: Flat) -> list[str]:
    """Return our keys that decide what such a run trains, and keeps of it.

    A migrated config sets each of them, so that no default of ours stands in place of theirs. What
    only changes memory and speed is not among them.
    """
    keys = [*_DECISIVE]
    if all("train_on" in source for source in settings.get("data.mixture", [{}])):
        keys.remove("data.train_on")
    if settings.get("lr_scheduler.decay_type") != "constant":
        keys.append("lr_scheduler.min_lr_ratio")
    if settings.get("checkpoint.enable", True):
        keys += ["checkpoint.interval", "checkpoint.keep_latest_k"]
    if settings.get("lora.rank"):
        keys += ["lora.alpha", "lora.dropout", "lora.target_modules"]
    if settings.get("loss.name", "cross_entropy") not in ("cross_entropy", "reward"):
        keys.append("loss.beta")
    for one, other in (
        ("training.steps", "training.epochs"),
        ("lr_scheduler.warmup_steps", "lr_scheduler.warmup_ratio"),
    ):
        keys.append(other if other in settings else one)
    return keys


# --- kinds of rules -------------------------------------------------------------------------------


def computed(theirs: str, ours: str, become: Callable[[Any, Flat], Flat], why: str = "") -> Rule:
    return Rule(theirs, become, ours if " " in ours else f"`{ours}`", why)


def same(theirs: str, ours: str, why: str = "") -> Rule:
    return computed(theirs, ours, lambda value, _: {ours: value}, why)


def same_name(*keys: str) -> list[Rule]:
    """Rules of "section.key other_key ..." that are called so here too."""
    names = (
        f"{section}.{name}"
        for section, _, found in (one.partition(".") for one in keys)
        for name in found.split()
    )
    return [same(name, name) for name in names]


def needless(theirs: str, why: str) -> Rule:
    return Rule(theirs, lambda value, _: {}, "", why)


def only(theirs: str, allowed: Sequence[Any], why: str) -> Rule:
    """Keys that must have one of these values; others have no counterpart."""

    def become(value: Any, _: Flat) -> Flat:
        if value in allowed:
            return {}
        raise Lost(why)

    return Rule(theirs, become, f"only {' or '.join(f'`{one}`' for one in allowed)}: {why}")


def lost(theirs: str, why: str) -> Rule:
    """Keys without a counterpart. Those that are off or empty ask for nothing."""
    off = (None, False, "", [], {})
    return replace(only(theirs, off, why), ours=f"no counterpart: {why}")


def choice(
    theirs: str,
    ours: str,
    values: dict[Any, Any],
    lost: dict[Any, str] | None = None,
    why: str = "",
) -> Rule:
    """A key whose values stand for values of ours, or for several settings, or for nothing (None).

    lost: why a value has no counterpart. A key of both may be several values, with spaces between.
    """
    settings = {
        each: found if isinstance(found, dict) else {} if found is None else {ours: found}
        for each, found in values.items()
    }
    known, unknown = _by_value(settings), _by_value(lost or {})

    def become(value: Any, _: Flat) -> Flat:
        key = value.lower() if isinstance(value, str) else value
        if isinstance(key, Hashable) and key in unknown:
            raise Lost(unknown[key])
        if not isinstance(key, Hashable) or key not in known:
            raise Lost(f"known values are {', '.join(map(str, [*known, *unknown]))}")
        return known[key]

    described = [
        (each, ", ".join(f"`{key} = {show(one)}`" for key, one in found.items()))
        for each, found in settings.items()
    ]
    described += [(each, f"no counterpart: {reason}") for each, reason in (lost or {}).items()]
    text = [f"{_quoted(each)}: {becomes}" for each, becomes in described if becomes]
    return Rule(theirs, become, "; ".join(text), why)


def switch(theirs: str, ours: str, value: Any = True) -> Rule:
    """Keys that are true or false: true stands for a value of ours, and false for nothing."""
    return choice(theirs, ours, {True: value, False: None})


def _by_value(table: dict[Any, Any]) -> dict[Any, Any]:
    return {value: found for values, found in table.items() for value in _split(values)}


def _split(values: Any) -> list[Any]:
    return values.split() or [values] if isinstance(values, str) else [values]


def _quoted(values: Any) -> str:
    return ", ".join(f"`{one if isinstance(one, str) else show(one)}`" for one in _split(values))


# --- what several formats share -------------------------------------------------------------------

SEQUENCE, SHARD = "parallelism.sequence_parallel_degree", "parallelism.data_parallel_shard_degree"
REPLICATE = "parallelism.data_parallel_replicate_degree"
FLASH = 'model.attention = "auto" takes the flash kernel of torch, or FlashAttention 3 or 4'
NO_TENSOR = "no tensor parallelism: raise parallelism.sequence_parallel_degree instead"
FP16 = "fp16 needs loss scaling: take bf16"
OTHER_LOSSES = "docs/trainers.md has TRL's trainers in sequence parallelism"
CPO_ALPHA = "cpo_alpha, 1 unless it is set, adds a cross-entropy that is not here"


def attention(theirs: str) -> Rule:
    flash = "auto fa2 fa3 flash_attn flash_attention_2 flash_attention_3 flash_attention_4"
    names = {flash: None, "sdpa": "sdpa", "flex_attention": "flex"}
    lost = {"eager disabled": "eager attention builds an S x S matrix"}
    return choice(theirs, "model.attention", names, lost, FLASH)


def dtype(theirs: str, **others: Flat) -> Rule:
    names = {"bf16 bfloat16": "bfloat16", "fp32 float32 no": "float32"}
    return choice(theirs, "training.param_dtype", {**names, **others}, {"fp16 float16": FP16})


NO_DECAY = "norms and biases, which have no weight decay there, have it here"
MIXED = "rows of all sources are one set there: set the weight of each source to its share"
ONE_STEP_LATER = (
    "a warm-up begins with a learning rate of 0 there, a step further here; a decay ends one step "
    "after the run there, with its last step here"
)
BF16_WEIGHTS = (
    "weights that are loaded in bf16 may be trained in bf16 there; the master weights are in fp32 "
    "here, unless optimizer.stochastic_rounding"
)
SHARE_HELD_OUT = "one document of a hundred is held out here, whatever the share"


def weight_decay(theirs: str, has_adapters: Callable[[Flat], bool]) -> Rule:
    """The rule of weight decay where transformers' trainer, or its like, applies it."""

    def become(value: Any, values: Flat) -> Flat:
        found = {"optimizer.weight_decay": value}
        if float(value) and not has_adapters(values):  # adapters are matrices alone
            raise Lost(NO_DECAY, found)
        return found

    return computed(theirs, "optimizer.weight_decay", become)


def adapters(
    rank: str, targets: str, are_trained: Callable[[Flat], bool], prefix: str = ""
) -> list[Rule]:
    """The rules of LoRA. rank, targets: their keys; are_trained: whether a recipe has adapters;
    prefix: that of use_rslora and use_dora.
    """

    def rule(theirs: str, ours: str) -> Rule:
        def become(value: Any, values: Flat) -> Flat:
            if not are_trained(values):
                return {}
            if value == TWICE_THE_RANK:
                value = 2 * int(values[rank])
            if ours == "lora.target_modules":
                names = value if isinstance(value, list) else str(value).split(",")
                value = [] if {"all", "all-linear"} & {*names} else [*map(str.strip, names)]
                if names == [OF_PEFT]:
                    kept = {ours: ["q_proj", "v_proj"]}
                    raise Lost("of llama, mistral, qwen and gemma they are q_proj and v_proj", kept)
            return {ours: value}

        return computed(theirs, ours, become, "of adapters")

    return [
        rule(rank, "lora.rank"),
        rule("lora_alpha", "lora.alpha"),
        rule("lora_dropout", "lora.dropout"),
        rule(targets, "lora.target_modules"),
        rule(f"{prefix}use_rslora", "lora.use_rslora"),
        rule(f"{prefix}use_dora", "lora.use_dora"),
    ]


TWICE_THE_RANK = "twice the rank"
OF_PEFT = "those that peft chooses for the type of the model"


def packing(packs: Any, *, streams: bool) -> Flat:
    """Return [data] of documents that are packed, or not; those of a stream always are."""
    if not streams:
        return {"data.packing": "best_fit" if packs else "none"}
    if not packs:
        why = "what is read during training is packed, end to end"
        raise Lost(why, {"data.packing": "concat"})
    return {"data.packing": "concat"}


def sources(found: Sequence[tuple[Flat, str]], weights: Sequence[Any] | None = None) -> Flat:
    """Return [data] of several sources: the keys of each, and what of it is lost."""
    for (keys, _), weight in zip(found, weights, strict=True) if weights else ():
        if keys:
            keys["weight"] = float(weight)
    each = [keys for keys, _ in found if keys]
    why = [lost for _, lost in found if lost]
    if len(each) == 1:
        data = {f"data.{key}": one for key, one in each[0].items()}
    else:
        data = {"data.mixture": each} if each else {}
    if len(each) > 1 and not any("weight" in keys for keys in each):
        why.append(MIXED)
    if why:
        raise Lost("; ".join(why), data)
    return data


def in_list(theirs: str, ours: str) -> Rule:
    """Keys of a list of names, which may be one name."""
    return computed(theirs, ours, lambda v, _: {ours: [v] if isinstance(v, str) else v})


def accumulation(*, batch: str, sequence: Sequence[str]) -> Rule:
    """The rule of how many micro-batches a rank has in a step.

    batch, sequence: the keys of a micro-batch's size, and those that may have the degree of
    sequence parallelism.
    """

    def become(steps: int, values: Flat) -> Flat:
        if int(steps) == 1:
            return {}
        ranks = values["--ranks"]
        if not ranks:
            raise Lost("training.global_batch_size depends on the number of GPUs: give --ranks")
        degree = max((int(values.get(key) or 1) for key in sequence), default=1)
        data, left = divmod(ranks, degree)
        if left:
            raise Lost(f"--ranks {ranks} cannot be divided by {degree} ranks of a sequence")
        return {"training.global_batch_size": int(steps) * int(values.get(batch) or 1) * data}

    ours = "`training.global_batch_size`, with `--ranks`"
    return computed("gradient_accumulation_steps", ours, become, "one micro-batch a step")


def betas(first: str, second: str, *, defaults: tuple[float, float]) -> Rule:
    """The rule of the keys of AdamW's two betas."""

    def become(_: Any, values: Flat) -> Flat:
        found = zip((first, second), defaults, strict=True)
        return {"optimizer.betas": [float(values.get(key, beta)) for key, beta in found]}

    return computed(f"{first} {second}", "optimizer.betas", become)


def warmup(share: float, steps: int) -> Flat:
    if not steps and share:
        raise Lost("a share of steps whose number the recipe does not say")
    return {"lr_scheduler.warmup_steps": int(share * steps)}


def of_warmup(theirs: str, schedule: str, ours: str, become: Callable[[Any, Flat], Flat]) -> Rule:
    """The rule of a warm-up, which transformers' schedule "constant" has not.

    schedule: their key of the schedule.
    """

    def warmup(value: Any, values: Flat) -> Flat:
        if values.get(schedule) == "constant":
            return {"lr_scheduler.warmup_steps": 0}
        return become(value, values)

    return computed(theirs, ours, warmup, "constant has none")


def zero_offload(optimizer: str, parameters: str) -> list[Rule]:
    """The rules of the two devices that DeepSpeed may offload to."""

    def rule(theirs: str, ours: str, what: str) -> Rule:
        on_disk = {"nvme": f"{what} on a disk"}
        return choice(theirs, f"memory.{ours}_offload", {"cpu": True, "none": None}, on_disk)

    return [
        rule(optimizer, "optimizer", "optimizer state"),
        rule(parameters, "parameter", "parameters"),
    ]


def deepspeed(prefix: str) -> list[Rule]:
    """The rules of a DeepSpeed config below a key."""
    zero, auto = f"{prefix}.zero_optimization", "other keys say it"

    def unless_auto(theirs: str, ours: str) -> Rule:
        def become(value: Any, _: Flat) -> Flat:
            return {} if value == "auto" else {ours: value}

        return computed(f"{prefix}.{theirs}", ours, become, "auto: others say")

    bf16 = {True: "bfloat16", False: None, "auto": None}
    return [
        needless(f"{zero}.stage", "FSDP2 shards parameters, gradients and optimizer state"),
        *zero_offload(f"{zero}.offload_optimizer.device", f"{zero}.offload_param.device"),
        needless(f"{zero}.*", "FSDP2 gathers one block at a time, without such a setting"),
        needless(
            f"{prefix}.seq_parallel_communication_data_type",
            "the exchange keeps the dtype of activations",
        ),
        choice(f"{prefix}.bf16.enabled", "training.param_dtype", bf16),
        choice(f"{prefix}.fp16.enabled", "", {False: None, "auto": None}, {True: FP16}),
        needless(f"{prefix}.fp16.*", "there is no training in fp16"),
        unless_auto("gradient_clipping", "training.max_norm"),
        unless_auto("train_micro_batch_size_per_gpu", "training.local_batch_size"),
        only(f"{prefix}.gradient_accumulation_steps", (1, "auto"), auto),
        only(f"{prefix}.train_batch_size", ("auto",), auto),
        needless(f"{prefix}.activation_checkpointing.*", "see activation_checkpoint.mode"),
        needless(f"{prefix}.steps_per_print", "see metrics.log_interval"),
        needless(f"{prefix}.wall_clock_breakdown", "see [profiling]"),
        needless(f"{prefix}.zero_allow_* {prefix}.zero_force_*", "it is about DeepSpeed itself"),
    ]
