"""Make every planned table and picture of the README and the docs, and write them into the pages.

    bash scripts/bench/plans.sh                     all of them
    bash scripts/bench/plans.sh ladder published    some

What was planned is in scripts/bench/plans.json: each table with its page, header and rows, and the
sentences that quote figures. `tests/test_plans.py` compares the pages with that file.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import published
from common import ROOT, model_table, parser_of

from titan_ulysses.config.load import load_config
from titan_ulysses.distributed.hardware import GIB
from titan_ulysses.observability.units import time_text
from titan_ulysses.plan import plots, search
from titan_ulysses.plan.planner import Plan, make_plan, set_up
from titan_ulysses.plan.run_cost import other_kernels
from titan_ulysses.plan.searches import what_ends

OUTPUT = ROOT / "scripts" / "bench" / "plans.json"
LLAMA, QWEN = "llama3_8b", "qwen3_8b"
LIKE_ALST = {"memory.parameter_offload": True, "memory.stream_chunk_tokens": -1}
STREAMED = {"memory.stream_offload": "host"}
FEW_GPUS = {"plan.world_size": 1, "parallelism.sequence_parallel_degree": 1}
EIGHT_BITS = {"optimizer.name": "adamw8bit", "optimizer.stochastic_rounding": True}
DISK = {"plan.disk_gib": 28_600}
"""Eight drives of 3.84 TB, as in DGX H100."""
ALST = [32_000, 160_000, 1_100_000, 1_200_000, 2_400_000, 3_700_000, None, None, None]
"""ALST's longest sequences (arXiv 2506.13996, section 5.3), for the steps of `search.ladder`."""

Rows = list[list[str]]


def planned(config: str, settings: dict[str, Any]) -> Plan:
    return make_plan(set_up(load_config(ROOT / "configs" / f"{config}.toml", settings.items())))


def gib(size: float) -> str:
    return f"{size / GIB:,.0f} GiB" if size >= 100 * GIB else f"{size / GIB:.2f} GiB"


def measurements() -> Iterator[list[str]]:
    """The table of published measurements."""
    for one in published.PUBLISHED:
        for row in published.compare(one, published.plan_of(one)):
            what = published.BY_UNIT[row["unit"]]
            name, planned = f"{row['name']} ({row['source']})", what.text.format(row["planned"])
            measured = f"{what.text.format(row['measured'])} {row['unit']}"
            yield [name, measured, planned, f"{row['ratio']:.2f}", row["missing"]]


def ladder() -> Iterator[list[str]]:
    """The ladder: its picture, and what ALST measured beside it."""
    config = load_config(ROOT / "configs" / f"{LLAMA}.toml", (LIKE_ALST | DISK).items())
    steps = []
    for step, theirs in zip(search.ladder(set_up(config)), ALST, strict=True):
        assert step.plan, f"{step.what}: {step.refused or 'no length fits'}"
        steps.append(step)
        length, seconds = step.plan.seq_len, time_text(step.plan.time.seconds)
        beside = [f"{theirs:,}", f"{length:,}", f"{length / theirs:.2f}"] if theirs else []
        yield [step.what, *(beside or ["-", f"{length:,}", "-"]), what_ends(step.plan), seconds]
    plots.ladder(
        steps,
        ROOT / "docs" / "memory_ladder.png",
        theirs=ALST,
        of_theirs="ALST, measured (arXiv 2506.13996)",
        title="Llama-3-8B on one node of eight H100-80GB: 1.9 TB of host memory, 30.7 TB of NVMe",
    )


def of_ladder(rows: Rows) -> list[str]:
    """Return the sentences that quote the ladder, of the steps that docs/million-tokens.md has."""
    one_by_one = [row for row in rows if row[0] != "+ offload, no tiled MLP"][:5]
    return [f"docs/million-tokens.md: | {row[2]} | {row[5]} |" for row in one_by_one]


def hybrids() -> Iterator[list[str]]:
    on_host = {"plan.world_size": 8, "parallelism.sequence_parallel_degree": 8}
    on_host |= {"memory.parameter_offload": True}
    for what, config, gpus, settings in (
        ("Qwen3-Next-80B-A3B", "qwen3_next_80b", 32, {}),
        (
            "Qwen3-Next-80B-A3B, parameters and optimizer on the host",
            *("qwen3_next_80b", 8, on_host),
        ),
        ("OLMo-Hybrid-7B", "olmo_hybrid_7b", 8, {}),
    ):
        plan = planned(config, settings)
        host, seconds = f"{plan.host_bytes / GIB:,.0f} GiB", time_text(plan.time.seconds)
        yield [what, str(gpus), gib(plan.gpu_bytes), host, seconds]


def recipes() -> Iterator[list[str]]:
    for name, what in (
        ("alst_llama_8b_1gpu", "ALST, Llama-8B, 500K tokens on one H100"),
        ("alst_llama_8b_8gpu", "ALST, Llama-8B, 3.7M tokens on eight"),
        ("alst_llama_8b_32gpu", "ALST, Llama-8B, 15M tokens on 32"),
        ("alst_llama_70b_32gpu", "ALST, Llama-70B, 4M tokens on 32"),
        ("trl_qwen3_8b_1m", "TRL's example, Qwen3-8B on eight, 1M tokens"),
    ):
        plan = planned(name, {})
        assert plan.fits, name
        memory = [f"{plan.gpu_bytes / GIB:.1f} GiB", f"{plan.host_bytes / GIB:,.0f} GiB"]
        yield [f"`configs/{name}.toml`", what, *memory, f"{plan.time.seconds:,.0f} s"]


ON_HOST = STREAMED | {"memory.parameter_offload": True}
ONE_GPU = FEW_GPUS | EIGHT_BITS | STREAMED | {"plan.host_memory_gib": 128}
KEPT = {"activation_checkpoint.keep_attention": "all", "memory.stream_chunk_tokens": 131_072}
MILLION: list[tuple[str, str, int, dict[str, Any]]] = [
    ("8 GPUs", LLAMA, 2**20, ON_HOST),
    ("8 GPUs", LLAMA, 2**22, ON_HOST),
    ("1 GPU", LLAMA, 2**20, ONE_GPU | {"activation_checkpoint.every": 4}),
    (
        "8 GPUs, Qwen3-8B, all attention kept, hidden states on the GPU, chunks of 131,072",
        *(QWEN, 2**20, KEPT),
    ),
]


def million() -> Iterator[list[str]]:
    """Steps of a million tokens and more. The memory is that of FlashAttention 3."""
    for what, config, tokens, settings in MILLION:
        more = {"plan.attention_kernel": "fa3", "training.seq_len": tokens}
        plan = planned(config, settings | more)
        memory = [f"{plan.gpu_bytes / GIB:.2f}", f"{plan.host_bytes / GIB:,.0f}"]
        seconds = [plan.time.seconds, other_kernels(plan)["fa2"]]
        yield [what, f"{plan.seq_len:,}", *memory, *(f"{one:,.0f} s" for one in seconds)]


def of_million(rows: Rows) -> list[str]:
    one, four = rows[0][2], rows[1][2]
    return [
        f"README.md: peak of Llama-3-8B on eight H100s is {one} GiB at 1M tokens and {four} GiB at "
        "4M.",
        f"docs/benchmarks.md: 1M and 4M tokens on eight GPUs in {one} and {four} GiB",
    ]


def hour() -> Iterator[list[str]]:
    """The longest sequences whose step takes an hour."""
    for kernel, what in (("fa3", "FlashAttention 3"), ("fa2", "FlashAttention 2")):
        settings = {
            "activation_checkpoint.keep_attention": "all",
            "activation_checkpoint.every": 2,
            "plan.attention_kernel": kernel,
            "plan.max_step_seconds": 3600,
        }
        config = load_config(ROOT / "configs" / f"{LLAMA}.toml", (settings | STREAMED).items())
        found = search.longest(set_up(config), near=3_400_000, close=0.01)
        assert found
        seconds = time_text(found.time.seconds)
        yield [what, f"{found.seq_len:,}", seconds, f"{found.host_bytes / GIB:,.0f}"]


QWEN_MOE = model_table("qwen3_moe", vocab=151_936, width=2048, inner=6144, layers=48, heads=(32, 4))
QWEN_MOE |= {"head_dim": 128, "moe_intermediate_size": 768, "max_position_embeddings": 262_144}
QWEN_MOE |= {"num_experts": 128, "num_experts_per_tok": 8}
QLORA = FEW_GPUS | {
    "activation_checkpoint.offload": "none",
    "lora.rank": 16,
    "lora.quantize_base": "nf4",
    "lora.target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "lora.target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    "training.seq_len": 2**14,
}
ON_24_GIB = {
    "lora.rank": 8,
    "memory.optimizer_offload": True,
    "activation_checkpoint.offload": "host",
    "plan.host_memory_gib": 64,
    "training.seq_len": 2**12,
}


def experts() -> Iterator[list[str]]:
    """QLoRA of mixtures, attention and experts, on one GPU."""
    for model, config, gpu, settings in (
        ("gpt-oss-20b", published.GPT_OSS, "H100-80GB", {}),
        ("gpt-oss-20b", published.GPT_OSS, "RTX-4090", {}),
        ("Qwen3-30B-A3B", QWEN_MOE, "H100-80GB", {}),
        ("Qwen3-30B-A3B", QWEN_MOE, "RTX-4090", ON_24_GIB),
    ):
        settings = QLORA | settings | {"model.config": config, "plan.gpu": gpu}
        plan = planned(QWEN, settings)
        assert plan.fits, (model, gpu)
        what = [f"{model}, rank {settings['lora.rank']}", gpu, f"{plan.seq_len:,}"]
        fits = [f"{plan.gpu_bytes / GIB:.2f} GiB", f"{search.estimate(plan):,}"]
        yield [*what, *fits, time_text(plan.time.seconds)]


SPARSE = {
    "lora.rank": 16,
    "lora.quantize_base": "nf4",
    "lora.target_modules": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
    "lora.target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    "training.seq_len": 2**17,
    "parallelism.sequence_parallel_degree": 8,
    "plan.gpus_per_node": 8,
    "activation_checkpoint.offload": "none",
}


_OF_LAYERS = ("gathered parameters", "checkpoints")


def indexers() -> Iterator[list[str]]:
    """QLoRA of whole models with learned sparse attention: DeepSeek-V3.2-Exp and GLM-5, whose
    numbers are transformers' defaults.
    """
    runs = product(("deepseek_v32", "glm_moe_dsa"), ((8, "H200"), (32, "H100-80GB")))
    for model, (gpus, gpu) in runs:
        run = {"model.config": {"model_type": model}, "plan.gpu": gpu, "plan.world_size": gpus}
        plan = planned(QWEN, SPARSE | run)
        assert plan.fits, (model, gpu)
        memory = [plan.peak.components[x] for x in ("parameters", *_OF_LAYERS)]
        seconds = [plan.time.parts[x] for x in ("indexer", "sparse attention")]
        seconds.append(plan.time.seconds)
        cells = [model, f"{gpus} x {gpu}", gib(plan.gpu_bytes), *map(gib, memory)]
        yield [*cells, *map(time_text, seconds)]


class Table(NamedTuple):
    page: str
    header: str
    make: Callable[[], Iterator[list[str]]]
    quoted: Callable[[Rows], list[str]] = lambda rows: []
    """the sentences of pages that quote figures of the rows"""


TABLES = {
    "published": Table(
        "docs/planner.md", "| run | measured | planned | ratio | not in the plan |", measurements
    ),
    "ladder": Table(
        "docs/planner.md",
        "| | ALST, measured | planned | ratio | what ends it | a step |",
        *(ladder, of_ladder),
    ),
    "hybrids": Table(
        "docs/planner.md", "| model | GPUs | a GPU | host memory of a node | a step |", hybrids
    ),
    "recipes": Table("docs/migration.md", "| config | of | GPU | node | a step |", recipes),
    "million": Table(
        "docs/streaming.md",
        "| | tokens | GPU GiB | host GiB | a step, FlashAttention 3 | a step, FlashAttention 2 |",
        *(million, of_million),
    ),
    "experts": Table(
        "docs/fine-tuning.md", "| model | GPU | tokens | memory | fits | a step |", experts
    ),
    "indexers": Table(
        "docs/models-and-cores.md",
        "| | GPUs | a GPU | weights | gathered | inputs | indexers | attention | a step |",
        indexers,
    ),
    "hour": Table("docs/streaming.md", "| kernel | tokens | a step | host GiB |", hour),
}


def line_of(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def write_table(table: Table, rows: list[str]) -> None:
    """Put rows into the page, in place of those below the header of the table."""
    page = ROOT / table.page
    lines = page.read_text().splitlines()
    assert table.header in lines, f"{table.page}: no table with the header {table.header}"
    start = lines.index(table.header) + 2
    end = next(i for i in range(start, len(lines) + 1) if not "".join(lines[i : i + 1]))
    page.write_text("\n".join([*lines[:start], *rows, *lines[end:]]) + "\n")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(TABLES))
    names = parser.parse_args().names or list(TABLES)
    known = json.loads(OUTPUT.read_text()) if OUTPUT.exists() else {}
    for name in names:
        table, started = TABLES[name], time.perf_counter()
        print(f"\n{name}: planned (simulated), not measured")
        made: Rows = []
        for cells in table.make():
            made.append(cells)
            print(" | ".join(cells))
        rows = [line_of(cells) for cells in made]
        write_table(table, rows)
        seconds = round(time.perf_counter() - started)
        known[name] = {
            "page": table.page,
            "header": table.header,
            "rows": rows,
            "sentences": table.quoted(made),
            "seconds": seconds,
        }
        OUTPUT.write_text(json.dumps(known, indent=1) + "\n")
        print(f"{name}: {seconds} s")


if __name__ == "__main__":
    main()
