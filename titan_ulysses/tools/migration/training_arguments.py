"""TrainingArguments of transformers, as LLaMA-Factory, ms-swift, TRL and axolotl use them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

from titan_ulysses.tools.migration import key_rules as to
from titan_ulysses.tools.migration.key_rules import Flat, Lost

_KWARGS = "lr_scheduler_kwargs."


def schedule(name: str, values: Flat) -> Flat:
    """Return [lr_scheduler] of one of transformers' schedules, with its lr_scheduler_kwargs."""
    given = {k.removeprefix(_KWARGS): v for k, v in values.items() if k.startswith(_KWARGS)}
    found: Flat = {"lr_scheduler.decay_type": name, "lr_scheduler.min_lr_ratio": 0.0}
    if name in ("constant", "constant_with_warmup"):
        found = {"lr_scheduler.decay_type": "constant"}
    elif name in ("cosine_with_min_lr", "cosine_warmup_with_min_lr"):
        least = given.pop("min_lr_rate", None)
        if least is None:
            least = float(given.pop("min_lr")) / float(values["learning_rate"])
        found |= {"lr_scheduler.decay_type": "cosine", "lr_scheduler.min_lr_ratio": float(least)}
    elif name == "cosine_with_restarts":
        cycles = int(given.pop("num_cycles", 1))
        found |= {"lr_scheduler.decay_type": "cosine", "lr_scheduler.cycles": cycles}
    elif name == "warmup_stable_decay" and int(values.get("max_steps") or 0) > 0:
        share = int(given.pop("num_decay_steps")) / int(values["max_steps"])
        shape = given.pop("decay_type", "cosine")
        found |= {
            "lr_scheduler.decay_type": {"1-sqrt": "sqrt"}.get(shape, shape),
            "lr_scheduler.decay_ratio": share,
            "lr_scheduler.min_lr_ratio": float(given.pop("min_lr_ratio", 0.0)),
        }
    elif name not in ("linear", "cosine", "inverse_sqrt"):
        raise Lost("linear, cosine, constant, inverse_sqrt, restarts and a least rate are known")
    if given:
        raise Lost(f"lr_scheduler_kwargs: {', '.join(given)}", found)
    return found


@to.unless_constant
def warmup(value: float, values: Flat) -> Flat:
    """Return the warm-up of warmup_steps, which below 1 is a share, as transformers 5 has it."""
    if 0 < float(value) < 1:
        return {"lr_scheduler.warmup_ratio": float(value)}
    if value and values.get("warmup_ratio"):
        raise Lost("warmup_ratio is set too")
    return {"lr_scheduler.warmup_steps": int(value)}


@to.unless_constant
def warmup_ratio(share: Any, _: Flat) -> Flat:
    return {"lr_scheduler.warmup_ratio": share}


def every(section: str, value: float) -> Flat:
    """Return the interval of checkpoints or validations: steps, or below 1 a share of the run."""
    steps = float(value)
    interval = int(steps) if steps >= 1 else str(steps)
    return {f"{section}.enable": True, f"{section}.interval": interval}


def _strategy(section: str, name: str) -> Callable[[Any, Flat], Flat]:
    def become(_: Any, values: Flat) -> Flat:
        how = values.get(f"{name}_strategy")
        if how in ("no", False):  # YAML 1.1 reads no as false
            return {f"{section}.enable": False}
        if how == "epoch":
            return {f"{section}.enable": True, f"{section}.interval": "epoch"}
        if how != "steps":
            raise Lost("set checkpoint.keep_best" if how == "best" else f"{how}: no such strategy")
        return every(section, values.get(f"{name}_steps") or values.get("logging_steps", 500))

    return become


saves, evaluates = _strategy("checkpoint", "save"), _strategy("validation", "eval")


def epochs(value: float, values: Flat) -> Any:
    return {} if int(values.get("max_steps") or 0) > 0 else float(value)


def steps(value: Any, _: Flat) -> Any:
    return int(value) if int(value) > 0 else {}


def total_limit(value: Any, _: Flat) -> int:
    return 0 if value == "all" else int(value)


def output(value: str, _: Flat) -> Flat:
    path = PurePosixPath(value)
    return {"job.dump_folder": str(path.parent), "job.name": path.name} if path.name else {}


def report(value: Any, _: Flat) -> Flat:
    names = value if isinstance(value, list) else [value]
    if others := [one for one in names if one not in ("none", "wandb", "tensorboard", "all")]:
        raise Lost(f"{', '.join(map(str, others))}: there are TensorBoard and Weights & Biases")
    return {"metrics.enable_wandb": True} if "wandb" in names else {}


def fsdp(value: Any, _: Flat) -> Any:
    return {"memory.parameter_offload": True} if "offload" in str(value) else {}
