"""LoRA on every mesh: against peft in one process; what is saved, resumed and exported; what is
refused.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from helpers import training
from helpers.families import model_of
from helpers.models import LLAMA, STARCODER2
from helpers.ranks import run_on_ranks
from helpers.rows import local_batch, make_rows
from helpers.runs import learned, refusal, train, write_run
from helpers.training import Record, largest_difference, train_plain, train_sharded
from test_float8 import emulate_float8
from test_plan import plan_of
from titan_ulysses.config.load import load_config
from titan_ulysses.config.schema import LoRA, Optimizer
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.seeds import seed_of
from titan_ulysses.model import hf
from titan_ulysses.model.lora import add_adapters, check_lora, initialize_adapters
from titan_ulysses.model.parameter_names import is_adapter
from titan_ulysses.observability.metrics import describe_parameters, flops_per_token
from titan_ulysses.optim.adamw import is_quantized

pytestmark = pytest.mark.cuda(slow=True)
SETTINGS = LoRA(rank=3, alpha=6)
STEPS = [
    [
        make_rows(rows, masked="uneven", vocab_size=61, seed=10 * step + i)
        for i, rows in enumerate(micro_batches)
    ]
    for step, micro_batches in enumerate(2 * [[[(10, 13, 1), (6, 6, 12)], [(24,), (8, 16)]]])
]


def add(model: nn.Module) -> None:
    add_adapters(model, SETTINGS)


def add_by_peft(model: nn.Module) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(
        LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM"), model
    )


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """As peft does, but with numbers in B too: with zeros there the first gradients of A would be
    zeros.
    """
    initialize_adapters(model, seed=5)
    for name, parameter in hf.named_parameters(model):
        if ".lora_B." in name:
            generator = torch.Generator().manual_seed(seed_of(0, name))
            hf.fill(
                parameter,
                0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype),
            )


# --- the same training as peft's ------------------------------------------------------------------


def train_adapters(degrees: tuple[int, int, int]) -> Record:
    options = {"mlp_tile_tokens": 5, "offload": "host"}
    return train_sharded(
        degrees, STARCODER2, STEPS, torch.float64, prepare=add, fill=fill, **options
    )


@pytest.fixture(scope="module")
def by_peft() -> Record:
    return train_plain(STARCODER2, STEPS, torch.float64, prepare=add_by_peft, fill=fill)


@pytest.mark.parametrize("degrees", [(1, 1, 2), (1, 2, 1)], ids=str)
def test_parity_with_peft(degrees: tuple[int, int, int], by_peft: Record) -> None:
    """Loss, each adapter's gradient and all parameters, over steps of two batches of packed
    documents.
    """
    found = run_on_ranks(2, train_adapters, degrees)[0]
    worst = largest_difference(found, by_peft)
    assert max(worst.values()) < 1e-12, {k: v for k, v in worst.items() if v >= 1e-12}
    assert len(found.gradients[0]) == 2 * 2 * 6 and all(map(is_adapter, found.gradients[0]))
    assert min(gradient.abs().max() for gradient in found.gradients[0].values()) > 0
    before = train_plain(STARCODER2, [], torch.float64).parameters
    assert all(torch.equal(found.parameters[name], values) for name, values in before.items()), (
        "the base has moved"
    )


DORA = LoRA(rank=3, alpha=6, use_dora=True, use_rslora=True)


def add_dora_by_peft(model: nn.Module) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    settings = {"r": 3, "lora_alpha": 6, "use_dora": True, "use_rslora": True}
    inject_adapter_in_model(LoraConfig(target_modules="all-linear", **settings), model)


def train_dora(**options: Any) -> Record:
    def prepare(model: nn.Module) -> None:
        add_adapters(model, DORA)

    return train_sharded(
        (1, 1, 2), STARCODER2, STEPS, torch.float64, prepare=prepare, fill=fill, **options
    )


def test_dora_and_rslora() -> None:
    """Against peft, whose weights are tiled, streamed and sharded here."""
    expected = train_plain(STARCODER2, STEPS, torch.float64, prepare=add_dora_by_peft, fill=fill)
    lengths = {name for name in expected.gradients[0] if "lora_magnitude_vector" in name}
    assert len(lengths) == 2 * 6 and len(expected.gradients[0]) == 3 * 2 * 6
    found = run_on_ranks(2, train_dora, stream_chunk_tokens=10, mlp_tile_tokens=5)[0]
    worst = largest_difference(found, expected)
    assert max(worst.values()) < 1e-12, {k: v for k, v in worst.items() if v >= 1e-12}


def slope_of_dropout() -> tuple[float, float, float]:
    """Along a direction, with the same random numbers: the gradient's slope, the loss's; what
    dropout does to it.
    """
    run = training.Run(
        (1, 1, 2),
        STARCODER2,
        STEPS[0][0],
        prepare=lambda model: add_adapters(model, LoRA(rank=3, dropout=0.4)),
    )
    fill(run.model)
    batch = local_batch(run.rows, run.mesh)
    valid = torch.tensor(sum(int((d.labels != -100).sum()) for row in run.rows for d in row))
    adapters = {name: p for name, p in hf.named_parameters(run.model) if is_adapter(name)}
    start = {name: p.full_tensor().detach() for name, p in adapters.items()}
    draw = torch.Generator().manual_seed(0)
    direction = {
        name: torch.randn(p.shape, generator=draw, dtype=p.dtype).to(p.device) * p.abs().mean()
        for name, p in start.items()
    }

    def loss(step: float) -> Tensor:
        for name, parameter in adapters.items():
            with torch.no_grad():
                hf.fill(parameter, start[name] + step * direction[name])
        torch.manual_seed(7 + torch.distributed.get_rank())
        return run.model(**batch.inputs(), num_items_in_batch=valid).loss

    loss(0.0).backward()
    by_gradient = sum(
        (p.grad.full_tensor() * direction[name]).sum().item() for name, p in adapters.items()
    )
    step = 1e-5
    by_loss = (loss(step) - loss(-step)).item() / (2 * step)
    with_dropout = loss(0.0).item()
    run.model.eval()
    return by_gradient, by_loss, loss(0.0).item() - with_dropout


def test_dropout_is_the_same_when_computed_again() -> None:
    """In tiles and checkpoints: gradients are those of the very function whose loss was
    computed.
    """
    for by_gradient, by_loss, without in run_on_ranks(2, slope_of_dropout):
        assert by_gradient == pytest.approx(by_loss, rel=1e-7)
        assert abs(without) > 1e-3


def initialized(degrees: tuple[int, int, int]) -> dict[str, Tensor]:
    run = training.Run(degrees, LLAMA, STEPS[0][0], prepare=add)
    initialize_adapters(run.model, seed=3)
    return {name: p.full_tensor().cpu() for name, p in hf.named_parameters(run.model)}


def test_initialisation_does_not_depend_on_the_mesh() -> None:
    expected = hf.build_on_meta(hf.load_model_config("", LLAMA), torch.float64)
    add(expected)
    hf.allocate(expected, torch.device("cpu"))
    hf.initialize(expected, seed=0)
    initialize_adapters(expected, seed=3)
    parameters = dict(hf.named_parameters(expected))
    for found in run_on_ranks(2, initialized, (1, 2, 1)):
        assert found.keys() == parameters.keys()
        assert all(torch.equal(p, found[name]) for name, p in parameters.items())
    a, b = (parameters[f"model.layers.0.mlp.up_proj.lora_{part}.default.weight"] for part in "AB")
    bound = LLAMA["hidden_size"] ** -0.5
    assert 0.9 * bound < a.abs().max() <= bound and not b.any()
    assert len({p[0, 0].item() for name, p in parameters.items() if ".lora_A." in name}) == 2 * 7
    plain = hf.build_on_meta(hf.load_model_config("", LLAMA), torch.float64)
    hf.allocate(plain, torch.device("cpu"))
    hf.initialize(plain, seed=0)
    assert all(torch.equal(p, parameters[name]) for name, p in plain.named_parameters())


# --- with other features --------------------------------------------------------------------------


WIDE = {
    **LLAMA,
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "head_dim": 16,
    "num_hidden_layers": 1,
}
COMPOSED: dict[str, dict[str, Any]] = {
    "alone": {},
    "parameter offload": {"parameter_offload": True},
    "8 bits": {"optimizer": Optimizer(lr=1e-2, name="adamw8bit")},
    "float8": {"float8": True},
    "compiled": {"compile": True},
}


def losses_of(names: list[str]) -> dict[str, tuple[list[float], dict[str, Any]]]:
    return {name: compose(**{"optimizer": Optimizer(lr=1e-2)} | COMPOSED[name]) for name in names}


def compose(
    *, float8: bool = False, compile: bool = False, **options: Any
) -> tuple[list[float], dict[str, Any]]:
    def prepare(model: nn.Module) -> None:
        if float8:
            emulate_float8(model)
        add_adapters(model, LoRA(rank=128, alpha=64))

    rows = make_rows([(32,), (16, 16)], masked="none", vocab_size=272, seed=0)
    torch._dynamo.utils.counters.clear()
    wrap = {"compile": compile, "mlp_tile_tokens": 9}
    run = training.Run(
        (1, 1, 2),
        WIDE,
        rows,
        dtype=torch.float32,
        param_dtype=torch.bfloat16,
        prepare=prepare,
        wrap=wrap,
        **options,
    )
    initialize_adapters(run.model, seed=0)
    before = {name: p.full_tensor().clone() for name, p in hf.state_of(run.model).items()}
    run.train(8)
    state = [
        values
        for values in run.optimizer.state.values()
        if is_quantized(values["exp_avg"].to_local().numel(), 8)
    ]
    return run.losses, {
        "base kept": all(
            torch.equal(p.full_tensor(), before[name]) for name, p in hf.state_of(run.model).items()
        ),
        "float8 layers": sum(type(m).__name__ == "Float8Linear" for m in run.model.modules()),
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "breaks": sum(torch._dynamo.utils.counters["graph_break"].values()),
        "quantized": len(state),
    }


@pytest.mark.slow
@pytest.mark.cuda(never="one of its models is compiled, by Triton")
def test_with_other_features() -> None:
    found = run_on_ranks(2, losses_of, list(COMPOSED), timeout=240)[0]
    alone, _ = found["alone"]
    assert alone[-1] < 0.9 * alone[0]
    assert all(facts["base kept"] for _, facts in found.values())
    assert found["parameter offload"][0] == alone
    for name in ("8 bits", "float8", "compiled"):
        assert found[name][0] != alone, name
        assert found[name][0] == pytest.approx(alone, abs=0.1), name
    assert found["float8"][1]["float8 layers"] == 7
    assert found["compiled"][1]["graphs"] >= 2 and found["compiled"][1]["breaks"] == 0
    assert found["8 bits"][1]["quantized"] > 0


@pytest.mark.cuda(never="a plan is made in a process without this device")
def test_the_plan_shrinks() -> None:
    whole, adapters = plan_of(training__seq_len=64), plan_of(training__seq_len=64, lora__rank=2)
    for component, share in {"parameters": 0.7, "optimizer state": 0.2, "gradients": 0.2}.items():
        assert (
            adapters.peak.components.get(component, 0) < share * whole.peak.components[component]
        ), component
    assert adapters.gpu_bytes < whole.gpu_bytes
    assert adapters.simulation.cost.flops < whole.simulation.cost.flops


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in bf16 to begin with, and runs of its adapters: whole, and in two parts."""
    folder = tmp_path_factory.mktemp("lora")
    config = write_run(folder)
    base = hf.build_on_meta(
        hf.load_model_config("", load_config(config).model.config), torch.bfloat16
    )
    hf.allocate(base, torch.device("cpu"))
    hf.initialize(base, seed=0)
    base.save_pretrained(folder / "base")
    settings = {
        "model.config": {},
        "model.path": str(folder / "base"),
        "training.param_dtype": "bfloat16",
    }
    settings |= {
        "lora.rank": 4,
        "lora.dropout": 0.1,
        "checkpoint.export": True,
        "checkpoint.interval": 2,
        "training.global_batch_size": 2,
    }
    settings |= {
        "lr_scheduler.decay_type": "constant",
        "lr_scheduler.warmup_steps": 0,
        "parallelism.sequence_parallel_degree": 2,
        "optimizer.lr": 0.03,
    }
    for name, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        run_on_ranks(2, train, config, settings | {"job.name": name, "training.steps": steps})
    return folder


def test_a_run_resumes_to_the_bit(runs: Path) -> None:
    whole, parts = runs / "outputs" / "whole", runs / "outputs" / "parts"
    assert learned(whole) == learned(parts) and len(learned(whole)) == 4
    for file in ("adapter/adapter_model.safetensors", "export/model.safetensors"):
        assert (whole / file).read_bytes() == (parts / file).read_bytes()
    saved = json.loads((parts / "checkpoints" / "step-4" / "run.json").read_text())["parameters"]
    assert len(saved) == 2 * 7 * 2 and all(map(is_adapter, saved)), "only adapters are saved"


def test_the_export_is_the_base_with_the_adapter(runs: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = runs / "outputs" / "whole"
    described = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(runs / "base") and described["r"] == 4
    base = AutoModelForCausalLM.from_pretrained(runs / "base", dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    adapted = PeftModel.from_pretrained(base, run / "adapter")
    exported = AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float32)
    ids = torch.arange(60).view(2, 30)
    with torch.no_grad():
        scores = adapted(input_ids=ids).logits, exported(input_ids=ids).logits
    assert torch.allclose(*scores, rtol=0, atol=1e-5 * scores[0].abs().max())
    merged = dict(adapted.merge_and_unload().named_parameters())
    for name, p in exported.named_parameters():
        assert torch.allclose(p, merged[name], rtol=0, atol=1e-6), name
        assert torch.equal(p, before[name]) != ("_proj" in name), name


def test_another_rank_is_another_model(runs: Path) -> None:
    settings = {
        "model.config": {},
        "model.path": str(runs / "base"),
        "training.param_dtype": "bfloat16",
    }
    settings |= {"lora.rank": 8, "job.name": "parts"}
    for message in run_on_ranks(2, refusal, runs / "run.toml", settings):
        assert (
            "step-4 holds a different model: " in message
            and "lora_A.default.weight is [4, 32] there and" in message
        )


def test_another_base_is_refused(runs: Path) -> None:
    """Beside other frozen numbers the adapters would be worth nothing."""
    shutil.copytree(runs / "base", runs / "other")
    tensors = load_file(runs / "other" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, runs / "other" / "model.safetensors", metadata={"format": "pt"})
    settings = {
        "model.config": {},
        "model.path": str(runs / "other"),
        "training.param_dtype": "bfloat16",
    }
    settings |= {"lora.rank": 4, "job.name": "parts"}
    for message in run_on_ranks(2, refusal, runs / "run.toml", settings):
        assert (
            "the frozen weights are not those that step-4 was trained with. Did model.path, "
            in message
        )


# --- settings -------------------------------------------------------------------------------------


def targets(*patterns: str) -> set[str]:
    model = hf.build_on_meta(hf.load_model_config("", LLAMA), torch.float32)
    count = add_adapters(model, LoRA(rank=2, target_modules=list(patterns)))
    names = {
        name.split(".lora_A.")[0].removeprefix("model.layers.")
        for name, _ in hf.named_parameters(model)
        if ".lora_A." in name
    }
    assert len(names) == count
    return names


def test_which_layers() -> None:
    assert targets("q_proj", "1.mlp.*") == {
        *("0.self_attn.q_proj", "1.self_attn.q_proj"),
        *("1.mlp.gate_proj", "1.mlp.up_proj", "1.mlp.down_proj"),
    }
    assert len(targets()) == 2 * 7


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "q_porj",
            '"q_porj" matches no linear layer that can have an adapter. Did you mean q_proj or ',
        ),
        ("lm_head", '"lm_head" matches no linear layer'),
        ("embed_tokens", '"embed_tokens" matches no linear layer'),
        ("xyz", "There are q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj."),
    ],
)
def test_patterns_that_match_nothing(pattern: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        targets("v_proj", pattern)
    assert str(caught.value).startswith('lora.target_modules = ["v_proj", ') and message in str(
        caught.value
    )


def test_layers_that_peft_takes_for_experts() -> None:
    table = LLAMA | {"model_type": "qwen3_moe", "num_experts": 4, "mlp_only_layers": [0]}
    model = hf.build_on_meta(hf.load_model_config("", table), torch.float32)
    with pytest.raises(
        UserError, match='in a "qwen3_moe" peft adapts model.layers.0.mlp.* as a part of a mixture'
    ):
        add_adapters(model, SETTINGS)
    model = hf.build_on_meta(hf.load_model_config("", table), torch.float32)
    assert add_adapters(model, LoRA(rank=3, target_modules=["self_attn.*"])) == 2 * 4


def test_what_is_counted() -> None:
    model = hf.build_on_meta(hf.load_model_config("", LLAMA), torch.float32)
    whole, flops = sum(p.numel() for p in model.parameters()), flops_per_token(model)
    assert describe_parameters(model) == f"{whole:,} parameters"
    add(model)
    adapters = sum(p.numel() for name, p in hf.named_parameters(model) if is_adapter(name))
    assert (
        describe_parameters(model)
        == f"{whole + adapters:,} parameters, of which {adapters:,} are trained"
    )
    first = model.model.layers[0].self_attn.q_proj.base_layer.weight.numel()
    assert flops_per_token(model) == flops * 4 // 6 + 6 * adapters - 2 * first


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_lora(LoRA())
    with pytest.raises(
        UserError, match="lora.rank = 3 needs peft, which is not installed: pip install peft"
    ):
        check_lora(SETTINGS)
    with pytest.raises(UserError, match="pip install peft"):  # also where a run is only planned
        targets()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model.freeze": ["lm_head.*"]},
            'lora.rank = 4 and model.freeze = ["lm_head.*"] are both set',
        ),
        (
            {"lora.dropout": 0.1, "compile.enable": True},
            "lora.dropout = 0.1 with compile.enable = true",
        ),
    ],
)
def test_settings_that_exclude_each_other(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        load_config(write_run(tmp_path), ({"lora.rank": 4} | settings).items())
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("family", "asked"),
    [
        *((family, []) for family in ("deepseek_v2", "qwen3_next", "falcon_h1", "nemotron_h")),
        ("deepseek_v2", ["down_proj"]),
    ],
)
def test_the_message_names_layers_that_peft_takes(family: str, asked: list[str]) -> None:
    """Where all linear layers, or those of MLPs, cannot have one: the names that it gives can."""
    config = hf.load_model_config("", model_of(family))
    with pytest.raises(UserError, match="lora.target_modules: .*Name other layers") as caught:
        model = hf.build_on_meta(config, torch.float32)
        add_adapters(model, LoRA(rank=3, target_modules=asked))
    names = json.loads(str(caught.value).split("lora.target_modules = ")[1].split("]")[0] + "]")
    model = hf.build_on_meta(config, torch.float32)
    assert add_adapters(model, LoRA(rank=3, target_modules=names)) >= len(names) > 3
