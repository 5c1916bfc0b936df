"""Files of `accelerate config`, with ParallelismConfig. Optimizer, schedule and data are those of
the script that it launches, and not in it.
"""

from __future__ import annotations

from typing import Any

from titan_ulysses.tools.migration.key_rules import Flat, Lost

_P = "parallelism_config.parallelism_config_"


def sequence(value: int, values: Flat) -> Any:
    sizes = [int(values.get(f"{_P}{name}") or 1) for name in ("cp_size", "sp_size")]
    if min(sizes) > 1:
        raise Lost("cp_size and sp_size together: there is one sequence-parallel degree")
    return value if value > 1 else {}


def nodes(value: int, values: Flat) -> Any:
    ranks = int(values.get("num_processes") or 0)
    return ranks // value if value > 1 and ranks % value == 0 else {}
