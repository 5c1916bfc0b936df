"""Prediction layers trained beside the model, through Trainer: against transformers' MtpModel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import MtpModel

from helpers.meshes import DP2_SP2, ONE, SP2, Degrees
from helpers.precision import keep_fp64
from helpers.ranks import run_on_ranks
from helpers.runs import Settings
from test_loss_settings import PAIRS, Trained, compare, encoded, settings, train, train_plainly
from test_released import DEEPSEEK
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.model import hf
from titan_ulysses.model.prediction import check_layer

WEIGHT, LAYERS = 0.3, DEEPSEEK["num_hidden_layers"]
GLM = {k: x for k, x in DEEPSEEK.items() if "lora" not in k and "head_dim" not in k}
GLM |= {"model_type": "glm4_moe", "head_dim": 8, "num_key_value_heads": 2, "use_qk_norm": True}
# Of a short prompt, the token behind it has a label that no prediction layer has.
ROWS = [row | {"prompt": row["prompt"][: 1 if i % 2 else None]} for i, row in enumerate(PAIRS)]
TABLES = {"deepseek_v3": DEEPSEEK, "glm4_moe": GLM}


def released(layer: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a prediction layer under the names that DeepSeek-V3 gives them
    (README_WEIGHTS.md there), without those that it shares with the model.
    """
    found = {}
    for name, tensor in layer.items():
        name = name.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
        if ".experts." not in name:
            found[name] = tensor
            continue
        for i, expert in enumerate(tensor):
            own = name.replace("experts.", f"experts.{i}.")
            if "gate_up_proj" in name:
                for kind, part in zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True):
                    found[own.replace("gate_up_proj", f"{kind}.weight")] = part.contiguous()
            else:
                found[f"{own}.weight"] = expert.contiguous()
    return {f"model.layers.{LAYERS}.{name}": tensor for name, tensor in found.items()}


def write_folder(folder: Path, table: dict[str, Any]) -> Path:
    config = hf.load_model_config("", table | {"vocab_size": 260, "use_cache": False})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
        layer = MtpModel(model, 1).layers[0].double()
        for name, parameter in layer.named_parameters():  # MtpModel has no values for some
            parameter.data.fill_(1.0 if "norm" in name else 0.0)
        for buffer in layer.buffers():
            buffer.zero_()
        for parameter in (*model.parameters(), *layer.parameters()):
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors") | released(layer.state_dict())
    for name, other in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
        tensors[f"model.layers.{LAYERS}.{name}.weight"] = tensors[f"{other}.weight"].clone()
    # transformers reads routers in fp32: so no number needs more.
    tensors = {name: tensor.float().double() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prediction")
    for name, table in TABLES.items():
        write_folder(folder / name, table)
    return folder


# --- plain transformers ---------------------------------------------------------------------------


def open_both(folder: Path) -> tuple[PreTrainedModel, MtpModel]:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="batched_mm"
    )
    # The layer of the released model, which transformers knows by its number.
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{LAYERS}.*"]
    layer = MtpModel.from_pretrained(model)
    for parameter in (*model.parameters(), *layer.parameters()):  # not the frequencies of RoPE
        parameter.data = parameter.data.double()
    return model, layer


def plain_step(model: PreTrainedModel, layer: MtpModel) -> Tensor:
    """Each document alone; prompts have no labels."""
    sums = torch.zeros(2, dtype=torch.float64).unbind()
    counts = [0, 0]
    for row in ROWS:
        ids = encoded(row["prompt"], row["chosen"])
        labels = ids.masked_fill(torch.arange(len(ids)) < len(row["prompt"]), -100)
        hidden = model.model(ids[None]).last_hidden_state
        positions = torch.arange(1, len(ids))[None]
        ahead = layer.forward_layer(0, hidden[:, :-1], positions, None, input_ids=ids[None, 1:])
        scores = model.lm_head(hidden)[0, :-1], layer._project_to_logits(ahead)[0, :-1]
        targets = labels[1:], labels[2:]
        both = zip(scores, targets, strict=True)
        sums = [
            x + F.cross_entropy(*pair, reduction="sum") for x, pair in zip(sums, both, strict=True)
        ]
        counts = [n + (x != -100).sum().item() for n, x in zip(counts, targets, strict=True)]
    return sums[0] / counts[0] + WEIGHT * sums[1] / counts[1]


def plainly(folder: Path) -> Trained:
    model, layer = open_both(folder)
    model.mtp = layer.layers[0]  # for its parameters

    def step(model: PreTrainedModel) -> tuple[Tensor, dict[str, float]]:
        return plain_step(model, layer), {}

    with keep_fp64():
        return train_plainly(folder, step, model)


# --- by Trainer -----------------------------------------------------------------------------------


def wanted(folder: Path) -> Settings:
    return settings(folder) | {
        "model.path": str(folder),
        "data.source": "jsonl",
        "data.path": f"{folder}/rows.jsonl",
        "data.prompt_field": "prompt",
        "data.completion_field": "chosen",
        "data.packing": "best_fit",
        "training.seq_len": 72,
        "training.global_batch_size": 2,
        "loss.prediction_weight": WEIGHT,
    }


def train_in_fp64(folder: Path, wanted: Settings, degrees: Degrees) -> Trained:
    with keep_fp64():
        return train(folder, wanted, degrees)


CASES = [
    pytest.param("deepseek_v3", SP2, {"memory.mlp_tile_tokens": 7}, id="deepseek-sp2"),
    pytest.param("glm4_moe", DP2_SP2, {"memory.stream_chunk_tokens": 16}, id="glm-streamed"),
    # These are covered by those two.
    pytest.param("deepseek_v3", ONE, {}, id="deepseek-one", marks=pytest.mark.slow),
    pytest.param("deepseek_v3", DP2_SP2, {}, id="deepseek-dp2-sp2", marks=pytest.mark.slow),
    pytest.param("deepseek_v3", (1, 1, 4), {}, id="deepseek-sp4", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "degrees", "more"), CASES)
def test_loss_and_gradients_are_those_of_transformers(
    kind: str, degrees: Degrees, more: Settings, folders: Path, tmp_path: Path
) -> None:
    """Packed documents cut among ranks, masked prompts, every gradient of two steps."""
    folder = folders / kind
    expected = run_on_ranks(1, plainly, folder)[0]
    own = wanted(folder) | more
    for found in run_on_ranks(
        degrees[0] * degrees[1] * degrees[2], train_in_fp64, tmp_path, own, degrees
    ):
        compare(found, expected)


def trained_and_exported(folder: Path, own: Settings) -> Trained:
    return train(folder, own | {"checkpoint.enable": True, "checkpoint.export": True}, SP2)


def test_an_export_has_the_trained_layer(folders: Path, tmp_path: Path) -> None:
    """All tensors of the release, by name; transformers reads what was trained of the layer, and
    the copies that it has of the embedding and the head are those of the model.
    """
    folder = folders / "deepseek_v3"
    found = run_on_ranks(2, trained_and_exported, tmp_path, wanted(folder))[0]
    export = tmp_path / "run" / "export"
    tensors, before = (load_file(x / "model.safetensors") for x in (export, folder))
    assert tensors.keys() == before.keys()
    assert json.loads((export / "config.json").read_text())["num_nextn_predict_layers"] == 1
    own_keys = hf.load_model_config(str(folder), None).to_dict().keys()
    assert json.loads((export / "config.json").read_text()).keys() <= own_keys
    model, layer = open_both(export)
    own = dict(model.named_parameters()) | {
        f"mtp.{name}": p for name, p in layer.layers[0].named_parameters()
    }
    assert own.keys() == found.parameters.keys()
    for name, parameter in found.parameters.items():
        assert torch.allclose(own[name], parameter, rtol=1e-6), name
    for name, other in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
        copy = tensors[f"model.layers.{LAYERS}.{name}.weight"]
        assert torch.equal(copy, tensors[f"{other}.weight"])
        assert not torch.equal(copy, before[f"{other}.weight"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "qwen3_next"}, 'of "qwen3_next" none is trained, only of deepseek_v3'),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers = 2, and only 1"),
    ],
)
def test_other_layers_are_refused(change: dict[str, Any], words: str) -> None:
    table = {"num_hidden_layers": 4} if "model_type" in change else DEEPSEEK
    with pytest.raises(UserError, match="loss.prediction_weight") as refused:
        check_layer(hf.load_model_config("", table | change))
    assert words in str(refused.value)
