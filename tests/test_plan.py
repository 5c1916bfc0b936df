"""The planner: the real step on fake tensors, against real ranks; what it says, and what it
refuses.
"""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from helpers.families import model_of
from helpers.models import LLAMA
from helpers.ranks import run_on_ranks
from titan_ulysses.config.schema import Config
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.parts import with_next
from titan_ulysses.memory.loss_head import can_add_wide
from titan_ulysses.observability.pictures import picture

ROOT = Path(__file__).resolve().parents[1]


def bench():
    """The benchmark that this is a small part of."""
    sys.path.insert(0, str(ROOT / "scripts" / "bench"))
    try:
        import plan_accuracy
    finally:
        sys.path.pop(0)
    return plan_accuracy


MODEL = LLAMA | {"max_position_embeddings": 2**24}
SHALLOW = {"model__config": MODEL | {"num_hidden_layers": 1}}
"""Where many plans are made: each takes half the time."""


def config(**settings) -> Config:
    """section__key = value, over a tiny llama."""
    table: dict = {"model": {"config": MODEL, "tokenizer": "bytes"}}
    table["training"] = {"seq_len": 4096}
    for key, value in settings.items():
        section, name = key.split("__")
        table.setdefault(section, {})[name] = value
    return Config.model_validate(table)


def plan_of(**settings):
    from titan_ulysses.plan.planner import make_plan, set_up

    return make_plan(set_up(config(**settings)))


def small_case(index: int, tokens: int):
    """tokens: the sequence length, in the place of the benchmark's; 0: that."""
    case = bench().SMALL[index]
    training = case.settings["training"] | ({"seq_len": tokens} if tokens else {})
    return replace(case, settings=case.settings | {"training": training})


def measure(index: int, tokens: int) -> dict:
    return bench().measure(small_case(index, tokens))


# The first one's plain settings, and the last one's, which need the most of the planner.
@pytest.mark.parametrize(
    ("index", "tokens"),
    [(0, 1024), *(pytest.param(index, 0, marks=pytest.mark.slow) for index in range(6)), (6, 0)],
)
def test_the_plan_is_what_real_ranks_take(index, tokens):
    case = small_case(index, tokens)
    planned = bench().planned(case)
    real = run_on_ranks(case.ranks, measure, index, tokens)[0]
    assert planned["collectives"] == real["collectives"]
    assert planned["peak"] == pytest.approx(real["peak"], rel=0.03)
    assert not dist.is_initialized()


WHOLE, CHUNKS = {"memory__stream_chunk_tokens": -1}, {"memory__stream_chunk_tokens": 576}


@pytest.mark.parametrize(
    "more",
    [
        WHOLE,
        pytest.param(CHUNKS, marks=pytest.mark.slow),
        CHUNKS | {"memory__stream_offload": "host"},
        pytest.param(
            CHUNKS | {"activation_checkpoint__keep_attention": "all"}, marks=pytest.mark.slow
        ),
    ],
    ids=["tiles", "chunks", "off the device", "kept on the device"],
)
def test_parts_that_are_left_out_change_nothing(monkeypatch, more):
    """A few tiles, or chunks and blocks of keys, stand for all: in memory, FLOPs, collectives, and
    copies.
    """
    from titan_ulysses.plan import standin
    from titan_ulysses.plan.cost import OFF_DEVICE, TO_DEVICE
    from titan_ulysses.plan.memory import MemoryTracker

    monkeypatch.setattr(standin, "CUDA_BLOCK", 256)

    settings = more | {
        "training__seq_len": 3328,  # six chunks, of which the last is short
        "memory__mlp_tile_tokens": 300,
        "memory__loss_tile_tokens": 500,
        "parallelism__sequence_parallel_degree": 2,
    }
    short = plan_of(**settings)
    monkeypatch.setattr(MemoryTracker, "shortened", lambda self, parts, cost: with_next(parts))
    whole = plan_of(**settings)
    assert short.peak.bytes == whole.peak.bytes
    assert short.peak.components == whole.peak.components
    assert short.simulation.collectives == whole.simulation.collectives
    found, all_found = short.simulation.cost, whole.simulation.cost
    for kind in {kind for _, kind in all_found.amounts}:  # attention would hide the products
        assert found.total(kind) == pytest.approx(all_found.total(kind), rel=0.01), kind
    for kind in (TO_DEVICE, OFF_DEVICE):
        assert bool(found.total(kind)) == ("memory__stream_offload" in more)
    assert len(short.simulation.memory.events) < len(whole.simulation.memory.events)


@pytest.mark.parametrize(
    "settings",
    [
        {"memory__stream_chunk_tokens": 576, "memory__stream_offload": "host"},
        {
            "model__config": model_of("qwen3_moe")
            | {"vocab_size": 257, "max_position_embeddings": 4096},
            **WHOLE,
        },
        {"lora__rank": 4, **WHOLE},
    ],
    ids=["chunks", "experts", "LoRA"],
)
def test_results_made_again_are_those_of_fake_tensors(monkeypatch, settings):
    """Each result of a whole step, beside what FakeTensorMode makes of the same arguments."""
    from torch.utils._pytree import tree_flatten

    from titan_ulysses.plan import fake, memory

    checked: Counter[str] = Counter()

    def described(x):
        if not isinstance(x, torch.Tensor):
            return x
        storage = x.untyped_storage()
        whole = x.shape, x.stride(), x.dtype, x.device, x.storage_offset(), storage.nbytes()
        return *whole, x.requires_grad

    class Checked(fake.FakeOperations):
        def __call__(self, func, args, kwargs):
            known = len(self._known)
            result = super().__call__(func, args, kwargs)
            kind = fake._kind(func)
            if kind == "other" or len(self._known) > known:  # by FakeTensorMode itself
                return result
            checked[kind] += 1
            (got, form), (expected, other) = map(tree_flatten, (result, func(*args, **kwargs)))
            assert form == other
            assert [*map(described, got)] == [*map(described, expected)], func
            shares = [
                [x.untyped_storage()._cdata == args[0].untyped_storage()._cdata for x in results]
                for results in (got, expected)
                if kind != "new"
            ]
            assert shares == [[True] * len(got)] * len(shares), func
            return result

    monkeypatch.setattr(memory, "FakeOperations", Checked)
    plan_of(**settings)
    assert min(checked[kind] for kind in ("view", "new", "in place")) > 10, checked


def test_products_of_experts_are_counted():
    """Two of four experts a token: three products of each weight that it meets."""
    plan = plan_of(
        model__config=model_of("qwen3_moe") | {"vocab_size": 257, "max_position_embeddings": 4096},
        activation_checkpoint__mode="none",
        memory__mlp_tile_tokens=-1,
    )
    heads, experts = 24 * (24 + 8 + 8 + 24), 2 * 3 * 24 * 16
    weights = 2 * (heads + 24 * 4 + experts) + 24 * 257
    assert plan.simulation.cost.total("matmul") == pytest.approx(3 * 2 * 4096 * weights, rel=0.01)


HYBRID_EXCHANGES = {"qwen3_next": 2, "granitemoehybrid": 2, "lfm2": 1}


@pytest.mark.parametrize(
    "family", [pytest.param("qwen3_next", marks=pytest.mark.slow), "granitemoehybrid", "lfm2"]
)
def test_layers_with_a_state_are_planned(monkeypatch, family):
    """Their exchanges, their part of the breakdown, and chunks of which few are simulated."""
    from titan_ulysses.plan import standin
    from titan_ulysses.plan.memory import MemoryTracker

    settings = {
        "model__config": model_of(family) | {"vocab_size": 257, "max_position_embeddings": 2**20},
        "training__seq_len": 3072,  # six chunks: fewer than five are all simulated
        "parallelism__sequence_parallel_degree": 2,
    }
    calls, _ = plan_of(**settings).simulation.collectives["all_to_all"]
    # One layer of it and one of attention: forward, recomputed, backward.
    assert calls == 3 * (HYBRID_EXCHANGES[family] + 2)
    monkeypatch.setattr(standin, "CUDA_BLOCK", 256)
    settings["memory__stream_chunk_tokens"] = 512
    short = plan_of(**settings)
    seen = {allocation.component for allocation, _ in short.simulation.memory.events}
    assert "linear attention" in seen
    monkeypatch.setattr(MemoryTracker, "shortened", lambda self, parts, cost: with_next(parts))
    whole = plan_of(**settings)
    assert short.peak.bytes == whole.peak.bytes
    assert short.simulation.collectives == whole.simulation.collectives
    assert short.simulation.cost.flops == pytest.approx(whole.simulation.cost.flops, rel=0.01)


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
    """Bytes of all-to-alls by the closed form, for the kernel that a GPU would run, with
    experts.
    """
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
    assert max(change for _, change in plan.simulation.memory.events) < 4096**2, (
        "no scores of S x S"
    )


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
    from titan_ulysses.distributed.hardware import DISK_BANDWIDTH

    tokens, width = 4096, LLAMA["hidden_size"]
    plan = plan_of(activation_checkpoint__offload="host", plan__world_size=1)
    assert plan.host_components == {"checkpoints": 2 * tokens * width * LLAMA["num_hidden_layers"]}
    # Files have two page-locked buffers in front of them.
    files = plan_of(activation_checkpoint__offload="disk", plan__world_size=1)
    assert files.host_components == {"checkpoints": 2 * 2 * tokens * width}
    assert files.disk_bytes == plan.host_bytes and files.fits and not plan.disk_bytes
    back = files.time.hidden["checkpoints back"]
    assert back == pytest.approx(files.disk_bytes / DISK_BANDWIDTH)
    assert back > 10 * plan.time.hidden["checkpoints back"]
    small = replace(files.setup, disk=0.9 * files.disk_bytes)
    assert (full := replace(files, setup=small)).bottleneck == "disk" and not full.fits
    assert files.peak.bytes == plan.peak.bytes
    assert plan_of().host_bytes == 0
    # Where host memory is the GPU's, nothing leaves it.
    shared = plan_of(
        activation_checkpoint__offload="host", plan__world_size=1, plan__gpu="dgx-spark"
    )
    reserved = sum(reserve.bytes for reserve in shared.setup.reserves)
    assert shared.gpu_bytes == shared.peak.bytes + shared.host_bytes + reserved
    # A checkpoint that is written in the background is copied: what is trained, and its state.
    copy = plan_of(checkpoint__async_mode="async", training__skip_nonfinite=2)
    whole = sum(
        allocation_bytes
        for allocation, allocation_bytes in copy.peak.alive.items()
        if allocation.component in ("parameters", "optimizer state")
    )
    assert whole <= copy.host_components["checkpoint copy"] <= 2.2 * whole  # pinned: a power of 2
    assert "checkpoint copy" not in plan_of(checkpoint__async_mode="disabled").host_components
    state = plan_of(memory__optimizer_offload=True)
    assert "optimizer state" in state.host_components
    moments = [
        a
        for a, _ in state.simulation.memory.events
        if a.component == "optimizer state" and a.shape != ()
    ]
    assert {a.place for a in moments} == {"host"}
    whole = plan_of(memory__parameter_offload=True)
    assert {"parameters", "gradients", "optimizer state"} <= whole.host_components.keys()
    assert "parameters" not in whole.peak.components


# test_optimizer.py has the bytes a parameter of both.
@pytest.mark.parametrize("name", ["adamw8bit", pytest.param("adamw4bit", marks=pytest.mark.slow)])
def test_low_bit_optimizers_are_planned(name):
    pytest.importorskip("torchao")
    model = LLAMA | {"hidden_size": 96, "intermediate_size": 256, "max_position_embeddings": 2**20}
    settings = {
        "model__config": model,
        "training__seq_len": 256,
        "optimizer__stochastic_rounding": True,
    }
    full = plan_of(**settings | {"optimizer__stochastic_rounding": False})
    few = plan_of(**settings, optimizer__name=name)
    assert few.peak.components["optimizer state"] < 0.5 * full.peak.components["optimizer state"]


def test_muon_is_planned():
    """One momentum of hidden matrices; a step gathers each of them once more, in bf16."""
    adamw, muon = (
        plan_of(optimizer__name=name, parallelism__data_parallel_shard_degree=2)
        for name in ("adamw", "muon")
    )
    state = [plan.peak.components["optimizer state"] for plan in (adamw, muon)]
    assert 0.5 * state[0] < state[1] < 0.9 * state[0]
    gathered = [plan.simulation.collectives["all_gather"] for plan in (adamw, muon)]
    assert gathered[1][0] > gathered[0][0] and gathered[1][1] > gathered[0][1]
    assert muon.simulation.cost.flops > adamw.simulation.cost.flops


def test_accumulated_batches():
    """A step of several batches counts what they count; two or three are simulated."""
    short = SHALLOW | {"training__seq_len": 512}
    pair = short | {"parallelism__sequence_parallel_degree": 2}
    one, five = plan_of(**pair), plan_of(**pair, training__global_batch_size=5)
    assert five.simulation.cost.flops == pytest.approx(5 * one.simulation.cost.flops, rel=0.05)
    calls, size = one.simulation.collectives["all_to_all"]
    assert five.simulation.collectives["all_to_all"] == (5 * calls, 5 * size)
    # KTO runs each of several batches twice, and a single one once.
    kto = short | {"loss__name": "kto", "data__source": "unpaired", "data__packing": "best_fit"}
    kto |= {"parallelism__data_parallel_shard_degree": 2}
    two, four = (plan_of(**kto, training__global_batch_size=size) for size in (4, 8))
    calls, size = two.simulation.collectives["all_gather"]
    assert four.simulation.collectives["all_gather"] == (2 * calls, 2 * size)


@pytest.mark.slow
def test_the_longest_sequence_fits_and_the_next_does_not():
    from titan_ulysses.plan.planner import make_plan, set_up
    from titan_ulysses.plan.search import at_length, longest

    setup = set_up(
        config(plan__gpu_memory_gib=1.5, memory__mlp_tile_tokens=256, memory__loss_tile_tokens=256)
    )
    found = longest(setup)
    assert found.fits
    assert not make_plan(at_length(setup, int(1.02 * found.seq_len))).fits


def test_the_longest_sequence_of_a_step_that_may_not_be_longer():
    from titan_ulysses.plan.planner import make_plan, set_up
    from titan_ulysses.plan.search import longest

    lengths = []

    def counted(setup):
        lengths.append(setup.config.training.seq_len)
        return make_plan(setup)

    seconds = plan_of(**SHALLOW, training__seq_len=8192).time.seconds
    found = longest(set_up(config(**SHALLOW, plan__max_step_seconds=seconds)), plan=counted)
    assert 8000 < found.seq_len <= 8192 and found.time.seconds <= seconds
    assert len(lengths) <= 5, "it simulates too many lengths"


def test_the_longest_sequence_that_a_host_has_room_for():
    """Its buffers are rounded up to powers of two, so that a line is not enough."""
    from titan_ulysses.plan.planner import make_plan, set_up
    from titan_ulysses.plan.search import at_length, longest

    lengths = []

    def counted(setup):
        lengths.append(setup.config.training.seq_len)
        return make_plan(setup)

    streamed = {"memory__stream_chunk_tokens": 1024, "memory__stream_offload": "host"} | SHALLOW
    room = plan_of(**streamed, training__seq_len=20_480).host_bytes / 2**30
    setup = set_up(config(**streamed, plan__host_memory_gib=0.9 * room))
    found = longest(setup, near=16_384, plan=counted)
    assert found.fits and len(lengths) <= 4
    lengths.clear()
    again = longest(setup, near=found.seq_len, close=0.01, plan=counted)
    assert lengths == [found.seq_len] == [again.seq_len], "close enough at once"
    assert not make_plan(at_length(setup, found.seq_len + 256)).host_fits


@pytest.mark.slow
def test_what_frees_a_gpu_is_not_tried_where_it_has_room():
    """With it, no sequence is longer."""
    from titan_ulysses.plan.planner import make_plan, set_up
    from titan_ulysses.plan.search import longest, search, with_settings

    # Its buffers of checkpoints are as large as these.
    settings = {"activation_checkpoint__offload": "host"} | SHALLOW
    room = plan_of(**settings, training__seq_len=20_480).host_bytes / 2**30
    setup = set_up(config(**settings, plan__host_memory_gib=room))
    found = [*search(setup, make_plan(setup))]
    best = max(one.plan.seq_len for one in found if one.plan)
    left_out = [one for one in found if "memory of a GPU does not end" in one.left_out]
    assert len(left_out) > 2
    for one in left_out:
        if "optimizer.name" in one.changes:  # too small a model for 8-bit states
            continue
        most = longest(with_settings(setup, one.changes), near=best, close=0.01)
        assert most is None or most.seq_len <= 1.02 * best, one.what


def test_hidden_states_off_the_gpu_take_time():
    """Closed form: what each part of the model reads and writes, in bf16."""
    from titan_ulysses.plan.cost import OFF_DEVICE, TO_DEVICE

    layers, width, head, tokens, chunks = 2, LLAMA["hidden_size"], LLAMA["head_dim"], 4096, 8
    plan = plan_of(memory__stream_chunk_tokens=tokens // chunks, memory__stream_offload="host")
    hidden, angles = 2 * tokens * width, 2 * 2 * tokens * head
    # Each block reads its input in forward, in the first sweep of backward (without the last
    # chunk) and in the second, where it reads the gradient of its output too. The last norm reads
    # its input, that again and the gradient. The loss head reads its input, and scales its
    # gradient. The embedding reads its gradient.
    block = (3 - 1 / chunks) * (hidden + angles) + hidden
    # A chunk reads the keys and values of the chunks so far in forward, again in backward, and to
    # differentiate, where it adds to their gradients in fp32, which the last chunk begins. The
    # gradients of its own are then read once more.
    keys = 2 * 2 * LLAMA["num_key_value_heads"] * head * tokens // chunks
    so_far = chunks * (chunks + 1) // 2
    block += 3 * so_far * keys + so_far * 2 * keys
    assert plan.simulation.cost.total(TO_DEVICE) == layers * block + (3 + 2 + 1) * hidden
    # Blocks write output and gradient, as do the norm and the loss head (twice). The embedding
    # writes its output, and the rotary embedding cos and sin.
    block = 2 * hidden + 2 * chunks * keys + so_far * 2 * keys
    assert plan.simulation.cost.total(OFF_DEVICE) == (
        layers * block + (2 + 2 + 1) * hidden + angles
    )
    assert plan.time.hidden["hidden states"] > 0


@pytest.mark.slow
def test_a_search_that_nothing_limits(capsys):
    """It ends where the planner looks no further, which is no finding, and says so."""
    from rich.console import Console

    from titan_ulysses.plan.console import closing
    from titan_ulysses.plan.planner import set_up
    from titan_ulysses.plan.search import SearchResult, is_unlimited, longest
    from titan_ulysses.plan.searches import tell_longest

    setup = set_up(config(plan__gpu_memory_gib=1e6))
    plan = longest(setup, near=2**25)
    assert plan.seq_len == 2**27 and is_unlimited(setup, plan.seq_len) and plan.fits
    found = [SearchResult("tiles", {"memory.mlp_tile_tokens": 0}, plan)]
    tell_longest(Console(width=100), "longest", found)
    assert "at least 134,217,728 tokens" in capsys.readouterr().out
    said = closing(plan, plan.seq_len, found)
    assert "at least 134,217,728 tokens fit: the planner looks no further" in said
    assert "plan.host_memory_gib is not set" in said


@pytest.mark.slow
def test_an_estimate_from_a_short_sequence():
    """What its peak is made of need not grow with it; a long one's does."""
    from titan_ulysses.plan.console import closing
    from titan_ulysses.plan.planner import make_plan, set_up
    from titan_ulysses.plan.search import at_length, estimate

    model = LLAMA | {"vocab_size": 20_000, "num_hidden_layers": 1, "max_position_embeddings": 8192}
    setup = set_up(config(model__config=model, training__seq_len=512, plan__gpu_memory_gib=4))
    plan = make_plan(setup)
    found = estimate(plan)
    assert make_plan(at_length(setup, int(0.8 * found))).fits
    assert not make_plan(at_length(setup, int(1.2 * found))).fits
    said = closing(plan, found, [])
    assert f"about {found:,} tokens fit. (Beyond 8,192, its max_position_embeddings" in said


@pytest.mark.parametrize(
    ("seq_len", "full", "bytes_a_token", "tried", "found"),
    [
        (2**20, 2**20, 2**13, [2**22], 2**22),  # on the line that the limit is on
        (2**20, 2**22, 2**13, [2**19, 2**22], 2**22),  # tiles are not full yet
        (2**20, 2**20, 2**16, [2**18], 2**19),  # too long
        (2**20, 2**18, 2**19, [2**18, 2**16], 2**16),  # and so is a quarter
        (512, 2**12, 1, [256, 2**27], 2**27),  # nothing limits it
        (2**27, 2**20, 1, [2**26], 2**27),
        (512, 2**24, 0, [256], 0),  # no length fits, and none needs more than another
    ],
)
def test_an_estimate_tries_few_lengths(
    monkeypatch, seq_len: int, full: int, bytes_a_token: int, tried: list[int], found: int
):
    from titan_ulysses.plan import search
    from titan_ulysses.plan.cost import Cost
    from titan_ulysses.plan.planner import Estimate, set_up

    settings = {"plan__gpu_memory_gib": 32, "training__seq_len": seq_len}
    model = {"model__config": LLAMA | {"max_position_embeddings": 2**27}}
    lengths: list[int] = []

    def planned(setup) -> Estimate:
        lengths.append(setup.config.training.seq_len)
        size = bytes_a_token * lengths[-1] or 2**36
        assert len(lengths) < 9, "it goes on and on"
        return Estimate(setup, Cost(), {}, {}, gpu_bytes=size, host_bytes=0)

    monkeypatch.setattr(search, "estimate_plan", planned)
    monkeypatch.setattr(search, "_full_length", lambda plan: full)
    assert search.estimate(planned(set_up(config(**model, **settings)))) == found
    assert lengths[1:] == tried


# --- what it says ---------------------------------------------------------------------------------

CASES = {
    "sharded": {
        "parallelism__sequence_parallel_degree": 2,
        "plan__world_size": 4,
        "activation_checkpoint__offload": "host",
        "memory__mlp_tile_tokens": 300,
        "memory__loss_tile_tokens": 500,
    },
    "no checkpoints": {
        "model__config": LLAMA | {"tie_word_embeddings": True, "max_position_embeddings": 4096},
        "activation_checkpoint__mode": "none",
        "training__global_batch_size": 3,
        "training__seq_len": 512,
    },
    "all on the host": {
        "memory__parameter_offload": True,
        "plan__world_size": 2,
        "training__seq_len": 512,
    },
    "LoRA": {
        "lora__rank": 4,
        "training__param_dtype": "float32",
        "memory__optimizer_offload": True,
        "training__seq_len": 512,
    },
}
RAW = re.compile(
    r"for_cpu|empty|zeros|_to_copy|all_to_all|_foreach|reduce_scatter|\bdiv\b|\(_|\bat _|setup|the "
    r"step"
)
"""Words of operators and of the simulation, which mean nothing to who reads a plan."""


@cache
def planned(case: str):
    return plan_of(**CASES[case])


def test_the_peak_in_words():
    """In those of the GPU and of the model, not of what stands for them here."""
    from titan_ulysses.plan.console import largest
    from titan_ulysses.plan.names import moment_name
    from titan_ulysses.plan.report import as_json

    sharded = planned("sharded")
    assert (
        moment_name(sharded.peak.moment)
        == "the backward pass, in attention of layer 1, at flash attention's backward"
    )
    assert as_json(sharded)["peak"]["operation"] == "flash attention's backward"
    rows, attention = largest(sharded, 6), "attention of layer 1"
    assert rows[:2] == [
        ("1.97 MiB", f"{attention}: workspace of flash attention's backward kernel", ""),
        ("0.31 MiB", f"{attention}: q, k, v after the exchange", "[163840] bfloat16"),
    ]
    assert ("0.19 MiB", "checkpoint: input of layer 1", "[1, 2048, 48] bfloat16") in rows


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_has_a_name(case):
    from titan_ulysses.plan import names

    plan = planned(case)
    memory, start = plan.simulation.memory, plan.simulation.start
    named = {
        names.tensor_name(a): a for a in [*(a for a, _ in memory.events[start:]), *plan.peak.alive]
    }
    assert not {
        name: a.made.operation
        for name, a in named.items()
        if RAW.search(name) and a.place == "device"
    }
    assert not RAW.search(names.moment_name(plan.peak.moment))
    if case == "sharded":
        made = {maker for a in named.values() for maker in a.made.created_in}
        if can_add_wide():
            made.add(
                "loss_head.add_product"
            )  # it makes a tensor only where torch cannot add in place
        assert names._ROLES.keys() <= made, "no function has moved"


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (3.7 * 2**30, "3.70 GiB"),
        (903.3 * 2**30, "903.3 GiB"),
        (2**20, "1.00 MiB"),
        (64_000, "62.50 KiB"),
        (16, "16 bytes"),
    ],
)
def test_sizes(size, text):
    from titan_ulysses.observability.units import size_text

    assert size_text(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (12_093, "3 h 21 min"),
        (146, "2 min 26 s"),
        (34.51, "34.5 s"),
        (0.0371, "37.1 ms"),
        (1e-6, "less than 0.01 ms"),
    ],
)
def test_durations(seconds, text):
    from titan_ulysses.observability.units import time_text

    assert time_text(seconds) == text


@pytest.mark.parametrize(
    ("kernel", "deterministic", "expected"),
    [
        # dq_accum and softmax_d in fp32, dk and dv of all query heads in bf16
        ("fa2", False, 4 * 1128 * 6 * (96 + 1) + 2 * 2 * 1000 * 6 * 72),
        # ceil(132 / (1 document x 6 heads)) = 22 copies of dq_accum
        ("fa2", True, 4 * 1128 * 6 * (22 * 96 + 1) + 2 * 2 * 1000 * 6 * 72),
        # dk_accum and dv_accum in fp32, of the KV heads; softmax_d and softmax_lse_log2
        ("fa3", False, 4 * 1128 * 6 * (96 + 2) + 2 * 4 * 1128 * 2 * 96),
        ("fa3", True, 4 * 1128 * 6 * (96 + 2) + 2 * 4 * 1128 * 2 * 96),
    ],
)
def test_the_workspace_of_attention(kernel, deterministic, expected):
    """1000 tokens of one document, which has 128 rows more in fp32, 6 query heads on 2 KV heads of
    72, which the kernel rounds up to 96.
    """
    import torch

    from titan_ulysses.plan.cuda_memory import CudaWorkspace

    func = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    query, key = (torch.empty(1, h, 1000, 72, dtype=torch.bfloat16, device="meta") for h in (6, 2))
    held = CudaWorkspace(kernel, deterministic, 132)(func, (query, query, key, key), None)
    assert held == expected
    assert CudaWorkspace(kernel)(torch.ops.aten.mm.default, (query, query), None) == 0
    assert CudaWorkspace(kernel).of_document(6, 72) == 4 * 128 * 6 * (96 + 1)


def test_the_plan_says_what_further_documents_take():
    """Of 6 heads of 8 on two ranks, in fp32: 128 rows of 3 heads of 32, and of 3 numbers."""
    found = [note for note in planned("sharded").notes if note.startswith("documents: ")]
    assert found == [
        "documents: one a sequence is planned. Each further one adds 0.0483 MiB while the backward "
        "of attention runs"
    ]
    alone = plan_of(data__packing="none")
    assert not any(note.startswith("documents: ") for note in alone.notes)


def test_what_the_table_of_gpus_says_is_possible():
    from titan_ulysses.distributed.hardware import GIB, GPUS, HOST_BANDWIDTH

    for gpu in GPUS.values():
        assert 0.5 * gpu.peak < gpu.matmul < gpu.peak, gpu.name
        rates = [rate for both in gpu.attention.values() for rate in both]
        assert "fa2" in gpu.attention and 0.1 * gpu.peak < min(rates), gpu.name
        assert max(rates) < gpu.peak, gpu.name
        assert 20 * GIB < gpu.memory < 300 * GIB, gpu.name
        # Each link is slower than the one nearer to the GPU.
        assert gpu.network <= gpu.node_link <= gpu.memory_bandwidth, gpu.name
        assert gpu.host_link < gpu.memory_bandwidth, gpu.name
        assert gpu.host_link <= gpu.host_bandwidth(1), gpu.name
        own = gpu.own_host_bandwidth
        assert gpu.host_bandwidth(4) == (4 * own or HOST_BANDWIDTH), gpu.name


def test_the_kernel_of_attention():
    """FlashAttention 3 takes less time and, with grouped heads, less memory; deterministic
    algorithms take more.
    """
    from titan_ulysses.distributed.hardware import GPUS

    sequence = {"parallelism__sequence_parallel_degree": 2}
    two, three, fixed = (
        plan_of(**sequence, **more)
        for more in ({}, {"plan__attention_kernel": "fa3"}, {"training__deterministic": True})
    )
    flops = [
        sum(n for (_, what), n in two.simulation.cost.amounts.items() if what == f"attention {x}")
        for x in ("forward", "backward")
    ]
    for plan, kernel in ((two, "fa2"), (three, "fa3")):
        forward, backward = GPUS["H100-80GB"].attention[kernel]
        expected = flops[0] / forward + flops[1] / backward
        assert plan.time.parts["attention"] == pytest.approx(expected)
    assert two.peak.bytes < fixed.peak.bytes
    assert any("FlashAttention 3" in note for note in three.notes)
    assert two.setup.core == "varlen" and any("attention: varlen" in note for note in two.notes)


@pytest.mark.parametrize(
    ("settings", "core"),
    [
        ({}, "varlen"),
        ({"training__param_dtype": "float32"}, "sdpa"),
        ({"model__attention": "flash"}, "flash"),  # also where the package is not
        ({"model__attention": "flex"}, "flex"),
    ],
)
def test_the_plan_follows_the_core_of_the_run(settings, core):
    from titan_ulysses.plan.planner import set_up

    assert set_up(config(**settings)).core == core


@pytest.mark.parametrize(
    ("degrees", "ranks", "channels"),
    [
        # (replicate, shard, sequence): the ranks of each communicator; ranks that reduce in a node
        ((1, 1, 8), (8,), 8),
        ((1, 8, 1), (8,), 8),
        ((1, 2, 4), (8, 4), 8),
        ((2, 1, 4), (8, 4, 2, 4), 8 + 4 + 2),
        ((2, 1, 8), (16, 8, 2, 8), 8 + 8),
        ((1, 1, 1), (), 0),
    ],
)
def test_axes_with_all_ranks_share_a_communicator(degrees, ranks, channels):
    from titan_ulysses.plan.planner import set_up

    replicate, shard, sequence = degrees
    setup = set_up(
        config(
            parallelism__data_parallel_replicate_degree=replicate,
            parallelism__data_parallel_shard_degree=shard,
            parallelism__sequence_parallel_degree=sequence,
            plan__world_size=replicate * shard * sequence,
            training__global_batch_size=replicate * shard,
        )
    )
    assert setup.communicators == ranks
    assert setup.multicast == 16 * channels  # H100


def test_a_single_gpu_waits_for_its_parameters():
    """FSDP2 copies them on the stream that computes, where it has no ranks to gather from."""
    one = plan_of(memory__parameter_offload=True)
    weights = one.simulation.memory.peak("host", first=one.simulation.start).components
    link = one.setup.gpu.host_link
    assert one.time.parts["parameters to the GPU"] == pytest.approx(
        2 * weights["parameters"] / link
    )
    assert one.time.hidden["parameters"] == pytest.approx(weights["gradients"] / link)
    assert one.clock[-1][1] == pytest.approx(one.time.seconds)
    two = plan_of(memory__parameter_offload=True, parallelism__sequence_parallel_degree=2)
    assert two.time.parts["parameters to the GPU"] == 0
    assert two.time.hidden["parameters"] > one.time.hidden["parameters"] / 2


@pytest.mark.parametrize("case", ["sharded", "all on the host", "LoRA"])
def test_the_clock_ends_with_the_step(case):
    """Whatever is waited for."""
    plan = planned(case)
    assert plan.clock[-1][1] == pytest.approx(plan.time.seconds)
    assert sorted(plan.clock) == plan.clock


def test_bytes_of_other_kernels():
    """What only makes a tensor moves no bytes, and what overwrites one does not read it."""
    from titan_ulysses.plan.cost import CostCounter

    aten = torch.ops.aten
    here = SimpleNamespace(phase="forward", here=lambda: SimpleNamespace(component="MLP"))
    tracker = SimpleNamespace(attribution=here, weight=3, events=[], layer=None)
    counter = CostCounter(tracker, {})
    x, y = torch.ones(4, 8), torch.ones(4, 8)
    size = 4 * 8 * 4
    for func, args, moved in (
        (aten.add.Tensor, (x, y), 3),
        (aten.add_.Tensor, (x, y), 3),
        (aten.copy_.default, (x, y), 2),
        (aten.zero_.default, (x,), 1),
        (aten.fill_.Scalar, (x, 1.0), 1),
        (aten.empty.memory_format, ([4, 8],), 0),
        (aten.empty_like.default, (x,), 0),
        (aten.new_empty.default, (x, [4, 8]), 0),
        (aten._unsafe_view.default, (x, [8, 4]), 0),
        (aten.transpose.int, (x, 0, 1), 0),
    ):
        counter.reset()
        counter(func, args, {}, func(*args))
        assert counter.cost.total("other kernels") == 3 * moved * size, func
    rows, table = torch.tensor([1, 2, 2, 0]), torch.ones(1000, 8)
    for func, args, moved in (  # rows of a large tensor, and their int64 numbers
        (aten.index.Tensor, (table, [rows]), 2 * size + 32),
        (aten.index_add_.default, (table, 0, rows, x), 3 * size + 32),
    ):
        counter.reset()
        counter(func, args, {}, func(*args))
        assert counter.cost.total("other kernels") == 3 * moved, func


def test_indexers_and_sparse_attention_are_planned():
    """By name, with the FLOPs of their formulas."""
    keys, tokens, settings = 256, 2048, model_of("deepseek_v32")
    settings |= {"vocab_size": 257, "max_position_embeddings": 4096, "index_topk": keys}
    plan = plan_of(
        model__config=settings,
        training__seq_len=tokens,
        parallelism__sequence_parallel_degree=2,
        memory__stream_chunk_tokens=512,
    )
    config, amounts = plan.setup.model_config, plan.cost.amounts
    scored = (tokens**2 - keys**2) / 2 / 2  # of two ranks
    flops = 2 * 2 * scored * config.index_n_heads * (config.index_head_dim + 1)  # two layers
    assert amounts["forward", "indexer: fp32 matmul"] == pytest.approx(flops, rel=0.2)
    # Rows of keys, in fp32, and of values; a pair of a query and a key needs 60 bytes more or less.
    row = 4 * config.qk_head_dim + 4 * config.v_head_dim + 60
    read = 2 * tokens * keys * config.num_attention_heads / 2 * row
    assert amounts["forward", "sparse attention: other kernels"] == pytest.approx(read, rel=0.4)
    assert {"indexer", "sparse attention"} <= plan.time.parts.keys()
    assert plan.time.parts["attention"] == 0
    gathered = 2 * tokens * 4 * (config.index_head_dim + keys)
    assert amounts["forward", "gathers of a sequence"] == pytest.approx(gathered, rel=0.1)


def test_the_clock_waits():
    """What the computation waits for makes the stage that waits longer; the update is as long as
    its transfer.
    """
    from titan_ulysses.plan.cost import Tick, Time, clock

    ticks = [
        Tick(1, "forward", "matmul", 10.0),
        Tick(3, "backward", "matmul", 20.0),
        Tick(4, "update", "matmul", 10.0),
    ]
    parts = {"matmul": 4.0, "offloaded optimizer": 5.0}
    back = Time(parts, {}, {"FSDP": 0.0, "checkpoints back": 6.0})
    assert clock(ticks, back, rates={"matmul": 10.0}, share=1) == [(1, 1.0), (3, 9.0), (4, 15.0)]
    both = Time(parts, {}, {"FSDP": 6.0, "checkpoints back": 0.0})
    assert clock(ticks, both, rates={"matmul": 10.0}, share=0.5) == [(1, 2.0), (3, 6.0), (4, 12.0)]
    assert back.seconds == 15.0


def drawn(plan, path, monkeypatch):
    """The axes of the plan's picture."""
    from titan_ulysses.plan import plots

    kept = []

    @contextmanager
    def keeping(*args, **kwargs):
        with picture(*args, **kwargs) as (figure, axes):
            yield figure, axes
            kept.append(axes)

    monkeypatch.setattr(plots, "picture", keeping)
    plots.timeline(plan, path)
    return kept[0]


def test_the_picture_of_a_small_model(tmp_path, monkeypatch):
    """In units that show something, over time, with its peak marked."""
    pytest.importorskip("matplotlib")
    sharded = planned("sharded")
    axes = drawn(sharded, tmp_path / "plan.png", monkeypatch)
    peak = sharded.peak.bytes / 2**20
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    assert axes.get_ylabel() == "MiB on one GPU" and peak < axes.get_ylim()[1] < 2 * peak
    assert axes.get_xlabel() == "planned time in the step, ms"
    assert axes.get_xlim() == pytest.approx((0, 1e3 * sharded.time.seconds))
    (marker,) = [line for line in axes.lines if line.get_marker() == "v"]
    at = marker.get_xydata()[0]
    assert at[1] == pytest.approx(peak)
    words = [text.get_text().strip() for text in axes.texts]
    assert f"peak: {peak:.2f} MiB of tensors" in words
    assert any(word.startswith("the GPU has 75.") and "times the peak" in word for word in words)
    backward = axes.texts[words.index("backward")].get_position()[0]
    assert 0.1 * axes.get_xlim()[1] < backward < at[0] < axes.get_xlim()[1]
    update = axes.texts[words.index("update")].get_position()[0]
    assert at[0] < update <= axes.get_xlim()[1]


def test_the_picture_has_the_peak_where_it_lasts():
    """The longer a kernel, the wider: here it is attention's backward, which holds the most."""
    from titan_ulysses.plan.plots import timeline_of

    small = {"memory__mlp_tile_tokens": 1024, "memory__loss_tile_tokens": 1024}
    plan = plan_of(training__seq_len=262_144, memory__stream_chunk_tokens=-1, **small)
    line = timeline_of(plan)
    heights = [column.total() for column in line.alive]
    assert max(heights) == plan.peak.bytes and line.ends[-1] == pytest.approx(plan.time.seconds)
    share = sum(height > 0.95 * plan.peak.bytes for height in heights) / len(heights)
    assert share == pytest.approx(5 / 9, rel=0.1), "5 of the 2 + 2 + 5 products over the scores"


def test_a_picture_of_accumulated_batches(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from titan_ulysses.plan.plots import timeline_of

    plan = planned("no checkpoints")
    axes = drawn(plan, tmp_path / "plan.png", monkeypatch)
    assert "the first 2 of 3 batches, and the update" in axes.get_xlabel()
    assert plan.clock[-1][1] == pytest.approx(2 / 3 * plan.time.seconds, rel=0.05)
    assert [text.get_text().strip() for text in axes.texts].count("backward") == 2
    heights = [column.total() for column in timeline_of(plan).alive]
    assert heights[0] < 0.5 * max(heights), "the simulated step of one batch is not in it"


def test_a_report(tmp_path, capsys):
    from titan_ulysses.plan.report import plan_and_report

    plan_and_report(
        config(
            job__dump_folder=str(tmp_path),
            parallelism__sequence_parallel_degree=8,
            plan__gpu="B200",
        )
    )
    said = json.loads((tmp_path / "run" / "plan.json").read_text())
    keys = {
        "fits",
        "binds",
        "gpu_peak_gib",
        "host_peak_gib",
        "longest_seq_len",
        "step_seconds",
        "mfu",
        "components",
    }
    assert keys <= said.keys()
    assert said["fits"] and said["step_seconds"] > 0
    assert sum(said["components"].values()) == pytest.approx(said["gpu_peak_gib"])
    shown = " ".join(capsys.readouterr().out.split())
    assert not re.search(r"\b0\.0+ (GiB|MiB|KiB|s|ms)\b| 0\.0%", shown), (
        "small numbers are in small units"
    )
    assert re.search(r"a step: 0\.\d+ ms, MFU .* the time to launch kernels", shown)
    assert re.search(r"activations of attention │ [\d.]+ (MiB|KiB) │", shown)
    assert "2 of 8 sequence-parallel ranks have no attention head" in shown
    assert "varlen exists only on CUDA" in shown and "FlashAttention 2" in shown
    assert "4,096 tokens on 8 x B200 fit." in shown
    assert said["grace_seconds"] == 60
    assert "sbatch --signal=B:USR1@60, or terminationGracePeriodSeconds: 60" in shown


@pytest.mark.parametrize(
    ("settings", "bytes_of_a_weight", "seconds"),
    [
        # (504 s + none) x 1.25, in whole minutes; fp32 weights and two moments of each
        ({}, 12, 660),
        ({"memory__optimizer_offload": True}, 12, 660),
        ({"checkpoint__enable": False}, 0, 660),
    ],
)
def test_what_a_run_needs_to_stop(settings, bytes_of_a_weight, seconds):
    from titan_ulysses.plan.run_cost import grace_of

    plan = plan_of(plan__world_size=8, training__global_batch_size=8, **settings)
    weights = sum(p.numel() for p in plan.simulation.model.parameters())
    plan.__dict__["time"] = SimpleNamespace(seconds=504.0)
    grace = grace_of(plan)
    assert grace.saved == pytest.approx(bytes_of_a_weight * weights, rel=0.02)
    assert grace.seconds == seconds
    # A checkpoint of 96 GB, of 8 billion weights, takes a node a minute and a half more.
    plan.__dict__["time"] = SimpleNamespace(seconds=504.0 + 96.4 - grace.saved / 1e9)
    assert grace_of(plan).seconds == 780


def test_what_other_choices_make_of_a_run():
    """Other lengths, links half as fast, another kernel and other settings: as if planned so."""
    from titan_ulysses.plan.console import choice_lines, time_lines
    from titan_ulysses.plan.run_cost import best_change, costs_at_lengths, half_as_fast, run_cost

    of_run = {"plan__tokens": 10**9, "plan__gpu_hour_price": 3.0}
    two = SHALLOW | {"parallelism__sequence_parallel_degree": 2}
    plan = plan_of(**of_run, **two)
    costs = dict(costs_at_lengths(plan))
    assert list(costs) == [2048, 4096, 8192]
    assert costs[4096] == run_cost(plan)
    assert costs[8192] == run_cost(plan_of(training__seq_len=8192, **of_run, **two))
    assert costs[2048].cost == 3 * costs[2048].gpu_hours < costs[4096].cost
    # Only the exchange takes a link of a node here, and nothing hides it.
    share = plan.time.parts["exchange"] / plan.time.seconds
    slower = half_as_fast(plan)
    assert slower == pytest.approx({"NVLink": share, "the network": 0, "PCIe to the host": 0})
    assert any(f"half as fast: NVLink {share:+.1%}" in line for line in time_lines(plan))
    lines = "\n".join(choice_lines(plan))
    fa3 = plan_of(plan__attention_kernel="fa3", **two).time.seconds
    assert f"with FlashAttention 3: {fa3 / plan.time.seconds - 1:+.1%}" in lines
    changes, other = best_change(plan)
    assert changes == {"activation_checkpoint.mode": "none"}
    assert other.time.seconds < 0.9 * plan.time.seconds and "the setting that buys most" in lines
    # On a GPU that is too small, nothing is advised, and no other length has a price.
    small = replace(plan, setup=replace(plan.setup, gpu_memory=0.7 * 2**30))
    assert best_change(small) is None and dict(costs_at_lengths(small))[8192] is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"plan__gpu": "RTX 4080"},
            r'plan.gpu = "RTX 4080": not known; near it: RTX-4090.*Known are.*plan.gpu_memory_gib',
        ),
        (
            {"plan__world_size": 6, "parallelism__sequence_parallel_degree": 4},
            r"sp\(4\) does not divide WORLD_SIZE\(6\)",
        ),
        (
            {"plan__gpu": "A100-80GB", "plan__attention_kernel": "fa3"},
            r'plan.attention_kernel = "fa3": it does not run on A100-80GB, which has fa2',
        ),
        (
            {"training__param_dtype": "float32", "plan__attention_kernel": "fa3"},
            r'"fa3": only the core varlen can have it, and this run takes sdpa .*needs bfloat16',
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


def test_preflight(monkeypatch):
    """A process of its own; nothing of it is left in this one. On a busy machine it is ready after
    the first step.
    """
    from titan_ulysses.plan.__main__ import _plan_for_cpu
    from titan_ulysses.train import preflight
    from titan_ulysses.train.preflight import Preflight

    run = {"world_size": 1, "model_bytes": 10**6, "gpu": ""}
    small = Preflight(config(), **run, gpu_memory=None)
    assert small.lines()[0].startswith("plan: not made: weights and optimizer take only 0.95 MiB")
    assert small.lines()[0].endswith("`python train.py --plan` with these settings makes one.")
    assert small.obstacle() is None
    assert small.news() == small.measured(1.0) == []
    with monkeypatch.context() as patch:
        # In this process: test_out_of_memory_says_what_to_lower has a plan for CPUs in its own.
        patch.setattr(
            Preflight, "_start", lambda self, asked: vars(self).update(plan=_plan_for_cpu(asked))
        )
        enforced = Preflight(
            config(plan__enforce=True, plan__host_memory_gib=1e-3), **run, gpu_memory=None
        )
    assert "MiB of tensors at the peak of a rank" in enforced.lines()[0]
    assert "plan.enforce = true: the run needs" in enforced.obstacle()
    assert (
        "of tensors planned; a rank's process has peaked at 1.50 GiB: all memory of"
        in enforced.measured(1.5)[0]
    )
    monkeypatch.setattr(preflight, "_TIMEOUT_S", 0.0)
    # Two ranks a node, as torchrun started them, whatever plan.gpus_per_node says.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    gpu = Preflight(
        config(parallelism__sequence_parallel_degree=4),
        **run | {"gpu": "NVIDIA H100 80GB HBM3", "world_size": 8},
        gpu_memory=79 * 2**30,
    )
    assert gpu.lines() == ["plan: not ready after 0 s (the machine is busy): it follows when it is"]
    assert gpu.news() == [] and gpu.planned_seconds == 0
    gpu._reader.join()
    news = gpu.news()
    assert gpu.planned_seconds == gpu.plan["step_seconds"] > 0
    assert "GiB of 79.00 GiB at the peak of a GPU" in news[0] and gpu.news() == []
    assert re.search(r"the exchange across nodes takes .* inside a node it would take", news[-1])
    gpu.enforce = True
    assert gpu.obstacle() is None
    assert "measured (" in gpu.measured(1.0)[0] and gpu.measured(1.0) == []
    left = Preflight(config(), **run | {"gpu": "NVIDIA H100 80GB HBM3"}, gpu_memory=79 * 2**30)
    left.close()
    assert left._process.returncode == -signal.SIGKILL and left.plan is None
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("sequence", "per_node", "inside"), [(4, 8, 4), (4, 4, 4), (4, 2, 2), (4, 6, 2), (8, 4, 4)]
)
def test_sequences_on_nodes(sequence, per_node, inside):
    """Of six ranks a node, the second sequence of four has two here and two there."""
    from titan_ulysses.launch.nodes import neighbours_on_node, spans_nodes

    where = {"sequence": sequence, "world_size": 24, "per_node": per_node}
    assert neighbours_on_node(**where) == inside
    assert (spans_nodes(**where) is None) == (inside == sequence)


def test_a_sequence_that_spans_nodes(tmp_path, capsys):
    """What the slower link costs, by the closed form of an all-to-all."""
    from titan_ulysses.distributed.hardware import GPUS
    from titan_ulysses.plan.report import as_json, plan_and_report

    sequence = SHALLOW | {"parallelism__sequence_parallel_degree": 4, "plan__world_size": 8}
    # Too small a GPU for any length, so that no other ones are planned to find the longest one.
    small = {"job__dump_folder": str(tmp_path), "plan__gpu_memory_gib": 1.0}
    plan_and_report(config(**sequence, **small, plan__gpus_per_node=2))
    across = json.loads((tmp_path / "run" / "plan.json").read_text())
    said = capsys.readouterr().out
    inside = as_json(plan_of(**sequence, plan__gpus_per_node=4))
    assert (
        "parallelism.sequence_parallel_degree = 4 spans nodes of 2 rank(s): the exchanges of every "
        "layer wait for the network between nodes. With 2 they stay inside a node, data "
        "parallelism spans the nodes, and a rank has 2 times the tokens." in said
    )
    assert re.search(r"the exchange across nodes takes [\d.]+ ms; inside a node it would", said)
    gpu, size = GPUS["H100-80GB"], across["collectives"]["all_to_all"]["bytes"]
    assert across["seconds"]["exchange"] == pytest.approx(size * 2 / 4 / gpu.network)
    assert across["exchange_seconds_inside_node"] == inside["seconds"]["exchange"]
    assert inside["seconds"]["exchange"] == pytest.approx(size * 3 / 4 / gpu.node_link)
    assert inside["exchange_seconds_inside_node"] is None


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [8, 1024])
def test_a_large_model_takes_a_minute(world_size, capsys):
    """The time is printed, not asserted: it is the machine's."""
    from titan_ulysses.config.load import load_config
    from titan_ulysses.plan.planner import make_plan, set_up

    started = time.perf_counter()
    setup = set_up(
        load_config(ROOT / "configs" / "llama3_8b.toml", [("plan.world_size", world_size)])
    )
    plan = make_plan(setup)
    with capsys.disabled():
        print(f"\nllama3_8b, {world_size} ranks: planned in {time.perf_counter() - started:.0f} s")
    assert plan.fits
