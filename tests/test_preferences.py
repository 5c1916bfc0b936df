"""The losses of [loss] through train.py: preferences, in pairs and of single completions, and label
smoothing, against plain transformers in one process and against TRL's trainers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from helpers.meshes import DP2_SP2, SP2, Degrees
from helpers.ranks import run_on_ranks
from helpers.runs import Settings
from test_integrations import Watch, quiet
from test_integrations import settings as trainer_settings
from test_loss_settings import (
    LR,
    PAIRS,
    STEPS,
    TEXTS,
    Trained,
    compare,
    encoded,
    settings,
    train,
    train_plainly,
    write_material,
)
from titan_ulysses.checkpoint.convert import to_safetensors
from titan_ulysses.data.tokenizer import load_tokenizer

BETA, GAMMA, SMOOTHING = 0.3, 0.7, 0.2
WEIGHTS = 1.25, 0.75
JUDGED = [
    {"prompt": row["prompt"], "completion": row["chosen" if good else "rejected"], "label": good}
    for row, good in zip(PAIRS, (True, False, True, True, False, True), strict=True)
]
LOSSES = ("cross_entropy", "dpo", "ipo", "simpo", "orpo", "kto", "reward")
CENTER = 0.1


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("preferences"))


def write(folder: Path) -> Path:
    write_material(folder)
    plain = AutoModelForSequenceClassification.from_pretrained(
        folder / "start", num_labels=1, pad_token_id=0, dtype=torch.float64
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        plain.score.weight.data.normal_(std=0.3)
    plain.save_pretrained(folder / "scores")
    (folder / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in JUDGED))
    return folder


def wanted(material: Path, loss: str) -> Settings:
    found = settings(material) | {"loss.name": loss}
    if loss == "cross_entropy":
        data = {"data.source": "jsonl", "data.path": f"{material}/texts.jsonl"}
        return found | data | {"loss.label_smoothing": SMOOTHING}
    found |= {"data.source": "preference", "data.path": f"{material}/pairs.jsonl"}
    if loss == "reward":
        center = {"loss.center_rewards_coefficient": CENTER}
        return found | center | {"model.path": f"{material}/scores"}
    found["loss.beta"] = BETA
    if loss == "kto":
        found |= {"data.source": "unpaired", "data.path": f"{material}/judged.jsonl"}
        found |= {"loss.desirable_weight": WEIGHTS[0], "loss.undesirable_weight": WEIGHTS[1]}
    if loss in ("dpo", "ipo", "kto"):
        found["loss.reference"] = f"{material}/other"
    if loss in ("dpo", "simpo"):
        found["loss.label_smoothing"] = SMOOTHING
    return found | ({"loss.simpo_gamma": GAMMA} if loss == "simpo" else {})


# --- plain transformers ---------------------------------------------------------------------------


def of_completion(model: PreTrainedModel, prompt: str, completion: str) -> tuple[Tensor, Tensor]:
    """The log-probabilities of the tokens of a completion with its end, and of all with a label."""
    ids = encoded(prompt, completion)
    each = model(ids[None, :-1], use_cache=False).logits[0].log_softmax(-1)
    each = each.gather(1, ids[1:, None]).flatten()
    return each[len(prompt) - 1 :], each


def reward_step(model: PreTrainedModel) -> tuple[Tensor, dict[str, float]]:
    chosen, rejected = (
        torch.stack([model(encoded(row["prompt"], row[name])[None]).logits[0, 0] for row in PAIRS])
        for name in ("chosen", "rejected")
    )
    loss = -F.logsigmoid(chosen - rejected) + CENTER * (chosen + rejected) ** 2
    return loss.mean(), rewards_of([*chosen], [*rejected])


def rewards_of(chosen: list[Tensor], rejected: list[Tensor]) -> dict[str, float]:
    good, bad = torch.stack(chosen).detach(), torch.stack(rejected).detach()
    shown = {"chosen": good, "rejected": bad, "margins": good - bad, "accuracies": good > bad}
    return {name: value.double().mean().item() for name, value in shown.items()}


def plain_step(loss: str, reference: PreTrainedModel) -> Callable[..., Any]:
    def both(model: PreTrainedModel, prompt: str, completion: str) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            other = of_completion(reference, prompt, completion)[0]
        return of_completion(model, prompt, completion)[0], other

    def smoothed(margin: Tensor) -> Tensor:
        return -(1 - SMOOTHING) * F.logsigmoid(margin) - SMOOTHING * F.logsigmoid(-margin)

    def pairs(model: PreTrainedModel) -> tuple[Tensor, dict[str, float]]:
        losses, chosen, rejected = [], [], []
        for row in PAIRS:
            good, good_other = both(model, row["prompt"], row["chosen"])
            bad, bad_other = both(model, row["prompt"], row["rejected"])
            if loss == "dpo":
                ratios = (good - good_other).sum(), (bad - bad_other).sum()
                losses.append(smoothed(BETA * (ratios[0] - ratios[1])))
            elif loss == "ipo":
                ratios = (good - good_other).sum(), (bad - bad_other).sum()
                margin = ratios[0] / len(good) - ratios[1] / len(bad)
                losses.append((margin - 1 / (2 * BETA)) ** 2)
            else:
                ratios = good.mean(), bad.mean()
                odds = [x - torch.log(1 - x.exp()) for x in ratios]
                margin = BETA * (ratios[0] - ratios[1]) - GAMMA
                by_odds = -BETA * F.logsigmoid(odds[0] - odds[1])
                losses.append(smoothed(margin) if loss == "simpo" else by_odds)
            chosen.append(BETA * ratios[0])
            rejected.append(BETA * ratios[1])
        mean = torch.stack(losses).mean()
        if loss == "orpo":
            rows = [of_completion(model, row["prompt"], row["chosen"])[1] for row in PAIRS]
            mean = mean - torch.cat(rows).mean()
        return mean, rewards_of(chosen, rejected)

    def judged(model: PreTrainedModel) -> tuple[Tensor, dict[str, float]]:
        following, ratios, others = [*JUDGED[1:], JUDGED[0]], [], []
        for row, after in zip(JUDGED, following, strict=True):
            mine, other = both(model, row["prompt"], row["completion"])
            ratios.append((mine - other).sum())
            mine, other = both(model, row["prompt"], after["completion"])
            others.append((mine - other).sum().detach())
        kl = torch.stack(others).mean().clamp(min=0)
        good = [x for x, row in zip(ratios, JUDGED, strict=True) if row["label"]]
        bad = [x for x, row in zip(ratios, JUDGED, strict=True) if not row["label"]]
        losses = [WEIGHTS[0] * (1 - torch.sigmoid(BETA * (x - kl))) for x in good]
        losses += [WEIGHTS[1] * (1 - torch.sigmoid(BETA * (kl - x))) for x in bad]
        means = [BETA * torch.stack(x).mean().item() for x in (good, bad)]
        shown = {"chosen": means[0], "rejected": means[1], "margins": means[0] - means[1]}
        return torch.stack(losses).mean(), shown | {"kl": kl.item()}

    def texts(model: PreTrainedModel) -> tuple[Tensor, dict[str, float]]:
        losses = []
        for row in TEXTS:
            ids = encoded(row["text"])
            scores = model(ids[None, :-1], use_cache=False).logits[0]
            own = {"label_smoothing": SMOOTHING, "reduction": "none"}
            losses.append(F.cross_entropy(scores, ids[1:], **own))
        return torch.cat(losses).mean(), {}

    return {"kto": judged, "cross_entropy": texts}.get(loss, pairs)


def train_all_plainly(material: Path) -> dict[str, Trained]:
    reference = AutoModelForCausalLM.from_pretrained(material / "other", dtype=torch.float64)
    found = {loss: train_plainly(material, plain_step(loss, reference)) for loss in LOSSES[:-1]}
    model = AutoModelForSequenceClassification.from_pretrained(
        material / "scores", dtype=torch.float64
    )
    return found | {"reward": train_plainly(material, reward_step, model)}


def train_all(
    folder: Path, material: Path, more: Settings, degrees: Degrees, losses: tuple[str, ...]
) -> dict[str, Trained]:
    found = {}
    for loss in losses:
        (folder / loss).mkdir(exist_ok=True)
        found[loss] = train(folder / loss, wanted(material, loss) | more, degrees)
    return found


@pytest.fixture(scope="module")
def plain(material: Path) -> dict[str, Trained]:
    return run_on_ranks(1, train_all_plainly, material)[0]


WHOLE = {"data.packing": "best_fit", "training.seq_len": 240, "training.global_batch_size": 1}
BATCHES = {"training.local_batch_size": 1}
STREAMED = BATCHES | {"memory.stream_chunk_tokens": 16}
HALVES = {"data.packing": "best_fit", "training.seq_len": 120, "training.global_batch_size": 2}


@pytest.mark.parametrize(
    ("degrees", "more", "losses"),
    [
        pytest.param(SP2, WHOLE, LOSSES, id="sp2-packed"),
        # Three micro-batches a step, the terms over all of its rows: KTO's divergence, ORPO's mean.
        pytest.param(DP2_SP2, BATCHES, ("orpo", "kto"), id="dp2-sp2"),
        # The two above cover these.
        pytest.param(DP2_SP2, STREAMED, LOSSES, id="dp2-sp2-streamed", marks=pytest.mark.slow),
        pytest.param(DP2_SP2, HALVES, LOSSES, id="dp2-sp2-packed", marks=pytest.mark.slow),
    ],
)
def test_every_loss_is_that_of_plain_transformers(
    degrees: Degrees,
    more: Settings,
    losses: tuple[str, ...],
    plain: dict[str, Trained],
    material: Path,
    tmp_path: Path,
) -> None:
    world = degrees[0] * degrees[1] * degrees[2]
    for rank in run_on_ranks(world, train_all, tmp_path, material, more, degrees, losses):
        for loss, found in rank.items():
            compare(found, plain[loss])
            assert found.has_second_model == (loss in ("dpo", "ipo", "kto")), loss
    assert plain["kto"].rewards[-1]["kl"] > 0


def test_a_reward_model_begins_with_a_language_model(material: Path, tmp_path: Path) -> None:
    """Its export and what is made of its checkpoint open as a classifier with what was trained."""
    own = {"model.path": f"{material}/start", "checkpoint.enable": True, "checkpoint.export": True}
    more = WHOLE | own | {"job.dump_folder": str(tmp_path / "reward")}
    found = run_on_ranks(2, train_all, tmp_path, material, more, SP2, ("reward",))[0]["reward"]
    run = tmp_path / "reward" / "run"
    assert found.parameters["score.weight"].abs().max() > 1e-3
    to_safetensors(run / f"checkpoints/step-{STEPS}", tmp_path / "converted", None)
    for folder in (run / "export", tmp_path / "converted"):
        opened, said = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float64, output_loading_info=True
        )
        assert opened.config.num_labels == 1 and not any(said.values())
        own = dict(opened.named_parameters())
        assert own.keys() == found.parameters.keys()
        assert all(torch.equal(own[name], x) for name, x in found.parameters.items())


# --- TRL ------------------------------------------------------------------------------------------


def through_trl(material: Path, folder: str, loss: str) -> dict[str, Any]:
    """All rows in each step of a trainer of TRL, in one process."""
    quiet()
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    trainers = {
        # TRL's DPOTrainer smooths the labels of aot, which sorts the rows of a batch: here of one.
        "dpo": (DPOTrainer, DPOConfig, {"loss_type": "aot", "label_smoothing": SMOOTHING}),
        "ipo": (DPOTrainer, DPOConfig, {"loss_type": "ipo"}),
        "simpo": (CPOTrainer, CPOConfig, {"loss_type": "simpo", "simpo_gamma": GAMMA}),
        "orpo": (ORPOTrainer, ORPOConfig, {}),
        "kto": (KTOTrainer, KTOConfig, {"train_sampling_strategy": "sequential"}),
        "reward": (RewardTrainer, RewardConfig, {"center_rewards_coefficient": CENTER}),
    }
    trainer_class, config_class, own = trainers[loss]
    if loss == "simpo":
        own |= {"cpo_alpha": 0.0, "label_smoothing": SMOOTHING}
    if loss == "kto":
        own |= {"desirable_weight": WEIGHTS[0], "undesirable_weight": WEIGHTS[1]}
    batch = 1 if loss == "dpo" else len(PAIRS)
    own |= {"gradient_accumulation_steps": len(PAIRS) // batch, "learning_rate": LR}
    own |= {"lr_scheduler_type": "constant", "optim": "adamw_torch", "adam_beta2": 0.95}
    own |= {"adam_epsilon": 1e-6, "max_length": 64, "max_steps": STEPS}
    own |= {} if loss == "reward" else {"beta": BETA}
    names = ["start", "other"] if loss in ("dpo", "ipo", "kto") else ["start"]
    auto, names = (
        (AutoModelForSequenceClassification, ["scores"])
        if loss == "reward"
        else (AutoModelForCausalLM, names)
    )
    models = [auto.from_pretrained(material / name, dtype=torch.float64) for name in names]
    watch, tokenizer = Watch(), load_tokenizer("bytes")
    # Rewards are those of the last token that is no padding.
    tokenizer.pad_token_id = 0 if loss == "reward" else tokenizer.eos_token_id
    # TRL's KTO takes the completion of the row before, and train.py of the row after.
    rows = JUDGED[::-1] if loss == "kto" else PAIRS
    trainer = trainer_class(
        model=models[0],
        **({"ref_model": models[1]} if len(models) > 1 else {}),
        args=config_class(**trainer_settings(folder, batch, **own)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[watch],
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {"logs": logs, "gradients": watch.gradients}


def all_through_trl(material: Path, folder: Path) -> dict[str, dict[str, Any]]:
    return {loss: through_trl(material, str(folder / loss), loss) for loss in LOSSES[1:]}


def test_every_loss_is_that_of_trl(material: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    expected = run_on_ranks(1, all_through_trl, material, tmp_path)[0]
    more = WHOLE | {"optimizer.weight_decay": 0.0}  # Trainer decays some parameters only
    for loss, found in run_on_ranks(2, train_all, tmp_path, material, more, SP2, LOSSES[1:])[
        0
    ].items():
        for step, log in enumerate(expected[loss]["logs"]):
            assert found.losses[step] == pytest.approx(log["loss"], rel=1e-5, abs=1e-6), loss
            assert found.norms[step] == pytest.approx(log["grad_norm"], rel=1e-5), loss
            for name, value in found.rewards[step].items():
                if loss == "reward":  # it logs no others of these
                    log |= {"rewards/accuracies": log["accuracy"], "rewards/margins": log["margin"]}
                    if name in ("chosen", "rejected"):
                        continue
                key = "kl" if name == "kl" else f"rewards/{name}"
                assert value == pytest.approx(log[key], rel=1e-5, abs=2e-6), (loss, name)
        gradients = zip(found.gradients, expected[loss]["gradients"], strict=True)
        for step, (mine, other) in enumerate(gradients):
            largest = max(x.abs().max() for x in other.values())
            worst = max((mine[name] - x).abs().max() for name, x in other.items())
            assert worst / largest < 1e-5, (loss, step)
