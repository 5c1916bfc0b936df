"""[loss] through train.py: DPO and distillation, against plain transformers in one process; their
data, what they log, what they resume to, what is planned, and what is refused.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from helpers.material import as_toml
from helpers.meshes import DP2, DP2_SP2, ONE, SP2, Degrees
from helpers.models import STARCODER2
from helpers.observed import see_plan
from helpers.ranks import run_on_ranks
from helpers.runs import Settings, logged, refusal
from test_library import real_model
from titan_ulysses.config.load import load_config
from titan_ulysses.config.rules import problems_of
from titan_ulysses.config.schema import Config
from titan_ulysses.config.validate import _model_problems
from titan_ulysses.model import hf

END = 256
TINY = STARCODER2 | {"vocab_size": 260, "max_position_embeddings": 4096}
SEQ_LEN, STEPS, LR, BETA = 40, 2, 1e-2, 0.3
PAIRS = [
    {
        "prompt": f"say {i}: ",
        "chosen": f"{i} is {'even' if i % 2 == 0 else 'odd'}",
        "rejected": "no idea"[: 2 + i % 5],
    }
    for i in range(6)
]
TEXTS = [{"text": f"{row['prompt']}{row['chosen']}, and so on"} for row in PAIRS]
Named = dict[str, Tensor]
TOP_K = 3


def taught() -> list[dict[str, Any]]:
    """Tokens with three log-probabilities of a teacher each, of which the first is the token's own.
    The first half of a row is not trained on, and every third row is two documents.
    """
    draw, rows = torch.Generator().manual_seed(6), []
    for number, row in enumerate(TEXTS):
        ids = encoded(row["text"]).tolist()
        others = torch.randint(0, 256, (len(ids), TOP_K - 1), generator=draw).tolist()
        log_probs = torch.randn(len(ids), TOP_K, generator=draw).tolist()
        first = len(ids) // 2
        lengths = [first + 3, len(ids) - first - 3] if number % 3 == 0 else [len(ids)]
        rows.append(
            {
                "input_ids": ids,
                "labels": [-100] * first + ids[first:],
                "document_lengths": lengths,
                "teacher_ids": [[] if i < first else [ids[i], *others[i]] for i in range(len(ids))],
                "teacher_log_probs": [None if i < first else x for i, x in enumerate(log_probs)],
            }
        )
    return rows


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_material(tmp_path_factory.mktemp("loss"))


def write_material(folder: Path) -> Path:
    """Write a model, another one of other widths (the teacher) and of the same, pairs and texts."""
    teacher = TINY | {"hidden_size": 36, "intermediate_size": 40, "num_attention_heads": 3}
    teacher |= {"num_key_value_heads": 1, "tie_word_embeddings": True}
    for name, table, seed in (("start", TINY, 3), ("other", TINY, 5), ("teacher", teacher, 7)):
        real_model(table, seed=seed).save_pretrained(folder / name)
    for name, rows in (("pairs", PAIRS), ("texts", TEXTS), ("taught", taught())):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


def settings(material: Path) -> Settings:
    """Each step has all of the data, so that its order does not matter. The halves of a sequence
    share the tokens of a completion.
    """
    return {
        "model.path": f"{material}/start",
        "model.tokenizer": "bytes",
        "data.packing": "none",
        "training.seq_len": SEQ_LEN,
        "training.steps": STEPS,
        "training.global_batch_size": len(PAIRS),
        "training.local_batch_size": 1,
        "training.param_dtype": "float64",
        "training.reduce_dtype": "float64",
        "training.max_norm": 0.5,
        "optimizer.lr": LR,
        "optimizer.eps": 1e-6,
        "lr_scheduler.decay_type": "constant",
        "checkpoint.enable": False,
    }


def dpo(material: Path) -> Settings:
    return settings(material) | {
        "data.source": "preference",
        "data.path": f"{material}/pairs.jsonl",
        "loss.name": "dpo",
        "loss.beta": BETA,
        "loss.reference": f"{material}/other",
    }


def distillation(material: Path) -> Settings:
    return settings(material) | {
        "data.source": "jsonl",
        "data.path": f"{material}/texts.jsonl",
        "loss.name": "distillation",
        "loss.teacher": f"{material}/teacher",
        "loss.temperature": 2.0,
        "loss.teacher_share": 0.7,
    }


def distillation_from_data(material: Path) -> Settings:
    from_data = {"data.source": "tokens", "data.path": f"{material}/taught.jsonl"}
    wanted = distillation(material) | from_data | {"data.teacher_top_k": TOP_K}
    return {key: value for key, value in wanted.items() if key != "loss.teacher"}


# --- a run of Trainer, and the same with plain transformers ---------------------------------------


class Trained(NamedTuple):
    losses: list[float]
    norms: list[float]
    gradients: list[Named]
    """before they are clipped"""
    parameters: Named
    rewards: list[dict[str, float]]
    has_second_model: bool = False


def train(folder: Path, wanted: Settings, degrees: Degrees = ONE) -> Trained:
    """A run of the settings on this rank of a mesh."""
    from titan_ulysses.train.trainer import Trainer

    names = ("data_parallel_replicate", "data_parallel_shard", "sequence_parallel")
    mesh = {f"parallelism.{n}_degree": d for n, d in zip(names, degrees, strict=True)}
    place = {"job.dump_folder": str(folder), "checkpoint.export": False}
    (folder / "empty.toml").touch()
    trainer = Trainer(load_config(folder / "empty.toml", (place | wanted | mesh).items()))
    gradients: list[Named] = []
    named = [(n, p) for n, p in hf.named_parameters(trainer.state.model) if p.requires_grad]

    def note(*_: Any) -> None:
        gradients.append({name: p.grad.full_tensor() for name, p in named})

    trainer.state.optimizer.register_step_pre_hook(note)
    trainer.train()
    dist.barrier()  # rank 0 writes what all of them read
    lines = [line for line in logged(folder / "run") if "loss" in line]
    return Trained(
        [line["loss"] for line in lines],
        [line["grad_norm"] for line in lines],
        gradients,
        {name: p.detach().full_tensor() for name, p in named},
        [line["rewards"] for line in lines if "rewards" in line],
        len(sharded_models(trainer)) > 1,
    )


def sharded_models(trainer: Any) -> list[PreTrainedModel]:
    """The models on a trainer's mesh that are alive."""
    gc.collect()
    models = [x for x in gc.get_objects() if type(x) is type(trainer.state.model)]
    return [x for x in models if "sharding" in vars(x) and x.sharding.mesh is trainer.state.mesh]


def encoded(*texts: str, ends: bool = True) -> Tensor:
    ids = [
        [*text.encode(), *([END] if ends and i == len(texts) - 1 else [])]
        for i, text in enumerate(texts)
    ]
    return torch.tensor([x for part in ids for x in part])


Step = Callable[[PreTrainedModel], tuple[Tensor, dict[str, float]]]


def train_plainly(material: Path, step_loss: Step, model: PreTrainedModel | None = None) -> Trained:
    model = model or AutoModelForCausalLM.from_pretrained(material / "start", dtype=torch.float64)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1
    )
    found = Trained([], [], [], {}, [])
    for _ in range(STEPS):
        loss, rewards = step_loss(model)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        found.gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
        found.losses.append(loss.item())
        found.norms.append(norm.item())
        found.rewards.append(rewards)
        optimizer.step()
        optimizer.zero_grad()
    found.parameters.update({n: p.detach() for n, p in model.named_parameters()})
    return found


def of_completion(model: PreTrainedModel, prompt: str, completion: str) -> Tensor:
    """The log-probability of a completion and its end, given the prompt."""
    ids = encoded(prompt, completion)
    each = model(ids[None, :-1], use_cache=False).logits[0].log_softmax(-1)
    return each.gather(1, ids[1:, None])[len(prompt) - 1 :].sum()


def plain_dpo(material: Path) -> Trained:
    reference = AutoModelForCausalLM.from_pretrained(material / "other", dtype=torch.float64)

    def step(model: PreTrainedModel) -> tuple[Tensor, dict[str, float]]:
        rewards = []
        for pair in PAIRS:
            for name in ("chosen", "rejected"):
                mine = of_completion(model, pair["prompt"], pair[name])
                with torch.no_grad():
                    other = of_completion(reference, pair["prompt"], pair[name])
                rewards.append(BETA * (mine - other))
        chosen, rejected = torch.stack(rewards[::2]), torch.stack(rewards[1::2])
        margins = chosen - rejected
        shown = {"chosen": chosen, "rejected": rejected, "margins": margins}
        shown["accuracies"] = (margins > 0).double()
        return -F.logsigmoid(margins).mean(), {k: x.mean().item() for k, x in shown.items()}

    return train_plainly(material, step)


def divergence_of(model: PreTrainedModel, teacher: PreTrainedModel, ids: Tensor) -> Tensor:
    """0.7 of the divergence from a teacher at temperature 2, and 0.3 of cross-entropy, summed."""
    scores = model(ids[None, :-1], use_cache=False).logits[0]
    with torch.no_grad():
        wanted = teacher(ids[None, :-1], use_cache=False).logits[0]
    kl = F.kl_div(
        (scores / 2).log_softmax(-1),
        (wanted / 2).log_softmax(-1),
        log_target=True,
        reduction="sum",
    )
    return 0.7 * 4 * kl + 0.3 * F.cross_entropy(scores, ids[1:], reduction="sum")


def plain_distillation(material: Path) -> Trained:
    teacher = AutoModelForCausalLM.from_pretrained(material / "teacher", dtype=torch.float64)

    def step(model: PreTrainedModel) -> tuple[Tensor, dict[str, float]]:
        total, count = torch.zeros((), dtype=torch.float64), 0
        for row in TEXTS:
            ids = encoded(row["text"])
            total = total + divergence_of(model, teacher, ids)
            count += len(ids) - 1
        return total / count, {}

    return train_plainly(material, step)


def compare(found: Trained, expected: Trained) -> None:
    close = {"rel": 1e-12, "abs": 1e-13}
    assert found.losses == pytest.approx(expected.losses, **close)
    assert found.norms == pytest.approx(expected.norms, **close)
    for mine, other in zip(found.rewards, expected.rewards, strict=bool(found.rewards)):
        assert mine == pytest.approx(other, **close)
    assert len(found.gradients) == STEPS
    for mine, other in zip(
        (*found.gradients, found.parameters),
        (*expected.gradients, expected.parameters),
        strict=True,
    ):
        assert mine.keys() == other.keys()
        largest = max(x.abs().max() for x in other.values())
        for name, x in other.items():
            assert (mine[name] - x).abs().max() / largest < 1e-12, name


MESHES = [
    pytest.param(ONE, id="one", marks=pytest.mark.slow),
    pytest.param(SP2, id="sp2"),
    pytest.param(DP2, id="dp2", marks=pytest.mark.slow),
    pytest.param(DP2_SP2, id="dp2-sp2", marks=pytest.mark.slow),
]
PACKED = {"data.packing": "best_fit", "training.seq_len": 192, "training.global_batch_size": -1}
STREAMED = {"memory.stream_chunk_tokens": 16}
# Whole sequences: test_references.py, with what the reference said computed before training.
MODES = [
    pytest.param({}, id="whole", marks=pytest.mark.slow),
    pytest.param(STREAMED, id="streamed"),
]


def in_batches(degrees: Degrees) -> Settings:
    """Three or six micro-batches a step, with different numbers of labels."""
    return {"training.local_batch_size": 2 if degrees in (ONE, SP2) else 1}


def on_ranks(folder: Path, wanted: Settings, degrees: Degrees) -> list[Trained]:
    world = degrees[0] * degrees[1] * degrees[2]
    return run_on_ranks(world, train, folder, wanted, degrees)


@pytest.mark.parametrize("degrees", MESHES)
@pytest.mark.parametrize("more", MODES)
def test_dpo_is_that_of_plain_transformers(
    more: Settings, degrees: Degrees, material: Path, tmp_path: Path
) -> None:
    expected = run_on_ranks(1, plain_dpo, material)[0]
    for found in on_ranks(tmp_path, dpo(material) | in_batches(degrees) | more, degrees):
        compare(found, expected)
        assert found.has_second_model


@pytest.mark.parametrize("degrees", MESHES)
def test_distillation_is_that_of_plain_transformers(
    degrees: Degrees, material: Path, tmp_path: Path
) -> None:
    expected = run_on_ranks(1, plain_distillation, material)[0]
    wanted = distillation(material) | in_batches(degrees) | STREAMED
    for found in on_ranks(tmp_path, wanted, degrees):
        compare(found, expected)


# --- references, packing, evaluation, resume ------------------------------------------------------


def same(found: Trained, expected: Trained) -> None:
    """The same losses and rewards, though other tensors were added up in another order."""
    close = {"rel": 1e-11, "abs": 1e-12}
    assert found.losses == pytest.approx(expected.losses, **close)
    assert found.norms == pytest.approx(expected.norms, **close)
    for mine, other in zip(found.rewards, expected.rewards, strict=True):
        assert mine == pytest.approx(other, **close)
    assert found.rewards[-1]["margins"] != 0


@pytest.mark.parametrize("lora", [0, 4], ids=["all", "lora"])
def test_the_reference_is_where_the_run_began(lora: int, material: Path, tmp_path: Path) -> None:
    """With LoRA, the model without its adapters. Several pairs share a sequence of two ranks."""
    if lora:
        pytest.importorskip("peft")
    own = dpo(material) | {"lora.rank": lora, "loss.reference": ""}
    named = own | {"loss.reference": f"{material}/start"}
    packed = own | PACKED | {"job.name": "run"}
    for name in ("one", "named", "packed"):
        (tmp_path / name).mkdir()
    expected = on_ranks(tmp_path / "named", named, ONE)[0]
    assert expected.rewards[0]["margins"] == 0
    for found in on_ranks(tmp_path / "packed", packed, SP2):
        same(found, expected)


def test_held_out_pairs_are_evaluated(material: Path, tmp_path: Path) -> None:
    """Before the first step, on the training data: the loss and the rewards of that step."""
    held_out = {"validation.enable": True, "validation.path": f"{material}/pairs.jsonl"}
    wanted = dpo(material) | held_out | {"training.steps": 1, "training.local_batch_size": 2}
    # Four sequences in a batch of all ranks, and six of them: rows fill up the second.
    wanted |= {"training.global_batch_size": 8, "validation.steps": 0}
    (found, *_) = on_ranks(tmp_path, wanted, DP2)
    first, step, *_ = logged(tmp_path / "run")
    assert first["validation_pairs"] == len(PAIRS) and "validation_by_position" not in first
    expected = run_on_ranks(1, plain_dpo, material)[0]
    assert first["validation_loss"] == pytest.approx(expected.losses[0], rel=1e-12)
    assert first["validation_rewards"] == pytest.approx(expected.rewards[0], rel=1e-12)


def test_named_sets_of_pairs(material: Path, tmp_path: Path) -> None:
    """Twice the same pairs: each set, and both together, have the loss and rewards of one."""
    pairs = {"source": "preference", "path": f"{material}/pairs.jsonl", "packing": "none"}
    sets = [{"name": name, **pairs} for name in ("one", "two")]
    wanted = dpo(material) | {"validation.enable": True, "validation.sets": sets}
    wanted |= {"training.steps": 1, "validation.steps": 0, "training.local_batch_size": 3}
    on_ranks(tmp_path, wanted, SP2)
    first, *_ = logged(tmp_path / "run")
    assert first["validation_pairs"] == 2 * len(PAIRS)
    for one in first["validation_sets"].values():
        assert one["loss"] == pytest.approx(first["validation_loss"], rel=1e-12)
        assert one["rewards"] == pytest.approx(first["validation_rewards"], rel=1e-12)
    texts = [{**sets[0], "source": "text"}]
    config = load_config_of({"model.config": TINY} | wanted | {"validation.sets": texts})
    problems = "\n".join(problems_of(config))
    assert 'with validation.sets[0].source = "text": dpo, ipo, simpo, orpo and reward' in problems


@pytest.mark.parametrize("loss", [dpo, distillation])
def test_a_resumed_run_goes_on(
    loss: Callable[[Path], Settings], material: Path, tmp_path: Path
) -> None:
    wanted = loss(material) | {"checkpoint.enable": True, "checkpoint.interval": 1}
    wanted |= {"training.local_batch_size": 3}
    (tmp_path / "at once").mkdir()
    (tmp_path / "in parts").mkdir()
    expected = on_ranks(tmp_path / "at once", wanted, SP2)[0]
    on_ranks(tmp_path / "in parts", wanted | {"training.steps": 1}, SP2)
    found = on_ranks(tmp_path / "in parts", wanted, SP2)[0]
    assert found.losses == expected.losses and found.norms == expected.norms
    for name, x in expected.parameters.items():
        assert torch.equal(found.parameters[name], x), name


def test_another_reference_is_said() -> None:
    from titan_ulysses.train.run_folder import warnings_of

    config = load_config_of({"model.config": TINY})
    for saved in ({"beside": 7}, {}):
        assert not warnings_of(config, 2, saved, content={}, frozen_weights=7)
    (warning,) = warnings_of(config, 2, {"beside": 7}, content={}, frozen_weights=8)
    assert "the reference or teacher differs from the one" in warning


# --- refusals, plan, mixtures ---------------------------------------------------------------------


def load_config_of(wanted: Settings) -> Any:
    return Config.model_validate(nested(wanted))


def nested(wanted: Settings) -> dict[str, Any]:
    tables: dict[str, Any] = {}
    for key, value in wanted.items():
        section, name = key.split(".")
        tables.setdefault(section, {})[name] = value
    return tables


@pytest.mark.parametrize(
    ("loss", "more", "words"),
    [
        (dpo, {"loss.name": "cross_entropy"}, ["loss.beta = 0.3", '"dpo", "ipo", "simpo"']),
        (dpo, {"data.source": "jsonl"}, ['loss.name = "dpo" with data.source = "jsonl"']),
        (distillation, {"data.source": "preference"}, ['data.source = "preference"', "dpo, ipo"]),
        (dpo, {"data.packing": "concat"}, ['data.packing = "concat"', "best_fit"]),
        (dpo, {"data.train_on": "all"}, ['data.train_on = "all"']),
        (dpo, {"loss.name": "kto"}, ['loss.name = "kto"', 'data.source = "preference"']),
        (dpo, {"loss.name": "orpo"}, ["loss.reference = ", '"dpo", "ipo" and "kto" read it']),
        (dpo, {"loss.simpo_gamma": 1.0}, ["loss.simpo_gamma = 1.0", 'only "simpo" reads it']),
        (dpo, {"training.z_loss": 0.1}, ["training.z_loss = 0.1", "cross-entropy"]),
        (dpo, {"memory.stream_offload": "host"}, ['memory.stream_offload = "host"', '"none"']),
        (distillation, {"loss.teacher": ""}, ["loss.teacher is not set"]),
        (
            distillation,
            {"data.teacher_top_k": 2, "data.source": "tokens"},
            ["loss.teacher = ", "0"],
        ),
        (distillation_from_data, {"data.teacher_top_k": 0}, ["or set data.teacher_top_k to read"]),
        (distillation_from_data, {"data.teacher_top_k": 4}, [":1: teacher_ids[14] has 3 entries"]),
        (distillation_from_data, {"data.source": "jsonl"}, ["only tokens read it"]),
        (dpo, {"loss.reference": "./nowhere"}, ['loss.reference = "./nowhere"']),
        (dpo, {"loss.reference": "$MATERIAL/small"}, ["its vocab_size is 99", "model's is 260"]),
        (dpo, {"loss.reference": "$MATERIAL/short"}, ["it has 8 positions"]),
        (dpo, {"loss.name": "reward", "lora.rank": 4}, ["is no adapter", "lora.rank = 0"]),
        (dpo, {"training.seq_len": 24}, ["longer than training.seq_len = 24", '"drop"']),
        (
            dpo,
            {"training.seq_len": 8, "data.long_documents": "drop"},
            ["each document is longer than training.seq_len = 8: raise training.seq_len"],
        ),
    ],
)
def test_what_cannot_be_is_refused(
    loss: Callable[[Path], Settings],
    more: Settings,
    words: list[str],
    material: Path,
    tmp_path: Path,
) -> None:
    for name, change in {
        "small": {"vocab_size": 99},
        "short": {"max_position_embeddings": 8},
    }.items():
        hf.load_model_config("", TINY | change).save_pretrained(material / name)
    wanted = loss(material) | {
        key: value.replace("$MATERIAL", str(material)) if isinstance(value, str) else value
        for key, value in more.items()
    }
    (tmp_path / "empty.toml").touch()
    told = run_on_ranks(1, refused, tmp_path / "empty.toml", wanted)[0]
    assert all(word in told for word in words), told


def refused(config: Path, wanted: Settings) -> str:
    return refusal(config, wanted)


def test_an_unchecked_mixture_of_experts_says_what_it_lacks() -> None:
    config = load_config_of({"model.config": TINY, "loss.name": "dpo"} | PACKED)
    found = next(_model_problems(config, SimpleNamespace(output_router_logits=True), 0))
    assert 'loss.name = "dpo" has no router loss' in found


@pytest.mark.slow
@pytest.mark.parametrize("loss", [dpo, distillation])
def test_the_second_model_is_planned(
    loss: Callable[[Path], Settings], material: Path, tmp_path: Path
) -> None:
    """The plan has its parameters, and what is computed of it, beside the rest."""
    real_model(TINY | {"num_hidden_layers": 1}).save_pretrained(material / "flat")
    wanted = loss(material) | {"training.param_dtype": "bfloat16", "training.seq_len": 512}
    wanted |= {"training.reduce_dtype": "float32", "model.path": f"{material}/flat"}
    wanted |= {"training.global_batch_size": -1, "checkpoint.enable": False}
    wanted[f"loss.{'reference' if loss is dpo else 'teacher'}"] = f"{material}/flat"
    plain = {k: v for k, v in wanted.items() if not k.startswith("loss.")}
    plain |= {"data.source": "jsonl"}
    facts = []
    plans = {"with": wanted, "without": plain}
    if loss is dpo:  # no step has the second model
        plans["before"] = wanted | {"loss.precompute_reference": True}
    for name, one in plans.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.toml").write_text(as_toml(one))
        seen = see_plan(tmp_path / name, {"HOME": str(tmp_path)})
        assert not seen.refused, seen.refused
        facts.append(seen.facts)
    more = facts[0]["gpu_peak_gib"] - facts[1]["gpu_peak_gib"]
    weights = real_model(TINY | {"num_hidden_layers": 1}).num_parameters() * 2  # in bf16
    assert more * 2**30 > 0.99 * weights, (more * 2**30, weights)
    assert facts[0]["step_seconds"] > 1.1 * facts[1]["step_seconds"]
    if loss is dpo:
        saved = facts[0]["gpu_peak_gib"] - facts[2]["gpu_peak_gib"]
        assert saved * 2**30 > 0.99 * weights
        assert facts[2]["step_seconds"] < facts[0]["step_seconds"] / 1.1


@pytest.mark.parametrize(
    ("loss", "meshes"),
    [
        (settings, (DP2,)),
        (distillation, (SP2,)),
        pytest.param(settings, (ONE, SP2), marks=pytest.mark.slow),
        pytest.param(distillation, (DP2,), marks=pytest.mark.slow),
    ],
)
def test_a_mixture_has_the_loss_of_each_source(
    loss: Callable[[Path], Settings], meshes: tuple[Degrees], material: Path, tmp_path: Path
) -> None:
    """They are those of the documents of each, and their mean is the loss."""
    other = [{"text": f"{i} tales and fables"} for i in range(6)]
    (material / "tales.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    paths = [f"{material}/{name}.jsonl" for name in ("texts", "tales")]
    entries = [{"source": "jsonl", "path": path} for path in paths]
    wanted = loss(material) | {"data.mixture": entries, "training.steps": 1}
    wanted |= {"training.global_batch_size": 12, "training.local_batch_size": 2}
    wanted |= {"data.source": "text", "data.path": ""}
    divergence = loss is distillation
    expected = run_on_ranks(1, plain_losses, material, [TEXTS, other], divergence)[0]
    for number, degrees in enumerate(meshes):
        folder = tmp_path / str(number)
        folder.mkdir()
        on_ranks(folder, wanted, degrees)
        (line, *_) = logged(folder / "run")
        assert list(line["loss_by_source"]) == paths
        means = [total / count for total, count in expected]
        assert [*line["loss_by_source"].values()] == pytest.approx(means, rel=1e-12)
        total, count = map(sum, zip(*expected, strict=True))
        assert line["loss"] == pytest.approx(total / count, rel=1e-12)


def plain_losses(
    material: Path, sources: list[list[dict[str, str]]], divergence: bool
) -> list[tuple[float, int]]:
    model, teacher = (
        AutoModelForCausalLM.from_pretrained(material / name, dtype=torch.float64)
        for name in ("start", "teacher")
    )
    found = []
    for rows in sources:
        total, count = 0.0, 0
        for row in rows:
            ids = encoded(row["text"])
            with torch.no_grad():
                scores = model(ids[None, :-1], use_cache=False).logits[0]
                of_row = F.cross_entropy(scores, ids[1:], reduction="sum")
                total += (divergence_of(model, teacher, ids) if divergence else of_row).item()
            count += len(ids) - 1
        found.append((total, count))
    return found
