"""LoRA on experts against peft: what is trained on every mesh, saved, merged, and what it takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.families import model_of
from helpers.models import plain_model
from helpers.precision import kept_in_fp64
from helpers.ranks import run_on_ranks
from helpers.runs import train, write_run
from helpers.training import Record, largest_difference, train_plain, train_sharded
from test_lora import STEPS, fill
from titan_ulysses import build_mesh, parallelize, shard
from titan_ulysses.config.schema import LoRA
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.model import hf
from titan_ulysses.model.expert_adapters import use_low_rank_products
from titan_ulysses.model.lora import add_adapters
from titan_ulysses.model.nf4 import dequantize, quantize
from titan_ulysses.model.parameter_names import is_adapter

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
MIXTRAL = {**model_of("llama"), "model_type": "mixtral", "num_local_experts": 4}
MIXTRAL |= {"num_experts_per_tok": 2}
MODELS = {
    **{name: model_of(name) for name in ("qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text")},
    "mixtral": MIXTRAL,
}
Case = tuple[tuple[int, int, int], dict[str, Any]]
STREAMED = {"stream_chunk_tokens": 12, "stream_offload": "host", "mlp_tile_tokens": 3}
CASES: dict[int, list[Case]] = {
    2: [((1, 1, 2), STREAMED), ((2, 1, 1), {"mlp_tile_tokens": 5})],
    4: [((1, 2, 2), {"stream_chunk_tokens": 10}), ((1, 1, 4), STREAMED)],
}


def add(model: nn.Module) -> None:
    settings = LoRA(rank=3, alpha=6, use_rslora=True, target_modules=["o_proj"])
    add_adapters(model, settings.model_copy(update={"target_parameters": EXPERTS}))


def add_by_peft(model: nn.Module) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=3, lora_alpha=6, use_rslora=True, target_modules=["o_proj"], target_parameters=EXPERTS
    )
    inject_adapter_in_model(config, model)


def trained(family: str) -> tuple[dict[str, Any], list[Any], torch.dtype]:
    return MODELS[family], STEPS, torch.float64


def train_on(family: str, cases: list[Case]) -> list[Record]:
    return [
        kept_in_fp64(train_sharded, mesh, *trained(family), prepare=add, fill=fill, **options)
        for mesh, options in cases
    ]


# The others differ from these in what is around the experts.
SWEPT = [pytest.param(name, 2, marks=pytest.mark.slow) for name in ("deepseek_v3", "mixtral")]
SWEPT += [pytest.param(name, 4, marks=pytest.mark.slow) for name in MODELS]


@pytest.mark.parametrize(
    ("family", "ranks"),
    [
        ("qwen3_moe", 2),
        ("gpt_oss", 2),
        # Its experts run as those of qwen3_moe do.
        pytest.param("llama4_text", 2, marks=pytest.mark.slow),
        *SWEPT,
    ],
)
def test_parity_with_peft(family: str, ranks: int) -> None:
    """Loss, the gradient of each adapter and all parameters, over steps of packed documents."""
    by_peft = {"prepare": add_by_peft, "fill": fill}
    expected = kept_in_fp64(train_plain, *trained(family), **by_peft)
    adapters = {name for name in expected.gradients[0] if "experts" in name}
    assert len(adapters) == (4 if family == "deepseek_v3" else 8), "of its layers with experts"
    assert min(expected.gradients[0][name].abs().max() for name in adapters) > 0
    records = run_on_ranks(ranks, train_on, family, CASES[ranks], timeout=240)[0]
    for case, found in zip(CASES[ranks], records, strict=True):
        worst = largest_difference(found, expected)
        assert max(worst.values()) < 1e-12, (case, max(worst, key=worst.__getitem__), worst)


def grouped_and_one_by_one(family: str, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Output and gradients by the grouped products of a release's dtype, by peft and by ours."""
    results = []
    for ours in (False, True):
        model = plain_model(MODELS[family], dtype, experts="grouped_mm")
        add(model)
        hf.initialize(model, seed=3)
        fill(model)
        if ours:
            use_low_rank_products(model)
        logits = model(input_ids=torch.arange(40)[None], use_cache=False).logits
        logits.float().logsumexp(-1).sum().backward()
        gradients = {n: p.grad for n, p in hf.named_parameters(model) if p.grad is not None}
        results.append({"logits": logits.detach()} | gradients)
    return results


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_grouped_products(family: str) -> None:
    """As a mixture runs outside of fp64: the family's own grouped products."""
    theirs, ours = grouped_and_one_by_one(family, torch.float32)
    assert theirs.keys() == ours.keys()
    for name, values in theirs.items():
        assert torch.allclose(values, ours[name], rtol=0, atol=1e-4 * values.abs().max()), name


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the largest floating-point tensor that operations make."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        flat = torch.utils._pytree.tree_leaves(args)
        given = {x.untyped_storage()._cdata for x in flat if isinstance(x, Tensor)}
        made = func(*args, **kwargs or {})
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self.numel = max(self.numel, tensor.numel())
        return made


def test_nothing_is_as_large_as_the_experts() -> None:
    """In forward and backward of a layer with 64 experts; peft's way makes such tensors."""
    table = MODELS["qwen3_moe"] | {"num_experts": 64, "num_hidden_layers": 1}
    found = []
    for ours in (True, False):
        model = plain_model(table, torch.float32, experts="grouped_mm")
        add_adapters(model, LoRA(rank=2, target_parameters=EXPERTS))
        if ours:
            use_low_rank_products(model)
        with Largest() as largest:
            model(input_ids=torch.arange(8)[None], use_cache=False).logits.sum().backward()
        found.append(largest.numel)
    experts = model.model.layers[0].mlp.experts.get_base_layer().gate_up_proj.numel()
    adapter = 64 * 8 * 32  # with the rank filled up to 8
    assert found[0] <= adapter < experts // 2 and found[1] >= experts, (found, experts)


# --- runs -----------------------------------------------------------------------------------------

RUN = {
    "lora.rank": 4,
    "lora.target_modules": ["q_proj"],
    "lora.target_parameters": EXPERTS,
    "lora.use_rslora": True,
    "checkpoint.export": True,
    "optimizer.lr": 0.03,
    "training.steps": 2,
    "lr_scheduler.warmup_steps": 0,
    "parallelism.sequence_parallel_degree": 2,
}


def run_of(folder: Path, family: str, **settings: Any) -> tuple[Path, Path]:
    """The base and the folder of a run of train.py's Trainer on it."""
    config = write_run(folder)
    table = MODELS[family] | {"vocab_size": 272, "hidden_size": 64, "moe_intermediate_size": 64}
    base = hf.build_on_meta(hf.load_model_config("", table), torch.float32)
    hf.allocate(base, torch.device("cpu"))
    hf.initialize(base, seed=0)
    base.save_pretrained(folder / "base")
    model = {"model.config": {}, "model.path": str(folder / "base")}
    run_on_ranks(2, train, config, RUN | model | settings)
    return folder / "base", folder / "outputs" / "run"


def test_what_a_run_writes(tmp_path: Path) -> None:
    """On experts in NF4: peft opens the adapter, and the export is what peft merges."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, run = run_of(tmp_path, "qwen3_moe", **{"lora.quantize_base": "nf4"})
    described = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert described["use_rslora"] and len(described["target_parameters"]) == 2 * 2
    exported = AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if ".layers." in name and p.ndim > 1 and not p.shape[-1] % 64 and "gate.w" not in name:
                p.copy_(dequantize(quantize(p), torch.empty_like(p)))
    adapted = PeftModel.from_pretrained(plain, run / "adapter")
    merged = dict(adapted.merge_and_unload().named_parameters())
    for name, p in exported.named_parameters():
        assert torch.allclose(p, merged[name], rtol=0, atol=1e-6), name
        assert "experts" not in name or not torch.equal(p, before[name]), name


def loss_with_peft_files(folder: str) -> tuple[float, float]:
    """The loss with an adapter that peft has written, of its model and of that model sharded."""
    from peft import PeftModel

    plain = plain_model(MODELS["gpt_oss"], torch.float64, experts=hf.experts_path(torch.float64))
    hf.initialize(plain, seed=3)
    model = PeftModel.from_pretrained(plain, folder, is_trainable=True).get_base_model()
    ids = torch.arange(24)[None]
    whole = model(input_ids=ids, labels=ids, use_cache=False).loss.item()
    mesh = build_mesh(sequence=2)
    parallelize(model, mesh, param_dtype=torch.float64, reduce_dtype=torch.float64)
    [batch] = shard([{"input_ids": ids, "labels": ids}], model)
    return whole, model(**batch).loss.item()


def test_an_adapter_that_peft_has_written(tmp_path: Path) -> None:
    """In a loop of one's own: peft loads it, and `parallelize` takes the model."""
    from peft import LoraConfig, get_peft_model

    plain = plain_model(MODELS["gpt_oss"], torch.float64, experts="eager")
    settings = LoraConfig(r=3, target_modules=["o_proj"], target_parameters=EXPERTS)
    adapted = get_peft_model(plain, settings)
    fill(adapted.base_model.model)
    adapted.save_pretrained(tmp_path)
    whole, sharded = run_on_ranks(2, loss_with_peft_files, str(tmp_path))[0]
    assert sharded == pytest.approx(whole, rel=1e-7)


def test_patterns_and_settings() -> None:
    model = hf.build_on_meta(hf.load_model_config("", MODELS["qwen3_moe"]), torch.float32)
    for table, message in (
        ({"target_parameters": ["experts.up_proj"]}, "Did you mean gate_up_proj?"),
        ({"target_parameters": ["gate.weight"]}, "matches no parameter of experts"),
    ):
        with pytest.raises(UserError, match="lora.target_parameters") as refused:
            add_adapters(model, LoRA(rank=2, **table))
        assert message in str(refused.value), refused.value
    dense = hf.build_on_meta(hf.load_model_config("", model_of("llama")), torch.float32)
    with pytest.raises(UserError, match="has no parameters that experts share"):
        add_adapters(dense, LoRA(rank=2, target_parameters=EXPERTS))
    assert add_adapters(model, LoRA(rank=2, target_parameters=EXPERTS)) == 2 * 2
    assert sum(map(is_adapter, dict(model.named_parameters()))) == 2 * 2 * 2, "and nothing else"
