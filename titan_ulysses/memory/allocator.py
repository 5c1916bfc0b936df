"""Settings of the CUDA allocator: expandable segments.

ALST (arXiv 2506.13996) found that without them long sequences run out of memory by fragmentation.
"""

from __future__ import annotations

import os
import warnings

# The second is the older name of the first.
_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_WANTED = "expandable_segments"


def expand_segments() -> None:
    """Turn expandable segments on, unless the user has set them. Call before importing torch."""
    name = next((name for name in _VARIABLES if os.environ.get(name)), _VARIABLES[0])
    chosen = os.environ.get(name, "")
    if _WANTED not in chosen:
        os.environ[name] = ",".join(filter(None, [chosen, f"{_WANTED}:True"]))


def warn_of_fragmentation() -> None:
    """Warn where a program of the user's own trains on CUDA without expandable segments.

    They are of the whole process, and read when CUDA starts, so the program has to ask for them.
    """
    if not any(_WANTED in os.environ.get(name, "") for name in _VARIABLES):
        warnings.warn(
            f"{_VARIABLES[0]} does not say {_WANTED}: long sequences will fragment the GPU's "
            f"memory and run out of it early. Set {_VARIABLES[0]}={_WANTED}:True before the program"
            f" starts ({_WANTED}:False, if that is what you want, ends this warning).",
            stacklevel=3,
        )


def describe_allocator() -> str:
    """Return a line for the log with the allocator's settings."""
    chosen = next(
        (f"{name}={os.environ[name]}" for name in _VARIABLES if os.environ.get(name)),
        "its defaults",
    )
    return f"CUDA allocator: {chosen}"
