"""Quantized releases: read as transformers dequantizes them, rank by rank; trained and exported.

The folders are written here, from the rule of each form.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from helpers.meshes import mesh_of
from helpers.ranks import run_on_ranks
from helpers.runs import learned, train, write_run
from titan_ulysses.checkpoint import safetensors as weights
from titan_ulysses.checkpoint.folder import find
from titan_ulysses.data.tokenizer import load_tokenizer
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.model import hf
from titan_ulysses.model.families import check_family
from titan_ulysses.setup.blocks import find_blocks
from titan_ulysses.setup.parallelize import shard_blocks, shard_root

SIZES = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
SPARSE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
QWEN3 = SIZES | {"model_type": "qwen3"}
QWEN3_MOE = SIZES | SPARSE | {"model_type": "qwen3_moe", "num_experts": 4}
GPT_OSS = SIZES | {"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = SIZES | SPARSE
DEEPSEEK |= {
    "model_type": "deepseek_v3",
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
DEEPSEEK.pop("head_dim")

# --- the writer -----------------------------------------------------------------------------------


def fp8(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Codes in E4M3, and for each block of rows and columns, of which the last may be cut, its
    largest magnitude / 448 (arXiv 2412.19437, section 3.3.2; `weight_dequant` in DeepSeek-V3's
    inference/kernel.py multiplies).
    """
    codes, rows = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), []
    for i in range(0, weight.shape[0], block[0]):
        rows.append([])
        for j in range(0, weight.shape[1], block[1]):
            part = (slice(i, i + block[0]), slice(j, j + block[1]))
            scale = weight[part].abs().max().clamp(min=1e-12) / 448
            codes[part] = (weight[part] / scale).to(torch.float8_e4m3fn)
            rows[-1].append(scale)
    return codes, torch.tensor(rows)


def write_fp8(folder: Path, table: dict[str, Any], block: tuple[int, int] | None) -> None:
    """All linear layers but head and routers; with one scale for all of a weight if block is
    None.
    """
    tensors = plain_tensors(folder, table)
    for name, weight in list(tensors.items()):
        if weight.ndim == 2 and not name.endswith(("lm_head.weight", "embed_tokens.weight")):
            if name.endswith("mlp.gate.weight"):
                continue
            size = block or tuple(weight.shape)
            tensors[name], scales = fp8(weight.float(), size)
            tensors[f"{name}_scale_inv"] = scales if block else scales.reshape(())
    save_file(tensors, folder / "model.safetensors")
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    say_form(folder, settings | ({"weight_block_size": list(block)} if block else {}))


def write_mxfp4(folder: Path, table: dict[str, Any]) -> None:
    """Any bytes are a weight: two codes of 4 bits each, and exponents of 2 plus 127 (OCP
    Microscaling Formats 1.0, sections 5.3.3 and 5.4.1).
    """
    tensors = plain_tensors(folder, table)
    generator = torch.Generator().manual_seed(1)
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        shape = (experts, rows, columns // 32)
        tensors[f"{name}_blocks"] = torch.randint(
            256, (*shape, 16), generator=generator, dtype=torch.uint8
        )
        tensors[f"{name}_scales"] = torch.randint(
            120, 126, shape, generator=generator, dtype=torch.uint8
        )
    save_file(tensors, folder / "model.safetensors")
    say_form(folder, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


def plain_tensors(folder: Path, table: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(2)
    config = hf.load_model_config("", table)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    # transformers keeps routers in fp32, but releases have them in bf16.
    return {n: t.bfloat16() if n.endswith("gate.weight") else t for n, t in tensors.items()}


def say_form(folder: Path, settings: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released")
    write_fp8(folder / "qwen3", QWEN3, (16, 16))
    write_fp8(folder / "qwen3_moe", QWEN3_MOE, None)
    write_fp8(folder / "deepseek_v3", DEEPSEEK, (16, 16))
    write_mxfp4(folder / "gpt_oss", GPT_OSS)
    return folder


FORMS = {
    "qwen3": FineGrainedFP8Config,
    "qwen3_moe": FineGrainedFP8Config,
    "deepseek_v3": FineGrainedFP8Config,
    "gpt_oss": Mxfp4Config,
}


def dequantized(folder: Path, dtype: torch.dtype) -> Any:
    """By transformers, whole."""
    settings = FORMS[folder.name](dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=dtype)


# --- reading --------------------------------------------------------------------------------------


def load_all(folders: list[Path], dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """The whole tensors, and NaN before, in all of a rank's rows."""
    found = []
    for folder in folders:
        model = hf.build_on_meta(hf.load_model_config(str(folder), None), dtype)
        shard = partial(fully_shard, mesh=mesh_of(1, torch.distributed.get_world_size(), 1).fsdp)
        shard_blocks(model, find_blocks(model)[1], shard)
        shard_root(model, shard)
        hf.allocate(model, torch.device("cpu"))
        for tensor in hf.state_of(model).values():
            tensor.data.fill_(torch.nan)
        loaded = weights.load(model, str(folder))
        assert loaded.unknown == [] and "are stored in" in loaded.quantized
        state = hf.state_of(model)
        found.append({n: getattr(t, "full_tensor", t.clone)().detach() for n, t in state.items()})
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_rank_reads_its_rows_to_the_bit(ranks: int, folders: Path) -> None:
    """As transformers dequantizes the whole; rows of a block of scales are on two ranks."""
    paths = [folders / name for name in FORMS]
    for dtype in (torch.float32, torch.bfloat16):
        results = run_on_ranks(ranks, load_all, paths, dtype)[0]
        for path, found in zip(paths, results, strict=True):
            expected = dequantized(path, dtype).state_dict()
            assert found.keys() == expected.keys()
            for name, tensor in expected.items():
                assert torch.equal(found[name], tensor.to(dtype)), (path.name, name)


# --- training and export --------------------------------------------------------------------------

FULL: dict[str, Any] = {
    "model.config": {},
    "training.steps": 3,
    "training.global_batch_size": 4,
    "parallelism.sequence_parallel_degree": 2,
    "lr_scheduler.warmup_steps": 0,
    "checkpoint.export": True,
}
ADAPTED = FULL | {"lora.rank": 4, "training.param_dtype": "bfloat16"}
ADAPTED |= {"lora.target_modules": ["self_attn.o_proj"]}


def train_and_compare(config: Path, folders: list[Path]) -> None:
    """Runs of each release, and of what transformers makes of it."""
    for folder in folders:
        for name, settings in {"full": FULL, "adapted": ADAPTED}.items():
            for source in (folder, folder.with_name(f"{folder.name}-plain")):
                job = {"model.path": str(source), "job.name": f"{source.name}-{name}"}
                train(config, settings | job)


def test_training_is_that_of_the_dequantized_model(folders: Path, tmp_path: Path) -> None:
    """Three steps, all parameters and adapters alone, on two ranks that share a sequence: the same
    losses, norms and exported bits; what is not trained leaves as it came.
    """
    sources = [folders / "gpt_oss", folders / "deepseek_v3"]
    for source in sources:
        dequantized(source, torch.float32).save_pretrained(folders / f"{source.name}-plain")
        load_tokenizer("bytes").save_pretrained(folders / f"{source.name}-plain")
    run_on_ranks(2, train_and_compare, write_run(tmp_path), sources)
    for source in sources:
        for name in ("full", "adapted"):
            run = tmp_path / "outputs" / f"{source.name}-{name}"
            plain = tmp_path / "outputs" / f"{source.name}-plain-{name}"
            assert learned(run) == learned(plain) and len(learned(run)) == 3
            found = load_file(run / "export" / "model.safetensors")
            expected = load_file(plain / "export" / "model.safetensors")
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[n], tensor) for n, tensor in expected.items())
            opened = AutoModelForCausalLM.from_pretrained(run / "export")
            assert not hasattr(opened.config, "quantization_config")
            if name == "adapted":
                before = dequantized(source, torch.bfloat16).state_dict()
                after = opened.state_dict()
                kept = {n for n, x in after.items() if torch.equal(x.float(), before[n].float())}
                trained = {f"model.layers.{i}.self_attn.o_proj.weight" for i in range(2)}
                assert before.keys() - kept == trained


# --- other forms ----------------------------------------------------------------------------------


def read(tmp_path: Path, tensors: dict[str, Tensor], settings: dict[str, Any]) -> list[Tensor]:
    """The weight "x.weight" of a folder: whole, and some of its rows."""
    tmp_path.mkdir()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    stored = find(str(tmp_path))
    assert stored.names == {"x.weight"}
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        weight = stored.get("x.weight", {tmp_path / "model.safetensors": file})
        rows = weight.get_shape()[0]
        return [weight[...], weight[7:rows, 3:5], weight[0:0]]


def assert_rows(found: list[Tensor], expected: Tensor) -> None:
    assert torch.equal(found[0].to(expected.dtype), expected)
    assert torch.equal(found[1].to(expected.dtype), expected[7:, 3:5])
    assert found[2].shape == (0, expected.shape[1])


def test_blocks_that_are_cut(tmp_path: Path) -> None:
    """As those of DeepSeek-V3's kv_a_proj_with_mqa, of 576 rows. transformers refuses 40 rows; of
    24 rows and 2 scales it takes blocks of 12.
    """
    for rows in (24, 40):
        codes, scales = fp8(torch.randn(rows, 40), (16, 16))
        wide = scales.repeat_interleave(16, 0)[:rows].repeat_interleave(16, 1)[:, :40]
        tensors = {"x.weight": codes, "x.weight_scale_inv": scales}
        settings = {"quant_method": "fp8", "weight_block_size": [16, 16]}
        assert_rows(read(tmp_path / str(rows), tensors, settings), codes.float() * wide)


def test_compressed_tensors(tmp_path: Path) -> None:
    """A scale for each row of float8; 4 bits with and without zero points, in groups of 8 numbers
    (compressed_tensors/compressors of vllm-project/compressed-tensors, 0.12 and 0.20, which gives
    the same).
    """
    codes, scales = fp8(torch.randn(24, 16), (1, 16))
    scales = scales.bfloat16()
    tensors = {"x.weight": codes, "x.weight_scale": scales}
    settings = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    expected = codes.to(torch.bfloat16) * scales
    assert_rows(read(tmp_path / "fp8", tensors, settings), expected)

    numbers = torch.randint(-8, 8, (24, 16))
    zeros = torch.randint(-8, 8, (24, 2))
    scales = torch.rand(24, 2).bfloat16()

    def pack(numbers: Tensor) -> Tensor:
        words = sum((numbers[:, i::8] + 8) << (4 * i) for i in range(8))
        return (words & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)

    tensors = {"x.weight_packed": pack(numbers), "x.weight_scale": scales}
    tensors["x.weight_shape"] = torch.tensor([24, 16])
    settings["format"] = "pack-quantized"
    wide = scales.repeat_interleave(8, 1)
    assert_rows(read(tmp_path / "int4", tensors, settings), numbers.bfloat16() * wide)
    tensors["x.weight_zero_point"] = pack(zeros.t()).t().contiguous()
    moved = (numbers - zeros.repeat_interleave(8, 1)).bfloat16() * wide
    assert_rows(read(tmp_path / "zeros", tensors, settings), moved)


def test_four_bits_of_bitsandbytes(tmp_path: Path) -> None:
    """Blocks of 64 numbers go across rows of 40 (bitsandbytes/functional.py, QuantState.as_dict and
    dequantize_4bit; bitsandbytes 0.50 gives the same on a CPU).
    """
    codes, levels = torch.randint(0, 16, (24 * 40,)), torch.randn(16)
    outer_levels, outer = torch.randn(256), torch.rand(1)
    scales = torch.randint(0, 256, (15,), dtype=torch.uint8)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [24, 40]}
    state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
    tensors = {
        "x.weight": (codes[::2] << 4 | codes[1::2]).to(torch.uint8)[:, None],
        "x.weight.absmax": scales,
        "x.weight.quant_map": levels,
        "x.weight.nested_absmax": outer,
        "x.weight.nested_quant_map": outer_levels,
        "x.weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }
    wide = (outer_levels[scales.int()] * outer + 0.25).repeat_interleave(64)
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    expected = (levels[codes] * wide).bfloat16().view(24, 40)
    assert_rows(read(tmp_path / "nested", tensors, settings), expected)


def test_forms_that_are_not_read(tmp_path: Path) -> None:
    """And codes without a scale, which would be taken for weights."""
    for settings in (
        {"quant_method": "awq"},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
    ):
        config = hf.load_model_config("", QWEN3 | {"quantization_config": settings})
        with pytest.raises(UserError, match="quantized .* in a form that this version does not"):
            check_family(config)
    write_fp8(tmp_path, QWEN3, (16, 16))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight_scale_inv")
    save_file(tensors, tmp_path / "model.safetensors")
    model = hf.build_on_meta(hf.load_model_config("", QWEN3), torch.float32)
    hf.allocate(model, torch.device("cpu"))
    with pytest.raises(UserError, match=r"layers.1.mlp.up_proj.weight is stored as torch.float8"):
        weights.load(model, str(tmp_path))
