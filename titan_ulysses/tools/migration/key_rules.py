"""What each key of the recipes of other trainers becomes here: NAME.toml, and how it is read.

A rule says of one or several of their keys which of our settings follow from a value. It raises
`Lost` with the reason where there is no counterpart. In [rules] of a file, in their order:

    key = "section.key"                 ours, with the same value
    key = { why = "..." }               nothing is needed here
    key = { lost = "..." }              no counterpart, unless it is off or empty
    key = { only = [...], why = "..." } must be one of these
    key = { ours, choice = {...} }      their values -> ours, or several settings, or nothing: {};
                                        lost = {...}: why others have no counterpart
    key = { ours, by = "function" }     what is computed: by NAME.py, or by this file
    key = { ours, like = "..." }        one of `_KINDS`
    prefix = { include = "name" }       the rules of another file

Any may have a note, why. Several keys, or several of their values, stand with spaces between; `*`
is any end of a key; $NAME is a text of the modules. Each file names the version of its trainer, and
the files that have its keys and their defaults.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from string import Template
from typing import Any

from titan_ulysses.config.toml import from_toml, show

Flat = dict[str, Any]
"""Values by their keys, those of nested tables with dots: ours are "section.key"."""


class Lost(Exception):
    """A key, or a value of it, that has no counterpart here; the message is the reason."""

    def __init__(self, why: str, kept: Flat | None = None):
        super().__init__(why)
        self.kept = kept or {}
        """our settings that follow from the rest of it"""


def _matches(keys: str, key: str) -> bool:
    return any(
        key.startswith(one[:-1]) if one.endswith("*") else key == one for one in keys.split()
    )


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
        return _matches(self.theirs, key)

    def table_row(self) -> str:
        keys = ", ".join(f"`{key}`" for key in self.theirs.split())
        return f"| {keys} | {'; '.join(filter(None, (self.ours, self.why)))} |"


@dataclass(frozen=True)
class Format:
    name: str
    source: str
    """where its trainer has the keys and their defaults, and in which version"""
    recognize: Sequence[str]
    """the keys of such a recipe: one of each entry"""
    command: str
    """or how its `command` begins"""
    rules: list[Rule]
    """of those that match a key, the first one counts"""
    defaults: Flat
    """their keys with the values that a recipe has where it does not set them"""
    beside: Flat
    """"--batch", "--sequence", "--adapters": their keys of a micro-batch's size, of the degree of
    sequence parallelism, and of the kind of adapters; for rules that depend on them"""
    files: dict[str, str]
    """their key that names a file -> the prefix of the keys of that file"""
    differs: Sequence[str]
    """what no key of theirs or ours says, and is not the same"""

    def rule_of(self, key: str) -> Rule | None:
        return next((rule for rule in self.rules if rule.matches(key)), None)

    def has(self, recipe: Flat) -> bool:
        if self.command and str(recipe.get("command", "")).startswith(self.command):
            return True
        return all(any(_matches(keys, key) for key in recipe) for keys in self.recognize)


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


def _computed(theirs: str, ours: str, find: Callable[[Any, Flat], Any], why: str) -> Rule:
    """find: (value, all values) -> our settings, or the value of the first key that ours names"""
    ours = ours if " " in ours else f"`{ours}`"

    def become(value: Any, values: Flat) -> Flat:
        found = find(value, values)
        return found if isinstance(found, dict) else {ours.split("`")[1]: found}

    return Rule(theirs, become, ours, why)


def _only(theirs: str, allowed: Sequence[Any], why: str) -> Rule:
    def become(value: Any, _: Flat) -> Flat:
        if value in allowed:
            return {}
        raise Lost(why)

    return Rule(theirs, become, f"only {' or '.join(f'`{one}`' for one in allowed)}: {why}")


def _choice(theirs: str, ours: str, values: Flat, lost: dict[str, str], why: str) -> Rule:
    settings = {
        _split(names): found if isinstance(found, dict) else {ours: found}
        for names, found in values.items()
    }
    reasons = {_split(names): reason for names, reason in lost.items()}
    known = {name: found for names, found in settings.items() for name in names}
    unknown = {name: reason for names, reason in reasons.items() for name in names}

    def become(value: Any, _: Flat) -> Flat:
        key = _plain(value)
        if isinstance(key, Hashable) and key in unknown:
            raise Lost(unknown[key])
        if not isinstance(key, Hashable) or key not in known:
            raise Lost(f"known values are {', '.join(map(str, [*known, *unknown]))}")
        return known[key]

    described = [
        (names, ", ".join(f"`{key} = {show(one)}`" for key, one in found.items()))
        for names, found in settings.items()
    ]
    described += [(names, f"no counterpart: {reason}") for names, reason in reasons.items()]
    text = [
        f"{', '.join(map(_shown, names))}: {becomes}" for names, becomes in described if becomes
    ]
    return Rule(theirs, become, "; ".join(text), why)


def _shown(name: Any) -> str:
    return f"`{name if isinstance(name, str) else show(name)}`"


def _split(names: str) -> tuple[Any, ...]:
    return tuple(map(_plain, names.split() or [names]))


def _plain(value: Any) -> Any:
    """Return a name in small letters, or what it is as text: true, false or a whole number."""
    if not isinstance(value, str):
        return value
    name = value.lower()
    return json.loads(name) if re.fullmatch("true|false|[0-9]+", name) else name


FLASH = 'model.attention = "auto" takes the flash kernel of torch, or FlashAttention 3 or 4'
_KINDS: dict[str, Flat] = {
    "attention": {
        "ours": "model.attention",
        "choice": {
            "auto fa2 fa3 flash_attn flash_attention_2 flash_attention_3 flash_attention_4": {},
            "sdpa": "sdpa",
            "flex_attention": "flex",
        },
        "lost": {"eager disabled": "eager attention builds an S x S matrix"},
        "why": FLASH,
    },
    "switch": {"choice": {"true": True, "false": {}}},
}


_OFF = (None, False, "", [], {})


def _rule(theirs: str, spec: Any, functions: Flat) -> Rule:
    spec = {"ours": spec} if isinstance(spec, str) else _KINDS.get(spec.get("like"), {}) | spec
    assert {*spec} <= {"ours", "why", "lost", "by", "only", "choice", "like"}, theirs
    ours, why, lost = (spec.get(key, "") for key in ("ours", "why", "lost"))
    if "by" in spec:
        return _computed(theirs, ours, functions[spec["by"]], why)
    if "only" in spec:
        return _only(theirs, spec["only"], why)
    if "choice" in spec:
        return _choice(theirs, ours, spec["choice"], lost or {}, why)
    if lost:
        return replace(_only(theirs, _OFF, lost), ours=f"no counterpart: {lost}")
    if ours:
        return _computed(theirs, ours, lambda value, _: {ours: value}, why)
    return Rule(theirs, lambda *_: {}, "", why)


def _read(name: str, functions: Flat) -> tuple[Flat, Flat]:
    """Return NAME.toml, and what its rules compute with: `functions`, else NAME.py, else this."""
    file = Path(__file__).with_name(f"{name}.toml")
    of_file = import_module(f"{__package__}.{name}") if file.with_suffix(".py").exists() else None
    functions = globals() | (vars(of_file) if of_file else {}) | functions
    texts = {key: json.dumps(one)[1:-1] for key, one in functions.items() if isinstance(one, str)}
    return from_toml(Template(file.read_text(encoding="utf-8")).substitute(texts)), functions


def _rules(table: Flat, functions: Flat, prefix: str = "") -> Iterator[Rule]:
    for keys, spec in table["rules"].items():
        if "include" in spec:
            yield from _rules(*_read(spec["include"], functions), prefix + keys)
        else:
            yield _rule(" ".join(prefix + key for key in keys.split()), spec, functions)


def read_format(name: str) -> Format:
    table, functions = _read(name, {})
    defaults = _read(table["defaults_of"], {})[0]["defaults"] if "defaults_of" in table else {}
    beside = {f"--{key}": table.get(key, []) for key in ("batch", "sequence", "adapters")}
    return Format(
        table["name"],
        table["source"],
        table["recognize"],
        table.get("command", ""),
        [*_rules(table, functions)],
        defaults | table.get("defaults", {}),
        beside,
        table.get("files", {}),
        table.get("differs", []),
    )


# --- what several formats share -------------------------------------------------------------------

TRANSFORMERS = "src/transformers/training_args.py of 5.24"
NO_TENSOR = "no tensor parallelism: raise parallelism.sequence_parallel_degree instead"
FP16 = "fp16 needs loss scaling: take bf16"
OTHER_LOSSES = "docs/trainers.md has TRL's trainers in sequence parallelism"
CPO_ALPHA = "cpo_alpha, 1 unless it is set, adds a cross-entropy that is not here"
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


def has_adapters(values: Flat) -> bool:
    kind = next((values[key] for key in values["--adapters"] if key in values), None)
    return str(kind).lower() in ("true", "lora", "qlora")


def weight_decay(value: Any, values: Flat) -> Flat:
    """Weight decay where transformers' trainer, or its like, applies it."""
    found = {"optimizer.weight_decay": value}
    if float(value) and not has_adapters(values):  # adapters are matrices alone
        raise Lost(NO_DECAY, found)
    return found


def of_adapters(value: Any, values: Flat) -> Any:
    return value if has_adapters(values) else {}


def targets(value: Any, values: Flat) -> Any:
    if not has_adapters(values):
        return {}
    names = value if isinstance(value, list) else str(value).split(",")
    return [] if {"all", "all-linear"} & {*names} else [*map(str.strip, names)]


def in_list(value: Any, _: Flat) -> Any:
    return [value] if isinstance(value, str) else value


def unless_auto(value: Any, _: Flat) -> Any:
    return {} if value == "auto" else value


def accumulation(steps: Any, values: Flat) -> Any:
    """How many micro-batches a rank has in a step."""
    if int(steps) == 1:
        return {}
    ranks = values["--ranks"]
    if not ranks:
        raise Lost("training.global_batch_size depends on the number of GPUs: give --ranks")
    degree = max((int(values.get(key) or 1) for key in values["--sequence"]), default=1)
    data, left = divmod(ranks, degree)
    if left:
        raise Lost(f"--ranks {ranks} cannot be divided by {degree} ranks of a sequence")
    batch = int(values.get(values["--batch"]) or 1)
    return {"training.global_batch_size": int(steps) * batch * data}


def betas(_: Any, values: Flat) -> list[float]:
    """AdamW's two betas; the first of all trainers is 0.9, and the second among their defaults."""
    first, second = (
        next((values[key] for key in (f"adam_beta{n}", f"optimizer.beta{n}") if key in values), 0.9)
        for n in (1, 2)
    )
    return [float(first), float(second)]


def unless_constant(warmup: Callable[[Any, Flat], Flat]) -> Callable[[Any, Flat], Flat]:
    """Of a warm-up, which transformers' schedule "constant" has not."""

    def become(value: Any, values: Flat) -> Flat:
        schedules = (values.get(key) for key in _SCHEDULES)
        return (
            {"lr_scheduler.warmup_steps": 0} if "constant" in schedules else warmup(value, values)
        )

    return become


_SCHEDULES = ("lr_scheduler", "lr_scheduler_type", "scheduler.name")


def warmup_of(share: float, steps: int) -> Flat:
    if not steps and share:
        raise Lost("a share of steps whose number the recipe does not say")
    return {"lr_scheduler.warmup_steps": int(share * steps)}


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
