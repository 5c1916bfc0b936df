"""Muon on sharded matrices, against torch.optim.Muon on one process; resumed; refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from helpers.meshes import mesh_of
from helpers.models import LLAMA, plain_model
from helpers.ranks import run_on_ranks
from helpers.rows import local_batch, make_rows
from helpers.runs import learned, refusal, train, write_run
from titan_ulysses.config.load import load_config
from titan_ulysses.config.schema import Optimizer
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.model import hf
from titan_ulysses.optim.adamw import describe_state, expected_bytes, state_bytes, state_format
from titan_ulysses.optim.muon import Muon, hidden_matrices
from titan_ulysses.optim.optimizer import build_optimizer
from titan_ulysses.setup.parallelize import parallelize
from titan_ulysses.train.step import train_step

OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
CONFIG = Optimizer(name="muon", **OPTIONS)
ROWS = make_rows([(24,), (16, 8), (8, 16), (24,)], masked="some", vocab_size=61, seed=0)


def torchs_own(matrices: list[nn.Parameter], others: list[nn.Parameter]) -> list[Any]:
    muon = torch.optim.Muon(
        matrices,
        lr=OPTIONS["lr"],
        weight_decay=OPTIONS["weight_decay"],
        adjust_lr_fn="match_rms_adamw",
    )
    return [muon, torch.optim.AdamW(others, **OPTIONS)]


# --- the step of torch, to the bit ----------------------------------------------------------------

SHAPES = [(24, 40), (40, 24), (7, 9), (1, 8), (16, 16)]  # 7 and 1 rows: uneven shards, an empty one


def steps_on_shards(dtype: torch.dtype, offload: bool) -> list[Tensor]:
    mesh = mesh_of(1, 2, 1).fsdp
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]
    parameters = [nn.Parameter(distribute_tensor(x, mesh, [Shard(0)])) for x in whole]
    optimizer = Muon([{"params": parameters, "muon": True}], **OPTIONS, offload=offload)
    for _ in range(3):
        for p in parameters:
            gradient = torch.randn(p.shape, generator=generator, dtype=dtype)
            p.grad = distribute_tensor(gradient, mesh, [Shard(0)])
        optimizer.step()
    return [p.detach().full_tensor() for p in parameters]


def steps_of_torch(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in SHAPES]
    muon, _ = torchs_own(parameters, [nn.Parameter(torch.zeros(1))])
    for _ in range(3):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator, dtype=dtype)
        muon.step()
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("offload", [False, True])
def test_a_step_is_torchs_own_to_the_bit(offload: bool) -> None:
    """In fp32, whose iterations are in bf16."""
    found = run_on_ranks(2, steps_on_shards, torch.float32, offload)
    for rank in found:
        for ours, theirs in zip(rank, steps_of_torch(torch.float32), strict=True):
            assert ours.equal(theirs)


# --- training -------------------------------------------------------------------------------------


def train_sharded(degrees: tuple[int, int, int], steps: int) -> dict[str, Any]:
    mesh = mesh_of(*degrees)
    model = hf.build_on_meta(hf.load_model_config("", LLAMA), torch.float64)
    dtypes = {"param_dtype": torch.float64, "reduce_dtype": torch.float64}
    parallelize(model, mesh, **dtypes)
    hf.allocate(model, mesh.device)
    hf.initialize(model, seed=3)
    assert all(isinstance(p, DTensor) for p in hidden_matrices(model))
    optimizer = build_optimizer(model, CONFIG)
    losses, norms = [], []
    for _ in range(steps):
        batch = local_batch(ROWS, mesh, model.sharding.stream_chunk_tokens)
        shown = train_step(model, optimizer, [batch], mesh, max_norm=0.5)
        losses.append(shown.loss.item())
        norms.append(shown.grad_norm.item())
    return {
        "losses": losses,
        "norms": norms,
        "parameters": {n: p.detach().full_tensor() for n, p in hf.named_parameters(model)},
        "bytes": state_bytes(optimizer),
        "expected": expected_bytes(optimizer),
        "format": state_format(optimizer),
        "said": describe_state(optimizer),
        "matrices": sum(p.numel() for p in hidden_matrices(model)),
    }


def train_plain(steps: int) -> dict[str, Any]:
    """Unmodified transformers, each document by itself, torch.optim.Muon and AdamW."""
    plain = plain_model(LLAMA, torch.float64, experts=hf.experts_path(torch.float64))
    hf.initialize(plain, seed=3)
    matrices = hidden_matrices(plain)
    chosen = {*matrices}
    optimizers = torchs_own(matrices, [p for p in plain.parameters() if p not in chosen])
    documents = [document for row in ROWS for document in row]
    losses, norms = [], []
    for _ in range(steps):
        total = torch.zeros((), dtype=torch.float64)
        for document in documents:
            logits = plain(input_ids=document.tokens[None, :-1], use_cache=False).logits[0]
            total = total + F.cross_entropy(
                logits, document.labels, ignore_index=-100, reduction="sum"
            )
        loss = total / sum(int((d.labels != -100).sum()) for d in documents)
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(plain.parameters(), 0.5).item())
        losses.append(loss.item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    parameters = {n: p.detach().clone() for n, p in hf.named_parameters(plain)}
    return {"losses": losses, "norms": norms, "parameters": parameters}


@pytest.mark.parametrize("degrees", [(1, 2, 1), (2, 1, 1), (1, 1, 2)], ids=["fsdp", "ddp", "sp"])
def test_training_is_that_of_a_plain_process(
    degrees: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp64, in which torch's iterations run too for this test: what rounds to bf16 in them would
    turn the last bit of a gradient into its eighth.
    """
    found = run_on_ranks(2, train_sharded, degrees, 3)
    to = Tensor.to

    def in_fp64(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x.clone() if kwargs.get("dtype") is torch.bfloat16 else to(x, *args, **kwargs)

    monkeypatch.setattr(Tensor, "bfloat16", lambda x: x.clone())
    monkeypatch.setattr(Tensor, "to", in_fp64)  # the same in torch 2.15
    expected = train_plain(3)
    worst = {}
    for rank in found:
        for key in ("losses", "norms"):
            pairs = zip(rank[key], expected[key], strict=True)
            worst[key] = max(abs(a - b) / abs(b) for a, b in pairs)
        assert rank["parameters"].keys() == expected["parameters"].keys()
        for name, theirs in expected["parameters"].items():
            difference = (rank["parameters"][name] - theirs).abs().max() / theirs.abs().max()
            worst[name] = difference.item()
    print(max(worst.items(), key=lambda item: item[1]))
    assert max(worst.values()) < 1e-12, worst


def test_one_momentum_of_matrices_and_two_moments_of_the_rest() -> None:
    found = run_on_ranks(2, train_sharded, (1, 2, 1), 1)
    total = sum(x.numel() for x in found[0]["parameters"].values())
    numbers = 8 * (found[0]["matrices"] + 2 * (total - found[0]["matrices"]))
    assert found[0]["expected"] == numbers
    assert sum(rank["bytes"]["float64"] for rank in found) == numbers
    assert found[0]["format"] == "muon" and found[0]["said"].startswith("muon: ")


def test_which_matrices() -> None:
    for tied in (False, True):
        table = LLAMA | {"tie_word_embeddings": tied}
        model = plain_model(table, torch.float32, experts=hf.experts_path(torch.float32))
        names = {
            n for n, p in model.named_parameters() if any(p is m for m in hidden_matrices(model))
        }
        assert names and all(".layers." in name and name.endswith("proj.weight") for name in names)
        assert len(names) == 7 * model.config.num_hidden_layers


# --- through the front door -----------------------------------------------------------------------

SETTINGS = {"optimizer.name": "muon", "training.global_batch_size": 2}
SETTINGS |= {"training.local_batch_size": 1, "lr_scheduler.decay_type": "constant"}
SETTINGS |= {"lr_scheduler.warmup_steps": 1}


def test_resumed_on_another_mesh(tmp_path: Path) -> None:
    config = write_run(tmp_path)

    def run(name: str, ranks: int, **more: Any) -> list[tuple[int, float, float]]:
        named = {key.replace("__", "."): value for key, value in more.items()}
        run_on_ranks(ranks, train, config, SETTINGS | named | {"job.name": name}, timeout=300)
        return learned(tmp_path / "outputs" / name)

    whole = run("whole", 1, training__steps=4)
    run("parts", 2, training__steps=2, parallelism__sequence_parallel_degree=2)
    parts = run("parts", 1, training__steps=4)
    assert len(parts) == 4 and whole[-1][1] < whole[0][1]
    for found, expected in zip(parts, whole, strict=True):
        assert found == pytest.approx(expected, rel=2e-3)  # its iterations round to bf16
    again = run("again", 2, training__steps=2)
    again = run("again", 2, training__steps=4)
    assert again == run("at once", 2, training__steps=4)
    told = run_on_ranks(
        1, refusal, config, {"job.name": "whole", "training.steps": 8, "optimizer.name": "adamw"}
    )[0]
    assert 'optimizer.name = "adamw"' in told and 'holds the state of "muon"' in told


def test_steps_that_are_not_finite_change_nothing() -> None:
    parameters = [nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4))]
    matrix, vector = parameters
    groups = [{"params": [matrix], "muon": True}, {"params": [vector], "muon": False}]
    optimizer = Muon(groups, **OPTIONS)
    optimizer.found_inf = torch.zeros(())
    for value in (1.0, float("nan"), 1.0):
        for p in parameters:
            p.grad = torch.full_like(p, value)
        optimizer.found_inf.fill_(float(value != value))
        before = [p.detach().clone() for p in parameters]
        kept = optimizer.state[parameters[0]].get("momentum_buffer", torch.zeros(())).clone()
        optimizer.step()
        same = all(p.equal(b) for p, b in zip(parameters, before, strict=True))
        assert same == (value != value)
        if same:
            assert optimizer.state[parameters[0]]["momentum_buffer"].equal(kept)
    assert all(p.isfinite().all() for p in parameters)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora.rank": 4}, 'optimizer.name = "muon" with lora.rank = 4'),
        (
            {"optimizer.stochastic_rounding": True, "training.param_dtype": "bfloat16"},
            'optimizer.name = "muon" with optimizer.stochastic_rounding = true',
        ),
    ],
)
def test_what_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_config(write_run(tmp_path), ({"optimizer.name": "muon"} | settings).items())
    assert message in str(caught.value)


def test_a_model_without_a_matrix_to_train(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    frozen = {"model.freeze": ["*proj.weight"], "optimizer.name": "muon"}
    told = run_on_ranks(1, refusal, config, frozen)[0]
    assert told.startswith('optimizer.name = "muon": no trained parameter is a hidden matrix')
