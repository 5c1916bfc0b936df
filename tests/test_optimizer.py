"""The optimizers: what their state weighs, that they learn, that they go on from a checkpoint, and
what is refused.
"""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from helpers import meshes, training
from helpers.meshes import DP2, ONE, SP2, Degrees
from helpers.ranks import run_on_ranks
from helpers.rows import make_rows
from helpers.runs import write_run
from test_checkpoint import RUN_STATE, error_of
from titan_ulysses.checkpoint.dcp import Checkpointer
from titan_ulysses.config.load import config_of
from titan_ulysses.config.schema import Optimizer
from titan_ulysses.distributed.collectives import CollectiveCounter
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.model.torchao import import_torchao
from titan_ulysses.optim.adamw import (
    ShardwiseAdamW,
    check_optimizer,
    check_shards,
    describe_state,
    state_bytes,
    state_format,
)
from titan_ulysses.optim.optimizer import build_optimizer, set_learning_rate
from titan_ulysses.train.step import clip_gradients

# On one rank all matrices are large enough to be quantized; on two those of the attention are not,
# the others are.
MODEL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
ROWS = make_rows([(24,), (16, 8), (8, 16), (24,)], masked="none", vocab_size=256, seed=0)

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw8bit": {"name": "adamw8bit"},
    "adamw4bit": {"name": "adamw4bit"},
    "adamw, rounded": {"stochastic_rounding": True},
    "adamw8bit, rounded": {"name": "adamw8bit", "stochastic_rounding": True},
}
each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


class Run(training.Run):
    """Computing in bf16, with fp32 master weights unless they are rounded stochastically."""

    def __init__(self, degrees: Degrees, optimizer: str, *, lr: float = 1e-2, **options: Any):
        config = Optimizer(lr=lr, weight_decay=0.1, **OPTIMIZERS[optimizer])
        dtype = torch.bfloat16 if config.stochastic_rounding else torch.float32
        model = MODEL | options.pop("model", {})
        super().__init__(
            degrees,
            model,
            ROWS,
            dtype=dtype,
            param_dtype=torch.bfloat16,
            optimizer=config,
            **options,
        )
        if options.get("optimizer_offload"):
            # On a CPU `build_optimizer` has nothing to offload; the way there and back is the same.
            groups = {key: getattr(config, key) for key in ("lr", "betas", "eps", "weight_decay")}
            bits = {"adamw8bit": 8, "adamw4bit": 4}.get(config.name, 32)
            rounding = config.stochastic_rounding
            parameters = list(self.model.parameters())
            self.optimizer = ShardwiseAdamW(
                parameters, **groups, bits=bits, stochastic_rounding=rounding, offload=True
            )


def same_bits(found: dict[str, list[Tensor]], expected: dict[str, list[Tensor]]) -> bool:
    assert found.keys() == expected.keys()
    pairs = ((a, b) for name in found for a, b in zip(found[name], expected[name], strict=True))
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


# --- bytes ----------------------------------------------------------------------------------------


def weigh(optimizer: str) -> tuple[dict[str, int], int, int, int, str]:
    run = Run(DP2, optimizer).train(1)
    sizes = [p.to_local().numel() for p in run.model.parameters()]
    quantized = [size for size in sizes if size >= 4096]
    return (
        state_bytes(run.optimizer),
        sum(sizes),
        sum(quantized),
        len(quantized),
        describe_state(run.optimizer),
    )


@pytest.mark.parametrize(
    ("optimizer", "bits", "block"), [("adamw", 32, 0), ("adamw8bit", 8, 256), ("adamw4bit", 4, 128)]
)
def test_bytes_of_state(optimizer, bits, block):
    """8 bytes a parameter; 2 or 1 and two scales a block where it is quantized, with two tables of
    2^bits values.
    """
    ranks = run_on_ranks(2, weigh, optimizer)
    print(f"\n{ranks[0][-1]}")
    for found, total, quantized, tensors, line in ranks:
        steps = 4 * (2 * 9 + 3)  # nine parameters a layer, embedding, norm and head
        expected = {"float32": 8 * (total - quantized) + steps}
        if bits < 32:
            assert quantized > 0.7 * total
            expected["float32"] += 8 * quantized // block + tensors * 2 * 4 * 2**bits
            expected["uint8"] = 2 * quantized * bits // 8
        else:
            expected["float32"] += 8 * quantized
        assert found == expected
        assert line.startswith(
            f"{optimizer}: {sum(expected.values()) / total:.2f} bytes of state a parameter, on a "
            "rank"
        )


@pytest.mark.parametrize(
    ("name", "expected"), [("adamw", 8.0), ("adamw8bit", 2.03), ("adamw4bit", 1.06)]
)
def test_bytes_of_state_of_a_large_matrix(name, expected):
    matrix = nn.Parameter(torch.zeros(1024, 512))
    optimizer = build_optimizer(nn.ParameterList([matrix]), Optimizer(name=name))
    matrix.grad = torch.zeros_like(matrix)
    optimizer.step()
    print(f"\n{describe_state(optimizer)}")
    assert sum(state_bytes(optimizer).values()) / matrix.numel() == pytest.approx(
        expected, abs=0.01
    )


# --- the step -------------------------------------------------------------------------------------


def random_steps(
    parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: int
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()
    return [p.detach() for p in parameters]


def some_parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [
        nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for shape in [(64, 64), (129, 64), (64,)]
    ]


@pytest.mark.parametrize("bits", [4, 8])
def test_the_step_is_torchaos(bits):
    ours, theirs = some_parameters(), some_parameters()
    config = Optimizer(name=f"adamw{bits}bit", lr=1e-2)
    options = {
        "lr": config.lr,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    reference = getattr(import_torchao("optim"), f"AdamW{bits}bit")(theirs, **options)
    found = random_steps(ours, build_optimizer(nn.ParameterList(ours), config), 4)
    with torch.compiler.set_stance("force_eager"):
        expected = random_steps(theirs, reference, 4)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"name": "adamw8bit"}, marks=pytest.mark.slow),
        pytest.param({"name": "adamw4bit"}, marks=pytest.mark.slow),
        pytest.param({"stochastic_rounding": True}, marks=pytest.mark.slow),
        pytest.param({"name": "adamw8bit", "stochastic_rounding": True}, marks=pytest.mark.slow),
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_the_compiled_step_has_the_same_numbers(settings):
    check_compiled_step(settings)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adamw4bit"])
def test_the_counter_of_the_first_step_lets_it_compile(name, monkeypatch):
    """The counter is a dispatch mode, and Dynamo refuses most of them. Without a code generator."""
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda fn, **options: compile_(fn, backend="eager", **options)
    )
    check_compiled_step({"name": name, "stochastic_rounding": True})


def check_compiled_step(settings: dict[str, Any]) -> None:
    config = Optimizer(lr=1e-2, **settings)
    dtype = torch.bfloat16 if config.stochastic_rounding else torch.float32
    plain, compiled = some_parameters(dtype)[:1], some_parameters(dtype)[:1]
    optimizer = build_optimizer(nn.ParameterList(compiled), config)
    optimizer.compiled = True  # as on a GPU
    torch._dynamo.utils.counters.clear()
    with CollectiveCounter():
        found = random_steps(compiled, optimizer, 2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    expected = random_steps(plain, build_optimizer(nn.ParameterList(plain), config), 2)
    # Compiled code draws other numbers: with stochastic rounding, a unit in the last place.
    bound = 0.04 if config.stochastic_rounding else 1e-6
    assert all((a - b).abs().max() < bound for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "muon"])
def test_learning_rates_of_some_parameters(name: str) -> None:
    """A parameter moves as if all had its learning rate; the last pattern that matches counts."""
    lr = 2**-7
    factors = {"*.layers.*": 8.0, "*.q_proj.weight": 2.0}

    def moved(lr: float, factors: dict[str, float]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        table = {key: value for key, value in MODEL.items() if key != "model_type"}
        model = AutoModelForCausalLM.from_config(LlamaConfig(**table))
        optimizer = build_optimizer(model, Optimizer(name=name, lr=lr, lr_factors=factors))
        assert state_format(optimizer) == name
        set_learning_rate(optimizer, lr)
        model(torch.arange(24)[None]).logits.square().sum().backward()
        optimizer.step()
        return {name: p.detach() for name, p in model.named_parameters()}

    runs = {factor: moved(factor * lr, {}) for factor in (1.0, 2.0, 8.0)}
    for key, value in moved(lr, factors).items():
        factor = 2.0 if "q_proj" in key else 8.0 if ".layers." in key else 1.0
        assert torch.equal(value, runs[factor][key]), key
    with pytest.raises(
        UserError, match=r"optimizer\.lr_factors = .*\*\.wieght.* matches no trained"
    ):
        moved(lr, {"*.wieght": 2.0})


def losses(optimizer: str, steps: int, **options: Any) -> list[float]:
    return Run(DP2, optimizer, lr=3e-3, **options).train(steps).losses


@pytest.mark.slow
def test_low_bits_follow_adamw():
    """Over 20 steps, each loss is within 0.02 (8 bits) or 0.2 (4 bits) of AdamW's, while they fall
    by 5 or more.
    """
    expected = torch.tensor(run_on_ranks(2, losses, "adamw", 20)[0])
    assert expected[0] - expected[-1] > 5
    for optimizer, bound in (("adamw8bit", 0.02), ("adamw8bit, rounded", 0.02), ("adamw4bit", 0.2)):
        difference = (
            (torch.tensor(run_on_ranks(2, losses, optimizer, 20)[0]) - expected).abs().max().item()
        )
        print(
            f"\n{optimizer}: losses within {difference:.4f} of adamw's, from {expected[0]:.2f} to "
            f"{expected[-1]:.2f}"
        )
        assert 0 < difference < bound


def train_twice(optimizer: str, options: dict[str, Any]) -> list[bool]:
    plain, other = Run(DP2, optimizer).train(3), Run(DP2, optimizer, **options).train(3)
    return [plain.losses == other.losses, same_bits(other.bits(), plain.bits())]


@pytest.mark.parametrize("option", ["optimizer_offload", "parameter_offload"])
@each_optimizer
def test_offload_changes_no_bit(optimizer, option):
    assert run_on_ranks(2, train_twice, optimizer, {option: True}) == [[True, True]] * 2


# --- stochastic rounding --------------------------------------------------------------------------


def step_by_tenths(seed_index: int) -> Tensor:
    """Where 20,000 numbers 1 are after a step of -0.1 units in their last place, and one of +0.1,
    ...
    """
    p = nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
    unit = 2**-8  # below 1; above it is 2^-7
    config = Optimizer(lr=0.1 * unit, weight_decay=0, stochastic_rounding=True)
    parameters = [*(nn.Parameter(torch.ones(1)) for _ in range(seed_index)), p]
    optimizer = build_optimizer(nn.ParameterList(parameters), config)
    p.grad = torch.ones_like(p)
    optimizer.step()
    return p.detach().float()


def test_rounding_is_stochastic_and_right_on_average():
    """AdamW's first step is lr * sign of the gradient: 0.1 of the distance to the next bf16 number
    below.
    """
    moved = step_by_tenths(0)
    assert set(moved.tolist()) == {1.0, 1 - 2**-8}
    share = (moved < 1).double().mean().item()
    deviation = math.sqrt(0.1 * 0.9 / len(moved))
    print(
        f"\n{share:.4f} of the numbers moved, where 0.1 was to be expected (standard deviation "
        f"{deviation:.4f})"
    )
    assert abs(share - 0.1) < 4 * deviation
    assert not torch.equal(moved, step_by_tenths(1)), (
        "another parameter draws the same random numbers"
    )
    nearest = torch.ones(20_000, dtype=torch.bfloat16) - 0.1 * 2**-8
    assert (nearest == 1).all(), "rounded to nearest, such a step is lost"


def test_the_number_of_a_step_that_may_be_skipped_is_the_hosts(monkeypatch):
    """What the device skips is counted there, and the host would wait to know it."""
    rounded = []
    for number in (0, 0, 1):
        p = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        config = Optimizer(lr=0.1 * 2**-8, weight_decay=0, stochastic_rounding=True)
        optimizer = build_optimizer(nn.ParameterList([p]), config, skips=True)
        optimizer.steps_before, p.grad = number, torch.ones_like(p)
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "__int__", lambda self: pytest.fail("the host waits"))
            optimizer.step()
        rounded.append(p.detach())
    assert torch.equal(rounded[0], rounded[1]) and not torch.equal(rounded[0], rounded[2])


def rounded_replicas() -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    torch.manual_seed(dist.get_rank())  # as the trainer does, for dropout
    before = torch.get_rng_state()
    run = Run((2, 1, 1), "adamw8bit, rounded").train(3)
    assert torch.equal(torch.get_rng_state(), before), (
        "the optimizer has drawn from the run's random numbers"
    )
    return run.bits()


def test_replicas_round_alike():
    first, second = run_on_ranks(2, rounded_replicas)
    assert same_bits(first, second)


def accumulate(count: int) -> tuple[list[torch.dtype], float, float]:
    run = Run(DP2, "adamw, rounded")
    dtypes: list[torch.dtype] = []
    run.optimizer.register_step_pre_hook(
        lambda *_: dtypes.extend(p.grad.dtype for p in run.model.parameters())
    )
    run.train(1, accumulate=count)
    return sorted(set(dtypes), key=str), run.losses[0], run.grad_norm.item()


def test_bf16_gradients_are_added_and_measured_in_fp32():
    [(one, loss, norm), _] = run_on_ranks(2, accumulate, 1)
    [(eight, same_loss, same_norm), _] = run_on_ranks(2, accumulate, 8)
    assert (one, eight) == ([torch.bfloat16], [torch.float32])
    assert abs(same_loss - loss) < 1e-6  # eight times the same batch
    assert abs(same_norm - norm) < 1e-3 * norm


def test_the_norm_of_bf16_gradients():
    parameters = [nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16)) for _ in range(3)]
    for p in parameters:
        p.grad = torch.full_like(p, 0.5)
    norm = clip_gradients(parameters, 1.0)
    assert norm.dtype == torch.float32
    assert abs(norm.item() - 0.5 * math.sqrt(3000)) < 1e-4
    assert abs(clip_gradients(parameters, 0).item() - 1) < 1e-2  # each rounded to bf16


# --- checkpoints ----------------------------------------------------------------------------------


def save_and_go_on(
    degrees: Degrees, optimizer: str, folder: Path, **options: Any
) -> tuple[dict, dict, dict]:
    run = Run(degrees, optimizer, **options).train(2)
    Checkpointer(folder, keep=0).save(2, run.model, run.optimizer, RUN_STATE)
    before = run.whole()
    return before, run.bits(), run.train(2).bits()


def resume(
    degrees: Degrees, optimizer: str, folder: Path, **options: Any
) -> tuple[dict, dict, dict]:
    run = Run(degrees, optimizer, seed=1, **options)
    Checkpointer(folder, keep=0).load(2, run.model, run.optimizer)
    before = run.whole()
    return before, run.bits(), run.train(2).bits()


@each_optimizer
def test_two_steps_and_two_more_are_four(optimizer, tmp_path):
    """Bit for bit, on the same mesh; dp2 and sp2 shard alike, so there too the state is the same to
    the bit.
    """
    saved = run_on_ranks(2, save_and_go_on, DP2, optimizer, tmp_path)
    for (_, now, later), (_, now_saved, later_saved) in zip(
        run_on_ranks(2, resume, DP2, optimizer, tmp_path), saved, strict=True
    ):
        assert same_bits(now, now_saved)
        assert same_bits(later, later_saved)
        assert not same_bits(now, later)
    for (_, now, _), (_, now_saved, _) in zip(
        run_on_ranks(2, resume, SP2, optimizer, tmp_path), saved, strict=True
    ):
        assert same_bits(now, now_saved)


@pytest.mark.parametrize(("there", "here"), [(DP2, ONE), (ONE, DP2)], ids=["2 to 1", "1 to 2"])
@pytest.mark.parametrize(
    "optimizer",
    [
        "adamw8bit",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("adamw4bit", "adamw, rounded")),
    ],
)
def test_another_number_of_ranks(optimizer, there, here, tmp_path):
    """Everything keeps its value, but for what was too small to be quantized on two ranks and is
    not on one.
    """
    ranks = {degrees: math.prod(degrees) for degrees in (there, here)}
    expected = run_on_ranks(ranks[there], save_and_go_on, there, optimizer, tmp_path)[0][0]
    exact, bound = True, {"adamw8bit": 0.01, "adamw4bit": 0.2}.get(optimizer.split(",")[0], 0)
    for found, *_ in run_on_ranks(ranks[here], resume, here, optimizer, tmp_path):
        assert found.keys() == expected.keys()
        for name in found:
            quantized_only_here = bound and here == ONE and "self_attn" in name and "/exp" in name
            difference = (found[name] - expected[name]).abs().max() / expected[name].abs().max()
            assert difference <= (bound if quantized_only_here else 0), (name, difference)
            exact &= difference.item() == 0
    assert exact == (not bound or here != ONE)


OFFLOAD_CASES_IN_CI = [
    ("adamw", "parameter_offload", False),
    ("adamw8bit", "optimizer_offload", True),
    ("adamw8bit", "parameter_offload", False),
]


@pytest.mark.parametrize(
    ("optimizer", "option", "there"),
    [
        pytest.param(
            *case,
            id=f"{case[0]}-{case[1]}-turned {'off' if case[2] else 'on'}",
            marks=[] if case in OFFLOAD_CASES_IN_CI else [pytest.mark.slow],
        )
        for case in product(
            ["adamw", "adamw8bit"], ["optimizer_offload", "parameter_offload"], [False, True]
        )
    ],
)
def test_offload_can_change_at_resume(optimizer, option, there, tmp_path):
    saved = run_on_ranks(2, save_and_go_on, DP2, optimizer, tmp_path, **{option: there})
    found = run_on_ranks(2, resume, DP2, optimizer, tmp_path, **{option: not there})
    for (_, now, later), (_, now_saved, later_saved) in zip(found, saved, strict=True):
        assert same_bits(now, now_saved)
        assert same_bits(later, later_saved)


def try_to_resume(
    degrees: Degrees, optimizer: str, folder: Path, **options: Any
) -> tuple[str, bool]:
    run = Run(degrees, optimizer, seed=1, **options)
    before = run.local()
    message = error_of(partial(Checkpointer(folder, keep=0).load, 2, run.model, run.optimizer))
    return message, all(map(torch.equal, run.local(), before))


def test_the_state_of_another_optimizer_is_refused(tmp_path):
    run_on_ranks(2, save_and_go_on, DP2, "adamw", tmp_path)
    for message, unchanged in run_on_ranks(2, try_to_resume, DP2, "adamw8bit", tmp_path):
        assert message == (
            f'optimizer.name = "adamw8bit": checkpoint.folder = {tmp_path}: step-2 holds the state '
            'of "adamw". Set optimizer.name = "adamw", or give this run another job.name.'
        )
        assert unchanged


@pytest.mark.parametrize(("there", "here"), [(ONE, DP2), (DP2, ONE)], ids=["cut", "joined"])
def test_a_block_is_never_cut(there, here, tmp_path):
    """q_proj has 6400 numbers, 25 blocks: one rank quantizes them, and half of them on two ranks
    are 12 1/2.
    """
    odd = {"model": {"hidden_size": 80}}
    run_on_ranks(math.prod(there), save_and_go_on, there, "adamw8bit", tmp_path, **odd)
    for message, unchanged in run_on_ranks(
        math.prod(here), try_to_resume, here, "adamw8bit", tmp_path, **odd
    ):
        assert message.startswith(
            f"checkpoint.folder = {tmp_path}: step-2 was saved on another number of ranks, "
        )
        assert (
            "8-bit optimizer state of model.layers.0.self_attn.q_proj.weight cannot be cut"
            in message
        )
        assert message.endswith("Resume with the dp_shard x sp of the run that saved it.")
        assert unchanged


# --- what is refused ------------------------------------------------------------------------------


def test_nothing_to_quantize():
    parameters = [
        nn.Parameter(torch.empty(shape, device="meta")) for shape in [(60, 60), (129, 65), ()]
    ]
    config = Optimizer(name="adamw8bit")
    with pytest.raises(
        UserError, match=r'optimizer.name = "adamw8bit" would quantize nothing: .* has 8,385\)'
    ):
        check_shards(parameters, config)
    check_shards([*parameters, nn.Parameter(torch.empty(64, 64, device="meta"))], config)
    check_shards(parameters, Optimizer())


def refused_shards(rows: int) -> str:
    """What is said of a parameter [rows, 64] whose shards are on two ranks."""
    shard = torch.empty(rows // 2, 64, device="meta")
    sharded = nn.Parameter(
        DTensor.from_local(shard, meshes.mesh_of(*DP2).fsdp, [Shard(0)], run_check=False)
    )
    try:
        check_shards([sharded], Optimizer(name="adamw4bit"))
    except UserError as error:
        return str(error)
    return ""


def test_shards_count_and_not_parameters():
    assert all("would quantize nothing" in text for text in run_on_ranks(2, refused_shards, 126))
    assert run_on_ranks(2, refused_shards, 128) == ["", ""]


def test_torchao_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_optimizer(Optimizer())
    for settings, named in (
        ({"name": "adamw4bit"}, 'optimizer.name = "adamw4bit"'),
        ({"stochastic_rounding": True}, "optimizer.stochastic_rounding = true"),
    ):
        with pytest.raises(UserError) as refused:
            check_optimizer(Optimizer(**settings))
        assert (
            str(refused.value)
            == f"{named} needs torchao, which is not installed: pip install torchao"
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"optimizer": {"stochastic_rounding": True}, "training": {"param_dtype": "float32"}},
            "optimizer.stochastic_rounding = true rounds to bfloat16, but training.param_dtype = "
            '"float32"',
        ),
        (
            {
                "optimizer": {"name": "adamw8bit"},
                "training": {"param_dtype": "float64", "reduce_dtype": "float64"},
            },
            'optimizer.name = "adamw8bit" computes in fp32, but training.param_dtype = "float64"',
        ),
        (
            {"quantize": {"float8": True}, "training": {"param_dtype": "float32"}},
            'quantize.float8 = true needs training.param_dtype = "bfloat16", which is "float32"',
        ),
    ],
    ids=["rounding", "fp64", "float8"],
)
def test_dtypes_that_do_not_go_together(settings, message):
    with pytest.raises(UserError) as refused:
        config_of({"model": {"config": {"model_type": "llama"}}, **settings})
    assert str(refused.value).startswith(message)
    assert refused.value.exit_code == 2


def test_a_run_says_what_it_keeps(tmp_path):
    """Through train.py, whose output has nothing of torchao's import in it."""
    settings = {
        "training.param_dtype": "bfloat16",
        "training.steps": "1",
        "lr_scheduler.warmup_steps": "0",
        "optimizer.name": "adamw8bit",
        "optimizer.stochastic_rounding": "true",
        "memory.parameter_offload": "true",
        "memory.optimizer_offload": "true",
        "model.config.hidden_size": "64",
    }
    command = [sys.executable, "train.py", "--config", str(write_run(tmp_path))]
    command += [f"--{key}={value}" for key, value in settings.items()]
    repository = Path(__file__).resolve().parent.parent
    run = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, "")
    for option in ("parameter_offload", "optimizer_offload"):
        assert (
            f"\nmemory.{option} has no effect: the device is the CPU, and everything is in host "
            "memory\n" in run.stdout
        )
    assert "\nadamw8bit: " in run.stdout and " bytes of state a parameter, on a rank " in run.stdout


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@each_optimizer
def test_offload_on_a_gpu_changes_no_bit(optimizer):
    config = Optimizer(lr=1e-2, **OPTIMIZERS[optimizer])
    mesh = meshes.mesh_of(*ONE).fsdp
    dtype = torch.bfloat16 if config.stochastic_rounding else torch.float32
    found, bytes_found = [], []
    for offload in (False, True):
        whole = [p.detach().to("cuda") for p in some_parameters(dtype)]
        parameters = [nn.Parameter(distribute_tensor(p, mesh, [Shard(0)])) for p in whole]
        before = torch.cuda.memory_allocated()
        built = build_optimizer(nn.ParameterList(parameters), config, offload=offload)
        for step in range(3):
            for p in parameters:
                p.grad = distribute_tensor(
                    torch.full(p.shape, 0.1 * (step + 1), device="cuda", dtype=dtype), mesh
                )
                p.grad = p.grad.redistribute(placements=[Shard(0)])
            built.step()
        for p in parameters:
            p.grad = None
        torch.cuda.synchronize()
        found.append([p.full_tensor().cpu() for p in parameters])
        bytes_found.append(torch.cuda.memory_allocated() - before)
        moments = [
            state[name] for state in built.state.values() for name in ("exp_avg", "exp_avg_sq")
        ]
        assert {m.device.type for m in moments} == {"cpu" if offload else "cuda"}
    assert all(map(torch.equal, *found))
    assert bytes_found[1] < 0.1 * bytes_found[0]


@pytest.mark.gpu
@each_optimizer
def test_parameters_on_the_host_of_a_gpu(optimizer, tmp_path):
    run = Run(ONE, optimizer, parameter_offload=True).train(2)
    expected = Run(ONE, optimizer).train(2).losses
    assert all(abs(a - b) < 1e-2 * b for a, b in zip(run.losses, expected, strict=True))
    assert {p.device.type for p in run.model.parameters()} == {"cpu"}
    Checkpointer(tmp_path, keep=0).save(2, run.model, run.optimizer, RUN_STATE)
    found = Run(ONE, optimizer, seed=1)  # parameters on the device again
    Checkpointer(tmp_path, keep=0).load(2, found.model, found.optimizer)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found.local(), run.local(), strict=True))
