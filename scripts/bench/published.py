"""Published measurements of long-sequence training on GPUs, and what the planner says of the same
runs. Nothing is run on a GPU here.

    python scripts/bench/published.py                  all of them
    python scripts/bench/published.py --only trl       those whose name has this word

Each measurement has its source, and the settings that come closest to its run: where others split
a sequence as a ring, the plan has Ulysses. A ratio is the plan's figure by the measured one.
Where it is not within `BOUNDS`, `missing` says which cost the plan does not have.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from common import ROOT, parser_of

BOUNDS = 0.8, 1.25
GB = 1e9
"""What PyTorch's users mean by GB where they print bytes / 1e9, as TRL does."""


class Quantity(NamedTuple):
    """What was measured, and how it is written."""

    unit: str
    of_plan: Callable[[Any], float]
    text: str = "{:,.0f}"


SECONDS = Quantity("s a step", lambda plan: plan.time.seconds)
PEAK = Quantity("GB of tensors on a GPU", lambda plan: plan.peak.bytes / GB, "{:,.1f}")
MFU = Quantity("% MFU", lambda plan: 100 * plan.mfu, "{:.1f}")


@dataclass(frozen=True)
class Measurement:
    """A published figure, or several of one run, and the settings of its plan."""

    name: str
    source: str
    config: str
    settings: dict[str, Any]
    measured: list[tuple[Quantity, float]]
    missing: dict[str, str] = field(default_factory=dict)
    """by unit, for figures that the plan is not close to: which cost it does not have"""


def _gpus(count: int, **more: Any) -> dict[str, Any]:
    settings = {"plan.world_size": count, "parallelism.sequence_parallel_degree": count}
    return settings | {key.replace("__", "."): value for key, value in more.items()}


WHOLE = {"memory.stream_chunk_tokens": -1}
LIKE_TRL = WHOLE | {"memory.mlp_tile_tokens": -1, "plan.attention_kernel": "fa3"}
"""TRL tiles only the loss. cuDNN's attention is planned with the rates of FlashAttention 3."""
SMALL = {
    "model.config.hidden_size": 1024,
    "model.config.intermediate_size": 3072,
    "model.config.num_hidden_layers": 28,
    "model.config.num_attention_heads": 16,
    "model.config.tie_word_embeddings": True,
}
"""Qwen3-0.6B, from Qwen3-8B."""
TRL = "TRL, pull request 6845"

PUBLISHED = [
    Measurement(
        "ALST, Llama-3-8B, 3.7M tokens, 8 H100",
        "arXiv 2506.13996, table 4; FlashAttention 2",
        "llama3_8b",
        _gpus(8, training__seq_len=3_700_000) | WHOLE | {"memory.parameter_offload": True},
        [(SECONDS, 6455)],
    ),
    Measurement(
        "TRL, Qwen3-8B, 1M, 8 H100",
        "TRL, docs/source/long_context_training.md and pull request 6846; cuDNN's attention",
        "qwen3_8b",
        _gpus(8, training__seq_len=2**20) | LIKE_TRL,
        [(SECONDS, 380), (PEAK, 56.2)],
    ),
    Measurement(
        "TRL, Qwen3-8B, 1M, 8 H100, FlashAttention 2",
        "transformers, pull request 48324",
        "qwen3_8b",
        _gpus(8, training__seq_len=2**20) | LIKE_TRL | {"plan.attention_kernel": "fa2"},
        [(SECONDS, 606)],
    ),
    Measurement(
        "TRL, Qwen3-8B, 4M, 32 H100",
        TRL,
        "qwen3_8b",
        _gpus(32, training__seq_len=2**22) | LIKE_TRL,
        [(SECONDS, 1346)],
    ),
    Measurement(
        "TRL, Qwen3-0.6B, 1M, 8 H100",
        TRL,
        "qwen3_8b",
        _gpus(8, training__seq_len=2**20) | LIKE_TRL | SMALL,
        [(SECONDS, 137), (PEAK, 27.9)],
    ),
    Measurement(
        "TRL, Qwen3-0.6B, 4M, 8 H100",
        TRL,
        "qwen3_8b",
        _gpus(8, training__seq_len=2**22) | LIKE_TRL | SMALL,
        [(SECONDS, 2135), (PEAK, 73.7)],
    ),
    Measurement(
        "TRL, Qwen3-32B, 1M, 8 H100",
        TRL,
        "qwen3_32b",
        _gpus(8, training__seq_len=2**20) | LIKE_TRL,
        [(SECONDS, 1295), (PEAK, 60.8)],
    ),
    Measurement(
        "FPDT, Llama-3-8B, 2M, 4 A100",
        "arXiv 2408.16978, table 3",
        "llama3_8b",
        _gpus(4, training__seq_len=2**21)
        | {
            "plan.gpu": "A100-80GB",
            "plan.gpus_per_node": 4,
            "activation_checkpoint.keep_attention": "all",
            "memory.stream_offload": "host",
            "memory.optimizer_offload": True,
        },
        [(MFU, 55.7)],
    ),
]


def plan_of(one: Measurement) -> Any:
    from titan_ulysses.config.load import load_config
    from titan_ulysses.plan.planner import make_plan, set_up

    return make_plan(
        set_up(load_config(ROOT / "configs" / f"{one.config}.toml", one.settings.items()))
    )


def compare(one: Measurement, plan: Any) -> list[dict[str, Any]]:
    """Return a row for each figure of a measurement."""
    return [
        {
            "name": one.name,
            "source": one.source,
            "unit": what.unit,
            "measured": measured,
            "planned": what.of_plan(plan),
            "ratio": what.of_plan(plan) / measured,
            "missing": one.missing.get(what.unit, ""),
        }
        for what, measured in one.measured
    ]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--only", default="", help="a word in the names of those to plan")
    args = parser.parse_args()
    print(f"planned (simulated), not measured\n{'':<50} {'measured':>9} {'planned':>9} ratio  took")
    for one in PUBLISHED:
        if args.only.lower() not in one.name.lower():
            continue
        started = time.perf_counter()
        rows = compare(one, plan_of(one))
        for row in rows:
            print(
                f"{row['name']:<50} {row['measured']:9,.1f} {row['planned']:9,.1f} "
                f"{row['ratio']:5.2f} {time.perf_counter() - started:5.0f} s  {row['unit']}",
                flush=True,
            )


if __name__ == "__main__":
    main()
