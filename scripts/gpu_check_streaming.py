"""Check streaming (docs/streaming.md) on one GPU: gradients, also with dropout and in many steps,
memory by length, copies, time.

    python scripts/gpu_check_streaming.py               on a machine with a GPU, some minutes
    python scripts/gpu_check_streaming.py --rehearse    the same code on a CPU, with tiny shapes

Models have Llama-3-8B's widths and few layers. Each check is a process of its own and has a line,
as those of gpu_check.py. All results go to gpu_check_streaming.json too. Exits with 1 if a check
has failed.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from gpu_check import (
    Check,
    Figures,
    Scale,
    check_all,
    hidden_copies,
    loss_and_gradients,
    seconds_of,
    sharded_llama,
)

WHOLE: dict[str, Any] = {"memory": {"stream_chunk_tokens": -1}}
HOST: dict[str, Any] = {"memory": {"stream_offload": "host"}}
DISK: dict[str, Any] = {"memory": {"stream_offload": "disk"}}
KEPT: dict[str, Any] = {"activation_checkpoint": {"keep_attention": "all", "offload": "host"}}
CLOSE = 0.02
"""How far gradients in bf16 may be from those without streaming, as a share of their norm."""
STEPS = 200
"""in which no gradient may get lost; a rehearsal has three"""
FLAT = 0.1
"""Hidden states a token by which the peak may grow where all is off the device."""


def chunked(scale: Scale, **options: Any) -> dict[str, Any]:
    """Return options with four chunks in a sequence of the scale's tokens."""
    chunks = {"stream_chunk_tokens": scale.tokens // 4}
    return options | {"memory": chunks | options.get("memory", {})}


def gradients(scale: Scale) -> Figures:
    """Gradients streamed, on the device and off it, against those of the whole sequence."""
    found: Figures = {}
    model, batch, _ = sharded_llama(scale, 4, **WHOLE)
    expected = loss_and_gradients(model, batch)
    for name, options in {"device": {}, "host": HOST, "disk": DISK, "kept": KEPT}.items():
        model, batch, _ = sharded_llama(scale, 4, **chunked(scale, **options))
        found[name] = furthest(loss_and_gradients(model, batch), expected)
        assert found[name] < CLOSE, found
    return found


def furthest(tensors: list[Any], expected: list[Any]) -> float:
    """Return the largest difference of tensors, as a share of the norm of what is expected."""
    pairs = zip(tensors, expected, strict=True)
    return max(
        float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))
        for a, b in pairs
    )


def dropout(scale: Scale) -> Figures:
    """Gradients of adapters with dropout, off the device against on it: the same masks."""
    import torch

    found: Figures = {}
    expected: list[Any] = []
    ways = {
        "device": {},
        "host": HOST,
        "disk": DISK,
        "segments": HOST | {"activation_checkpoint": {"every": 2}},
    }
    for name, options in ways.items():
        model, batch, _ = sharded_llama(scale, 4, dropout=0.5, **chunked(scale, **options))
        model.train()
        torch.manual_seed(0)
        gradients = loss_and_gradients(model, batch)
        found[name] = furthest(gradients, expected := expected or gradients)
        assert found[name] < CLOSE, found
    return found


def many_steps(scale: Scale) -> Figures:
    """Gradients of each of many steps, off the device against on it: none gets lost."""
    found: Figures = {}
    most = {"tokens": 4096, "width": 512, "inner": 1024, "vocabulary": 1000}
    sizes: dict[str, Any] = {name: min(getattr(scale, name), size) for name, size in most.items()}
    small = replace(scale, heads=(4, 2), **sizes)
    model, batch, _ = sharded_llama(small, 2, **chunked(small))
    expected = loss_and_gradients(model, batch)
    for name, offload in {"host": HOST, "disk": DISK}.items():
        model, batch, _ = sharded_llama(small, 2, **chunked(small, **offload))
        steps = range(3 if scale.rehearses else STEPS)
        found[name] = max(furthest(loss_and_gradients(model, batch), expected) for _ in steps)
        assert found[name] < CLOSE, found
    return found


def memory_by_length(scale: Scale) -> Figures:
    """Peak memory of a step at three lengths, and its slope in hidden states a token."""
    import torch

    found: Figures = {}
    lengths = [scale.tokens * factor for factor in (1, 2, 4)]
    itemsize = 4 if scale.rehearses else 2
    for name, options in {"whole": WHOLE, "streamed": {}, "host": HOST}.items():
        peaks = []
        for tokens in lengths:
            if name == "streamed" and scale.rehearses:
                options = chunked(scale)
            model, batch, _ = sharded_llama(scale, 2, tokens=tokens, **options)
            loss_and_gradients(model, batch)
            if not scale.rehearses:
                torch.cuda.reset_peak_memory_stats()
            loss_and_gradients(model, batch)
            peaks.append(0 if scale.rehearses else torch.cuda.max_memory_allocated())
            del model, batch
        slope = (peaks[-1] - peaks[0]) / (lengths[-1] - lengths[0]) / (scale.width * itemsize)
        found[name] = {"gib": [round(x / 2**30, 2) for x in peaks], "a token": round(slope, 3)}
    assert scale.rehearses or found["host"]["a token"] < FLAT, found
    assert scale.rehearses or found["streamed"]["a token"] < found["whole"]["a token"], found
    return found


def copies(scale: Scale) -> Figures:
    """The share of the time of copies that passes while kernels run."""
    options = {} if scale.rehearses else HOST
    return hidden_copies(scale, **chunked(scale, **options))


def seconds(scale: Scale) -> Figures:
    """Seconds of forward and backward of four layers, streamed and not."""
    found: Figures = {}
    ways = {"whole": WHOLE, "streamed": {}, "kept": KEPT, "host": HOST}
    for name, options in ways.items():
        model, batch, _ = sharded_llama(scale, 4, **options)
        found[name] = round(seconds_of(scale, partial(loss_and_gradients, model, batch)), 3)
        del model, batch
    return found


CHECKS: dict[str, tuple[Check, float]] = {
    "gradients": (gradients, 180),
    "dropout": (dropout, 120),
    "many_steps": (many_steps, 240),
    "memory_by_length": (memory_by_length, 240),
    "copies": (copies, 120),
    "seconds": (seconds, 180),
}
"""The checks in their order, each with the seconds that it may take."""


def main(argv: list[str]) -> int:
    return check_all(argv, CHECKS, Path(__file__), str(__doc__), minutes=13)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
