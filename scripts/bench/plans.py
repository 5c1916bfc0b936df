"""Make every planned table and picture of the README and the docs, and write them into the pages.

    bash scripts/bench/plans.sh                     all of them
    bash scripts/bench/plans.sh ladder published    some

What was planned is in scripts/bench/plans.json: each table with its page, header and rows, the
sentences that quote figures, and the CPU seconds that it took. `tests/test_plans.py` compares the
pages with that file.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from math import ceil
from typing import Any, NamedTuple

import published
from common import ROOT, model_table, parser_of
from megatron import tensor_parallelize
from published import gpus, planned, setup_of
from scaling import exchanged_bytes
from torch.distributed.tensor.parallel import loss_parallel
from versus_megatron import sent

from titan_ulysses.distributed.hardware import GIB
from titan_ulysses.distributed.sequence import chunk_length
from titan_ulysses.observability.units import size_text, time_text
from titan_ulysses.plan import fastest, plots, search
from titan_ulysses.plan.cost import Time, step_time
from titan_ulysses.plan.planner import Plan, Setup, make_plan
from titan_ulysses.plan.run_cost import other_kernels
from titan_ulysses.plan.searches import ending
from titan_ulysses.plan.simulate import shared_ranks
from titan_ulysses.setup.parallelize import wrap

OUTPUT = ROOT / "scripts" / "bench" / "plans.json"
LLAMA, QWEN = "llama3_8b", "qwen3_8b"
LIKE_ALST = {"memory.parameter_offload": True, "memory.stream_chunk_tokens": -1}
STREAMED = {"memory.stream_offload": "host"}
FEW_GPUS = {"plan.world_size": 1, "parallelism.sequence_parallel_degree": 1}
FA3 = {"plan.attention_kernel": "fa3"}
EIGHT_BITS = {"optimizer.name": "adamw8bit", "optimizer.stochastic_rounding": True}
DISK = {"plan.disk_gib": 28_600}
"""Eight drives of 3.84 TB, as in DGX H100."""
ALST = [32_000, 160_000, 1_100_000, 1_200_000, 2_400_000, 3_700_000, None, None, None]
"""ALST's longest sequences (arXiv 2506.13996, section 5.3), for the steps of `search.ladder`."""

Rows = list[list[str]]


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


def of_measurements(rows: Rows) -> list[str]:
    times = [row for row in rows if row[1].endswith(published.SECONDS.unit)]
    figures = [[float(row[i].split()[0].replace(",", "")) for i in (1, 2)] for row in times]
    worst = ceil(max(100 * abs(plan / measured - 1) for measured, plan in figures))
    pages = ("README.md", "docs/benchmarks.md")
    return [f"{page}: step times within {worst} %" for page in pages]


def ladder() -> Iterator[list[str]]:
    """The ladder: its picture, and what ALST measured beside it."""
    steps = []
    for step, theirs in zip(search.ladder(setup_of(LLAMA, LIKE_ALST | DISK)), ALST, strict=True):
        assert step.plan, f"{step.what}: {step.left_out or 'no length fits'}"
        steps.append(step)
        length, seconds = step.plan.seq_len, time_text(step.plan.time.seconds)
        beside = [f"{theirs:,}", f"{length:,}", f"{length / theirs:.2f}"] if theirs else []
        yield [step.what, *(beside or ["-", f"{length:,}", "-"]), ending(step.plan), seconds]
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
    quoted = [f"| {row[2]} | {row[5]} |" for row in one_by_one]
    quoted.append(f"hold sequences of {rows[0][2]} tokens")
    return [f"docs/million-tokens.md: {one}" for one in quoted]


def hybrids() -> Iterator[list[str]]:
    on_host = gpus(8, 2**20, {"memory.parameter_offload": True})
    for what, config, number, settings in (
        ("Qwen3-Next-80B-A3B", "qwen3_next_80b", 32, {}),
        (
            "Qwen3-Next-80B-A3B, parameters and optimizer on the host",
            *("qwen3_next_80b", 8, on_host),
        ),
        ("OLMo-Hybrid-7B", "olmo_hybrid_7b", 8, {}),
    ):
        plan = planned(config, settings)
        host, seconds = f"{plan.host_bytes / GIB:,.0f} GiB", time_text(plan.time.seconds)
        yield [what, str(number), gib(plan.gpu_bytes), host, seconds]


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
        plan = planned(config, settings | FA3 | {"training.seq_len": tokens})
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
        found = search.longest(setup_of(LLAMA, settings | STREAMED), near=3_400_000, close=0.01)
        assert found
        seconds = time_text(found.time.seconds)
        yield [what, f"{found.seq_len:,}", seconds, f"{found.host_bytes / GIB:,.0f}"]


def of_hour(rows: Rows) -> list[str]:
    return [f"docs/streaming.md: --training.seq_len {rows[0][1].replace(',', '')} ```"]


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


def indexers() -> Iterator[list[str]]:
    """QLoRA of whole models with learned sparse attention: DeepSeek-V3.2-Exp and GLM-5, whose
    numbers are transformers' defaults.
    """
    runs = product(("deepseek_v32", "glm_moe_dsa"), ((8, "H200"), (32, "H100-80GB")))
    for model, (number, gpu) in runs:
        run = {"model.config": {"model_type": model}, "plan.gpu": gpu, "plan.world_size": number}
        plan = planned(QWEN, SPARSE | run)
        assert plan.fits, (model, gpu)
        parts = ("parameters", "gathered parameters", "checkpoints")
        memory = [plan.peak.components[x] for x in parts]
        seconds = [plan.time.parts[x] for x in ("indexer", "sparse attention")]
        seconds.append(plan.time.seconds)
        cells = [model, f"{number} x {gpu}", gib(plan.gpu_bytes), *map(gib, memory)]
        yield [*cells, *map(time_text, seconds)]


def readme() -> Iterator[list[str]]:
    """The plan of the README's long run."""
    plan = planned(LLAMA, {"training.seq_len": 2**20})
    used = (size_text(size) for size in (plan.gpu_bytes, plan.host_bytes))
    seconds, length = time_text(plan.time.seconds), search.estimate(plan)
    yield [*used, seconds, f"{plan.mfu:.1%}", f"{length:,}"]


def of_readme(rows: Rows) -> list[str]:
    gpu, host, seconds, mfu, length = rows[0]
    return [
        f"README.md: all {gpu} of 79.10 GiB host memory of a node: {host} of",
        f"README.md: a step: {seconds}, MFU {mfu}",
        f"README.md: about {length} tokens fit.",
        f"docs/million-tokens.md: {gpu} of a GPU, {host} of host memory, a step of {seconds}.",
    ]


def adapters() -> Iterator[list[str]]:
    """LoRA and QLoRA of whole sequences of one document, on one GPU."""
    nf4 = {"lora.quantize_base": "nf4"}
    for what, config, settings in (
        ("Llama-3-8B, LoRA", LLAMA, {}),
        ("Llama-3-8B, QLoRA", LLAMA, nf4),
        ("Llama-3-70B, LoRA", "llama3_70b", {}),
        ("Llama-3-70B, QLoRA", "llama3_70b", nf4),
    ):
        setup = setup_of(config, gpus(1, 2**18, settings | {"lora.rank": 16}))
        plan = make_plan(setup)
        parameters, length = plan.peak.components["parameters"], "none"
        if parameters < setup.gpu_memory and (most := search.longest(setup, plan)):
            length = f"{most.seq_len:,} in {gib(most.gpu_bytes)}"
            length += f" and {time_text(most.time.seconds)} a step"
        yield [what, gib(parameters), gib(plan.gpu_bytes), length]


# --- scale ----------------------------------------------------------------------------------------


def scale() -> Iterator[list[str]]:
    """Sequence length and sequence-parallel degree grow together."""
    longer = {"model.config.max_position_embeddings": 2**27}
    for ranks in (8, 32, 128, 1024):
        settings = gpus(ranks, 2**15 * ranks, longer)
        whole = planned(LLAMA, settings | published.WHOLE)
        streamed = planned(LLAMA, settings)
        model = whole.setup.model_config
        exchanged = exchanged_bytes(model, degree=ranks, tokens=2**15, itemsize=2)
        assert exchanged == whole.sent("all_to_all"), "the closed form is not what is planned"
        cells = [f"{ranks:,}", f"{whole.seq_len:,}", gib(exchanged), gib(streamed.gpu_bytes)]
        yield [*cells, *(time_text(one.time.seconds) for one in (streamed, whole))]


def meshes() -> Iterator[list[str]]:
    """Every mesh of so many GPUs that has each sequence on a node or more."""
    for world in (8, 64, 512):
        setup = setup_of("llama3_70b", gpus(world, 2**20, {}))
        for mesh in fastest.meshes(setup):
            if mesh["parallelism.sequence_parallel_degree"] < 8:
                continue
            plan = make_plan(search.with_settings(setup, mesh))
            degrees, time_ = plan.setup.degrees, plan.time
            network = time_.parts["exchange"] + time_.waits["FSDP"]
            cells = [str(world), f"{degrees.replicate} x {degrees.shard} x {degrees.sequence}"]
            cells += [time_text(time_.seconds), f"{1 / plan.seconds_per_token:,.0f}"]
            cells += [gib(plan.gpu_bytes) + ("" if plan.fits else ", does not fit")]
            yield [*cells, f"{100 * network / time_.seconds:.1f} %"]


def of_meshes(rows: Rows) -> list[str]:
    """Return the sentence about 512 GPUs, parameters sharded over all of them."""
    sharded = [row for row in rows if row[0] == "512" and row[1].startswith("1 x ")]
    by_degree = {row[1].rpartition(" ")[2]: row for row in sharded}
    times = [by_degree[degree][2] for degree in ("8", "16", "64")]
    shares = sorted(float(row[5].removesuffix(" %")) for row in sharded)
    return [
        f"docs/million-tokens.md: {times[0]} with 8 GPUs a sequence, {times[1]} with 16, and "
        f"{times[2]} with 64",
        f"docs/million-tokens.md: the network takes {shares[0]} to {shares[-1]} % of the step",
    ]


def waits() -> Iterator[list[str]]:
    """The exchange of streamed steps, for which the computation waits, and the most that it would
    save to send a chunk's q, k and v while the chunk before is attended to.

    That is a third of the bytes, but for the first chunk. Forward has q, k, v and the output,
    backward these again, and their gradients. The rest of a layer waits for the output, autograd
    for the gradients, and the keys and values that backward computes first have no attention beside
    them: q, k and v of forward and q of backward are left, as many as q, k, v and the output.
    """
    for ranks, kilo in ((8, 64), (8, 256), (8, 1024), (16, 128), (64, 512), (64, 1024)):
        plan = planned(LLAMA, gpus(ranks, 2**10 * kilo, FA3))
        exchange, seconds = plan.time.parts["exchange"], plan.time.seconds
        chunks = -(-plan.seq_len // (chunk_length(0, plan.seq_len, ranks) or plan.seq_len))
        shares = exchange / seconds, exchange / 3 * (chunks - 1) / chunks / seconds
        cells = [str(ranks), f"{plan.seq_len:,}", str(chunks), *map(time_text, (seconds, exchange))]
        yield [*cells, *(f"{100 * share:.2f} %" for share in shares)]


def of_waits(rows: Rows) -> list[str]:
    inside, across = (
        max((row[6] for row in rows if (row[0] == "8") == is_node), key=lambda x: float(x[:-2]))
        for is_node in (True, False)
    )
    return [f"docs/streaming.md: Inside a node it is at most {inside}, across nodes {across}"]


WHOLE = published.WHOLE | {
    "activation_checkpoint.offload": "none",
    "memory.mlp_tile_tokens": -1,
    "memory.loss_tile_tokens": -1,
}
IN_CHUNKS = dict.fromkeys(WHOLE, 0) | {"activation_checkpoint.offload": "none"}
CUTS: list[tuple[str, Callable[..., Any], dict[str, Any]]] = [
    ("Megatron, the logits of all tokens at once", tensor_parallelize, WHOLE),
    ("Ulysses and FSDP, the same", wrap, WHOLE),
    (
        "Megatron, loss in tiles of 32,768 tokens",
        *(tensor_parallelize, WHOLE | {"memory.loss_tile_tokens": 2**15}),
    ),
    (
        "Ulysses and FSDP, loss in tiles of 1 GiB",
        *(wrap, WHOLE | {"memory.loss_tile_tokens": 0}),
    ),
    ("Ulysses, tiles and streaming", wrap, IN_CHUNKS),
    (
        "Ulysses, + checkpoints and hidden states on the host",
        *(wrap, IN_CHUNKS | STREAMED | {"activation_checkpoint.offload": "host"}),
    ),
]
"""All have activation checkpoints of every block. A rank has the logits of a tile for the whole
vocabulary in Ulysses, and for its part of it in Megatron.
"""


def plan_of_cut(setup: Setup, cut: Callable[..., Any]) -> Plan:
    with loss_parallel():
        return make_plan(setup, wrap=cut)


def time_of_cut(plan: Plan, cut: Callable[..., Any]) -> Time:
    """Return the time of a planned step.

    Tensor parallelism waits for all its collectives, as Ulysses does for its all-to-alls. Those of
    FSDP overlap with the computation.
    """
    if cut is wrap:
        return plan.time
    setup, links, degree = plan.setup, plan.setup.links, plan.setup.degrees.sequence
    where: dict[str, Any] = {"gpu": setup.gpu, "links": links, "rates": setup.rates}
    time_ = step_time(plan.cost, exchanged=0, gathered=0, on_host={}, **where)
    size = plan.sent("all_gather") * degree + plan.sent("reduce_scatter")
    size += 2 * plan.sent("all_reduce")
    return replace(time_, parts=time_.parts | {"exchange": links.fsdp_seconds(size, setup.gpu)})


def cuts() -> Iterator[list[str]]:
    """Ulysses and Megatron-style parallelism (megatron.py) of Llama-3-8B on one node."""
    for what, cut, settings in CUTS:
        setup = setup_of(LLAMA, gpus(8, 2**18, settings))
        plan = plan_of_cut(setup, cut)
        most = search.longest(setup, plan, close=0.01, plan=partial(plan_of_cut, cut=cut))
        assert most, what
        leaves, time_ = sum(sent(plan.collectives, 8).values()), time_of_cut(plan, cut)
        seconds = (time_.seconds, time_.parts["exchange"])
        cells = [what, f"{most.seq_len:,}", size_text(leaves), *map(time_text, seconds)]
        yield [*cells, gib(plan.gpu_bytes)]


class Table(NamedTuple):
    page: str
    header: str
    """empty where only sentences quote what is planned"""
    make: Callable[[], Iterator[list[str]]]
    quoted: Callable[[Rows], list[str]] = lambda rows: []
    """the sentences of pages that quote figures of the rows"""


TABLES = {
    "published": Table(
        "docs/planner.md",
        "| run | measured | planned | ratio | not in the plan |",
        *(measurements, of_measurements),
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
    "hour": Table("docs/streaming.md", "| kernel | tokens | a step | host GiB |", hour, of_hour),
    "readme": Table("README.md", "", readme, of_readme),
    "adapters": Table(
        "docs/fine-tuning.md",
        "| | parameters | GPU memory at 262,144 tokens | longest sequence |",
        adapters,
    ),
    "scale": Table(
        "docs/scaling.md",
        "| ranks | tokens | exchanged | GPU memory | a step, streamed | a step, not streamed |",
        scale,
    ),
    "meshes": Table(
        "docs/scaling.md",
        "| GPUs | replicate x shard x sp | a step | tokens/s | GPU memory | network's share |",
        *(meshes, of_meshes),
    ),
    "waits": Table(
        "docs/streaming.md",
        "| GPUs | tokens | chunks | a step | exchange | share | ahead |",
        *(waits, of_waits),
    ),
    "cuts": Table(
        "docs/scaling.md",
        "| | longest S | a rank sends | a step | of it waiting for collectives | GPU memory |",
        cuts,
    ),
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
        table, started = TABLES[name], time.process_time()
        print(f"\n{name}: planned (simulated), not measured")
        made: Rows = []
        with shared_ranks():
            for cells in table.make():
                made.append(cells)
                print(" | ".join(cells))
        rows = [line_of(cells) for cells in made]
        if table.header:
            write_table(table, rows)
        seconds = round(time.process_time() - started)
        known[name] = {
            "page": table.page,
            "header": table.header,
            "rows": rows if table.header else [],
            "sentences": table.quoted(made),
            "cpu_seconds": seconds,
        }
        OUTPUT.write_text(json.dumps(known, indent=1) + "\n")
        print(f"{name}: {seconds} CPU seconds")


if __name__ == "__main__":
    main()
