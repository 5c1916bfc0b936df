"""[loss] through train.py: DPO and distillation, against plain transformers in one process; their
data, what they log, what they resume to, what is planned, and what is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from helpers.material import as_toml
from helpers.meshes import DP2, DP2_SP2, ONE, SP2, Degrees
from helpers.models import STARCODER2
from helpers.ranks import run_on_ranks
from helpers.runs import Settings, learned, logged, refusal
from test_library import real_model
from titan_ulysses.config.load import load_config
from titan_ulysses.model import hf

END = 256
TINY = STARCODER2 | {"vocab_size": 260, "max_position_embeddings": 4096}
SEQ_LEN, STEPS, LR, BETA = 64, 3, 1e-2, 0.3
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


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, another one of other widths (the teacher) and of the same, pairs and texts."""
    folder = tmp_path_factory.mktemp("loss")
    teacher = TINY | {"hidden_size": 36, "intermediate_size": 40, "num_attention_heads": 3}
    teacher |= {"num_key_value_heads": 1, "tie_word_embeddings": True}
    for name, table, seed in (("start", TINY, 3), ("other", TINY, 5), ("teacher", teacher, 7)):
        real_model(table, seed=seed).save_pretrained(folder / name)
    for name, rows in (("pairs", PAIRS), ("texts", TEXTS)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


def settings(material: Path, **more: Any) -> Settings:
    """Each step has all of the data, so that its order does not matter."""
    return {
        "model.path": f"{material}/start",
        "model.tokenizer": "bytes",
        "data.packing": "none",
        "training.seq_len": SEQ_LEN,
        "training.steps": STEPS,
        "training.global_batch_size": len(PAIRS) if "ranks" not in more else more.pop("ranks"),
        "training.local_batch_size": 1,
        "training.param_dtype": "float64",
        "training.reduce_dtype": "float64",
        "training.max_norm": 0.5,
        "optimizer.lr": LR,
        "optimizer.eps": 1e-6,
        "lr_scheduler.decay_type": "constant",
        "checkpoint.enable": False,
    } | {key.replace("__", "."): value for key, value in more.items()}


def dpo(material: Path, **more: Any) -> Settings:
    return (
        settings(material)
        | {
            "data.source": "preference",
            "data.path": f"{material}/pairs.jsonl",
            "loss.name": "dpo",
            "loss.beta": BETA,
            "loss.reference": f"{material}/other",
        }
        | {key.replace("__", "."): value for key, value in more.items()}
    )


def distillation(material: Path, **more: Any) -> Settings:
    return (
        settings(material)
        | {
            "data.source": "jsonl",
            "data.path": f"{material}/texts.jsonl",
            "loss.name": "distillation",
            "loss.teacher": f"{material}/teacher",
            "loss.temperature": 2.0,
            "loss.teacher_share": 0.7,
        }
        | {key.replace("__", "."): value for key, value in more.items()}
    )


# --- a run of Trainer, and the same with plain transformers ---------------------------------------


class Trained(NamedTuple):
    losses: list[float]
    norms: list[float]
    gradients: list[Named]
    """before they are clipped"""
    parameters: Named
    rewards: list[dict[str, float]]


def train(folder: Path, wanted: Settings, degrees: Degrees = ONE) -> Trained:
    """A run of the settings on this rank of a mesh."""
    from titan_ulysses.train.trainer import Trainer

    names = ("data_parallel_replicate", "data_parallel_shard", "sequence_parallel")
    mesh = {f"parallelism.{n}_degree": d for n, d in zip(names, degrees, strict=True)}
    place = {"job.dump_folder": str(folder), "checkpoint.export": False}
    (folder / "empty.toml").touch()
    trainer = Trainer(load_config(folder / "empty.toml", (place | wanted | mesh).items()))
    gradients: list[Named] = []
    named = [(n, p) for n, p in hf.named_parameters(trainer.model) if p.requires_grad]

    def note(*_: Any) -> None:
        gradients.append({name: p.grad.full_tensor() for name, p in named})

    trainer.optimizer.register_step_pre_hook(note)
    trainer.train()
    lines = [line for line in logged(folder / "run") if "loss" in line]
    return Trained(
        [line["loss"] for line in lines],
        [line["grad_norm"] for line in lines],
        gradients,
        {name: p.detach().full_tensor() for name, p in named},
        [line["rewards"] for line in lines if "rewards" in line],
    )


def encoded(*texts: str, ends: bool = True) -> Tensor:
    ids = [
        [*text.encode(), *([END] if ends and i == len(texts) - 1 else [])]
        for i, text in enumerate(texts)
    ]
    return torch.tensor([x for part in ids for x in part])


Step = Callable[[PreTrainedModel], tuple[Tensor, dict[str, float]]]


def train_plainly(material: Path, step_loss: Step) -> Trained:
    model = AutoModelForCausalLM.from_pretrained(material / "start", dtype=torch.float64)
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


def plain_distillation(material: Path) -> Trained:
    teacher = AutoModelForCausalLM.from_pretrained(material / "teacher", dtype=torch.float64)

    def step(model: PreTrainedModel) -> tuple[Tensor, dict[str, float]]:
        total, count = torch.zeros((), dtype=torch.float64), 0
        for row in TEXTS:
            ids = encoded(row["text"])
            scores = model(ids[None, :-1], use_cache=False).logits[0]
            with torch.no_grad():
                wanted = teacher(ids[None, :-1], use_cache=False).logits[0]
            kl = F.kl_div(
                (scores / 2).log_softmax(-1),
                (wanted / 2).log_softmax(-1),
                log_target=True,
                reduction="sum",
            )
            total = total + 0.7 * 4 * kl + 0.3 * F.cross_entropy(scores, ids[1:], reduction="sum")
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
    pytest.param(ONE, id="one"),
    pytest.param(SP2, id="sp2"),
    pytest.param(DP2, id="dp2", marks=pytest.mark.slow),
    pytest.param(DP2_SP2, id="dp2-sp2", marks=pytest.mark.slow),
]
PACKED = {"data.packing": "best_fit", "training.seq_len": 192, "training.global_batch_size": -1}
STREAMED = {"memory.stream_chunk_tokens": 16}


def on_ranks(folder: Path, wanted: Settings, degrees: Degrees) -> list[Trained]:
    world = degrees[0] * degrees[1] * degrees[2]
    return run_on_ranks(world, train, folder, wanted, degrees)


@pytest.mark.parametrize("degrees", MESHES)
@pytest.mark.parametrize("more", [{}, STREAMED], ids=["whole", "streamed"])
def test_dpo_is_that_of_plain_transformers(
    more: Settings, degrees: Degrees, material: Path, tmp_path: Path
) -> None:
    expected = run_on_ranks(1, plain_dpo, material)[0]
    for found in on_ranks(tmp_path, dpo(material) | more, degrees):
        compare(found, expected)


@pytest.mark.parametrize("degrees", MESHES)
def test_distillation_is_that_of_plain_transformers(
    degrees: Degrees, material: Path, tmp_path: Path
) -> None:
    expected = run_on_ranks(1, plain_distillation, material)[0]
    for found in on_ranks(tmp_path, distillation(material) | STREAMED, degrees):
        compare(found, expected)
