"""Settings of the CUDA allocator: expandable segments.

ALST (arXiv 2506.13996) found that without them long sequences run out of memory by fragmentation.
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
    """Turn expandable segments on, unless the user has set them. Call before importing torch."""
    name = next((name for name in _VARIABLES if os.environ.get(name)), _VARIABLES[0])
    chosen = os.environ.get(name, "")
    if _WANTED not in chosen:
        os.environ[name] = ",".join(filter(None, [chosen, f"{_WANTED}:True"]))


def describe_allocator() -> str:
    """Return a line for the log with the allocator's settings."""
    chosen = next(
        (f"{name}={os.environ[name]}" for name in _VARIABLES if os.environ.get(name)),
        "its defaults",
    )
    return f"CUDA allocator: {chosen}"
