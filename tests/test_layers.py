"""A step simulated by a few layers is the step of all layers."""

from __future__ import annotations

from random import Random

import pytest

from helpers.families import model_of
from helpers.models import LLAMA
from titan_ulysses.config.schema import Config
from titan_ulysses.distributed.errors import UserError

LONG = {"max_position_embeddings": 2**24}
WIDE = {"hidden_size": 192, "intermediate_size": 64}  # NF4 has blocks of 64 numbers
LEADING = "deepseek_v32"
"""Its first layers are not as all others."""
MODELS = {
    "llama": LLAMA | WIDE,
    "tied": LLAMA | WIDE | {"tie_word_embeddings": True},
    "qwen3_moe": model_of("qwen3_moe"),
    "gpt_oss": model_of("gpt_oss"),
    LEADING: model_of(LEADING),
    "gemma3_text": model_of("gemma3_text"),
    "qwen3_next": model_of("qwen3_next"),
}
KINDS = {
    "gpt_oss": ["sliding_attention", "full_attention"],
    "gemma3_text": ["sliding_attention", "full_attention"],
    "qwen3_next": ["linear_attention", "full_attention"],
}


def model_with(name: str, *, every: int) -> dict:
    """The config of a model with as many layers as a few can stand for."""
    kinds = KINDS.get(name, [])
    layers = 16 if every == 2 else 12 if kinds else 10 if name == LEADING else 8
    types = {"layer_types": kinds * (layers // 2)} if kinds else {}
    return MODELS[name] | LONG | types | {"num_hidden_layers": layers}


def setup_of(model: str, settings: dict):
    from titan_ulysses.plan.planner import set_up

    shape = model_with(model, every=settings.get("activation_checkpoint.every", 1))
    table: dict = {"model": {"config": shape, "tokenizer": "bytes"}}
    for key, value in ({"training.seq_len": 4096} | settings).items():
        section, name = key.split(".")
        table.setdefault(section, {})[name] = value
    return set_up(Config.model_validate(table))


def all_of(simulation) -> dict:
    """All that a simulation says, so that it can be compared."""
    memory, numbers = simulation.memory, {}
    return {
        "events": [
            (numbers.setdefault(id(one), len(numbers)), change, moment)
            for (one, change), moment in zip(memory.events, memory.moments, strict=True)
        ],
        "allocations": [
            (one.component, one.place, one.made, one.shape, one.dtype, one.label, one.layer)
            for one in dict.fromkeys(one for one, _ in memory.events)
        ],
        "ticks": simulation.ticks,
        "cost": simulation.cost.amounts,
        "collectives": simulation.collectives,
        "rest": (simulation.start, simulation.batches, simulation.flops_per_token),
    }


def drawn(number: int):
    """A setup with random settings of all kinds."""
    from titan_ulysses.plan.search import at_length

    random = Random(number)
    while True:
        model = random.choice([x for x in MODELS if x != LEADING])
        world = random.choice([1, 2, 4, 8])
        full, is_wide = random.random() < 0.8, model in ("llama", "tied")
        # What is quantized has a smallest size.
        quantized = ["none", "nf4"] if is_wide else ["none"]
        adapters = random.random() < 0.3 and model != "qwen3_next"  # peft refuses its experts
        is_large = world == 1 or (world == 2 and not adapters)  # enough to quantize on a rank
        optimizers = ["adamw", "muon"] + ["adamw8bit"] * (is_wide and is_large)
        settings = {
            "plan.world_size": world,
            "parallelism.sequence_parallel_degree": random.choice([1, 2, 4]),
            "parallelism.data_parallel_replicate_degree": random.choice([1, 1, 2]),
            "training.global_batch_size": random.choice([-1, -1, 3 * world]),
            "memory.stream_chunk_tokens": -1,
            "memory.optimizer_offload": random.random() < 0.2,
            "memory.parameter_offload": random.random() < 0.2,
            "memory.mlp_tile_tokens": random.choice([0, 1000, -1]),
            "activation_checkpoint.mode": "full" if full else "none",
            "lora.rank": 32 if adapters else 0,
            "lora.quantize_base": random.choice(quantized) if adapters else "none",
            "optimizer.name": random.choice(optimizers),
            "checkpoint.enable": random.random() < 0.5,
        }
        if full:
            settings |= {
                "activation_checkpoint.every": random.choice([1, 1, 2]),
                "activation_checkpoint.offload": random.choice(["none", "host"]),
            }
        if full and random.random() < 0.6:
            settings |= {
                "memory.stream_chunk_tokens": 1024,
                "memory.stream_offload": random.choice(["none", "host", "disk"]),
                "activation_checkpoint.keep_attention": random.choice(["none", "none", "all"]),
            }
        try:
            setup = setup_of(model, settings)
            at_length(setup, 8192)  # UserError where settings exclude each other
            return setup
        except UserError:
            continue


CASES = {
    "chunks off the device": (
        "llama",
        {
            "plan.world_size": 8,
            "parallelism.sequence_parallel_degree": 4,  # of six heads
            "memory.stream_chunk_tokens": 2048,
            "memory.stream_offload": "host",
            "training.global_batch_size": 4,  # two batches
        },
    ),
    "adapters on NF4": (
        "tied",
        {
            "plan.world_size": 1,
            "lora.rank": 32,
            "lora.quantize_base": "nf4",
            "activation_checkpoint.offload": "host",
            "memory.stream_chunk_tokens": -1,
        },
    ),
    "other layers first": (
        LEADING,
        {
            "plan.world_size": 2,
            "parallelism.sequence_parallel_degree": 2,
            "memory.stream_chunk_tokens": -1,
            "training.seq_len": 128,
        },
    ),
    "two kinds": (
        "qwen3_next",
        {
            "plan.world_size": 2,
            "parallelism.sequence_parallel_degree": 2,
            "memory.optimizer_offload": True,
            "activation_checkpoint.mode": "none",
            "memory.stream_chunk_tokens": -1,
        },
    ),
}

TWO_CHUNKS = {
    "plan.world_size": 2,
    "parallelism.sequence_parallel_degree": 2,
    "memory.stream_chunk_tokens": 2048,
    "memory.stream_offload": "host",
}


@pytest.mark.parametrize(
    "case",
    # Those with names are the hardest of what the numbers draw.
    # The longest of the named cases is slow: those of two kinds and of adapters always run.
    [
        pytest.param(case, marks=[pytest.mark.slow] if case == "chunks off the device" else [])
        for case in CASES
    ]
    + [pytest.param(number, marks=pytest.mark.slow) for number in range(40)],
)
def test_few_layers_tell_what_all_do(case):
    """To the byte and the FLOP: every event, every operation's cost, every name."""
    from titan_ulysses.plan.layers import simulate_by_layers
    from titan_ulysses.plan.simulate import simulate

    setup = drawn(case) if isinstance(case, int) else setup_of(*CASES[case])
    short, whole = (run(setup.spec, cuda=setup.workspace) for run in (simulate_by_layers, simulate))
    print(setup.model_config.model_type, short.layers, "of", whole.layers)
    found, expected = all_of(short), all_of(whole)
    for what in expected:
        assert found[what] == expected[what], what
    # With replicas, a layer can take the buffer of the layer before: then all are simulated.
    is_replicated = setup.degrees.replicate > 1
    assert short.layers < whole.layers or is_replicated, "all layers were simulated"


@pytest.mark.parametrize(
    "case",
    ["two chunks", *(pytest.param(n, marks=pytest.mark.slow) for n in range(40, 56))],
)
def test_a_second_length_takes_one_simulation(monkeypatch, case):
    """What the fewest layers tell is known from the first length, whatever the last chunk has."""
    from titan_ulysses.plan import layers
    from titan_ulysses.plan.search import at_length
    from titan_ulysses.plan.simulate import simulate

    simulated = []

    def counted(spec, **options):
        simulated.append(spec.model_config.num_hidden_layers)
        return simulate(spec, **options)

    monkeypatch.setattr(layers, "simulate", counted)
    first = drawn(case) if isinstance(case, int) else setup_of("llama", TWO_CHUNKS)
    for setup in (first, second := at_length(first, 15_360)):
        short = layers.simulate_by_layers(setup.spec, cuda=setup.workspace)
    if case == "two chunks":
        assert simulated == [4, 3, 4]
    assert all_of(short) == all_of(simulate(second.spec, cuda=setup.workspace))
