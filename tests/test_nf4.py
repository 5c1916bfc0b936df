"""QLoRA: what a weight in NF4 is, training beside it on every mesh, its runs and its plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from helpers.models import LLAMA, STARCODER2, write_byte_model
from helpers.ranks import run_on_ranks
from helpers.rows import make_rows
from helpers.runs import Settings, learned, logged, refusal, write_run
from helpers.training import Record, largest_difference, train_plain, train_sharded
from test_evaluation import train_main
from test_lora import STEPS, fill
from test_plan import plan_of
from titan_ulysses.config.load import load_config
from titan_ulysses.config.schema import LoRA
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.model import hf
from titan_ulysses.model.freezing import fingerprint
from titan_ulysses.model.lora import add_adapters
from titan_ulysses.model.nf4 import (
    NF4Weight,
    dequantize,
    full_tensor,
    is_nf4,
    quantize,
    quantize_base,
    row_bytes,
)
from titan_ulysses.model.parameter_names import is_adapter
from titan_ulysses.setup.blocks import find_blocks

# Rows of 128 numbers; 130 rows of the first product of the MLP, which 4 ranks do not share evenly,
# and whose second product has rows of 130 numbers, which stay as they are.
MODEL = STARCODER2 | {
    "hidden_size": 128,
    "intermediate_size": 130,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}


def numbers_of(packed: Tensor, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return dequantize(packed, torch.empty(*packed.shape[:-1], columns, dtype=dtype))


# --- rows of bytes --------------------------------------------------------------------------------


def test_each_row_is_what_torchao_makes_of_it() -> None:
    to_nf4 = pytest.importorskip("torchao.quantization").to_nf4
    torch.manual_seed(0)
    weight = torch.randn(96, 512) * torch.rand(96, 512).exp()
    packed = quantize(weight)
    assert packed.shape == (96, 256 + 8 + 8) and row_bytes(512) == 272
    for row, found, numbers in zip(weight, packed, numbers_of(packed, 512), strict=True):
        theirs = to_nf4(row, block_size=64, scaler_block_size=512 // 64)
        assert torch.equal(found[:256], theirs.quantized_data)
        assert torch.equal(found[256:264].view(torch.int8), theirs.quantized_scalers)
        expected = theirs.get_original_weight()
        assert torch.allclose(numbers, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_a_row_depends_on_nothing_but_itself() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 5, 192, dtype=torch.float64)
    packed = quantize(weight)
    assert torch.equal(packed[4], quantize(weight[4]))
    assert torch.equal(packed[4, 2], quantize(weight[4, 2:3])[0])
    assert torch.equal(quantize(weight.float()), packed)


def test_rows_without_range() -> None:
    """One block a row, blocks that are alike, zeros: no number is divided by zero."""
    one = torch.randn(3, 64)
    zeros = torch.zeros(2, 128)
    alike = torch.ones(1, 256)
    assert not numbers_of(quantize(zeros), 128).any()
    assert torch.equal(numbers_of(quantize(alike), 256), alike)
    found = numbers_of(quantize(one), 64)
    assert torch.equal(found.abs().amax(-1), one.abs().amax(-1)), "the scale itself"
    half = torch.cat([torch.zeros(1, 64), torch.randn(1, 64)], -1)
    assert not numbers_of(quantize(half), 128)[0, :64].any()


def test_how_far_it_is_from_the_weight() -> None:
    """Half of the widest distance of two levels, of a block's largest number; in any dtype."""
    torch.manual_seed(0)
    weight = torch.randn(300, 1024)
    found = numbers_of(quantize(weight), 1024)
    scale = weight.unflatten(-1, (-1, 64)).abs().amax(-1).repeat_interleave(64, -1)
    off = (found - weight).abs() / scale
    assert 0.13 < off.max() < 0.16
    assert off.mean() < 0.05
    assert torch.equal(numbers_of(quantize(weight), 1024, torch.bfloat16), found.bfloat16())


# --- a sharded weight -----------------------------------------------------------------------------


def prepare(model: nn.Module) -> None:
    add_adapters(model, LoRA(rank=3, alpha=6))
    assert quantize_base(find_blocks(model)[1]) == 2 * 5


@torch.no_grad()
def round_base(model: nn.Module) -> None:
    """The weights of a plain model become the numbers that their bytes stand for."""
    rounded = 0
    for name, p in model.named_parameters():
        if ".layers." in name and "base_layer.weight" in name and p.shape[-1] % 64 == 0:
            p.copy_(numbers_of(quantize(p), p.shape[-1], p.dtype))
            rounded += 1
    assert rounded == 2 * 5


def fill_plain(model: nn.Module) -> None:
    round_base(model)
    fill(model)


def sharded_base(degrees: tuple[int, int, int]) -> tuple[dict[str, Tensor], int, list[int]]:
    """The whole weights, the checksum, and this rank's bytes of the weights in NF4."""
    from helpers.training import Run

    run = Run(
        degrees,
        MODEL,
        make_rows([(12,), (12,)], masked="none", vocab_size=61, seed=0),
        seed=3,
        prepare=prepare,
    )
    before = fingerprint(run.model)
    run.train(1)
    assert fingerprint(run.model) == before, "another one once FSDP has padded the shards"
    found = {name: full_tensor(p) for name, p in hf.named_parameters(run.model)}
    held = [p._local_tensor._padded.numel() for p in run.model.parameters() if is_nf4(p)]
    return found, before, held


@pytest.mark.parametrize(
    "meshes",
    [
        [(1, 1, 1), (2, 1, 2), (1, 2, 2)],
        pytest.param([(1, 1, 1), (1, 2, 1)], marks=pytest.mark.slow),
    ],
    ids=["three", "without replicas and sp"],
)
def test_the_same_bytes_on_every_mesh(meshes: list[tuple[int, int, int]]) -> None:
    """Shards of 1, 2 and 4 ranks, also such as are not even, and with replicas."""
    plain = hf.build_on_meta(hf.load_model_config("", MODEL), torch.float64)
    add_adapters(plain, LoRA(rank=3, alpha=6))
    hf.allocate(plain, torch.device("cpu"))
    hf.initialize(plain, seed=3)
    round_base(plain)
    expected = {n: p for n, p in hf.named_parameters(plain) if not p.requires_grad}
    checksums = set()
    for degrees in meshes:
        ranks = degrees[0] * degrees[1] * degrees[2]
        for found, checksum, held in run_on_ranks(ranks, sharded_base, degrees):
            assert all(torch.equal(found[name], values) for name, values in expected.items())
            checksums.add(checksum)
            shards = degrees[1] * degrees[2]
            rows = [128, 32, 32, 128, 130]
            assert sum(held) == 2 * sum(-(-r // shards) for r in rows) * row_bytes(128)
    assert len(checksums) == 1


def test_what_it_refuses() -> None:
    weight = NF4Weight(
        torch.zeros(4, row_bytes(64), dtype=torch.uint8), torch.Size([4, 64]), torch.bfloat16
    )
    for operation in (
        lambda: weight + 1,
        lambda: weight.t(),
        lambda: weight.float(),
        lambda: weight.view(64, 4),
        lambda: weight[:, :2],
    ):
        with pytest.raises(NotImplementedError, match="of a weight in NF4, NF4Weight"):
            operation()
    with pytest.raises(NotImplementedError, match="of a weight in NF4, NF4Weight"):
        torch.zeros(4, 64).copy_(weight)
    assert weight[1:3].shape == (2, 64) and weight.cpu().dtype == torch.bfloat16
    assert weight.dequantized().dtype == torch.bfloat16


# --- training -------------------------------------------------------------------------------------


def train_quantized(degrees: tuple[int, int, int], options: dict[str, Any]) -> Record:
    return train_sharded(
        degrees, MODEL, STEPS, torch.float64, prepare=prepare, fill=fill, **options
    )


@pytest.fixture(scope="module")
def plain() -> Record:
    def add(model: nn.Module) -> None:
        add_adapters(model, LoRA(rank=3, alpha=6))

    return train_plain(MODEL, STEPS, torch.float64, prepare=add, fill=fill_plain)


STREAMED = {"stream_chunk_tokens": 8}
TILED = {"mlp_tile_tokens": 5, "offload": "host"}


@pytest.mark.parametrize(
    ("degrees", "options"),
    [
        ((1, 1, 1), {"stream_chunk_tokens": -1, "checkpoint_every": 0}),
        pytest.param((1, 1, 2), TILED, marks=pytest.mark.slow),
        # Streamed with replicas, below.
        pytest.param((1, 1, 2), STREAMED, marks=pytest.mark.slow),
        ((1, 2, 2), TILED),
        ((2, 1, 2), STREAMED | {"parameter_offload": True}),
        pytest.param((1, 1, 2), TILED | {"compile": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_parity_with_a_plain_process(
    degrees: tuple[int, int, int], options: dict[str, Any], plain: Record
) -> None:
    """Loss, each adapter's gradient, norms and all parameters over two AdamW steps of two batches
    of packed documents with masked labels, beside the same rounded weights.
    """
    ranks = degrees[0] * degrees[1] * degrees[2]
    found = run_on_ranks(ranks, train_quantized, degrees, options)[0]
    worst = largest_difference(found, plain)
    assert max(worst.values()) < 1e-12, {k: v for k, v in worst.items() if v >= 1e-12}
    assert len(found.losses) == 2 and all(map(is_adapter, found.gradients[0]))
    assert len(found.gradients[0]) == 2 * 2 * 6
    assert min(gradient.abs().max() for gradient in found.gradients[0].values()) > 0


# Three experts, of which the last of four ranks has none; adapters of attention alone.
MIXTURE = LLAMA | {"model_type": "qwen3_moe", "num_experts": 3, "num_experts_per_tok": 2}
MIXTURE |= {"hidden_size": 64, "moe_intermediate_size": 64, "num_attention_heads": 8}
ATTENTION = LoRA(rank=3, alpha=6, target_modules=["self_attn.*"])
EXPERTS = {"gate_up_proj", "down_proj"}


def train_mixture() -> Record:
    def prepare(model: nn.Module) -> None:
        add_adapters(model, ATTENTION)
        assert quantize_base(find_blocks(model)[1]) == 2 * (4 + 2)

    return train_sharded((1, 2, 2), MIXTURE, STEPS, torch.float64, prepare=prepare, fill=fill)


def test_parity_of_a_mixture_of_experts() -> None:
    """Whose norms are in fp32, in transformers' own code."""

    @torch.no_grad()
    def fill_mixture(model: nn.Module) -> None:
        for name, p in model.named_parameters():
            if "base_layer.weight" in name or name.rpartition(".")[2] in EXPERTS:
                p.copy_(numbers_of(quantize(p), p.shape[-1], p.dtype))
        fill(model)

    expected = train_plain(
        MIXTURE,
        STEPS,
        torch.float64,
        prepare=lambda model: add_adapters(model, ATTENTION),
        fill=fill_mixture,
    )
    worst = largest_difference(run_on_ranks(4, train_mixture)[0], expected)
    assert max(worst.values()) < 1e-6, {k: v for k, v in worst.items() if v >= 1e-6}


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model to begin with, and QLoRA runs by train.py: whole, in two parts, and in bf16."""
    folder = tmp_path_factory.mktemp("nf4")
    config = write_run(folder)
    sizes = {"num_attention_heads": 4, "head_dim": 24, "hidden_size": 128}
    write_byte_model(folder / "base", intermediate_size=192, **sizes)
    for name, steps, more in [
        ("whole", 4, {}),
        ("parts", 2, {}),
        ("parts", 4, {}),
        ("bf16", 1, {"training.param_dtype": "bfloat16"}),
    ]:
        settings = SETTINGS | more | {"job.name": name, "training.steps": steps}
        settings |= {"model.path": folder / "base"}
        run_on_ranks(2, train_main, config, settings)
    return folder


SETTINGS: Settings = {
    "model.config": "{}",
    "lora.rank": 4,
    "lora.quantize_base": "nf4",
    "validation.enable": True,
    "validation.steps": 2,
    "training.global_batch_size": 4,
    "checkpoint.export": True,
    "checkpoint.interval": 2,
    "lr_scheduler.decay_type": "constant",
    "lr_scheduler.warmup_steps": 0,
    "parallelism.sequence_parallel_degree": 2,
    "optimizer.lr": 0.03,
}


def test_a_run_resumes_to_the_bit(runs: Path) -> None:
    """The base is read again and quantized to the same bytes; a checkpoint has adapters alone."""
    whole, parts = runs / "outputs" / "whole", runs / "outputs" / "parts"
    assert learned(whole) == learned(parts) and len(learned(whole)) == 4
    for file in ("adapter/adapter_model.safetensors", "export/model.safetensors"):
        assert (whole / file).read_bytes() == (parts / file).read_bytes()
    saved = json.loads((parts / "checkpoints" / "step-4" / "run.json").read_text())["parameters"]
    assert len(saved) == 2 * 7 * 2 and all(map(is_adapter, saved))


def test_the_export_is_the_rounded_base_with_the_adapter(runs: Path) -> None:
    """Opened by plain transformers: peft beside the rounded weights computes the same, and the run
    has evaluated the same loss.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = runs / "outputs" / "whole"
    base = AutoModelForCausalLM.from_pretrained(runs / "base", dtype=torch.float32)
    for name, p in base.named_parameters():
        if "_proj" in name and p.shape[-1] % 64 == 0:
            p.data = numbers_of(quantize(p), p.shape[-1])
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    adapted = PeftModel.from_pretrained(base, run / "adapter")
    exported = AutoModelForCausalLM.from_pretrained(run / "export", dtype="auto")
    ids = torch.arange(60).view(2, 30)
    with torch.no_grad():
        scores = adapted(input_ids=ids).logits, exported(input_ids=ids).logits
    assert torch.allclose(*scores, rtol=0, atol=1e-5 * scores[0].abs().max())
    for name, p in exported.named_parameters():
        assert p.dtype == torch.float32
        assert torch.equal(p, before[name]) != ("_proj" in name), name
    greedy = [
        model.generate(ids[:1], max_new_tokens=5, do_sample=False) for model in (adapted, exported)
    ]
    assert torch.equal(*greedy) and greedy[0].shape == (1, 35)

    validated = [line["validation_loss"] for line in logged(run) if "validation_loss" in line]
    assert validated[-1] < 0.9 * validated[0]
    of_run = SETTINGS | {"model.path": runs / "base", "job.name": "whole", "training.steps": 4}
    own = {key: value for key, value in SETTINGS.items() if not key.startswith("lora")}
    of_export = own | {"model.path": run / "export", "job.name": "exported"}
    for settings in (of_run, of_export):
        run_on_ranks(2, train_main, runs / "run.toml", settings, "--evaluate")
        file = runs / "outputs" / str(settings["job.name"]) / "evaluation.json"
        assert json.loads(file.read_text())["loss"] == pytest.approx(validated[-1], rel=1e-6)


def test_an_export_in_bf16(runs: Path) -> None:
    tensors = load_file(runs / "outputs" / "bf16" / "export" / "model.safetensors")
    widths = {name.split(".")[-2]: tensor.dtype for name, tensor in tensors.items()}
    assert widths["q_proj"] == widths["down_proj"] == widths["embed_tokens"] == torch.bfloat16
    # Its rows of 96 numbers are not quantized, and merged as LoRA merges all.
    assert widths["o_proj"] == torch.float32


def test_another_storage_is_refused(runs: Path) -> None:
    settings = SETTINGS | {"model.path": runs / "base", "job.name": "parts"}
    settings |= {"lora.quantize_base": "none", "training.steps": 5, "model.config": {}}
    settings["model.path"] = str(settings["model.path"])
    for message in run_on_ranks(2, refusal, runs / "run.toml", settings):
        assert "the frozen weights are not those that step-4 was trained with" in message
        assert "or lora.quantize_base change?" in message


# --- settings -------------------------------------------------------------------------------------


def test_float8_excludes_it(tmp_path: Path) -> None:
    settings = {"lora.rank": 4, "lora.quantize_base": "nf4", "quantize.float8": True}
    with pytest.raises(UserError, match='lora.quantize_base = "nf4" and quantize.float8 = true'):
        load_config(write_run(tmp_path), settings.items())


def test_rows_that_cannot_be_quantized() -> None:
    model = hf.build_on_meta(hf.load_model_config("", LLAMA), torch.float32)
    model.requires_grad_(False)
    with pytest.raises(UserError, match="multiple of 64 numbers \\(48\\). Set it to"):
        quantize_base(find_blocks(model)[1])


def test_which_weights_of_a_mixture() -> None:
    """Experts and attention; no router, and no gate of a shared expert."""
    table = LLAMA | {"model_type": "qwen2_moe", "num_experts": 4, "hidden_size": 64}
    table |= {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
    table |= {"num_attention_heads": 8, "num_hidden_layers": 1, "decoder_sparse_step": 1}
    model = hf.build_on_meta(hf.load_model_config("", table), torch.float32)
    model.requires_grad_(False)
    quantize_base(find_blocks(model)[1])
    found = {n.removeprefix("model.layers.0.") for n, p in model.named_parameters() if is_nf4(p)}
    attention = {f"self_attn.{x}_proj.weight" for x in "qkvo"}
    shared = {f"mlp.shared_expert.{x}_proj.weight" for x in ("gate", "up", "down")}
    assert found == attention | shared | {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}


@pytest.mark.slow  # test_plan.py compares a plan with real ranks
def test_the_plan_has_their_bytes() -> None:
    """4 bits and their scales in place of 16 bits."""
    settings = {"training__seq_len": 256, "lora__rank": 2}
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}
    settings["model__config"] = LLAMA | sizes | {"max_position_embeddings": 256}
    in_bf16, in_nf4 = plan_of(**settings), plan_of(lora__quantize_base="nf4", **settings)
    rows = {256: 64 + 2 * 16 + 2 * 512, 64: 256, 512: 256}  # their lengths, and how many a layer
    saved = in_bf16.peak.components["parameters"] - in_nf4.peak.components["parameters"]
    assert saved == 2 * sum(count * (2 * n - row_bytes(n)) for n, count in rows.items())
