"""The command line of `titan-ulysses plan MODEL` and `init MODEL`, which need no TOML file.

titan-ulysses plan MODEL --gpus 8xH100 --seq-len 1M [--section.key value ...]
titan-ulysses init MODEL --gpus 4x8xH200 [--seq-len 256K] [--output run.toml]
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from titan_ulysses.config.cli import parse_command_line
from titan_ulysses.distributed.errors import UsageError
from titan_ulysses.distributed.hardware import find_gpu, unknown_gpu

_UNITS = {"": 1, "K": 2**10, "M": 2**20}
_ROUND = 1024
"""Lengths with a unit are rounded up to a multiple of this, which every usual mesh divides."""
_NODE = 8
"""GPUs of a node, unless --gpus says it."""

MODEL_USAGE = """\
usage: titan-ulysses plan MODEL --gpus GPUS [--seq-len TOKENS] [--section.key value ...]
       titan-ulysses init MODEL --gpus GPUS [--seq-len TOKENS] [--output FILE] [...]

  MODEL      a folder with a model's config.json, or the name of a model on the hub
  --gpus     number and name, as in 8xH100; nodes in front where they do not have 8 GPUs: 2x4xH200
  --seq-len  tokens of a sequence: 131072, 500K or 1M (K is 1,024); without it, all the positions
             that the model has
  --output   init: the file to write. Without it: <name of the model>.toml
  --section.key value  any setting, as in --plan.host_memory_gib 1770 --data.path ~/books

plan finds the fastest settings that fit, and plans them. init writes them to a TOML file.
A file is planned with titan-ulysses plan --config FILE; titan-ulysses train --help lists all
settings."""


@dataclass(frozen=True)
class Gpus:
    count: int
    name: str
    per_node: int


@dataclass(frozen=True)
class ModelCommand:
    """What `plan MODEL` or `init MODEL` was asked for."""

    model: str
    gpus: Gpus
    seq_len: int | None
    """None: all the positions of the model"""
    output: str
    """empty: the name of the model"""
    overrides: list[tuple[str, Any]]


def parse_gpus(text: str) -> Gpus:
    """Parse "8xH100", "32xH200" or, with the nodes in front, "4x4xA100".

    The name is that of `hardware.GPUS`, with its memory or without. UserError with exit code 2 for
    others.
    """
    match = re.fullmatch(r"\s*(?:(\d+)\s*[xX]\s*)?(\d+)\s*[xX]\s*([A-Za-z][\w -]*)", text)
    if not match:
        raise UsageError(f"--gpus {text}: needs a number and a name, as in --gpus 8xH100")
    nodes, count, asked = int(match[1] or 1), int(match[2]), match[3]
    if (gpu := find_gpu(asked)) is None:
        raise UsageError(f"--gpus {text}: {asked} is {unknown_gpu(asked)}")
    if not 1 <= nodes * count <= 2**20:
        raise UsageError(f"--gpus {text}: needs from 1 to {2**20:,} GPUs")
    return Gpus(nodes * count, gpu.name, count if match[1] else _NODE)


def parse_tokens(text: str) -> int:
    """Parse a number of tokens: "131072", "500K" or "3.7M". K is 1,024, and M is 1,024 K.

    With a unit, the number is rounded up to a multiple of 1,024. UserError with exit code 2.
    """
    match = re.fullmatch(r"(\d[\d_,]*(?:\.\d+)?)([kKmM]?)", text.strip())
    number = float(re.sub(r"[_,]", "", match[1])) if match else 0.0
    unit = _UNITS[match[2].upper()] if match else 1
    tokens = number * unit
    if unit > 1:
        tokens = -(-round(tokens) // _ROUND) * _ROUND
    if not match or tokens != int(tokens) or not 1 <= tokens < 2**31:
        raise UsageError(
            f"--seq-len {text}: needs a number of tokens below 2^31, as in 131072, 500K or 1M"
        )
    return int(tokens)


def parse_model_command(argv: Sequence[str], *, writes: bool) -> ModelCommand:
    """Parse the arguments of `plan MODEL`, or of `init MODEL`, which `writes` a file.

    `--help` prints `MODEL_USAGE` and exits with code 0. UserError with exit code 2.
    """
    if {"-h", "--help"} & {*argv}:
        print(MODEL_USAGE)
        raise SystemExit(0)
    own: dict[str, str | None] = {"gpus": None, "seq-len": None}
    if writes:
        own["output"] = None
    model, rest = "", list(argv)
    if rest and not rest[0].startswith("-"):
        model = rest.pop(0)
    others = []
    while rest:
        option, equals, value = rest.pop(0).partition("=")
        if option.removeprefix("--") not in own or not option.startswith("--"):
            others.append(option + equals + value)
            continue
        if not equals and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        if not value:
            raise UsageError(f"{option}: needs a value; see --help")
        own[option[2:]] = value
    name = "init" if writes else "plan"
    if not model:
        raise UsageError(f"{name}: MODEL comes first, as in {name} FOLDER --gpus 8xH100")
    if own["gpus"] is None:
        raise UsageError(f"{name} {model}: --gpus is missing, as in --gpus 8xH100")
    return ModelCommand(
        model,
        parse_gpus(own["gpus"]),
        None if own["seq-len"] is None else parse_tokens(own["seq-len"]),
        own.get("output") or "",
        _settings(name, others),
    )


def _settings(command: str, arguments: list[str]) -> list[tuple[str, Any]]:
    """Return the settings among the arguments; UserError for anything else."""
    for argument in arguments:
        if argument.partition("=")[0] == "--config":
            raise UsageError(
                f"{command}: give either MODEL or --config, not both; a file plans with "
                f"titan-ulysses plan {argument} FILE"
            )
    parsed = parse_command_line(["--config", "none", *arguments])
    if any(key == "training.seq_len" for key, _ in parsed.overrides):
        raise UsageError(f"--training.seq_len: here it is {command} MODEL --seq-len")
    if parsed.print_config or parsed.plan or parsed.evaluate:
        flag = next(one for one in arguments if "." not in one and one.startswith("--"))
        raise UsageError(f"{flag}: {command} MODEL has no such option; see --help")
    return parsed.overrides
