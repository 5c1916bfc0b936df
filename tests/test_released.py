"""Quantized releases: read as transformers dequantizes them, rank by rank; trained and exported.

The folders are written here, from the rule of each form.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import threading
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
from helpers.runs import learned, refusal, train, write_run
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


def write_fp8(
    folder: Path, table: dict[str, Any], block: tuple[int, int] | None, more: Any = None
) -> None:
    """All linear layers but head and routers; with one scale for all of a weight if block is
    None. more: tensors that the model does not have.
    """
    tensors = plain_tensors(folder, table) | (more or {})
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


def prediction_layer() -> dict[str, Tensor]:
    """As DeepSeek-V3 has it behind its last layer (README_WEIGHTS.md there). transformers leaves it
    out.
    """
    experts = [f"mlp.experts.{i}.{kind}_proj" for i in range(2) for kind in ("gate", "up", "down")]
    matrices = ["eh_proj", "self_attn.o_proj", "embed_tokens", "shared_head.head", *experts]
    shapes = {f"{name}.weight": (32, 32) for name in matrices}
    shapes |= {f"{name}.weight": (32,) for name in ("enorm", "hnorm", "shared_head.norm")}
    generator = torch.Generator().manual_seed(3)
    return {
        f"model.layers.2.{name}": torch.randn(shape, generator=generator).bfloat16()
        for name, shape in shapes.items()
    }


def say_form(folder: Path, settings: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released")
    write_fp8(folder / "qwen3", QWEN3, (16, 16))
    write_fp8(folder / "qwen3_moe", QWEN3_MOE, None)
    write_fp8(folder / "deepseek_v3", DEEPSEEK, (16, 16), prediction_layer())
    (folder / "deepseek_v3" / "modeling_deepseek.py").write_text("raise RuntimeError('run')")
    (folder / "deepseek_v3" / "LICENSE").write_text("MIT")
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
        lacks = set(prediction_layer()) if folder.name == "deepseek_v3" else set()
        assert set(loaded.unknown) == lacks and "are stored in" in loaded.said
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


KEPT = ADAPTED | {"lora.quantize_base": "released"}
NF4 = ADAPTED | {"lora.quantize_base": "nf4"}  # the experts are in 4 bits already
RUNS = {
    "gpt_oss": {"full": FULL, "adapted": ADAPTED, "kept": KEPT, "nf4": NF4},
    "deepseek_v3": {"adapted": ADAPTED, "kept": KEPT},
}


def train_all(config: Path, folders: Path) -> str:
    """Runs of each release, and of what transformers makes of it."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        for name, runs in RUNS.items():
            for kind, settings in runs.items():
                job = {"model.path": str(folders / name), "job.name": f"{name}-{kind}"}
                train(config, settings | job)
                if kind in ("full", "adapted"):
                    job = {"model.path": f"{folders / name}-plain"}
                    train(config, settings | job | {"job.name": f"{name}-{kind}-plain"})
    return said.getvalue()


def test_training_is_that_of_the_dequantized_model(folders: Path, tmp_path: Path) -> None:
    """Three steps, all parameters and adapters alone, on two ranks that share a sequence: the same
    losses, norms and exported bits, also where frozen weights stay as they were released; what is
    not trained leaves as it came.
    """
    for name in RUNS:
        dequantized(folders / name, torch.float32).save_pretrained(folders / f"{name}-plain")
        load_tokenizer("bytes").save_pretrained(folders / f"{name}-plain")
    said = run_on_ranks(2, train_all, write_run(tmp_path), folders)[0]
    for line in (
        "4 weights are stored in mxfp4, and read as the numbers that they stand for",
        "lora.quantize_base: 4 weights of 49,152 parameters in MXFP4, 0.531 bytes each; ",
        "weights of 27,776 parameters in FP8, 1.253 bytes each",
        "ignored 13 tensors that DeepseekV3ForCausalLM does not have: model.layers.2.eh_proj",
        "code that is not run: modeling_deepseek.py; an export has them as they are",
    ):
        assert line in said, line
    for name, kind in [(name, kind) for name, runs in RUNS.items() for kind in runs]:
        run = tmp_path / "outputs" / f"{name}-{kind}"
        reference = "full" if kind == "full" else "adapted"
        plain = tmp_path / "outputs" / f"{name}-{reference}-plain"
        assert learned(run) == learned(plain) and len(learned(run)) == 3
        found = load_file(run / "export" / "model.safetensors")
        expected = load_file(plain / "export" / "model.safetensors")
        if kind in ("kept", "nf4"):  # merged in bf16, as the other weights are
            expected = {n: t.to(found[n].dtype) for n, t in expected.items()}
        assert all(torch.equal(found[n], tensor) for n, tensor in expected.items())
        stored = load_file(folders / name / "model.safetensors")
        if name == "deepseek_v3":
            names = {n for n in stored if not n.endswith("_scale_inv")}
            assert found.keys() == names == expected.keys() | prediction_layer().keys()
            for n in prediction_layer():
                numbers = stored[n].float()
                if (scale := stored.get(f"{n}_scale_inv")) is not None:
                    numbers *= scale.repeat_interleave(16, 0).repeat_interleave(16, 1)
                assert torch.equal(found[n], numbers.bfloat16()), n
            assert (run / "export" / "LICENSE").exists()
            assert (run / "export" / "modeling_deepseek.py").exists()
        opened = AutoModelForCausalLM.from_pretrained(run / "export")
        assert not hasattr(opened.config, "quantization_config")
        if kind != "full":
            before = dequantized(folders / name, torch.bfloat16).state_dict()
            after = opened.state_dict()
            kept = {n for n, x in after.items() if torch.equal(x.float(), before[n].float())}
            trained = {f"model.layers.{i}.self_attn.o_proj.weight" for i in range(2)}
            assert before.keys() - kept == trained


def test_a_form_that_is_not_kept(folders: Path, tmp_path: Path) -> None:
    settings = KEPT | {"parallelism.sequence_parallel_degree": 1, "checkpoint.enable": False}
    settings["checkpoint.export"] = False
    shutil.copytree(folders / "qwen3", tmp_path / "mixed")
    tensors = load_file(tmp_path / "mixed" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].bfloat16()
    tensors.pop(f"{name}_scale_inv")
    save_file(tensors, tmp_path / "mixed" / "model.safetensors")
    shutil.copytree(tmp_path / "mixed", tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    config.pop("quantization_config")
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    run = write_run(tmp_path)
    for folder, message in {
        "mixed": f"{name} is stored as BF16, which is not the FP8Rows(block=16)",
        "plain": "keeps fp8 and mxfp4, and the folder of model.path is not quantized. Set it to",
    }.items():
        settings["model.path"] = str(tmp_path / folder)
        assert message in run_on_ranks(1, refusal, run, settings)[0]


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


# --- memory ---------------------------------------------------------------------------------------


def anonymous_bytes() -> int:
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in x]
    return int(line.split()[1]) * 1024


def peak_of_loading(folder: Path) -> tuple[int, int, int]:
    """Bytes above this process before: at the most, of this rank's shard, and of a whole block."""
    model = hf.build_on_meta(hf.load_model_config(str(folder), None), torch.bfloat16)
    blocks = find_blocks(model)[1]
    block = sum(p.nbytes for p in blocks[0].parameters())
    shard = partial(fully_shard, mesh=mesh_of(1, torch.distributed.get_world_size(), 1).fsdp)
    shard_blocks(model, blocks, shard)
    shard_root(model, shard)
    before, seen, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    hf.allocate(model, torch.device("cpu"))
    weights.load(model, str(folder))
    done.set()
    watcher.join()
    return max(seen) - before, sum(p.to_local().nbytes for p in model.parameters()), block


@pytest.mark.slow  # the bits of such a load are in test_each_rank_reads_its_rows_to_the_bit
def test_a_rank_holds_its_shard_and_one_block(tmp_path: Path) -> None:
    """Of a folder of 1 GiB; tensors in files are mapped, and count where they are copied."""
    sizes = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 22}
    sizes |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    model = hf.build_on_meta(hf.load_model_config("", QWEN3 | sizes), torch.bfloat16)
    tensors = {}
    for name, p in model.named_parameters():
        tensors[name] = torch.ones(p.shape, dtype=torch.bfloat16)
        if ".layers." in name and p.ndim == 2:
            codes = torch.randint(0, 120, p.shape, dtype=torch.uint8)
            tensors[name] = codes.view(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.rand(-(-p.shape[0] // 128), -(-p.shape[1] // 128))
    model.config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    say_form(tmp_path, {"quant_method": "fp8", "weight_block_size": [128, 128]})
    assert (tmp_path / "model.safetensors").stat().st_size > 2**30
    del tensors
    for peak, shard, block in run_on_ranks(2, peak_of_loading, tmp_path):
        print(f"peak {peak >> 20} MiB, shard {shard >> 20} MiB, block {block >> 20} MiB")
        assert peak <= 1.05 * (shard + block), (peak, shard, block)
