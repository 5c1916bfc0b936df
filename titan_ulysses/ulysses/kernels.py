"""Which FlashAttention is behind torch's flash operators, and so behind the core `varlen`.

FlashAttention 2 ships with torch. Torch can put FlashAttention 3 or 4 in its place, where the
package is installed. This is a switch for the whole process, so only `train.py` turns it, and who
calls `activate_fastest`.
"""

from __future__ import annotations

import torch

FA2, FA3, FA4 = "fa2", "fa3", "fa4"
"""Names of the kernels, as in plan.attention_kernel."""

NAMES = {FA2: "FlashAttention 2", FA3: "FlashAttention 3", FA4: "FlashAttention 4"}

_CANDIDATES = {9: (FA3, FA4), 10: (FA4,)}
"""The kernels other than FlashAttention 2 for GPUs of a major compute capability, the best one
first.

9 is Hopper, 10 is Blackwell (torch/nn/attention/_fa3.py and _fa4.py check the same).
"""

MOST_HEAD_SIZE = 256
"""The largest head size of FlashAttention 2 and 3."""
_MOST_HEAD_SIZE_FA4 = 128


def active() -> str:
    """Return which kernel is behind torch's flash operators in this process."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    return FA2 if current is None else current.lower()


def flash_obstacle() -> str | None:
    """Return why this machine's GPU cannot run flash attention, or None.

    None too where there is no GPU: a plan is for another machine.
    """
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return f"needs an Ampere GPU or newer (this is {torch.cuda.get_device_name()})"
    return None


def activate_fastest(*, head_size: int | None = None, window: bool = False) -> str:
    """Put the fastest kernel that this machine has behind torch's flash operators, for the whole
    process, and return a sentence that says which, and why not a faster one.

    head_size: the largest of the model. window: whether the model has sliding windows. Call it on
    every rank: a kernel that some ranks lack would make them slower, but no result wrong.
    """
    passed_over = []
    capability = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0
    for kernel in _CANDIDATES.get(capability, ()):
        if obstacle := _obstacle(kernel, head_size, window):
            passed_over.append(f"{NAMES[kernel]} {obstacle}")
        else:
            break
    why = f" ({'; '.join(passed_over)})" if passed_over else ""
    return f"attention kernel: {NAMES[active()]}{why}"


def _obstacle(kernel: str, head_size: int | None, window: bool) -> str | None:
    """Activate kernel, or return why that is not possible."""
    if kernel == FA4 and (head_size or 0) > _MOST_HEAD_SIZE_FA4:
        return f"has heads of at most {_MOST_HEAD_SIZE_FA4} (this model's have {head_size})"
    if kernel == FA4 and window:
        return "has no backward for windows that we know of"
    activate = getattr(torch.nn.attention, "activate_flash_attention_impl", None)
    if activate is None:
        return f"needs a newer torch than {torch.__version__}"
    try:
        activate(kernel.upper())
    except ModuleNotFoundError as error:
        return f"needs the package {error.name}"
    except Exception as error:  # whatever a package built for another torch raises
        return f"does not load here ({error})"
    return None
