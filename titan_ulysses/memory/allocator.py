"""The CUDA allocator's settings: segments that grow, without which long sequences end in fragments
(ALST found).
"""

from __future__ import annotations

import os

# The second is the older name of the first.
_VARIABLES = (
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
)
_WANTED = "expandable_segments"


def expand_segments() -> None:
    """Turn expandable segments on, unless the user has said something about them. Before torch is
    imported.
    """
    name = next((name for name in _VARIABLES if os.environ.get(name)), _VARIABLES[0])
    chosen = os.environ.get(name, "")
    if _WANTED not in chosen:
        os.environ[name] = ",".join(filter(None, [chosen, f"{_WANTED}:True"]))


def describe_allocator() -> str:
    """What the log says of it."""
    chosen = next(
        (f"{name}={os.environ[name]}" for name in _VARIABLES if os.environ.get(name)),
        "its defaults",
    )
    return f"CUDA allocator: {chosen}"
