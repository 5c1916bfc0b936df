"""Weights in and out, as transformers writes and opens them: all families, bit by bit; and
`titan-ulysses convert`.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)

from helpers.families import FAMILIES, LACKING, SMALL, model_of
from helpers.meshes import mesh_of
from helpers.models import LLAMA, STARCODER2
from helpers.ranks import run_on_ranks
from helpers.runs import learned, train, write_run
from helpers.vision import VISION
from titan_ulysses.checkpoint import safetensors as weights
from titan_ulysses.checkpoint.convert import ReadWhenWritten
from titan_ulysses.checkpoint.convert import main as convert
from titan_ulysses.checkpoint.folder import exported_step
from titan_ulysses.checkpoint.layout import Layout
from titan_ulysses.checkpoint.manifest import read_json, write_json
from titan_ulysses.checkpoint.origin import Origin
from titan_ulysses.data.tokenizer import load_tokenizer
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.model import hf
from titan_ulysses.model.families import CHECKED_FAMILIES, text_part
from titan_ulysses.setup.blocks import find_blocks
from titan_ulysses.setup.parallelize import parallelize, shard_blocks, shard_root

TIED = {**LLAMA, "tie_word_embeddings": True}
MODELS: dict[str, dict[str, Any]] = {
    **{family: model_of(family) for family in FAMILIES},
    "starcoder2": STARCODER2,
    "tied": TIED,
    # Not checked for training, and stored in a way of its own: experts under another name.
    "mixtral": {**SMALL, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}
FEW_BYTES = 12_000
"""Of a file, where there are to be several."""
SEVERAL_FILES = {"tied", "qwen3_moe", "gpt_oss"}
IN_BF16 = {"llama", "tied", "qwen3_moe"}
ONE_BY_ONE = {
    "qwen3_moe": "mlp.experts.3.up_proj.weight",
    "mixtral": ".block_sparse_moe.experts.3.w2.weight",
}


def plain_model(table: dict[str, Any], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """With random numbers in everything that is saved."""
    model = AutoModelForCausalLM.from_config(hf.load_model_config("", table), dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model


def test_an_export_is_finished_when_all_of_it_is_what_its_manifest_says(tmp_path: Path) -> None:
    folder, plain = tmp_path / "export", plain_model(TIED)
    weights.export(plain, load_tokenizer("bytes"), folder, step=3)
    assert exported_step(folder) == 3
    (tmp_path / "file").touch()
    usual = (tmp_path / "file").stat().st_mode
    assert {file.stat().st_mode for file in folder.iterdir()} == {usual}
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    for name, damage in {
        "model.safetensors": bytes(data),
        "config.json": b"",
        "tokenizer_config.json": b"{}",
        "training_step.json": b"[]",
    }.items():
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(damage)
        assert exported_step(folder) is None, name
        (folder / name).write_bytes(whole)
    assert exported_step(folder) == 3
    (folder / "training_step.json").write_text('{"step": 3}')  # no checksum
    assert exported_step(folder) is None


def tensors_in(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(
            found[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)
        ), name


# --- all families ---------------------------------------------------------------------------------


def round_trip(
    case: str, source: Path, target: Path, degrees: tuple[int, int, int], dtype: torch.dtype
) -> list[str]:
    model = hf.build_on_meta(hf.load_model_config(str(source), None), dtype)
    if model.config.model_type in CHECKED_FAMILIES:
        parallelize(model, mesh_of(*degrees), param_dtype=dtype)
    else:
        shard = partial(fully_shard, mesh=mesh_of(*degrees).fsdp)
        shard_blocks(model, find_blocks(model)[1], shard)
        shard_root(model, shard)
    hf.allocate(model, torch.device("cpu"))
    for tensor in hf.state_of(model).values():
        tensor.data.fill_(torch.nan)
    unknown, *_ = weights.load(model, str(source))
    with pytest.MonkeyPatch.context() as patch:
        if case in SEVERAL_FILES:
            patch.setattr(weights, "_EXPORT_FILE_BYTES", FEW_BYTES)
        weights.export(model, load_tokenizer("bytes"), target, step=1)
    return unknown


def round_trips(cases: list[tuple]) -> list[list[str]]:
    return [round_trip(*case) for case in cases]


def test_every_family_comes_back_bit_by_bit(tmp_path: Path) -> None:
    """What `save_pretrained` writes, loaded on two ranks and exported, is what it was; and
    transformers opens it.
    """
    cases, plain = [], {}
    for number, (case, table) in enumerate(MODELS.items()):
        for dtype in (torch.float32, torch.bfloat16) if case in IN_BF16 else (torch.float32,):
            name = f"{case}-{dtype}"
            size = {"max_shard_size": FEW_BYTES} if case in SEVERAL_FILES else {}
            plain[name] = plain_model(table, dtype)
            plain[name].save_pretrained(tmp_path / name, **size)
            degrees = ((1, 2, 1), (1, 1, 2))[number % 2]
            cases.append((case, tmp_path / name, tmp_path / f"{name}-back", degrees, dtype))
    of_text = CHECKED_FAMILIES & set(CONFIG_MAPPING) - VISION.keys()
    assert FAMILIES.keys() | LACKING | {"starcoder2"} == of_text
    for found in run_on_ranks(2, round_trips, cases):
        assert not any(found)
    for case, source, target, *_ in cases:
        stored = tensors_in(source)
        assert ("lm_head.weight" not in stored) == hf.load_model_config(
            str(source), None
        ).tie_word_embeddings, case
        assert not (end := ONE_BY_ONE.get(case)) or any(name.endswith(end) for name in stored)
        assert_same_bits(tensors_in(target), stored)
        several = case in SEVERAL_FILES
        for folder in (source, target):
            assert (
                len(list(folder.glob("*.safetensors"))) > 2
                if several
                else (folder / "model.safetensors").exists()
            )
        opened, info = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
        assert not any(info.values()), (case, info)
        assert_same_bits(opened.state_dict(), plain[source.name].state_dict())
    assert any(
        "e_score_correction_bias" in name
        for name in tensors_in(tmp_path / "glm4_moe-torch.float32")
    )


def test_fused_experts_are_read_too(tmp_path: Path) -> None:
    plain = plain_model(MODELS["qwen3_moe"])
    plain.save_pretrained(tmp_path, save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in tensors_in(tmp_path)
    model = empty_model(MODELS["qwen3_moe"])
    weights.load(model, str(tmp_path))
    assert_same_bits(model.state_dict(), plain.state_dict())


def test_what_a_folder_says_of_generation_and_text_is_handed_on(tmp_path: Path) -> None:
    plain, tokenizer = plain_model(LLAMA), load_tokenizer("bytes")
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.model_max_length = 12345
    plain.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    # `save_pretrained` would refuse it: a temperature, and no sampling. Many a model on the hub has
    # it so.
    settings = {
        "do_sample": False,
        "temperature": 0.6,
        "eos_token_id": [2, 7],
        "max_new_tokens": 99,
    }
    (tmp_path / "source" / "generation_config.json").write_text(json.dumps(settings))
    model = empty_model(LLAMA)
    weights.load(model, str(tmp_path / "source"))
    weights.keep_generation_config(model, str(tmp_path / "source"))
    weights.export(model, load_tokenizer(str(tmp_path / "source")), tmp_path / "target", step=1)
    kept = GenerationConfig.from_pretrained(tmp_path / "target")
    assert {name: getattr(kept, name) for name in settings} == settings
    opened = AutoTokenizer.from_pretrained(tmp_path / "target")
    assert (opened.chat_template, opened.model_max_length) == (tokenizer.chat_template, 12345)


def vision(model_type: str, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    return {"vision_config": {**sizes, "model_type": model_type, **more}}


PARTS: dict[str, dict[str, Any]] = {
    "llava": {"text_config": LLAMA, **vision("clip_vision_model")},
    "mistral3": {
        "text_config": model_of("mistral"),
        **vision("pixtral", head_dim=8),
    },
    "gemma3": {"text_config": model_of("gemma3_text"), **vision("siglip_vision_model")},
    "idefics3": {"text_config": LLAMA, **vision("idefics3_vision")},
    "internvl": {
        "text_config": model_of("qwen2"),
        **vision("internvl_vision", image_size=[16, 16], patch_size=[8, 8]),
    },
    "lfm2_vl": {"text_config": model_of("lfm2"), **vision("siglip2_vision_model", num_patches=4)},
}


@pytest.mark.parametrize("family", PARTS)
def test_a_text_part_leaves_as_the_whole(family: str, tmp_path: Path) -> None:
    """It computes what the whole does of text; then one weight changes, and all else, the tower
    too, is as it was. qwen3_5 is in tests/test_hybrid_runs.py.
    """
    ids = {"image_token_id": 60} if family in {"internvl", "idefics3", "lfm2_vl"} else {}
    config = CONFIG_MAPPING[family](**PARTS[family], **(ids or {"image_token_index": 60}))
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    whole.save_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / "preprocessor_config.json").write_text("{}")
    part = text_part(hf.load_model_config(str(tmp_path / "whole"), None))
    model = hf.build_on_meta(part, torch.float32)
    hf.allocate(model, torch.device("cpu"))
    weights.load(model, str(tmp_path / "whole"))
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens).logits, whole(input_ids=tokens).logits)
        changed = next(n for n, _ in model.named_parameters() if "layers.1" in n and "norm" in n)
        model.get_parameter(changed).add_(1)
    weights.export(model, None, tmp_path / "export", origin=str(tmp_path / "whole"))
    opened, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "export", output_loading_info=True
    )
    assert not any(info.values()), info
    before, after = whole.state_dict(), opened.state_dict()
    [differs] = [name for name in before if not torch.equal(before[name], after[name])]
    assert differs.endswith(changed.removeprefix("model."))
    assert (tmp_path / "export" / "preprocessor_config.json").exists()


# --- files that are not as they should be ---------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model in several files, with an index."""
    plain_model(LLAMA).save_pretrained(tmp_path / "model", max_shard_size=FEW_BYTES)
    return tmp_path / "model"


def index_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "model.safetensors.index.json").read_text())


def empty_model(table: dict[str, Any]) -> PreTrainedModel:
    model = hf.build_on_meta(hf.load_model_config("", table), torch.float32)
    hf.allocate(model, torch.device("cpu"))
    return model


def test_the_index_says_which_file_a_tensor_is_in(folder: Path) -> None:
    wrong = {name: torch.full_like(tensor, 7.0) for name, tensor in tensors_in(folder).items()}
    expected = tensors_in(folder)
    save_file(wrong, folder / "consolidated.safetensors")
    save_file(wrong, folder / "a.safetensors")
    model = empty_model(LLAMA)
    assert weights.load(model, str(folder)).unknown == []
    assert_same_bits(model.state_dict(), expected)


def test_an_index_that_is_wrong(folder: Path) -> None:
    index = index_of(folder)
    files = sorted(set(index["weight_map"].values()))
    (folder / files[1]).rename(folder / "elsewhere")
    with pytest.raises(
        UserError, match=f"1 of the {len(files)} files that .* names are missing: {files[1]}"
    ):
        weights.find(str(folder))
    (folder / "elsewhere").rename(folder / files[1])
    name = next(name for name, file in index["weight_map"].items() if file == files[1])
    index["weight_map"][name] = files[0]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        UserError, match=f"index.json says that {files[0]} holds {name}, but it does not"
    ):
        weights.find(str(folder))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ')
    with pytest.raises(UserError, match="index.json is damaged"):
        weights.find(str(folder))


def test_tensors_that_the_model_does_not_have_are_told_and_kept(tmp_path: Path) -> None:
    source = tmp_path / "source"
    plain_model(LLAMA).save_pretrained(source)
    tensors = tensors_in(source) | {f"visual.{letter}": torch.ones(2) for letter in "abcd"}
    # Old files have it, and nobody needs it.
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, source / "model.safetensors")
    model = empty_model(LLAMA)
    assert len(weights.load(model, str(source)).unknown) == 5
    assert Origin.of(str(source), Layout(model)).describe() == (
        "ignored 4 tensors that LlamaForCausalLM does not have: visual.a, visual.b, visual.c, ...; "
        "an export has them as they are"
    )
    weights.export(model, None, tmp_path / "target", origin=str(source))
    assert_same_bits(tensors_in(tmp_path / "target"), tensors)


@pytest.mark.parametrize("keep", ["embed_tokens", "lm_head", "both"])
def test_a_tied_tensor_may_have_either_name(keep: str, tmp_path: Path) -> None:
    tensors = tensors_of_untied(equal=True)
    for name in {
        "embed_tokens": ["lm_head.weight"],
        "lm_head": ["model.embed_tokens.weight"],
        "both": [],
    }[keep]:
        del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    model = empty_model(TIED)
    assert weights.load(model, str(tmp_path)).unknown == []
    assert torch.equal(model.lm_head.weight, tensors_of_untied(equal=True)["lm_head.weight"])
    assert not any(tensor.isnan().any() for tensor in model.state_dict().values())


def tensors_of_untied(*, equal: bool) -> dict[str, Tensor]:
    tensors = dict(plain_model(LLAMA).state_dict())
    if equal:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    return tensors


def test_a_tied_tensor_with_two_values_is_refused(tmp_path: Path) -> None:
    save_file(tensors_of_untied(equal=False), tmp_path / "model.safetensors")
    with pytest.raises(
        UserError,
        match="embed_tokens.weight and lm_head.weight differ .* tie_word_embeddings = false",
    ):
        weights.load(empty_model(TIED), str(tmp_path))


def test_experts_that_are_missing_are_named(tmp_path: Path) -> None:
    plain_model(MODELS["qwen3_moe"]).save_pretrained(tmp_path)
    tensors = tensors_in(tmp_path)
    gone = "model.layers.1.mlp.experts.2.up_proj.weight"
    for lost in ([gone], [gone, gone.replace("up_proj", "gate_proj")]):
        save_file(
            {n: t for n, t in tensors.items() if n not in lost}, tmp_path / "model.safetensors"
        )
        with pytest.raises(
            UserError, match=f"{len(lost)} of {len(tensors)} tensors of .* are not in .*{gone}"
        ):
            weights.load(empty_model(MODELS["qwen3_moe"]), str(tmp_path))
    shape = {**tensors, gone: torch.ones(3, 24)}
    save_file(shape, tmp_path / "model.safetensors")
    with pytest.raises(
        UserError, match="layers.1.mlp.experts.gate_up_proj has shape .*, config.json says"
    ):
        weights.load(empty_model(MODELS["qwen3_moe"]), str(tmp_path))


# --- titan-ulysses convert ------------------------------------------------------------------------


MOE = {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
ON_TWO = {"parallelism.sequence_parallel_degree": 2, "lr_scheduler.warmup_steps": 0}
MOE |= {"head_dim": 8, "decoder_sparse_step": 1, "tie_word_embeddings": True}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on two ranks with its export."""
    config = write_run(tmp_path_factory.mktemp("run"))
    train_on_two(config, {"training.steps": 2, "checkpoint.export": True})
    return config.parent / "outputs" / "run"


def train_on_two(config: Path, settings: dict[str, Any]) -> None:
    moe = {f"model.config.{key}": value for key, value in MOE.items()}
    run_on_ranks(2, train, config, moe | ON_TWO | settings)


def test_a_checkpoint_becomes_what_the_run_exports(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    convert([str(run / "checkpoints" / "step-2"), str(tmp_path / "converted")])
    assert capsys.readouterr().out == f"{tmp_path / 'converted'} is complete\n"
    expected, found = run / "export", tmp_path / "converted"
    assert sorted(path.name for path in found.iterdir()) == sorted(
        path.name for path in expected.iterdir()
    )
    for path in expected.iterdir():
        assert (found / path.name).read_bytes() == path.read_bytes(), path.name
    assert [path.name for path in tmp_path.iterdir()] == ["converted"]


def printed_by(config: Path, settings: dict[str, Any]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train(config, settings)
    return printed.getvalue()


def test_a_folder_becomes_a_checkpoint_that_a_run_starts_from(run: Path, tmp_path: Path) -> None:
    """The losses are those of a run that is given the folder as its model, which tells what it does
    not use.
    """
    config, outputs, folder = run.parent.parent / "run.toml", run.parent, tmp_path / "folder"
    shutil.copytree(run / "export", folder)
    (folder / "training_step.json").unlink()  # it is changed on purpose
    save_file({**tensors_in(folder), "visual": torch.ones(2)}, folder / "model.safetensors")
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "max_new_tokens": 99}')
    held = largest_that_is_held(
        partial(convert, [str(folder), str(outputs / "converted" / "checkpoints" / "step-0")])
    )
    largest = max(
        t.nbytes for t in AutoModelForCausalLM.from_pretrained(folder).state_dict().values()
    )
    assert 0 < held <= 2 * largest, "more than one tensor is in memory, and what DCP makes of it"
    steps = {"training.steps": 2, "training.seed": 1}
    train_on_two(config, steps | {"job.name": "converted"})
    path = steps | {
        "job.name": "path",
        "model.path": str(folder),
        "model.config": {},
        "checkpoint.export": True,
    }
    printed, other = run_on_ranks(2, printed_by, config, path | ON_TWO)
    assert printed.count("ignored 1 tensor that Qwen3MoeForCausalLM does not have: visual;") == 1
    assert other == ""
    assert learned(outputs / "converted") == learned(outputs / "path") != learned(run)
    saved = json.loads((outputs / "converted" / "checkpoints" / "step-2" / "run.json").read_text())
    assert saved["optimizer"] == "adamw"
    assert GenerationConfig.from_pretrained(outputs / "path" / "export").max_new_tokens == 99


def largest_that_is_held(act: Callable[[], None]) -> int:
    """Bytes of what was read for DCP and still in memory when the next tensor had been read, at the
    most.
    """
    read: list[tuple[StorageWeakRef, int]] = []
    most, lookup = 0, ReadWhenWritten.lookup_object

    def noted(planner: ReadWhenWritten, index: Any) -> Tensor:
        nonlocal most
        tensor = lookup(planner, index)
        read.append((StorageWeakRef(tensor.untyped_storage()), tensor.untyped_storage().nbytes()))
        most = max(most, sum(size for storage, size in read if not storage.expired()))
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReadWhenWritten, "lookup_object", noted)
        act()
    return most


def test_conversions_that_cannot_be(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    step = run / "checkpoints" / "step-2"
    shutil.copytree(step, tmp_path / "checkpoints" / "step-2")
    other = (
        (run / "config.toml")
        .read_text()
        .replace("moe_intermediate_size = 16", "moe_intermediate_size = 8")
    )
    (tmp_path / "other.toml").write_text(other)
    shutil.copytree(step, tmp_path / "frozen" / "step-2")
    told = read_json(step / "run.json")
    write_json(tmp_path / "frozen" / "step-2" / "run.json", told | {"frozen": 5})
    frozen = str(tmp_path / "frozen" / "step-2")
    alone, new = str(tmp_path / "checkpoints" / "step-2"), str(tmp_path / "new")
    cases = {
        (str(tmp_path / "nothing"), new): "no such folder",
        (str(step), str(run)): "exists already",
        (str(run / "export"), new): "a checkpoint is a folder named step-N",
        (alone, new): "no config.toml in the folders above",
        (
            alone,
            new,
            "--config",
            str(tmp_path / "other.toml"),
        ): "holds a different model than config.toml describes: model",
        (frozen, new, "--config", str(run / "config.toml")): "does not hold the frozen weights",
        (str(tmp_path / "checkpoints"), str(tmp_path / "step-0")): "no transformers model there",
    }
    for arguments, message in cases.items():
        with pytest.raises(SystemExit) as caught:
            convert(list(arguments))
        assert caught.value.code == 2
        told = capsys.readouterr().err
        assert told.startswith("error: ") and message in told and told.count("\n") == 1, told
    assert not Path(new).exists() and not (tmp_path / "step-0").exists()
