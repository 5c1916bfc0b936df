"""The trainer: the same run on any mesh, what it logs, and that only the model's own collectives
are on the wire.
"""

from __future__ import annotations

import json
import math
import re
import signal
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.families import model_of
from helpers.meshes import mesh_of
from helpers.models import LLAMA
from helpers.ranks import run_on_ranks
from helpers.rows import local_batch, make_rows
from helpers.runs import (
    SEQ_LEN,
    Settings,
    learned,
    logged,
    refusal,
    train,
    write_documents,
    write_run,
)
from helpers.training import OPTIMIZER
from titan_ulysses.config.load import load_config
from titan_ulysses.config.schema import Config
from titan_ulysses.data.corpus import Corpus
from titan_ulysses.data.loader import Loader
from titan_ulysses.data.packing import PackedSequences
from titan_ulysses.model import hf
from titan_ulysses.observability.metrics import PeakMemory, attention_flops, flops_per_token
from titan_ulysses.optim.optimizer import build_optimizer
from titan_ulysses.setup.parallelize import parallelize
from titan_ulysses.train.preflight import timeout_of_step
from titan_ulysses.train.step import (
    StepMetrics,
    clip_gradients,
    gradient_norms,
    learning_rate,
    train_step,
)
from titan_ulysses.train.trainer import Trainer

MESHES = {  # dp_replicate, dp_shard, sp
    "one": (1, 1, 1),
    "sp2": (1, 1, 2),
    "sp4": (1, 1, 4),
    "dp2 x sp2": (1, 2, 2),
    "rep2 x sp2": (2, 1, 2),
}


STEPS = 6
# What makes long sequences fit changes nothing either; the runs above keep their checkpoints on the
# device.
OFFLOADED: Settings = {
    "activation_checkpoint.every": 2,
    "activation_checkpoint.offload": "disk",
    "memory.mlp_tile_tokens": 7,
    "memory.loss_tile_tokens": 5,
}


def on_mesh(name: str) -> Settings:
    replicate, shard, sequence = MESHES[name]
    return (OFFLOADED if name == "dp2 x sp2" else {}) | {
        "parallelism.data_parallel_replicate_degree": replicate,
        "parallelism.data_parallel_shard_degree": shard,
        "parallelism.sequence_parallel_degree": sequence,
    }


# --- the same run on any mesh ---------------------------------------------------------------------


class RunOnMeshes:
    """One config, run on each mesh that is asked for: 6 steps of 8 sequences, more than an epoch.

    Where few ranks read, micro-batches are accumulated.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, write_run(folder)
        self.held_out = write_documents(folder / "held-out", documents=6, seed=1)
        self.done: set[str] = set()

    def __getitem__(self, name: str) -> Path:
        """The folder of the run on this mesh."""
        settings: Settings = {
            "validation.enable": True,
            "validation.path": str(self.held_out),
            "validation.interval": 3,
            "training.steps": STEPS,
            "training.global_batch_size": 8,
            "optimizer.lr": 1e-2,
            "checkpoint.enable": False,
            "job.name": name,
        }
        if name not in self.done:
            ranks = math.prod(MESHES[name])
            run_on_ranks(ranks, train, self.config, settings | on_mesh(name))
            self.done.add(name)
        return self.folder / "outputs" / name


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> RunOnMeshes:
    return RunOnMeshes(tmp_path_factory.mktemp("runs"))


SEVERAL_RANKS = [
    pytest.param(name, marks=[] if name in ("sp2", "dp2 x sp2") else [pytest.mark.slow])
    for name in MESHES
    if name != "one"
]


def held_out_sequences(runs: RunOnMeshes) -> int:
    files = runs.held_out.iterdir()
    # A byte a token, and the end of the text.
    return -(-sum(file.stat().st_size + 1 for file in files) // SEQ_LEN)


@pytest.mark.parametrize("mesh", SEVERAL_RANKS)
def test_loss_and_gradient_norm_do_not_depend_on_the_mesh(mesh: str, runs: RunOnMeshes) -> None:
    expected, found = learned(runs["one"]), learned(runs[mesh])
    assert (
        [step for step, *_ in found] == [step for step, *_ in expected] == list(range(1, STEPS + 1))
    )
    for (step, loss, norm), (_, expected_loss, expected_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-5), step
        assert norm == pytest.approx(expected_norm, rel=1e-5), step
    # It learns: a run that stands still agrees with itself on any mesh.
    assert expected[-1][1] < 0.8 * expected[0][1]


@pytest.mark.parametrize("mesh", SEVERAL_RANKS)
def test_validation_loss_does_not_depend_on_the_mesh(mesh: str, runs: RunOnMeshes) -> None:
    sequences = held_out_sequences(runs)
    assert sequences % 2 and sequences > 8  # no mesh's batches are filled by the last sequences
    expected, found = (
        [line for line in logged(runs[name]) if "validation_loss" in line] for name in ("one", mesh)
    )
    assert [line["step"] for line in found] == [line["step"] for line in expected] == [0, 3, 6]
    for line, other in zip(found, expected, strict=True):
        assert line["validation_loss"] == pytest.approx(other["validation_loss"], rel=1e-6)
        assert line["validation_tokens"] == other["validation_tokens"] <= sequences * SEQ_LEN
    assert len({line["validation_loss"] for line in found}) == 3


MOE = {
    "model_type": "qwen3_moe",
    "output_router_logits": True,
    "router_aux_loss_coef": 0.1,
    "num_experts": 4,
}
MOE |= {
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "head_dim": 8,
    "decoder_sparse_step": 1,
}


LATENT = {
    "model_type": "youtu",
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 8,
}
LATENT |= {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}


def test_latent_attention_does_not_depend_on_the_mesh(tmp_path: Path) -> None:
    """Queries and keys of 12, values of 6; three heads on two ranks."""
    config = write_run(tmp_path)
    settings: Settings = {f"model.config.{key}": value for key, value in LATENT.items()}
    settings |= {"training.steps": 2, "lr_scheduler.warmup_steps": 1, "checkpoint.enable": False}
    settings |= {"training.local_batch_size": 4}
    for name in ("one", "sp2"):
        here = settings | on_mesh(name) | {"job.name": name}
        run_on_ranks(math.prod(MESHES[name]), train, config, here)
    one, sharded = (learned(tmp_path / "outputs" / name) for name in ("one", "sp2"))
    for (step, *expected), (_, *found) in zip(one, sharded, strict=True):
        assert found == pytest.approx(expected, rel=1e-5), step


def test_router_loss_does_not_depend_on_the_mesh(tmp_path: Path) -> None:
    """The batch is one micro-batch on each mesh."""
    config = write_run(tmp_path)
    settings: Settings = {f"model.config.{key}": value for key, value in MOE.items()} | {
        "training.steps": 2,
        "lr_scheduler.warmup_steps": 1,
    }
    settings |= {"validation.enable": True, "validation.interval": 2, "checkpoint.enable": False}
    lines = []
    for name, rows in {"one": 4, "sp2": 4, "dp2 x sp2": 2}.items():
        here = settings | on_mesh(name) | {"job.name": name, "training.local_batch_size": rows}
        run_on_ranks(math.prod(MESHES[name]), train, config, here)
        lines.append(logged(tmp_path / "outputs" / name))
    for expected, *others in zip(*lines, strict=True):
        for name in expected.keys() & {"loss", "grad_norm", "router_loss", "validation_loss"}:
            assert [other[name] for other in others] == pytest.approx(
                [expected[name]] * 2, rel=1e-4
            ), name
    # K = 2, where all experts are chosen alike.
    assert all(line["router_loss"] > 1.5 for line in lines[0] if "loss" in line)


# --- what a run tells -----------------------------------------------------------------------------


def test_metrics_of_a_run(runs: RunOnMeshes) -> None:
    lines = [line for line in logged(runs["sp2"]) if "loss" in line]
    for number, line in enumerate(lines, start=1):
        assert line.keys() >= {
            "step",
            "loss",
            "grad_norm",
            "lr",
            "step_seconds",
            "peak_memory_gib",
            "mfu",
        }
        assert line["tokens"] == number * 8 * SEQ_LEN
        assert line["tokens_per_second"] * line["step_seconds"] == pytest.approx(8 * SEQ_LEN)
        assert 0.05 < line["peak_memory_gib"] < 64  # GiB: torch alone takes some 0.2
        assert line["mfu"] is None  # of a CPU nobody knows the peak
    config = load_config(runs["sp2"] / "config.toml")
    assert [line["lr"] for line in lines] == [learning_rate(step, config) for step in range(STEPS)]


def growth_of_the_peak() -> list[float]:
    """MiB, after 200 MiB of a file are mapped and read, and after an array of 64 MiB has come and
    gone.
    """
    memory, found = PeakMemory(torch.device("cpu")), []
    before = memory.gib()
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    pages = np.memmap(library, dtype=np.uint8, mode="r", shape=200 * 2**20)
    assert pages[::4096].max() > 0
    found.append(1024 * (memory.gib() - before))
    np.ones(64 * 2**20, dtype=np.uint8)
    found.append(1024 * (memory.gib() - before))
    assert not memory.counts_files
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="other systems tell only of all resident pages")
def test_peak_memory_is_of_what_the_process_owns() -> None:
    """On a CPU. A data cache is files that are mapped."""
    [(mapped, allocated)] = run_on_ranks(1, growth_of_the_peak)
    assert mapped < 8 and 60 < allocated < 72


def test_a_run_leaves_its_config_and_tensorboard_events(runs: RunOnMeshes) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = load_config(runs["sp2"] / "config.toml")
    assert config.job.name == "sp2" and config.parallelism.sequence_parallel_degree == 2
    events = EventAccumulator(str(runs["sp2"] / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(step, pytest.approx(loss)) for step, loss, _ in learned(runs["sp2"])]
    assert [event.step for event in events.Scalars("validation_loss")] == [0, 3, 6]


def test_a_mixture_does_not_depend_on_the_mesh(tmp_path: Path) -> None:
    """Answers to prompts and texts, packed by best fit: padding, masks, an epoch count of each
    source.
    """
    config, answers = write_run(tmp_path), tmp_path / "answers.jsonl"
    lines = [{"q": f"{n} + {n} = ", "a": f"{2 * n}"} for n in range(30)]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    mixture = [
        {"path": str(tmp_path / "data"), "weight": 0.75},
        {
            "source": "jsonl",
            "path": str(answers),
            "prompt_field": "q",
            "completion_field": "a",
            "weight": 0.25,
        },
    ]
    settings: Settings = {
        "data.path": "",
        "data.mixture": mixture,
        "data.packing": "best_fit",
        "training.steps": 3,
    }
    found = []
    for name in ("one", "dp2 x sp2"):
        degrees = MESHES[name]
        run_on_ranks(
            math.prod(degrees), train, config, settings | on_mesh(name) | {"job.name": name}
        )
        found.append(logged(tmp_path / "outputs" / name))
    for expected, line in zip(*found, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        assert line["epoch"] == expected["epoch"]
    epochs = found[0][-1]["epoch"]
    assert epochs.keys() == {str(tmp_path / "data"), str(answers)} and epochs[str(answers)] > 0.2


def test_log_interval_and_the_last_step(tmp_path: Path) -> None:
    """A line every 3 steps, about all 3 of them, and one for the last step."""
    config = write_run(tmp_path)
    settings: Settings = {
        "metrics.log_interval": 3,
        "training.steps": 7,
        "training.global_batch_size": 2,
        "checkpoint.enable": False,
    }
    run_on_ranks(2, train, config, settings | on_mesh("sp2"))
    lines = logged(tmp_path / "outputs" / "run")
    assert [line["step"] for line in lines] == [3, 6, 7]
    for line, steps in zip(lines, [3, 3, 1], strict=True):
        assert line["tokens_per_second"] * line["step_seconds"] * steps == pytest.approx(
            steps * 2 * SEQ_LEN
        )
    assert not (tmp_path / "outputs" / "run" / "checkpoints").exists()


# --- a model that has diverged --------------------------------------------------------------------


def stopped_by_a_signal(config: Path, settings: Settings, *, after: int) -> str:
    """The refusal of a run that gets SIGTERM while it makes this step."""
    step = Trainer._step

    def signalled(trainer: Trainer, *args) -> StepMetrics:
        if trainer.state.step + 1 == after:
            signal.raise_signal(signal.SIGTERM)
        return step(trainer, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", signalled)
        return refusal(config, settings)


def test_a_model_that_has_diverged_is_never_saved(tmp_path: Path) -> None:
    """Seen by no loss that is logged: two steps between two logs, then a signal; and the update of
    the last step.
    """
    config, run = write_run(tmp_path), tmp_path / "outputs" / "run"
    settings: Settings = on_mesh("sp2") | {
        "lr_scheduler.warmup_steps": 0,
        "training.global_batch_size": 2,
        "checkpoint.export": True,
    }
    settings |= {"checkpoint.interval": 100, "metrics.log_interval": 100}
    run_on_ranks(2, train, config, settings | {"training.steps": 1, "checkpoint.export": False})
    before = sorted(run.glob("**/*.safetensors")), sorted((run / "checkpoints").glob("*"))
    wild = settings | {"optimizer.lr": 1e30, "training.steps": 100}
    for message in run_on_ranks(2, partial(stopped_by_a_signal, after=4), config, wild):
        assert re.match(
            r"The loss is \S+ and the gradient norm nan at step 3 \(first: the gradient of model\."
            r".+\)\. Nothing of it is saved; ",
            message,
        )
        assert "; the last checkpoint is of step 1. Lower optimizer.lr = 1e+30" in message
    last = settings | {"optimizer.lr": 1e39, "training.steps": 2}
    for enable in (True, False):  # to be saved, and to be exported alone
        name = (
            {}
            if enable
            else {"checkpoint.enable": False, "job.name": "export", "training.steps": 1}
        )
        for message in run_on_ranks(2, refusal, config, last | name):
            what = (
                f"The update of step {2 if enable else 1} has left model.embed_tokens.weight with "
                "values that are "
            )
            assert message.startswith(f"{what}not finite. Nothing of it is saved"), message
    assert before == (sorted(run.glob("**/*.safetensors")), sorted((run / "checkpoints").glob("*")))
    assert not (tmp_path / "outputs" / "export" / "export").exists()


# --- learning rate, clipping, FLOPs ---------------------------------------------------------------


def schedule(**settings: Any) -> list[float]:
    steps = settings.pop("steps")
    config = Config.model_validate(
        {
            "model": {"config": {"model_type": "llama"}},
            "optimizer": {"lr": 1.0},
            "training": {"steps": steps},
            "lr_scheduler": {"min_lr_ratio": 0.1, **settings},
        }
    )
    return [learning_rate(step, config) for step in range(steps)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"decay_type": "constant", "steps": 4}, [1, 1, 1, 1]),
        ({"decay_type": "constant", "steps": 4, "warmup_steps": 2}, [0.5, 1, 1, 1]),
        ({"decay_type": "linear", "steps": 4}, [1, 0.7, 0.4, 0.1]),
        ({"decay_type": "linear", "steps": 5, "warmup_steps": 2}, [0.5, 1, 1, 0.55, 0.1]),
        ({"decay_type": "linear", "steps": 3, "min_lr_ratio": 0.0}, [1, 0.5, 0]),
        ({"decay_type": "linear", "steps": 3, "min_lr_ratio": 1.0}, [1, 1, 1]),
        ({"decay_type": "cosine", "steps": 3}, [1, 0.55, 0.1]),
        (
            {"decay_type": "cosine", "steps": 5, "min_lr_ratio": 0.0},
            [1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4, 0],
        ),
        ({"decay_type": "cosine", "steps": 1}, [1]),
        ({"decay_type": "cosine", "steps": 2, "warmup_steps": 1}, [1, 1]),
        ({"decay_type": "cosine", "steps": 4, "warmup_steps": 4}, [0.25, 0.5, 0.75, 1]),
        ({"decay_type": "linear", "steps": 3, "warmup_steps": 2}, [0.5, 1, 1]),
        (
            {"decay_type": "sqrt", "steps": 5, "min_lr_ratio": 0.0},
            [1, 0.5, 1 - 0.5**0.5, 1 - 0.75**0.5, 0],
        ),
        ({"decay_type": "linear", "steps": 6, "decay_ratio": 0.5}, [1, 1, 1, 1, 0.55, 0.1]),
    ],
    ids=str,
)
def test_learning_rate(settings: dict[str, Any], expected: list[float]) -> None:
    assert schedule(**settings) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("max_norm", "scale"), [(1.0, 0.2), (10.0, 1.0), (0.0, 1.0), (math.inf, 1.0)]
)
def test_clip_gradients(max_norm: float, scale: float) -> None:
    parameters = [
        nn.Parameter(torch.zeros(2)),
        nn.Parameter(torch.zeros(1)),
        nn.Parameter(torch.zeros(3)),
    ]
    # The third has none.
    parameters[0].grad = torch.tensor([3.0, 0.0])
    parameters[1].grad = torch.tensor([-4.0])
    assert clip_gradients(parameters, max_norm).item() == pytest.approx(5.0)
    assert parameters[0].grad.tolist() == pytest.approx([3.0 * scale, 0.0])
    assert parameters[1].grad.tolist() == pytest.approx([-4.0 * scale])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_norm_of_millions_of_numbers(dtype: torch.dtype) -> None:
    """Of magnitudes apart by many orders, in several parts of which the last is cut; some in other
    places.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = [(1500, 1500), (7,), (0,), (1200, 1000)]
    gradients = [torch.randn(size, generator=generator) for size in sizes]
    gradients = [
        (g * torch.randn(g.shape, generator=generator).exp() * 1e-3).to(dtype) for g in gradients
    ]
    gradients[3] = gradients[3].t()  # not as it lies in memory
    exact = torch.cat([g.flatten() for g in gradients]).double().norm().item()
    norm = gradient_norms(gradients).total
    assert norm.item() == pytest.approx(exact, rel=1e-13 if dtype == torch.float64 else 1e-7)
    assert norm.dtype == torch.promote_types(dtype, torch.float32)
    assert gradient_norms([]).total.item() == gradient_norms([torch.zeros(0)]).total.item() == 0


def norm_of_a_step(degrees: tuple[int, int, int]) -> tuple[float, float]:
    """The gradient norm of an fp32 step, and the root of an fp64 sum over the same gradients,
    gathered.
    """
    mesh = mesh_of(*degrees)
    table = LLAMA | {
        "vocab_size": 20_000,
        "hidden_size": 96,
        "num_hidden_layers": 1,
        "tie_word_embeddings": False,
    }
    model = hf.build_on_meta(hf.load_model_config("", table), torch.float32)
    parallelize(model, mesh)
    hf.allocate(model, mesh.device)
    hf.initialize(model, seed=0)
    batch = local_batch(
        make_rows([(10, 14), (24,)], masked="none", vocab_size=20_000, seed=0), mesh
    )
    model(**batch.inputs(), num_items_in_batch=torch.tensor(45)).loss.backward()
    norm = clip_gradients(list(model.parameters()), 0)
    squares = [p.grad.full_tensor().double().square().sum() for p in model.parameters()]
    return norm.item(), torch.stack(squares).sum().sqrt().item()


@pytest.mark.parametrize(
    "meshes",
    [("one", "dp2 x sp2", "rep2 x sp2"), pytest.param(tuple(MESHES), marks=pytest.mark.slow)],
    ids=["three", "all"],
)
def test_the_gradient_norm_does_not_depend_on_the_mesh(meshes: tuple[str, ...]) -> None:
    """With a head of 1.9M gradients, enough for a sum in fp32 to show."""
    norms = {}
    for name in meshes:
        degrees = MESHES[name]
        for norm, exact in run_on_ranks(math.prod(degrees), norm_of_a_step, degrees):
            assert norm == pytest.approx(exact, rel=1e-7), name
            norms[name] = norm
    assert list(norms.values()) == pytest.approx([norms["one"]] * len(meshes), rel=1e-6), norms


@pytest.mark.parametrize("tied", [False, True])
def test_flops_of_a_tiny_llama_counted_by_hand(tied: bool) -> None:
    hidden, intermediate, layers, heads, kv_heads, size, vocabulary = 48, 40, 2, 6, 2, 8, 61
    table = LLAMA | {"intermediate_size": intermediate, "tie_word_embeddings": tied}
    config = hf.load_model_config("", table)
    attention = hidden * heads * size * 2 + hidden * kv_heads * size * 2  # q and o, k and v
    norms = 2 * layers * hidden + hidden  # they multiply too
    weights = layers * (attention + 3 * hidden * intermediate) + norms + hidden * vocabulary
    assert flops_per_token(hf.build_on_meta(config, torch.float32)) == 6 * weights
    # Forward: a head does q k^T and p v, 2 * L^2 * d FLOPs each, over half of the L^2; backward
    # twice as many.
    documents = ((10,), (4, 6))
    assert attention_flops(config, documents) == layers * heads * sum(
        3 * 2 * L**2 * size for L in (10, 4, 6)
    )
    # With an indexer, a query reads at most 4 keys, and is scored from the fifth key on.
    config = hf.load_model_config("", model_of("deepseek_v32") | {"index_topk": 4})
    read, scored = sum(4 * (2 * L - 4) for L in (10, 4, 6)), 10**2 + 6**2 - 2 * 4**2
    heads, sizes = config.num_attention_heads, config.qk_head_dim + config.v_head_dim
    indexer = config.index_n_heads * config.index_head_dim
    assert attention_flops(config, documents) == 2 * (3 * heads * sizes * read + indexer * scored)


def test_flops_of_experts_are_of_those_that_a_token_meets() -> None:
    table = {k: v for k, v in LLAMA.items() if k != "intermediate_size"} | {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "tie_word_embeddings": True,
    }
    model = hf.build_on_meta(hf.load_model_config("", table), torch.float32)
    experts = LLAMA["num_hidden_layers"] * 4 * 3 * 16 * LLAMA["hidden_size"]
    assert flops_per_token(model) == 6 * (sum(p.numel() for p in model.parameters()) - experts // 2)


def test_attention_flops_without_a_head_dim() -> None:
    config = SimpleNamespace(num_hidden_layers=1, num_attention_heads=4, hidden_size=32)
    assert attention_flops(config, ((3,),)) == 6 * 4 * 8 * 9


def test_attention_flops_of_heads_of_two_sizes() -> None:
    """In latent attention `head_dim` is that of RoPE: q k^T is of 128 + 64, p v of 128."""
    latent = hf.load_model_config("", {"model_type": "deepseek_v3", "num_hidden_layers": 1})
    assert latent.head_dim == 64
    heads = latent.num_attention_heads
    assert attention_flops(latent, ((3,),)) == 3 * heads * (2 * 9 * 192 + 2 * 9 * 128) // 2


# --- collectives ----------------------------------------------------------------------------------


class Collectives(TorchDispatchMode):
    """Every collective of this rank, in order: (operator, elements, dtype) of its first tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int, torch.dtype]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:  # it goes first: the operators that it is made of come back here
            return NotImplemented
        name = func.overloadpacket.__name__
        if "c10d" in func.namespace and name not in ("wait_tensor", "_wrap_tensor_autograd"):
            tensor = args[0]
            while isinstance(tensor, (list, tuple)):
                tensor = tensor[0]
            self.calls.append((name, tensor.numel(), tensor.dtype))
        return func(*args, **(kwargs or {}))


def collectives_of_loading() -> list:
    rank = dist.get_rank()
    corpus = Corpus.from_documents([torch.arange(n).numpy() for n in (50, 7, 90)])
    loader = Loader(
        PackedSequences(corpus, seq_len=16, seed=0), batch_size=2, sp_rank=rank, sp_degree=2
    )
    with Collectives() as seen:
        for _ in range(12):  # more than an epoch
            loader.next_batch().to("cpu")
    with Collectives() as control:
        dist.all_reduce(torch.ones(3))
    assert control.calls == [("allreduce_", 3, torch.float32)], control.calls
    return seen.calls


def test_loading_needs_no_collective() -> None:
    assert run_on_ranks(2, collectives_of_loading) == [[], []]


def collectives_of_a_step(
    layers: int, checkpoint: bool
) -> tuple[list[tuple[str, int, torch.dtype]], int]:
    """Of one step of one batch on (sp2), after a first one; and how many elements a block has."""
    mesh = mesh_of(1, 1, 2)
    model = hf.build_on_meta(
        hf.load_model_config("", LLAMA | {"num_hidden_layers": layers}), torch.float32
    )
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    mode = "full" if checkpoint else "none"
    parallelize(model, mesh, activation_checkpoint={"mode": mode}, param_dtype=torch.float32)
    hf.allocate(model, mesh.device)
    hf.initialize(model, seed=0)
    optimizer = build_optimizer(model, OPTIMIZER)
    batches = [
        local_batch(make_rows([(10, 14), (24,)], masked="none", vocab_size=61, seed=0), mesh)
    ]
    train_step(model, optimizer, batches, mesh, max_norm=1.0)
    with Collectives() as seen:
        train_step(model, optimizer, batches, mesh, max_norm=1.0)
    return seen.calls, block


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize(
    ("checkpoint", "a_layer"), [(False, 4), (True, 6)], ids=["no checkpointing", "checkpointing"]
)
def test_collectives_of_a_step(layers: int, checkpoint: bool, a_layer: int) -> None:
    """Two all-to-alls a layer each way (and again in recomputation), FSDP's own, count, loss and
    norm, no more.
    """
    first, second = run_on_ranks(2, collectives_of_a_step, layers, checkpoint)
    assert first == second
    calls, block = first
    seen = Counter(name for name, *_ in calls)
    assert seen.pop("all_to_all_single") == a_layer * layers
    gathers, scatters = (
        Counter(elements for name, elements, _ in calls if name == operator)
        for operator in ("_allgather_base_", "_reduce_scatter_base_")
    )
    assert gathers[block] <= 2 * layers and scatters[block // 2] == layers
    # The embedding is gathered at most twice; the head, and the root with the last norm, once.
    assert seen.pop("_allgather_base_") - gathers[block] <= 4
    assert seen.pop("_reduce_scatter_base_") - layers == 3
    # The number of tokens, the loss, and the norm of all gradients.
    reductions = [dtype for name, elements, dtype in calls if (name, elements) == ("allreduce_", 1)]
    assert reductions == [torch.int64, torch.float64, torch.float64]
    assert calls[0][0] == calls[-1][0] == "allreduce_" and seen == {"allreduce_": 3}


# --- timeouts -------------------------------------------------------------------------------------


def timeout_of(chosen: float, planned: float | None) -> tuple[float, list[str]]:
    """The timeout of this rank, and what it says; only rank 0 has a plan."""
    said: list[str] = []
    has_plan = planned is not None and dist.get_rank() == 0
    config = Config.model_validate({"comm": {"timeout_s": chosen}})
    preflight = SimpleNamespace(planned_seconds=planned) if has_plan else None
    return timeout_of_step(config, preflight, say=said.append), said


def test_ranks_wait_as_long_as_planned_steps_take() -> None:
    """The NCCL watchdog counts from when a collective is enqueued, which may be a step early."""
    found = run_on_ranks(2, timeout_of, "auto", 400.0)
    assert [timeout for timeout, _ in found] == [1600.0, 1600.0]
    assert found[0][1] == ["comm.timeout_s: 1,600 s, four times the planned step of 6 min 40 s"]
    assert run_on_ranks(2, timeout_of, "auto", 100.0) == [(600.0, [])] * 2
    assert run_on_ranks(2, timeout_of, "auto", None) == [(600.0, [])] * 2
    assert run_on_ranks(2, timeout_of, 7.0, 400.0) == [(7.0, [])] * 2
