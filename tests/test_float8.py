"""float8 training: which layers, that names, dtypes and export stay as they are, that it learns,
and what is refused.

Emulated in software, since a CPU has no float8 multiplication: the same casts and scales, the
products in fp32.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from helpers import training
from helpers.ranks import run_on_ranks
from helpers.rows import make_rows
from titan_ulysses.checkpoint import safetensors as weights
from titan_ulysses.config.schema import Optimizer
from titan_ulysses.data.tokenizer import load_tokenizer
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.model import hf
from titan_ulysses.model.float8 import check_float8, is_float8, use_float8
from titan_ulysses.model.torchao import import_torchao
from titan_ulysses.setup.blocks import compile_blocks, find_blocks

MODEL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
ROWS = make_rows([(32,), (16, 16), (8, 24), (32,)], masked="none", vocab_size=272, seed=0)


def use_emulated_float8(blocks: Iterable[nn.Module]) -> int:
    """The numbers of float8 on any device, slowly."""
    float8 = import_torchao("float8")
    emulated = partial(float8.Float8LinearConfig, emulate=True)
    with mock.patch.object(float8, "Float8LinearConfig", emulated):
        return use_float8(blocks, tokens=32)


def emulate_float8(model: nn.Module) -> None:
    use_emulated_float8(find_blocks(model)[1])


class Run(training.Run):
    def __init__(self, *, float8: bool):
        options = {
            "dtype": torch.float32,
            "param_dtype": torch.bfloat16,
            "optimizer": Optimizer(lr=1e-3),
        }
        super().__init__(
            (1, 1, 2), MODEL, ROWS, prepare=emulate_float8 if float8 else None, **options
        )


def build(**changes: Any) -> nn.Module:
    return hf.build_on_meta(hf.load_model_config("", MODEL | changes), torch.float32)


def float8_layers(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if is_float8(module)}


def test_which_layers():
    model = build()
    before = {name: (p.shape, p.dtype) for name, p in model.named_parameters()}
    assert use_emulated_float8(find_blocks(model)[1]) == 2 * 7
    assert {name.split(".")[-1] for name in float8_layers(model)} == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    assert type(model.lm_head) is nn.Linear
    assert {name: (p.shape, p.dtype) for name, p in model.named_parameters()} == before


def test_compiled_with_the_blocks(monkeypatch):
    """The projections of attention too, each by itself; those of the MLP are in its graph."""
    model, compiled = build(), []

    def compile_(forward, **_):
        compiled.append(forward.__self__)
        return forward

    monkeypatch.setattr(torch, "compile", compile_)
    blocks = find_blocks(model)[1]
    plain = compile_blocks(blocks)
    use_emulated_float8(blocks)
    compiled.clear()
    assert compile_blocks(blocks) == plain + 2 * 4
    names = {module: name.split(".")[-1] for name, module in model.named_modules()}
    assert {names[module] for module in compiled if is_float8(module)} == {
        *("q_proj", "k_proj", "v_proj", "o_proj")
    }


def test_sizes_that_are_no_multiples_of_16():
    model = build(intermediate_size=88)
    assert use_emulated_float8(find_blocks(model)[1]) == 2 * 4
    assert all("self_attn" in name for name in float8_layers(model))


def test_routers_stay_as_they_are():
    block = nn.ModuleDict({"gate": nn.Linear(64, 16), "up_proj": nn.Linear(64, 16)})
    assert use_emulated_float8([block]) == 1
    assert type(block["gate"]) is nn.Linear


def test_no_layer_at_all():
    model = build(hidden_size=40, intermediate_size=88, head_dim=10)
    with pytest.raises(
        UserError, match="quantize.float8 = true: no linear layer of the blocks has sizes that are"
    ):
        use_emulated_float8(find_blocks(model)[1])


def train(
    steps: int, float8: bool, folder: Path | None = None
) -> tuple[list[float], int, dict[str, torch.Tensor]]:
    run = Run(float8=float8).train(steps)
    if folder:
        weights.export(run.model, load_tokenizer("bytes"), folder, step=steps)
    return run.losses, len(float8_layers(run.model)), run.whole()


@pytest.mark.slow
def test_fifty_steps_follow_bf16():
    """On two ranks, each loss is within 0.25 of the run in bf16, while both fall by 5 or more."""
    [(found, layers, _), _] = run_on_ranks(2, train, 50, True)
    [(expected, none, _), _] = run_on_ranks(2, train, 50, False)
    assert (layers, none) == (14, 0)
    difference = (torch.tensor(found) - torch.tensor(expected)).abs().max().item()
    print(
        f"\nfloat8: losses within {difference:.4f} of bf16's, from {expected[0]:.2f} to "
        f"{expected[-1]:.2f}"
    )
    assert 0 < difference < 0.25
    assert expected[0] - expected[-1] > 5


def test_export_and_load(tmp_path):
    """transformers opens what a float8 run exports, and a float8 run loads it."""
    from transformers import AutoModelForCausalLM

    [(_, _, whole), _] = run_on_ranks(2, train, 1, True, tmp_path / "export")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    assert all(torch.equal(p, whole[name]) for name, p in opened.named_parameters())
    for loaded in run_on_ranks(2, load, tmp_path / "export"):
        assert all(torch.equal(p, loaded[name]) for name, p in opened.named_parameters())


def load(folder: Path) -> dict[str, torch.Tensor]:
    run = Run(float8=True)
    weights.load(run.model, str(folder))
    return {name: p.full_tensor() for name, p in hf.named_parameters(run.model)}


def test_a_machine_without_float8(monkeypatch):
    with pytest.raises(
        UserError,
        match="quantize.float8 = true needs a GPU, and this run is on cpu: set it to false.",
    ):
        check_float8("cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    with pytest.raises(
        UserError,
        match=r"needs compute capability 8.9 .*, and NVIDIA A100 has 8.0: set it to false.",
    ):
        check_float8("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    check_float8("cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match="quantize.float8 = true needs torchao, which is not installed: pip install"
    ):
        check_float8("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [64, 60], ids=["aligned", "padded"])
def test_float8_on_a_gpu(tokens):
    check_float8("cuda")
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(64, 96, bias=False), nn.Linear(96, 64, bias=False)).to(
        "cuda", torch.bfloat16
    )
    x = torch.randn(tokens, 64, device="cuda", dtype=torch.bfloat16)
    expected = block(x)
    expected.square().sum().backward()
    gradients = [p.grad.clone() for p in block.parameters()]
    block.zero_grad()
    assert use_float8([block], tokens=tokens) == 2
    found = block(x)
    found.square().sum().backward()
    for a, b in zip(
        [found, *(p.grad for p in block.parameters())], [expected, *gradients], strict=True
    ):
        assert (a - b).norm() < 0.1 * b.norm()
