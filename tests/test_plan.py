"""The planner: the real step on fake tensors, against real ranks; what it says, and what it refuses."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from models import LLAMA
from ranks import run_on_ranks
from titan_ulysses.config import Config
from titan_ulysses.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def bench():
    """The benchmark that this is a small part of."""
    sys.path.insert(0, str(ROOT / "scripts" / "bench"))
    try:
        import plan_accuracy
    finally:
        sys.path.pop(0)
    return plan_accuracy


def config(**settings) -> Config:
    """section__key = value, over a tiny llama."""
    table: dict = {"model": {"config": LLAMA | {"max_position_embeddings": 2**24}, "tokenizer": "bytes"}}
    table["training"] = {"seq_len": 4096}
    for key, value in settings.items():
        section, name = key.split("__")
        table.setdefault(section, {})[name] = value
    return Config.model_validate(table)


def plan_of(**settings):
    from titan_ulysses.plan.planner import make_plan, set_up

    return make_plan(set_up(config(**settings)))


def measure(index: int) -> dict:
    module = bench()
    return module.measure(module.SMALL[index])


@pytest.mark.parametrize("index", range(5))
def test_the_plan_is_what_real_ranks_take(index):
    module = bench()
    case = module.SMALL[index]
    planned = module.planned(case)
    real = run_on_ranks(case.ranks, measure, index)[0]
    assert planned["collectives"] == real["collectives"]
    assert planned["peak"] == pytest.approx(real["peak"], rel=0.03)
    assert not dist.is_initialized()


def test_tiles_that_are_left_out_change_nothing(monkeypatch):
    """Two tiles and the last one stand for all of them: in memory, FLOPs, collectives."""
    from titan_ulysses.plan.memory import MemoryTracker

    settings = {
        "memory__mlp_tile_tokens": 300,
        "memory__loss_tile_tokens": 500,
        "parallelism__sequence_parallel_degree": 2,
    }
    short = plan_of(**settings)
    monkeypatch.setattr(MemoryTracker, "shortened", lambda self, tiles: iter(tiles))
    whole = plan_of(**settings)
    assert short.peak.bytes == whole.peak.bytes
    assert short.peak.components == whole.peak.components
    assert short.simulation.collectives == whole.simulation.collectives
    assert short.simulation.cost.flops == pytest.approx(whole.simulation.cost.flops, rel=0.01)
    assert len(short.simulation.memory.events) < len(whole.simulation.memory.events)


def test_the_plan_is_the_step():
    """A setting that takes a wrapper away moves the plan, which knows nothing of it."""
    model = {"model__config": LLAMA | {"intermediate_size": 512, "max_position_embeddings": 2**20}}
    tiled = plan_of(**model, memory__mlp_tile_tokens=256)
    whole = plan_of(**model, memory__mlp_tile_tokens=-1)
    assert whole.peak.bytes > tiled.peak.bytes
    assert whole.peak.components["MLP"] > 2 * tiled.peak.components.get("MLP", 0)
    kept = plan_of(**model, activation_checkpoint__mode="none", memory__mlp_tile_tokens=256)
    assert "checkpoints" not in kept.peak.components
    assert kept.simulation.cost.flops < tiled.simulation.cost.flops, "nothing is computed again"


def test_an_exchange_of_heads_of_two_sizes_is_planned():
    """Bytes of all-to-alls by the closed form, for the kernel that a GPU would run, with experts."""
    latent = {
        "model_type": "deepseek_v3",
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "num_key_value_heads": 6,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }
    model = {k: v for k, v in LLAMA.items() if k != "head_dim"} | latent
    plan = plan_of(
        model__config=model | {"max_position_embeddings": 2**20},
        parallelism__sequence_parallel_degree=2,
    )
    calls, size = plan.simulation.collectives["all_to_all"]
    # Each of 2 layers, in bf16: q, k, v and the output; recomputed, and backward: three times.
    assert calls == 2 * 2 * 3
    assert size == 2 * 3 * 4096 // 2 * 2 * (24 * (6 + 6) + 12 * 6 + 12 * 6)
    assert max(change for _, change in plan.simulation.memory.events) < 4096**2, "no scores of S x S"


def test_a_vocabulary_is_planned_as_it_will_be():
    """The byte tokenizer has 257 ids."""
    small = {"model__config": LLAMA | {"vocab_size": 41, "max_position_embeddings": 4096}}
    assert plan_of(**small, model__resize_embeddings=64).simulation.model.config.vocab_size == 320
    with pytest.raises(UserError, match="model.tokenizer"):
        plan_of(**small, model__resize_embeddings=64, model__tokenizer="no/such/tokenizer")


def test_everything_has_an_owner():
    plan = plan_of(parallelism__sequence_parallel_degree=2, plan__world_size=4)
    by_component = plan.simulation.memory
    seen = {allocation.component for allocation, _ in by_component.events}
    expected = {"parameters", "gathered parameters", "gradients", "optimizer state", "checkpoints"}
    assert expected | {"attention", "MLP", "norm", "loss head"} <= seen
    parameters = sum(p.numel() for p in plan.simulation.model.parameters())
    shard = sum(size for a, size in plan.peak.alive.items() if a.component == "parameters")
    assert shard == pytest.approx(4 * parameters / 4, rel=0.1), "fp32, on four ranks"
    state = sum(size for a, size in plan.peak.alive.items() if a.component == "optimizer state")
    assert state == pytest.approx(2 * shard, rel=0.01)
    assert min(plan.peak.alive.values()) > 0
    # Nothing is lost: what was alive at the end of the step is parameters, state, inputs.
    alive: dict = {}
    for allocation, change in by_component.events:
        alive[allocation] = alive.get(allocation, 0) + change
    assert min(alive.values()) >= 0


def test_what_leaves_the_gpu_is_on_the_host():
    tokens, width = 4096, LLAMA["hidden_size"]
    plan = plan_of(activation_checkpoint__offload="host", plan__world_size=1)
    assert plan.host_components == {"checkpoints": 2 * tokens * width * LLAMA["num_hidden_layers"]}
    assert plan_of().host_bytes == 0
    state = plan_of(memory__optimizer_offload=True)
    assert "optimizer state" in state.host_components
    moments = [a for a, _ in state.simulation.memory.events if a.component == "optimizer state" and a.shape != ()]
    assert {a.place for a in moments} == {"host"}
    whole = plan_of(memory__parameter_offload=True)
    assert {"parameters", "gradients", "optimizer state"} <= whole.host_components.keys()
    assert "parameters" not in whole.peak.components


@pytest.mark.parametrize("name", ["adamw8bit", "adamw4bit"])
def test_low_bit_optimizers_are_planned(name):
    pytest.importorskip("torchao")
    model = LLAMA | {"hidden_size": 96, "intermediate_size": 256, "max_position_embeddings": 2**20}
    settings = {"model__config": model, "training__seq_len": 256, "optimizer__stochastic_rounding": True}
    full, few = (
        plan_of(**settings | {"optimizer__stochastic_rounding": False}),
        plan_of(**settings, optimizer__name=name),
    )
    assert few.peak.components["optimizer state"] < 0.5 * full.peak.components["optimizer state"]


def test_accumulated_batches():
    """A step of five batches counts what five count; two are simulated."""
    one, five = plan_of(), plan_of(training__global_batch_size=5)
    gathers = [plan.simulation.collectives.get("all_to_all", (0, 0)) for plan in (one, five)]
    assert gathers == [(0, 0), (0, 0)]
    assert five.simulation.cost.flops == pytest.approx(5 * one.simulation.cost.flops, rel=0.05)
    pair = {"parallelism__sequence_parallel_degree": 2}
    one, five = plan_of(**pair), plan_of(**pair, training__global_batch_size=5)
    calls, size = one.simulation.collectives["all_to_all"]
    assert five.simulation.collectives["all_to_all"] == (5 * calls, 5 * size)


def test_the_longest_sequence_fits_and_the_next_does_not():
    from titan_ulysses.plan.planner import set_up
    from titan_ulysses.plan.search import at_length, longest

    setup = set_up(config(plan__gpu_memory_gib=1.5, memory__mlp_tile_tokens=256, memory__loss_tile_tokens=256))
    found = longest(setup)
    assert found.plan.fits
    assert not at_length(setup, int(1.02 * found.seq_len)).plan.fits


def test_a_search_that_nothing_limits():
    from titan_ulysses.plan.planner import set_up
    from titan_ulysses.plan.search import longest

    with pytest.raises(UserError, match="nothing limits the sequence below .* tokens"):
        longest(set_up(config(plan__gpu_memory_gib=1e9)))


def test_a_report(tmp_path, capsys):
    from titan_ulysses.plan.report import plan_and_report

    plan_and_report(config(job__dump_folder=str(tmp_path), parallelism__sequence_parallel_degree=8, plan__gpu="B200"))
    said = json.loads((tmp_path / "run" / "plan.json").read_text())
    keys = {"fits", "binds", "gpu_peak_gib", "host_peak_gib", "longest_seq_len", "step_seconds", "mfu", "components"}
    assert keys <= said.keys()
    assert said["fits"] and said["step_seconds"] > 0
    assert sum(said["components"].values()) == pytest.approx(said["gpu_peak_gib"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 of 8 sequence-parallel ranks have no attention head" in shown
    assert "flash exists only on CUDA" in shown
    assert "4,096 tokens on 8 x B200 fit" in shown


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"plan__gpu": "RTX 9999"}, r'plan.gpu = "RTX 9999": not known; known are A100-80GB, .*plan.gpu_memory_gib'),
        (
            {"plan__world_size": 6, "parallelism__sequence_parallel_degree": 4},
            r"sp\(4\) does not divide WORLD_SIZE\(6\)",
        ),
        (
            {"memory__parameter_offload": True, "plan__host_memory_gib": 1e-6},
            r"plan.host_memory_gib = 1e-06: .* of weights",
        ),
    ],
)
def test_what_cannot_be_planned(settings, message):
    with pytest.raises(UserError, match=message):
        plan_of(**settings)


def test_preflight():
    """A process of its own; nothing of it is left in this one."""
    from titan_ulysses.plan.preflight import Preflight

    run = {"world_size": 1, "model_bytes": 10**6, "gpu": ""}
    small = Preflight(config(), **run, gpu_memory=None)
    assert small.lines()[0].startswith("plan: not made: 0.00 GiB") and small.obstacle() is None
    enforced = Preflight(config(plan__enforce=True, plan__host_memory_gib=1e-3), **run, gpu_memory=None)
    assert "GiB of tensors at the peak of a rank" in enforced.lines()[0]
    assert "plan.enforce = true: the run needs" in enforced.obstacle()
    gpu = Preflight(config(plan__enforce=True), **run | {"gpu": "NVIDIA H100 80GB HBM3"}, gpu_memory=79 * 2**30)
    assert "GiB of 79.0 at the peak of a GPU" in gpu.lines()[0]
    assert gpu.obstacle() is None
    assert "measured (" in gpu.measured(1.0) and gpu.measured(1.0) is None
    assert not dist.is_initialized()


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [8, 1024])
def test_a_large_model_takes_a_minute(world_size, capsys):
    """The time is printed, not asserted: it is the machine's."""
    from titan_ulysses.config_file import load_config
    from titan_ulysses.plan.planner import make_plan, set_up

    started = time.perf_counter()
    setup = set_up(load_config(ROOT / "configs" / "llama3_8b.toml", [("plan.world_size", world_size)]))
    plan = make_plan(setup)
    with capsys.disabled():
        print(f"\nllama3_8b, {world_size} ranks: planned in {time.perf_counter() - started:.0f} s")
    assert plan.fits
