"""What a small training on the device of tests/cuda shows of itself, and what of that is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from helpers.training import Record, largest_difference


@dataclass
class Seen:
    """What one rank has seen."""

    record: Record = field(default_factory=Record)
    refused: str = ""
    """the error that ended it"""
    races: list[str] = field(default_factory=list)
    contexts: set[int] = field(default_factory=set)
    """devices of others that it has begun to use"""
    waits: Counter[str] = field(default_factory=Counter)
    """where the host waited for the device"""


def on_device(
    copies: str, seed: int, train: Callable[..., Record], *args: Any, **options: Any
) -> Seen:
    """Train on this rank's device, with copies at these moments (FAKECUDA_COPIES, FAKECUDA_SEED).

    An error is a thing that was seen. With several ranks it ends them: the others would wait.
    """
    import fakecuda

    seen = Seen()
    fakecuda.races()
    torch.manual_seed(5)
    with fakecuda.setting(copies=copies, seed=seed), fakecuda.host_waits() as waits:
        try:
            seen.record = train(*args, **options)
        except Exception as error:
            if torch.distributed.get_world_size() > 1:
                raise
            seen.refused = f"{type(error).__name__}: {error}"
    torch.cuda.synchronize()
    seen.races, seen.waits = fakecuda.races(), waits
    seen.contexts = {*torch.ops.fakecuda.contexts()} - {torch.cuda.current_device()}
    return seen


def what_is_wrong(
    found: list[Seen], expected: Record, *, within: float, waits: set[str] | None = None
) -> list[str]:
    """Return what is wrong with what these ranks have seen, one line each; it begins with its kind.

    expected: the numbers, to so much of the largest of each tensor. waits: where the host may wait;
    None: anywhere.
    """
    wrong = []
    for rank, seen in enumerate(found):
        wrong += [f"refused: rank {rank}: {seen.refused}"] if seen.refused else []
        wrong += [f"race: rank {rank}: {race}" for race in seen.races]
        wrong += [f"context: rank {rank}: of device {device}" for device in sorted(seen.contexts)]
        if waits is not None:
            wrong += [f"wait: rank {rank}: {where}" for where in sorted({*seen.waits} - waits)]
    if not found[0].refused:
        wrong += [f"numbers: {text}" for text in _differences(found[0].record, expected, within)]
    return wrong


def _differences(found: Record, expected: Record, within: float) -> list[str]:
    try:
        differences = largest_difference(found, expected)
    except AssertionError as other_keys:  # a parameter without a gradient
        return [str(other_keys).splitlines()[0]]
    worst = max(differences, key=lambda name: differences[name])
    return [f"{worst} by {differences[worst]:.1e}"] if differences[worst] > within else []
