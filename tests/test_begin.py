"""What a run begins with: the weights of another one, and vocabularies that grow with the
tokenizer.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers.meshes import mesh_of
from helpers.ranks import run_on_ranks
from helpers.runs import learned, refusal, train, write_run
from titan_ulysses.checkpoint import safetensors as weights
from titan_ulysses.checkpoint.initial import describe_initial_weights
from titan_ulysses.config.load import load_config
from titan_ulysses.model import hf
from titan_ulysses.model.resize_embeddings import fill_new_rows, grow_vocabulary, token_parameters
from titan_ulysses.setup.parallelize import parallelize

SETTINGS: dict[str, Any] = {
    "lr_scheduler.warmup_steps": 0,
    "training.steps": 2,
    "parallelism.sequence_parallel_degree": 2,
    "checkpoint.export": True,
}
ADAPTERS = {"lora.rank": 4, "optimizer.lr": 0.03}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that others begin with."""
    config = write_run(tmp_path_factory.mktemp("begin"))
    run(config, "first", {})
    return config


def run(config: Path, name: str, settings: dict[str, Any]) -> Path:
    run_on_ranks(2, train, config, SETTINGS | {"job.name": name} | settings)
    return outputs(config, name)


def outputs(config: Path, name: str) -> Path:
    return config.parent / "outputs" / name


def begin_with(config: Path, name: str, part: str) -> dict[str, str]:
    return {"checkpoint.initial_load_path": str(outputs(config, name) / part)}


def refused(config: Path, settings: dict[str, Any]) -> str:
    first, second = run_on_ranks(2, refusal, config, SETTINGS | {"job.name": "refused"} | settings)
    assert first == second and not outputs(config, "refused").exists()
    return first


# --- the weights of another run -------------------------------------------------------------------


def test_weights_of_a_checkpoint_or_an_export(config: Path) -> None:
    """The same weights, with a fresh optimizer and the data from its beginning; a run that resumes
    has its own.
    """
    settings = {"optimizer.lr": 0.0}
    checkpoint = run(config, "from checkpoint", begin_with(config, "first", "checkpoints/step-2"))
    export = run(config, "from export", begin_with(config, "first", "export"))
    assert learned(checkpoint) == learned(export)
    assert [step for step, *_ in learned(export)] == [1, 2]
    assert learned(export)[0][1] < learned(outputs(config, "first"))[0][1], (
        "it goes on from what was learned"
    )
    still = run(config, "still", settings | begin_with(config, "first", "checkpoints/step-2"))
    first = (outputs(config, "first") / "export" / "model.safetensors").read_bytes()
    assert (still / "export" / "model.safetensors").read_bytes() == first
    on = run(
        config,
        "from export",
        {"training.steps": 3} | begin_with(config, "from export", "nothing there any more"),
    )
    assert learned(on)[:2] == learned(checkpoint) and len(learned(on)) == 3


def test_what_a_run_says_of_it(config: Path) -> None:
    settings = load_config(config, begin_with(config, "first", "export").items())
    path = outputs(config, "first") / "export"
    assert describe_initial_weights(settings, 0) == f"begins with the weights of {path}"
    assert (
        describe_initial_weights(settings, 3)
        == f"resumed from step 3; {path} is only read at the start of a new run"
    )
    assert describe_initial_weights(load_config(config), 0) == ""


def test_adapters_beside_another_runs_weights(config: Path) -> None:
    run(config, "adapters", ADAPTERS | begin_with(config, "first", "checkpoints/step-2"))
    export = run(config, "adapters of an export", ADAPTERS | begin_with(config, "first", "export"))
    assert learned(export) == learned(outputs(config, "adapters"))
    # Adapters alone are saved: they go on beside what they were trained beside, and nothing else.
    path = {"model.config": {}, "model.path": str(outputs(config, "first") / "export")}
    on = run(
        config,
        "adapters go on",
        ADAPTERS | path | begin_with(config, "adapters", "checkpoints/step-2"),
    )
    assert learned(on)[0][1] < learned(export)[0][1]
    message = refused(config, ADAPTERS | begin_with(config, "adapters", "checkpoints/step-2"))
    assert (
        "that run froze other weights than this one, and a checkpoint does not hold frozen "
        "weights. Start from the export/" in message
    )
    message = refused(config, path | begin_with(config, "adapters", "checkpoints/step-2"))
    assert (
        "lora_A.default.weight is [4, 32] there and absent here. Set lora.rank and "
        "lora.target_modules" in message
    )


def test_an_export_that_was_damaged_since(config: Path) -> None:
    """One bit, in a tensor: every reader of safetensors takes it."""
    damaged = config.parent / "damaged export"
    shutil.copytree(outputs(config, "first") / "export", damaged)
    stored = bytearray((damaged / "model.safetensors").read_bytes())
    stored[-100] ^= 1
    (damaged / "model.safetensors").write_bytes(stored)
    setting = f'checkpoint.initial_load_path = "{damaged}"'
    message = refused(config, {"checkpoint.initial_load_path": str(damaged)})
    assert message.startswith(
        f"{setting}: the export is damaged (model.safetensors: its contents differ"
    )
    assert message.endswith("if it was changed on purpose, remove its training_step.json.")
    (damaged / "training_step.json").unlink()
    assert run(config, "on purpose", {"checkpoint.initial_load_path": str(damaged)}).exists()


def test_weights_that_do_not_fit(config: Path) -> None:
    checkpoint, export = (
        begin_with(config, "first", part) for part in ("checkpoints/step-2", "export")
    )
    wider = {"model.config.intermediate_size": 64}
    assert "mlp.gate_proj.weight is [48, 32] there and [64, 32] here." in refused(
        config, wider | checkpoint
    )
    deeper = {"model.config.num_hidden_layers": 3}
    assert "model.layers.2.self_attn.q_proj.weight is absent there and [32, 32] here" in refused(
        config, deeper | checkpoint
    )
    message = refused(config, deeper | export)
    assert f'checkpoint.initial_load_path = "{export["checkpoint.initial_load_path"]}": ' in message
    assert "model.layers.2.self_attn.q_proj.weight" in message
    nowhere = {"checkpoint.initial_load_path": str(config.parent / "nowhere")}
    assert 'nowhere": not a folder, and not' in refused(config, nowhere)
    damaged = config.parent / "damaged" / "step-2"
    shutil.copytree(outputs(config, "first") / "checkpoints" / "step-2", damaged)
    (damaged / "__1_0.distcp").write_bytes(b"")
    message = refused(config, {"checkpoint.initial_load_path": str(damaged)})
    assert (
        f"checkpoint.initial_load_path = {damaged}: the checkpoint is damaged (__1_0.distcp has 0 "
        "of" in message
    )


def test_longer_sequences_are_in_the_export(config: Path) -> None:
    """A model of 128 positions goes on with 256."""
    settings = begin_with(config, "first", "export") | {
        "training.seq_len": 256,
        "training.global_batch_size": 2,
    }
    message = refused(
        config, settings | {"model.rope_scaling": {"rope_type": "yarn", "factor": 1.5}}
    )
    assert message == (
        "training.seq_len = 256 is longer than 192, which model.rope_scaling.factor = 1.5 makes of "
        "the model's 128: set the factor to 2, or lower training.seq_len"
    )
    longer = run(
        config, "longer", settings | {"model.rope_scaling": {"rope_type": "yarn", "factor": 2.0}}
    )
    exported = AutoModelForCausalLM.from_pretrained(longer / "export").config
    assert exported.max_position_embeddings == 256
    assert exported.rope_parameters == {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 128,
    }


# --- vocabularies ---------------------------------------------------------------------------------

TABLE = {
    "model_type": "llama",
    "vocab_size": 41,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
}
TABLE |= {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
}


def grown(folder: Path, degrees: tuple[int, int, int] | None, *, tied: bool) -> dict[str, Tensor]:
    """A model of 41 tokens that is to have 48, sharded or (None) whole."""
    config = hf.load_model_config("", TABLE | {"tie_word_embeddings": tied})
    grow_vocabulary(config, num_token_ids=43, multiple=8)
    assert config.vocab_size == 48
    model = hf.build_on_meta(config, torch.float32)
    if degrees:
        parallelize(model, mesh_of(*degrees), param_dtype=torch.float32)
    hf.allocate(model, torch.device("cpu"))
    names = token_parameters(model)
    assert names == {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    known = weights.load(model, str(folder), growing=names).fewer_rows
    assert known == dict.fromkeys(names, 41)
    fill_new_rows(model, known, seed=3)
    return {
        name: p.full_tensor() if degrees else p.detach() for name, p in hf.named_parameters(model)
    }


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_begin_near_the_mean_of_the_others(tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    old = AutoModelForCausalLM.from_config(
        hf.load_model_config("", TABLE | {"tie_word_embeddings": tied})
    )
    old.save_pretrained(tmp_path)
    whole = grown(tmp_path, None, tied=tied)
    for degrees in [(1, 2, 1), (2, 1, 1)]:
        for found in run_on_ranks(2, grown, tmp_path, degrees, tied=tied):
            assert all(torch.equal(p, whole[name]) for name, p in found.items()), degrees
    before = {name: p.detach().clone() for name, p in old.named_parameters()}
    resized = dict(old.resize_token_embeddings(48) and old.named_parameters())
    for name, p in whole.items():
        assert torch.equal(p[: len(before[name])], before[name][: len(p)])
        assert p.shape == resized[name].shape
        if len(p) == 48:  # as near to the mean as transformers' own rows, and no two of them alike
            mean = before[name][:41].mean(0)
            spread = (resized[name][41:] - before[name][:41].mean(0)).abs().max()
            assert 0 < (p[41:] - mean).abs().max() < 3 * spread < 0.01
            assert len(p[41:].unique(dim=0)) == 7


def test_a_vocabulary_never_shrinks() -> None:
    config = hf.load_model_config("", TABLE)
    grow_vocabulary(config, num_token_ids=41, multiple=64)
    assert config.vocab_size == 41


def test_a_run_grows_with_its_tokenizer(config: Path) -> None:
    """A model of 200 tokens and a tokenizer of 257."""
    table = load_config(config).model.config | {
        "vocab_size": 200,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    AutoModelForCausalLM.from_config(hf.load_model_config("", table)).save_pretrained(
        config.parent / "small"
    )
    settings = {"model.config": {}, "model.path": str(config.parent / "small")}
    message = refused(config, settings)
    assert (
        "but the model's vocab_size is 200" in message and "model.resize_embeddings = 1" in message
    )
    grown = run(config, "grown", settings | {"model.resize_embeddings": 64})
    assert json.loads((grown / "export" / "config.json").read_text())["vocab_size"] == 320
    exported = AutoModelForCausalLM.from_pretrained(grown / "export")
    assert len(exported.get_input_embeddings().weight) == len(exported.lm_head.weight) == 320
    again = run(config, "grown", settings | {"model.resize_embeddings": 64, "training.steps": 3})
    assert len(learned(again)) == 3
    with pytest.raises(
        Exception, match="lora.rank = 4 and model.resize_embeddings = 64 are both set"
    ):
        load_config(config, (settings | ADAPTERS | {"model.resize_embeddings": 64}).items())
