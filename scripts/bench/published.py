"""Published measurements of long-sequence training on GPUs, and what the planner says of the same
runs. Nothing is run on a GPU here: plans.py makes the table.

Each measurement has its source, and the settings that come closest to its run: where others split
a sequence as a ring, the plan has Ulysses. A ratio is the plan's figure divided by the measured
one. Where it is not within `BOUNDS`, `missing` says which cost the plan does not have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from common import ROOT, model_table

from titan_ulysses.config.load import load_config
from titan_ulysses.plan.planner import Plan, Setup, make_plan, set_up

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
    settings: dict[str, Any]
    measured: list[tuple[Quantity, float]]
    missing: dict[str, str] = field(default_factory=dict)
    """by unit, for figures that the plan is not close to: which cost it does not have"""
    config: str = "llama3_8b"


def gpus(count: int, tokens: int, more: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of sequences of so many tokens, each on all GPUs unless more differs."""
    own = {"plan.world_size": count, "parallelism.sequence_parallel_degree": count}
    return own | {"training.seq_len": tokens} | more


def _by_trl(
    name: str,
    source: str,
    settings: dict[str, Any],
    measured: list[tuple[Quantity, float]],
    missing: str = "",
    config: str = "qwen3_8b",
) -> Measurement:
    """Return a measurement by TRL's authors; missing: of its memory."""
    return Measurement(name, source, settings, measured, {PEAK.unit: missing}, config)


WHOLE = {"memory.stream_chunk_tokens": -1}
LIKE_TRL = WHOLE | {"memory.mlp_tile_tokens": -1, "plan.attention_kernel": "fa3"}
"""TRL tiles only the loss. cuDNN's attention is planned with the rates of FlashAttention 3."""
SMALL = {"model.config.hidden_size": 1024, "model.config.intermediate_size": 3072}
SMALL |= {"model.config.num_hidden_layers": 28, "model.config.num_attention_heads": 16}
SMALL |= {"model.config.tie_word_embeddings": True}
"""Qwen3-0.6B, from Qwen3-8B."""
ON_HOST = {"memory.parameter_offload": True}
LIKE_ALST = WHOLE | ON_HOST
LIKE_FPDT = {"memory.stream_offload": "host", "memory.optimizer_offload": True}
LIKE_FPDT |= {"activation_checkpoint.keep_attention": "all"}
FOUR_A100 = {"plan.gpu": "A100-80GB", "plan.gpus_per_node": 4}
QLORA = {"lora.rank": 8, "lora.quantize_base": "nf4"}
GB200 = {"plan.gpu": "GB200", "plan.gpus_per_node": 64, "plan.host_memory_gib": 0}
GB200 |= {"plan.attention_kernel": "fa4"}
REPLICAS = {"training.local_batch_size": 16, "activation_checkpoint.offload": "none"}
REPLICAS |= {"parallelism.data_parallel_shard_degree": 64}
REPLICAS |= {"parallelism.data_parallel_replicate_degree": 8}
REPLICAS |= {"parallelism.sequence_parallel_degree": 1}
TRL = "pull request 6845"
GPT_OSS = model_table("gpt_oss", vocab=201_088, width=2880, inner=2880, layers=24, heads=(64, 8))
GPT_OSS |= {"head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4}
GPT_OSS |= {"sliding_window": 128, "max_position_embeddings": 2**20}
MARIN = model_table("qwen2_moe", vocab=128_256, width=5120, inner=5120, layers=48, heads=(40, 10))
MARIN |= {"moe_intermediate_size": 2560, "shared_expert_intermediate_size": 5120}
MARIN |= {"num_experts": 64, "num_experts_per_tok": 4, "max_position_embeddings": 8192}
"""A model of the family of Qwen2-MoE with the sizes that the source names."""

PUBLISHED = [
    Measurement(
        "ALST, Llama-3-8B, 3.7M tokens, 8 H100",
        "arXiv 2506.13996, table 4; FlashAttention 2",
        gpus(8, 3_700_000, LIKE_ALST),
        [(SECONDS, 6455)],
    ),
    _by_trl(
        "TRL, Qwen3-8B, 1M, 8 H100",
        "TRL, docs/source/long_context_training.md and pull request 6846; cuDNN's attention",
        gpus(8, 2**20, LIKE_TRL),
        [(SECONDS, 380), (PEAK, 56.2)],
    ),
    _by_trl(
        "TRL, Qwen3-8B, 1M, 8 H100, FlashAttention 2",
        "transformers, pull request 48324",
        gpus(8, 2**20, LIKE_TRL | {"plan.attention_kernel": "fa2"}),
        [(SECONDS, 606)],
    ),
    _by_trl("TRL, Qwen3-8B, 4M, 32 H100", TRL, gpus(32, 2**22, LIKE_TRL), [(SECONDS, 1346)]),
    _by_trl(
        "TRL, Qwen3-0.6B, 1M, 8 H100, checkpoints on the GPU",
        "pull request 6845; accelerate, pull request 4175",
        gpus(8, 2**20, LIKE_TRL | SMALL | {"activation_checkpoint.offload": "none"}),
        [(SECONDS, 137), (PEAK, 27.9)],
        "K and V of all tokens, which accelerate's ring gathers: 4.3 GB",
    ),
    _by_trl(
        "TRL, Qwen3-0.6B, 1M, 8 H100, checkpoints on the host",
        "accelerate, pull request 4175",
        gpus(8, 2**20, LIKE_TRL | SMALL),
        [(PEAK, 20.8)],
        "the same K and V: 4.3 GB",
    ),
    _by_trl(
        "TRL, Qwen3-0.6B, 4M, 8 H100",
        TRL,
        gpus(8, 2**22, LIKE_TRL | SMALL),
        [(SECONDS, 2135), (PEAK, 73.7)],
        "the same K and V: 17.2 GB",
    ),
    _by_trl(
        "TRL, Qwen3-32B, 1M, 8 H100",
        TRL,
        # Its weights, gradients and moments in fp32 would be 66 GB a GPU, more than was measured.
        gpus(8, 2**20, LIKE_TRL | ON_HOST),
        [(SECONDS, 1295), (PEAK, 60.8)],
        config="qwen3_32b",
    ),
    Measurement(
        "FPDT, Llama-3-8B, 2M, 4 A100",
        "arXiv 2408.16978, table 3",
        gpus(4, 2**21, FOUR_A100 | LIKE_FPDT),
        [(MFU, 55.7)],
    ),
    Measurement(
        "ALST, Llama-3-8B, 500K, 1 H100",
        "arXiv 2506.13996, section 5.2",
        gpus(1, 500_000, LIKE_ALST),
        [(FITS, 79.1)],
    ),
    Measurement(
        "ALST, Llama-3-8B, 15M, 32 H100",
        "arXiv 2506.13996, section 5.2",
        gpus(32, 15_000_000, LIKE_ALST),
        [(FITS, 79.1)],
    ),
    Measurement(
        "UPipe, Llama-3-8B, 5M, 8 H100",
        "arXiv 2602.21196, abstract",
        gpus(8, 5 * 2**20, {"memory.optimizer_offload": True}),
        [(FITS, 79.1)],
    ),
    Measurement(
        "Unsloth, gpt-oss-20b, QLoRA, 500K, 1 H100",
        "docs.unsloth.ai/new/500k-context-length-fine-tuning",
        gpus(1, 500 * 2**10, WHOLE | QLORA | {"model.config": GPT_OSS}),
        [(FITS, 79.1)],
    ),
    Measurement(
        "Marin, 129B, 14.6B active, 4,096 tokens, 512 GB200",
        "marin-community/marin, issue 7201",
        gpus(512, 4096, WHOLE | GB200 | REPLICAS | {"model.config": MARIN}),
        [(MFU, 22.3)],
    ),
]


def setup_of(config: str, settings: dict[str, Any]) -> Setup:
    return set_up(load_config(ROOT / "configs" / f"{config}.toml", settings.items()))


def planned(config: str, settings: dict[str, Any]) -> Plan:
    return make_plan(setup_of(config, settings))


def plan_of(one: Measurement) -> Plan:
    return planned(one.config, one.settings)


def compare(one: Measurement, plan: Plan) -> list[dict[str, Any]]:
    """Return a row for each figure of a measurement."""
    rows = []
    for what, measured in one.measured:
        planned, missing = what.of_plan(plan), one.missing.get(what.unit, "")
        row = {"name": one.name, "source": one.source, "unit": what.unit, "measured": measured}
        rows.append(row | {"planned": planned, "ratio": planned / measured, "missing": missing})
    return rows
