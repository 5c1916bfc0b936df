"""Plans of a model without a TOML file, and the TOML file of what such a plan finds.

`titan-ulysses plan MODEL --gpus 8xH100 --seq-len 1M` looks for the fastest settings that fit
(`fastest.py`), and plans them. `titan-ulysses init MODEL ...` writes them to a file, each with the
description of the schema.
"""

from __future__ import annotations

import os
import shlex
import textwrap
from pathlib import Path
from typing import Any

from rich.console import Console

from titan_ulysses.config.load import config_of
from titan_ulysses.config.model_cli import ModelCommand
from titan_ulysses.config.schema import KEYS, Config, in_words
from titan_ulysses.config.toml import to_toml
from titan_ulysses.distributed.atomic import whole_file
from titan_ulysses.distributed.errors import UsageError, UserError
from titan_ulysses.launch.hub import look_for_hub
from titan_ulysses.model import hf
from titan_ulysses.model.rope_scaling import rope_for
from titan_ulysses.observability.units import size_text, time_text
from titan_ulysses.plan.fastest import LEAN, Search
from titan_ulysses.plan.planner import Plan, set_up
from titan_ulysses.plan.report import plan_and_report
from titan_ulysses.plan.searches import tell_fastest
from titan_ulysses.plan.simulate import shared_ranks

_WIDTH, _WARMUP = 98, 10
_BEGINNING: dict[str, Any] = {
    "data.path": "{stdlib}/*.py",
    "training.steps": 1000,
    "optimizer.lr": 1e-5,
    "lr_scheduler.warmup_steps": _WARMUP,
    "checkpoint.interval": 100,
}
"""What no plan can say; every file of `init` has these, to be changed by its reader."""


def plan_model(command: ModelCommand) -> None:
    """Find the fastest settings of a model, and print and write their plan (see `report.py`).

    Where nothing fits, the plan is of the settings that come closest. UserError for a model that
    cannot be planned.
    """
    config, _, plan = _find(command, Console())
    plan_and_report(config, plan)


def init(command: ModelCommand) -> None:
    """Write the fastest settings of a model as a TOML file.

    UserError where the file is there already, or where nothing fits.
    """
    path = Path(command.output or f"{_name_of(command.model)}.toml")
    unwritable = (
        f"--output {path}: cannot write to the folder {path.parent} ({{}}). Choose another one."
    )
    if path.exists():
        raise UserError(f"{path} is there already: give another --output, or remove it.")
    if not path.parent.is_dir():
        raise UserError(f"--output {path}: there is no folder {path.parent}. Make it first.")
    if not os.access(path.parent, os.W_OK):
        raise UserError(unwritable.format("it is not writable"))
    console = Console()
    config, changes, plan = _find(command, console)
    if plan is None:
        raise UserError(f"{path} is not written, because nothing fits {_gpus_of(command)}.")
    set_up(config)  # UserError for what the run would refuse
    text = _file(command, config, changes, plan, path)
    try:
        with whole_file(path) as partial:
            partial.write_text(text)
    except OSError as error:
        raise UserError(unwritable.format(error.strerror or error)) from error
    console.print(
        f"[bold]{path}[/] has these settings. Set data.path and the others in it, and start with\n"
        f"  {_start(config, path)}",
        highlight=False,
        soft_wrap=True,
    )


@shared_ranks()
def _find(command: ModelCommand, console: Console) -> tuple[Config, dict[str, Any], Plan | None]:
    """Return the config with the fastest settings, what of it the search found, and its plan.

    Where nothing fits, the settings are those that come closest, without a plan.
    """
    config = _config(command)
    search = Search(set_up(config))
    found = tell_fastest(console, search)
    if search.is_interrupted:
        raise KeyboardInterrupt
    best = found[0] if found else search.nearest()
    changes = best.changes if best else {}
    return config_of(config.model_dump(), changes.items()), changes, best.plan if best else None


def _config(command: ModelCommand) -> Config:
    """Return the config of a command, before any search; of the model, config.json is read."""
    chosen = [key for key, _ in command.overrides if key in LEAN or key.startswith("parallelism.")]
    if chosen:
        raise UsageError(
            f"--{chosen[0]}: the search for the fastest settings chooses it. Write a file with "
            "titan-ulysses init, change it there, and plan that with --config."
        )
    settings = _BEGINNING | {
        "job.name": _name_of(command.model),
        "model.path": command.model,
        "plan.gpu": command.gpus.name,
        "plan.world_size": command.gpus.count,
        "plan.gpus_per_node": command.gpus.per_node,
    }
    before = config_of({}, [*settings.items(), *command.overrides])
    look_for_hub(before)
    model = hf.load_model_config(before.model.path, before.model.config)
    length = command.seq_len or getattr(model, "max_position_embeddings", None)
    if length is None:
        raise UsageError(f"{command.model} does not say how many positions it has: give --seq-len.")
    settings["training.seq_len"] = length
    settings["lr_scheduler.warmup_steps"] = min(_WARMUP, before.training.steps)
    if stretched := before.model.rope_scaling or rope_for(model, length):
        settings["model.rope_scaling"] = stretched
    return config_of({}, [*settings.items(), *command.overrides])


def _name_of(model: str) -> str:
    """Return the name of a run with a model: that of its folder, or of its repository."""
    return Path(model).resolve().name if Path(model).exists() else model.rpartition("/")[2]


def _gpus_of(command: ModelCommand) -> str:
    return f"{command.gpus.count} x {command.gpus.name}"


# --- the file -------------------------------------------------------------------------------------


def _file(
    command: ModelCommand, config: Config, changes: dict[str, Any], plan: Plan, path: Path
) -> str:
    """Return the text of a TOML file with the settings of config that its reader should see."""
    shown = {
        *("job.name", "model.path", "model.rope_scaling", "training.seq_len", *_BEGINNING),
        *("plan.gpu", "plan.world_size", "plan.gpus_per_node"),
        "parallelism.sequence_parallel_degree",
        *(key for key, _ in command.overrides),
    }
    table, written = config.model_dump(), _BEGINNING | dict(command.overrides)
    values = {key: table[key.split(".")[0]][key.split(".")[1]] for key in KEYS}
    shown |= {key for key in changes if values[key] != KEYS[key].default}
    # As they were written: the schema has expanded {stdlib} and ~, which differ elsewhere.
    values |= {key: text for key, text in written.items() if isinstance(text, str)}
    lines = _head(command, config, plan, path)
    section = ""
    for key in KEYS:
        if key not in shown or values[key] is None:
            continue
        if key.split(".")[0] != section:
            section = key.split(".")[0]
            lines += ["", f"[{section}]"]
        lines += _commented(KEYS[key].description or "")
        lines.append(f"{key.split('.')[1]} = {to_toml(in_words(key, values[key]))}")
    return "\n".join(lines) + "\n"


def _head(command: ModelCommand, config: Config, plan: Plan, path: Path) -> list[str]:
    """Return the comment at the beginning: what was planned, and how to go on."""
    setup = plan.setup
    tokens = f"{config.training.seq_len:,} tokens"
    host = f"; of a node's host memory {size_text(plan.host_bytes)}" if plan.host_bytes else ""
    if host and not config.plan.host_memory_gib:
        host += ", which was not looked at: set plan.host_memory_gib"
    return [
        *_commented(
            f"{command.model} on {_gpus_of(command)}, {tokens} a sequence: the fastest settings "
            "that titan-ulysses init found."
        ),
        *_commented(
            f"Planned, not measured: a step {time_text(plan.time.seconds)}, MFU {plan.mfu:.1%}; of "
            f"a GPU's memory {size_text(plan.gpu_bytes)} of {size_text(setup.gpu_memory)}{host}."
        ),
        f"#   titan-ulysses plan --config {shlex.quote(str(path))}",
        f"#   {_start(config, path)}",
    ]


def _commented(text: str) -> list[str]:
    wrapped = textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)
    return [f"# {line}" for line in wrapped]


def _start(config: Config, path: Path) -> str:
    """Return the command that starts the run, on each node."""
    world, per_node = config.plan.world_size, config.plan.gpus_per_node
    nodes = -(-world // per_node)
    where = "--standalone"
    if nodes > 1:
        where = f"--nnodes {nodes} --node-rank I --master-addr FIRST --master-port 29500"
    return (
        f"torchrun {where} --nproc-per-node {min(world, per_node)} "
        f"-m titan_ulysses train --config {shlex.quote(str(path))}"
    )
