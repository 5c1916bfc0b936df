"""Runs of models with layers that carry a state, as their users start them: trained, streamed,
resumed, evaluated and exported; the text part of a multi-modal model; packages with kernels.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback

from helpers.families import FAMILIES, model_of
from helpers.ranks import run_on_ranks
from helpers.runs import learned, logged, refusal, train, write_documents
from test_evaluation import by_plain_transformers
from titan_ulysses.config.load import load_config
from titan_ulysses.config.toml import to_toml
from titan_ulysses.data.records import Encoded
from titan_ulysses.data.tokenizer import encode, load_tokenizer
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.mesh import build_mesh
from titan_ulysses.model import hf
from titan_ulysses.plan.planner import make_plan, set_up
from titan_ulysses.setup.blocks import find_blocks
from titan_ulysses.setup.parallelize import parallelize
from titan_ulysses.ulysses import linear_kernels
from titan_ulysses.ulysses.linear_attention import check_layers, describe_layers, linear_layers
from titan_ulysses.ulysses.states import function_of


def write_run(folder: Path, family: str, **keys: Any) -> Path:
    """A run of train.py on packed documents of bytes."""
    table = model_of(family) | {"vocab_size": 257, "max_position_embeddings": 128, **keys}
    table |= {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}
    data = write_documents(folder / "data", documents=20, seed=0)
    held_out = write_documents(folder / "held-out", documents=4, seed=1)
    settings = {
        "job": {"dump_folder": str(folder / "outputs")},
        "model": {"tokenizer": "bytes", "config": table},
        "data": {"path": str(data), "packing": "concat"},
        "validation": {"enable": True, "path": str(held_out), "interval": 2, "steps": 0},
        "training": {
            "seq_len": 48,
            "local_batch_size": 2,
            "global_batch_size": 4,
            "steps": 4,
            "param_dtype": "float32",
        },
        "optimizer": {"lr": 3e-3},
        "lr_scheduler": {"warmup_steps": 2},
        "checkpoint": {"interval": 2},
    }
    path = folder / "run.toml"
    path.write_text("".join(_section(name, keys) for name, keys in settings.items()))
    return path


def _section(name: str, keys: dict[str, Any]) -> str:
    nested = {key: value for key, value in keys.items() if isinstance(value, dict)}
    lines = [f"{key} = {to_toml(value)}" for key, value in keys.items() if key not in nested]
    inner = [_section(f"{name}.{key}", value) for key, value in nested.items()]
    return "\n".join([f"[{name}]", *lines, *inner, ""])


@pytest.mark.parametrize(
    "family",
    ["falcon_h1", *(pytest.param(x, marks=pytest.mark.slow) for x in ("qwen3_next", "lfm2"))],
)
def test_a_run_on_two_ranks_resumed_on_three(family: str, tmp_path: Path) -> None:
    """Streamed on two ranks and resumed on three, as on one. transformers opens its
    export, and finds the same loss of held-out documents, also by position.
    """
    config = write_run(tmp_path, family)
    run_on_ranks(1, train, config, {"job.name": "one"})
    one = learned(tmp_path / "outputs" / "one")
    streamed = {"job.name": "many", "memory.stream_chunk_tokens": 24}
    first = {
        "parallelism.sequence_parallel_degree": 2,
        "training.steps": 2,
        "checkpoint.export": False,
    }
    run_on_ranks(2, train, config, streamed | first)
    run_on_ranks(3, train, config, streamed | {"parallelism.sequence_parallel_degree": 3})
    many = learned(tmp_path / "outputs" / "many")
    assert [step for step, *_ in many] == [step for step, *_ in one] == [1, 2, 3, 4]
    for ours, theirs in zip(many, one, strict=True):
        assert ours[1:] == pytest.approx(theirs[1:], rel=2e-5)
    assert one[-1][1] < one[0][1]
    exports = [tmp_path / "outputs" / name / "export" for name in ("one", "many")]
    opened, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in exports)
    for (name, ours), theirs in zip(other.named_parameters(), opened.parameters(), strict=True):
        assert (ours - theirs).abs().max() < 1e-3, name
    validated = [
        [line for line in logged(tmp_path / "outputs" / name) if "validation_loss" in line]
        for name in ("one", "many")
    ]
    assert [line["step"] for line in validated[1]] == [line["step"] for line in validated[0]]
    plain = by_plain_transformers(opened.eval(), held_out_of(tmp_path), seq_len=48)
    for run in validated:
        assert run[-1]["validation_loss"] == pytest.approx(plain.loss, rel=1e-4)
        positions = [tuple(x) for x in run[-1]["validation_by_position"]]
        assert positions == [pytest.approx(x, rel=1e-3) for x in plain.by_position]


def held_out_of(folder: Path) -> list[Encoded]:
    tokenizer = load_tokenizer("bytes")
    files = sorted((folder / "held-out").iterdir())
    return [Encoded(encode(tokenizer, file.read_text()), None) for file in files]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_next", "nemotron_h", "lfm2_moe"])
def test_a_compiled_run(family: str, tmp_path: Path) -> None:
    """Has the losses of an eager one."""
    config, found = write_run(tmp_path, family), {}
    settings = {"parallelism.sequence_parallel_degree": 2, "training.steps": 3}
    settings |= {"checkpoint.enable": False, "validation.enable": False}
    for name, enable in {"eager": False, "compiled": True}.items():
        run = settings | {"job.name": name, "compile.enable": enable}
        run_on_ranks(2, train, config, run, timeout=300)
        found[name] = [loss for _, loss, _ in learned(tmp_path / "outputs" / name)]
    assert len(found["eager"]) == 3
    assert found["compiled"] == pytest.approx(found["eager"], rel=1e-5)


# --- layers of unknown kinds ----------------------------------------------------------------------

UNKNOWN = {
    "jamba": "JambaMambaDecoderLayer (JambaMambaMixer, JambaMLP) is a layer of type "
    "linear_attention, which carries a state along the sequence, and is not of a kind that this "
    "version supports: ",
    # Its config has no types of layers.
    "rwkv": "RwkvBlock (RwkvSelfAttention, RwkvFeedForward) carries a state along the sequence, ",
}


def _plan(config: Path, settings: dict[str, Any]) -> str:
    """Why it cannot be planned."""
    with pytest.raises(UserError) as caught:
        make_plan(set_up(load_config(config, [*settings.items()])))
    return str(caught.value)


def _in_a_loop(table: dict[str, Any]) -> str:
    """Why it is not parallelized."""
    model = hf.build_on_meta(hf.load_model_config("", table), torch.float32)
    with pytest.raises(UserError) as caught:
        parallelize(model, build_mesh(sequence=2), param_dtype=torch.float32)
    return str(caught.value)


@pytest.mark.parametrize("family", UNKNOWN)
def test_a_layer_of_an_unknown_kind(family: str, tmp_path: Path) -> None:
    """Its class is named, and what is known is listed, however a run begins."""
    config = write_run(tmp_path, "lfm2")
    table = model_of("lfm2") | {"model_type": family, "num_hidden_layers": 2, "vocab_size": 257}
    table = {key: value for key, value in table.items() if key not in FAMILIES["lfm2"]}
    settings = {"model.config": table, "checkpoint.enable": False}
    said = [
        *run_on_ranks(2, refusal, config, settings),
        _plan(config, settings),
        *run_on_ranks(2, _in_a_loop, table),
    ]
    for message in said:
        assert UNKNOWN[family] in message, message
        assert "Gated DeltaNet, Mamba-2 and short convolutions" in message


# --- the text part of a multi-modal model ---------------------------------------------------------


def write_whole(folder: Path, **text: Any) -> Any:
    """A tiny multi-modal model as transformers saves it."""
    table = model_of("qwen3_5_text") | {"vocab_size": 257, "max_position_embeddings": 128, **text}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    vision |= {"out_hidden_size": table["hidden_size"], "num_position_embeddings": 16}
    ids = dict.fromkeys(("image_token_id", "video_token_id", "vision_start_token_id"), 250)
    table.pop("model_type")
    config = AutoConfig.for_model("qwen3_5", text_config=table, vision_config=vision, **ids)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return model


def test_the_text_part_of_a_multi_modal_model(tmp_path: Path) -> None:
    """It begins with the loss of the whole for text, is trained alone, and leaves as the whole."""
    whole = write_whole(tmp_path / "whole")
    config = write_run(tmp_path, "qwen3_5_text")
    settings = {"model.config": {}, "model.path": str(tmp_path / "whole"), "training.steps": 2}
    settings |= {"parallelism.sequence_parallel_degree": 2, "job.name": "text"}
    run_on_ranks(2, train, config, settings)
    run = tmp_path / "outputs" / "text"
    plain = by_plain_transformers(whole.eval(), held_out_of(tmp_path), seq_len=48)
    first, *_, last = [line for line in logged(run) if "validation_loss" in line]
    assert first["validation_loss"] == pytest.approx(plain.loss, rel=1e-5)
    assert last["validation_loss"] < first["validation_loss"]
    opened, info = AutoModelForImageTextToText.from_pretrained(
        run / "export", output_loading_info=True
    )
    assert not any(info.values()), info
    before, after = whole.state_dict(), opened.state_dict()
    kept = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    assert kept == {name for name in before if "visual" in name} != set()
    plain = by_plain_transformers(opened.eval(), held_out_of(tmp_path), seq_len=48)
    assert last["validation_loss"] == pytest.approx(plain.loss, rel=1e-5)


def test_a_multi_modal_model_without_its_weights(tmp_path: Path) -> None:
    """A table would be trained whole; and no part is quantized where the whole is."""
    config = write_run(tmp_path, "qwen3_5_text")
    tables = {"model.config": {"model_type": "qwen3_5"}, "checkpoint.enable": False}
    assert '"qwen3_5" is multi-modal' in run_on_ranks(1, refusal, config, tables)[0]
    write_whole(tmp_path / "whole")
    settings = json.loads((tmp_path / "whole" / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "awq"}
    (tmp_path / "whole" / "config.json").write_text(json.dumps(settings))
    path = {"model.config": {}, "model.path": str(tmp_path / "whole")}
    assert "the weights are quantized" in run_on_ranks(1, refusal, config, path)[0]


# --- kernels --------------------------------------------------------------------------------------


def meta_model(family: str) -> Any:
    return hf.build_on_meta(hf.load_model_config("", model_of(family)), torch.float32)


def test_what_a_run_says_of_its_layers() -> None:
    said = describe_layers(meta_model("nemotron_h"), "cuda")
    assert said == (
        "linear attention: 1 x NemotronHMamba2Mixer, in PyTorch, which is slow, without "
        "causal-conv1d and mamba-ssm (pip install causal-conv1d mamba-ssm); a call for each "
        "document"
    )
    said = describe_layers(meta_model("lfm2"), "cpu")
    assert said == (
        "linear attention: 1 x Lfm2ShortConv, in PyTorch, which is slow (the kernels of "
        "causal-conv1d are for GPUs); a call for each document"
    )
    assert describe_layers(meta_model("qwen3"), "cuda") == ""


GOOD = "q, k, v, g, beta, initial_state=None, output_final_state=False"
FAKES = {
    "an old version": ("0.1.0", f"def chunk_gated_delta_rule({GOOD}): ...", "version 0.1.0, where"),
    "no such function": ("0.4.0", "", "fla.ops.gated_delta_rule has no chunk_gated_delta_rule"),
    "an argument less": (
        "0.4.0",
        f"def chunk_gated_delta_rule({GOOD}, **kwargs): ...",
        "its chunk_gated_delta_rule does not take use_qk_l2norm_in_kernel",
    ),
    "not for this machine": (
        "0.4.0",
        "raise OSError('undefined symbol')",
        "cannot be imported (OSError: undefined symbol)",
    ),
}


def install(folder: Path, code: str, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package flash-linear-attention, for this process and this test."""
    (folder / "fla" / "ops").mkdir(parents=True)
    for place in (folder / "fla", folder / "fla" / "ops"):
        (place / "__init__.py").write_text("")
    (folder / "fla" / "ops" / "gated_delta_rule.py").write_text(code)
    about = folder / f"flash_linear_attention-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Name: flash-linear-attention\nVersion: {version}\n")
    monkeypatch.syspath_prepend(folder)
    for name in ("fla", "fla.ops", "fla.ops.gated_delta_rule"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture
def forget_fla() -> Iterator[None]:
    yield
    for name in ("fla.ops.gated_delta_rule", "fla.ops", "fla"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("case", FAKES)
@pytest.mark.usefixtures("forget_fla")
def test_a_package_that_cannot(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run on a GPU is refused; one on a CPU does not need it."""
    version, code, reason = FAKES[case]
    # Before the package is there: transformers keeps what it finds when a family is imported.
    blocks, of_mamba = (find_blocks(meta_model(name))[1] for name in ("olmo_hybrid", "bamba"))
    install(tmp_path, code, version, monkeypatch)
    types = ["linear_attention", "full_attention"]
    with pytest.raises(UserError) as caught:
        check_layers(blocks, types, device_type="cuda")
    assert reason in str(caught.value)
    assert "Update it (pip install -U flash-linear-attention)" in str(caught.value)
    check_layers(blocks, types, device_type="cpu")
    check_layers(of_mamba, types, device_type="cuda")


@pytest.mark.usefixtures("forget_fla")
def test_a_package_that_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said, and computes where it can: not on a CPU."""
    name = "torch_chunk_gated_delta_rule"
    kernel = f"def chunk_gated_delta_rule({GOOD}, use_qk_l2norm_in_kernel=False): return 'kernel'"
    model = meta_model("qwen3_next")
    install(tmp_path, kernel, "0.4.0", monkeypatch)
    check_layers(find_blocks(model)[1], ["linear_attention", "full_attention"], device_type="cuda")
    assert describe_layers(model, "cuda").endswith(
        "by the kernels of flash-linear-attention, and in PyTorch, which is slow, without "
        "causal-conv1d (pip install causal-conv1d); a call for each document"
    )
    layer = linear_layers(model)[0]
    own = inspect.unwrap(function_of(layer, name, torch.device("cuda")))
    chosen = use_kernel_func_from_hub_with_fallback("chunk_gated_delta_rule", "fla")(own)
    monkeypatch.setattr(sys.modules[type(layer).__module__], name, chosen)
    ones = dict.fromkeys("qkv", 1)
    assert function_of(layer, name, torch.device("cuda"))(*ones.values(), g=1, beta=1) == "kernel"
    assert function_of(layer, name, torch.device("cpu")) is own


def test_the_arguments_are_those_that_are_given() -> None:
    """Each function of transformers has the arguments that its kernel must have."""
    for name, kernel in linear_kernels.KERNELS.items():
        family = {"mamba2_chunk_scan": "bamba"}.get(name, "qwen3_next")
        own = function_of(linear_layers(meta_model(family))[0], name, torch.device("cpu"))
        assert kernel.arguments <= inspect.signature(own).parameters.keys()
