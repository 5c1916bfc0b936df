"""Published measurements of long-sequence training on GPUs, and what the planner says of the same
runs. Nothing is run on a GPU here.

    python scripts/bench/published.py                  all of them
    python scripts/bench/published.py --only trl       those whose name has this word

Each measurement has its source, and the settings that come closest to its run: where others split
a sequence as a ring, the plan has Ulysses. A ratio is the plan's figure divided by the measured
one. Where it is not within `BOUNDS`, `missing` says which cost the plan does not have.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from common import ROOT, parser_of

BOUNDS = 0.8, 1.25
GIB, GB = 2**30, 1e9
"""What PyTorch's users mean by GB where they print bytes / 1e9, as TRL does."""


class Quantity(NamedTuple):
    """What was measured, and how it is written."""

    unit: str
    of_plan: Callable[[Any], float]
    text: str = "{:,.0f}"


SECONDS = Quantity("s a step", lambda plan: plan.time.seconds)
PEAK = Quantity("GB of tensors on a GPU", lambda plan: plan.peak.bytes / GB, "{:,.1f}")
MFU = Quantity("% MFU", lambda plan: 100 * plan.mfu, "{:.1f}")
FITS = Quantity("GiB that CUDA has", lambda plan: plan.gpu_bytes / GIB, "{:,.1f}")
"""What a run that fitted cannot have needed more of. The plan must not either."""
BY_UNIT = {one.unit: one for one in (SECONDS, PEAK, MFU, FITS)}


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
TRL = "pull request 6845"
GPT_OSS: dict[str, Any] = {
    "model_type": "gpt_oss",
    "vocab_size": 201_088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "max_position_embeddings": 2**20,
    "tie_word_embeddings": False,
}
MARIN: dict[str, Any] = {
    "model_type": "qwen2_moe",
    "vocab_size": 128_256,
    "hidden_size": 5120,
    "intermediate_size": 5120,
    "moe_intermediate_size": 2560,
    "shared_expert_intermediate_size": 5120,
    "num_experts": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 10,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
"""A model of the family of Qwen2-MoE with the sizes that the source names."""

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
        "TRL, Qwen3-0.6B, 1M, 8 H100, checkpoints on the GPU",
        "pull request 6845; accelerate, pull request 4175",
        "qwen3_8b",
        _gpus(8, training__seq_len=2**20)
        | LIKE_TRL
        | SMALL
        | {"activation_checkpoint.offload": "none"},
        [(SECONDS, 137), (PEAK, 27.9)],
        {PEAK.unit: "K and V of all tokens, which accelerate's ring gathers: 4.3 GB"},
    ),
    Measurement(
        "TRL, Qwen3-0.6B, 1M, 8 H100, checkpoints on the host",
        "accelerate, pull request 4175",
        "qwen3_8b",
        _gpus(8, training__seq_len=2**20) | LIKE_TRL | SMALL,
        [(PEAK, 20.8)],
        {PEAK.unit: "the same K and V: 4.3 GB"},
    ),
    Measurement(
        "TRL, Qwen3-0.6B, 4M, 8 H100",
        TRL,
        "qwen3_8b",
        _gpus(8, training__seq_len=2**22) | LIKE_TRL | SMALL,
        [(SECONDS, 2135), (PEAK, 73.7)],
        {PEAK.unit: "the same K and V: 17.2 GB"},
    ),
    Measurement(
        "TRL, Qwen3-32B, 1M, 8 H100",
        TRL,
        "qwen3_32b",
        # Its weights, gradients and moments in fp32 would be 66 GB a GPU, more than was measured.
        _gpus(8, training__seq_len=2**20) | LIKE_TRL | {"memory.parameter_offload": True},
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
    Measurement(
        "ALST, Llama-3-8B, 500K, 1 H100",
        "arXiv 2506.13996, section 5.2",
        "llama3_8b",
        _gpus(1, training__seq_len=500_000) | WHOLE | {"memory.parameter_offload": True},
        [(FITS, 79.1)],
    ),
    Measurement(
        "ALST, Llama-3-8B, 15M, 32 H100",
        "arXiv 2506.13996, section 5.2",
        "llama3_8b",
        _gpus(32, training__seq_len=15_000_000) | WHOLE | {"memory.parameter_offload": True},
        [(FITS, 79.1)],
    ),
    Measurement(
        "UPipe, Llama-3-8B, 5M, 8 H100",
        "arXiv 2602.21196, abstract",
        "llama3_8b",
        _gpus(8, training__seq_len=5 * 2**20) | {"memory.optimizer_offload": True},
        [(FITS, 79.1)],
    ),
    Measurement(
        "Unsloth, gpt-oss-20b, QLoRA, 500K, 1 H100",
        "docs.unsloth.ai/new/500k-context-length-fine-tuning",
        "llama3_8b",
        _gpus(1, training__seq_len=500 * 2**10, lora__rank=8, lora__quantize_base="nf4")
        | WHOLE
        | {"model.config": GPT_OSS},
        [(FITS, 79.1)],
    ),
    Measurement(
        "Marin, 129B, 14.6B active, 4,096 tokens, 512 GB200",
        "marin-community/marin, issue 7201",
        "llama3_8b",
        _gpus(
            512,
            training__seq_len=4096,
            training__local_batch_size=16,
            plan__gpu="GB200",
            plan__gpus_per_node=64,
            plan__host_memory_gib=0,
            plan__attention_kernel="fa4",
            parallelism__data_parallel_shard_degree=64,
            parallelism__data_parallel_replicate_degree=8,
        )
        | WHOLE
        | {"parallelism.sequence_parallel_degree": 1, "activation_checkpoint.offload": "none"}
        | {"model.config": MARIN},
        [(MFU, 22.3)],
    ),
]


def plan_of(one: Measurement) -> Any:
    from titan_ulysses.config.load import load_config
    from titan_ulysses.plan.planner import make_plan, set_up

    config = load_config(ROOT / "configs" / f"{one.config}.toml", one.settings.items())
    return make_plan(set_up(config))


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
                f"{row['ratio']:5.2f} {time.perf_counter() - started:5.0f} s  {row['unit']}"
            )


if __name__ == "__main__":
    main()
