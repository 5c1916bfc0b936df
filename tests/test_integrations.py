"""Trainers of transformers and TRL with sequence parallelism, against the same trainer in one
process: losses, gradients, norms, evaluation, what is saved, and what is refused.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, ByT5Tokenizer, TrainerCallback, TrainingArguments

from helpers.meshes import DP2, DP2_SP2, SP2, Degrees, mesh_of
from helpers.models import LLAMA, STARCODER2
from helpers.ranks import RankFailure, run_on_ranks
from test_classifier import classifier_of
from test_library import real_model
from test_loss_settings import BETA, LR, PAIRS, dpo, on_ranks, write_material
from titan_ulysses.data.tokenizer import load_tokenizer
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.train.huggingface import compatibility as checks
from titan_ulysses.train.huggingface.ulysses_trainer import UlyssesTrainer

pytest.importorskip("accelerate")

ROOT = Path(__file__).resolve().parent.parent
STEPS = 3
BYTES = STARCODER2 | {"vocab_size": 384}
Shown = dict[str, Any]
MESHES = [
    pytest.param(SP2, id="sp2"),
    pytest.param(DP2, id="dp2"),
    pytest.param(DP2_SP2, id="dp2-sp2", marks=pytest.mark.slow),
]


# TRL's trainers have the mixin of transformers' Trainer, which always runs on dp2, too.
MORE_MESHES = [
    pytest.param(SP2, id="sp2"),
    pytest.param(DP2, id="dp2", marks=pytest.mark.slow),
    pytest.param(DP2_SP2, id="dp2-sp2", marks=pytest.mark.slow),
]


class Watch(TrainerCallback):
    """Keeps the gradients that each step is made with."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        self.gradients.append({name: whole(grad) for name, grad in named.items()})


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def rows(count: int, *, vocab_size: int = 61) -> list[dict[str, list[int]]]:
    """Rows of 24 tokens: two documents packed, with uneven masks."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for index in range(count):
        first = 7 + 3 * (index % 4)
        ids = torch.randint(3, vocab_size, (24,), generator=generator)
        labels = ids.masked_fill(torch.arange(24) < 2 * (index % 5), -100)
        labels[[0, first]] = -100
        positions = torch.cat([torch.arange(first), torch.arange(24 - first)])
        made.append(
            {
                "input_ids": ids.tolist(),
                "labels": labels.tolist(),
                "position_ids": positions.tolist(),
            }
        )
    return made


def settings(folder: str, batch: int, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": 2 * batch,  # which no evaluation fills
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "logging_steps": 1,
        "learning_rate": 0.02,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 0.5,
        "optim": "sgd",  # AdamW divides the rounding of the smallest gradients by itself
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 11,
    } | more


def kind(base: type, degrees: Degrees | None) -> tuple[type, dict[str, Any]]:
    """The trainer's class and its own keywords, sharded or not."""
    if degrees is None:
        return base, {}
    return type(base.__name__, (UlyssesTrainer, base), {}), {"mesh": mesh_of(*degrees)}


def show(trainer: Any, watch: Watch, **train: Any) -> Shown:
    trainer.train(**train)
    evaluation = trainer.evaluate()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    timed = ("runtime", "second", "time")
    return {
        "logs": [
            {k: v for k, v in entry.items() if k not in ("epoch", "step_time")} for entry in logs
        ],
        "gradients": watch.gradients,
        "eval": {k: v for k, v in evaluation.items() if not any(word in k for word in timed)},
        "batch": trainer.get_total_train_batch_size(trainer.args),
    }


def plain_trainer(degrees: Degrees | None, folder: str, batch: int, **more: Any) -> Any:
    from transformers import Trainer, default_data_collator

    cls, own = kind(Trainer, degrees)
    watch = Watch()
    data = rows(15)
    trainer = cls(
        model=real_model(STARCODER2, dtype=torch.float64),
        args=TrainingArguments(**settings(folder, batch, **more)),
        train_dataset=data[:8],
        eval_dataset=data[8:],
        data_collator=default_data_collator,
        callbacks=[watch],
        **own,
    )
    return trainer, watch


def train_plainly(degrees: Degrees | None, folder: str, batch: int, **more: Any) -> Shown:
    return show(*plain_trainer(degrees, folder, batch, **more))


def compare(found: list[Shown], expected: Shown, *, exact: float) -> None:
    """All that was shown, on every rank. Gradients to `exact`, relative to the largest one. Models
    are in fp64, but the losses of transformers and TRL, and what trainers log, are in fp32.
    """
    for shown in found:
        assert shown["batch"] == expected["batch"]
        assert len(shown["logs"]) == len(expected["logs"]) == STEPS
        for mine, other in zip(shown["logs"], expected["logs"], strict=True):
            assert mine["loss"] == pytest.approx(other["loss"], rel=1e-6, abs=1e-6)
            assert mine == pytest.approx(other, rel=1e-5, abs=1e-6)
        assert shown["eval"]["eval_loss"] == pytest.approx(
            expected["eval"]["eval_loss"], rel=1e-6, abs=1e-6
        )
        assert shown["eval"] == pytest.approx(expected["eval"], rel=1e-5, abs=1e-6)
        pairs = list(zip(shown["gradients"], expected["gradients"], strict=True))
        assert len(pairs) == STEPS
        for step, (mine, other) in enumerate(pairs):
            assert mine.keys() == other.keys() and mine
            largest = max(x.abs().max() for x in other.values())
            for name in other:
                difference = (mine[name] - other[name]).abs().max() / largest
                assert difference < exact, (step, name, difference)


def world(degrees: Degrees) -> int:
    return degrees[0] * degrees[1] * degrees[2]


def together(
    train: Any, degrees: Degrees, folder: Path, *, exact: float = 1e-6, **more: Any
) -> None:
    expected = run_on_ranks(1, train, None, str(folder / "one"), degrees[1], **more)[0]
    found = run_on_ranks(world(degrees), train, degrees, str(folder), 1, **more)
    compare(found, expected, exact=exact)


def as_ddp(train: Any, degrees: Degrees, folder: Path, *, batch: int = 1, **more: Any) -> None:
    """Compare with the same trainer under DDP, on as many ranks as there are data-parallel ones.

    Losses and metrics of TRL that look at the batch of a rank are others in one process.
    """
    expected = run_on_ranks(degrees[1], train, None, str(folder / "ddp"), batch, **more)[0]
    found = run_on_ranks(world(degrees), train, degrees, str(folder), batch, **more)
    compare(found, expected, exact=2e-6)


# --- transformers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", MESHES)
def test_trainer_trains_as_in_one_process(degrees: Degrees, tmp_path: Path) -> None:
    together(train_plainly, degrees, tmp_path)


def resume(degrees: Degrees, folder: str) -> tuple[Shown, Shown, list[float]]:
    adamw = {"optim": "adamw_torch", "learning_rate": 1e-2}
    trainer, watch = plain_trainer(degrees, folder, 1, save_strategy="steps", save_steps=2, **adamw)
    undisturbed = show(trainer, watch)
    trainer, watch = plain_trainer(degrees, folder, 1, **adamw)
    resumed = show(trainer, watch, resume_from_checkpoint=f"{folder}/checkpoint-2")
    trainer.save_model()
    saved = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    mine = {name: whole(p) for name, p in trainer.model.named_parameters()}
    there = Path(folder, "checkpoint-2", "trainer_state.json").exists()
    assert there, "save_model must leave checkpoints alone"
    return undisturbed, resumed, [(saved[name] - p).abs().max().item() for name, p in mine.items()]


def test_a_trainer_resumes_and_saves(tmp_path: Path) -> None:
    for undisturbed, resumed, differences in run_on_ranks(2, resume, SP2, str(tmp_path)):
        assert resumed["logs"] == undisturbed["logs"]
        assert resumed["eval"] == undisturbed["eval"]
        for name, gradient in undisturbed["gradients"][-1].items():
            assert torch.equal(resumed["gradients"][-1][name], gradient), name
        assert max(differences) == 0


def killed_in_step(folder: str, steps: int) -> None:
    """A trainer on this rank that dies by SIGKILL within a step, after a checkpoint of two."""
    adamw = {"optim": "adamw_torch", "learning_rate": 1e-2, "save_strategy": "steps"}
    trainer, _ = plain_trainer(SP2, folder, 1, save_steps=2, **adamw | {"max_steps": steps})

    class Kill(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **_):
            if state.global_step == 3:
                os.kill(os.getpid(), signal.SIGKILL)

    if Path(folder, "checkpoint-2").is_dir():
        trainer.train(resume_from_checkpoint=True)
    else:
        trainer.add_callback(Kill())
        trainer.train()
    if int(os.environ["RANK"]) == 0:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        Path(folder, "losses.json").write_text(json.dumps(losses))


def undisturbed(folder: str, steps: int) -> list[float]:
    adamw = {"optim": "adamw_torch", "learning_rate": 1e-2}
    trainer, watch = plain_trainer(SP2, folder, 1, **adamw | {"max_steps": steps})
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
def test_a_killed_trainer_resumes(tmp_path: Path) -> None:
    """Two processes of torchrun die by SIGKILL in a step, and the same command goes on."""
    script = tmp_path / "run.py"
    calls = f"import test_integrations as t; t.killed_in_step({str(tmp_path)!r}, 5)"
    script.write_text(calls)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(script)]
    paths = f"{ROOT}:{ROOT / 'tests'}"
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    first = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert first.returncode != 0 and "SIGKILL" in first.stderr, first.stderr[-2000:]
    assert not (tmp_path / "losses.json").exists() and (tmp_path / "checkpoint-2").is_dir()
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr[-2000:]
    expected = run_on_ranks(2, undisturbed, str(tmp_path / "undisturbed"), 5)[0]
    assert json.loads((tmp_path / "losses.json").read_text()) == expected


def uneven(folder: str) -> str:
    """From the third batch on, the ranks of a sequence have rows of other lengths."""
    from transformers import Trainer, default_data_collator

    cls, own = kind(Trainer, SP2)
    data = rows(6)
    if torch.distributed.get_rank() == 1:
        data = data[:2] + [{key: values[:17] for key, values in row.items()} for row in data[2:]]
    more = {"train_dataset": data, "data_collator": default_data_collator}
    arguments = settings(
        folder, 1, gradient_accumulation_steps=1, train_sampling_strategy="sequential"
    )
    trainer = cls(model=real_model(LLAMA), args=TrainingArguments(**arguments), **more, **own)
    try:
        trainer.train()
    except UserError as error:
        return f"{trainer.state.global_step}: {error}"
    return ""


def test_other_lengths_on_ranks_of_a_sequence_are_found(tmp_path: Path) -> None:
    for told in run_on_ranks(2, uneven, str(tmp_path)):
        assert told.startswith("2: shard: ranks [0, 1] share a sequence"), told


def test_what_was_not_tried_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "version", lambda _: "9.9.1")
    of_trl = type("SFTTrainer", (), {"__module__": "trl.trainer"})
    named = type("Long", (UlyssesTrainer, of_trl), {"__module__": "mine"})
    with pytest.warns(UserWarning, match=r"trl 9\.9\.1 was not tried .* Compare the losses"):
        checks.check(named, SimpleNamespace(), {})
    of_trl.__name__ = "OtherTrainer"
    with pytest.warns(UserWarning, match="OtherTrainer was not tried"):
        checks.check(named, SimpleNamespace(), {})


BEST: Shown = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
BEST |= {"save_strategy": "steps", "save_steps": 1}


def refused(degrees: Degrees, folder: str, arguments: Shown, more: Shown) -> str:
    from transformers import Trainer

    cls, own = kind(Trainer, degrees)
    args = TrainingArguments(**settings(folder, 1, **arguments))
    given = {"model": real_model(LLAMA, dtype=torch.float32), "args": args} | own | more
    try:
        trainer = cls(train_dataset=rows(2), **given)
        trainer.train(**({"resume_from_checkpoint": folder} if not arguments | more else {}))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("arguments", "more", "words"),
    [
        ({"optim": "adafactor"}, {}, ['optim = "adafactor"', "adamw_torch"]),
        ({}, {"optimizer_cls_and_kwargs": (torch.optim.Rprop, {})}, ['"rprop"', "adamw_torch"]),
        ({}, {"mesh": 2}, ["mesh = 2", "build_mesh"]),
        ({}, {"args": None}, ["args = None", "TrainingArguments"]),
        ({"torch_compile": True}, {}, ["torch_compile = True", '{"compile": {"enable"']),
        (BEST | {"save_only_model": True}, {}, ["load_best_model_at_end", "save_only_model"]),
        ({}, {"compute_metrics": len}, ["compute_metrics", "logits"]),
        ({}, {"optimizers": (1, None)}, ["optimizers", "optimizer_cls_and_kwargs"]),
        ({}, {}, ["resume_from_checkpoint", "sharded/"]),
    ],
)
def test_what_would_be_wrong_is_refused(
    arguments: Shown, more: Shown, words: list[str], tmp_path: Path
) -> None:
    for message in run_on_ranks(2, refused, SP2, str(tmp_path), arguments, more):
        assert all(word in message for word in words), message


def asked_of_a_trainer(folder: str) -> list[str]:
    """What of a trainer whose arguments are by position needs logits, or the whole model."""
    from transformers import Trainer

    cls, own = kind(Trainer, SP2)
    args = TrainingArguments(**settings(folder, 1))
    trainer = cls(real_model(LLAMA), args, None, rows(2), **own)
    unlabelled = [{"input_ids": row["input_ids"]} for row in rows(2)]
    asked = [
        lambda: trainer.predict(rows(2)),
        lambda: trainer.evaluate(unlabelled),
        lambda: trainer.accelerator.save_state(folder),
    ]
    told = []
    for ask in asked:
        try:
            ask()
        except UserError as error:
            told.append(str(error))
    return told


def test_what_needs_logits_or_the_whole_model_is_named(tmp_path: Path) -> None:
    for told in run_on_ranks(2, asked_of_a_trainer, str(tmp_path)):
        starts = ("predict: it returns the logits", "evaluate: eval_dataset has rows without")
        starts += ("accelerator.save_state and load_state: each rank has a piece",)
        assert len(told) == 3 and all(map(str.startswith, told, starts)), told


def test_smoothed_labels(tmp_path: Path) -> None:
    together(train_plainly, SP2, tmp_path, label_smoothing_factor=0.2)


# --- TRL ------------------------------------------------------------------------------------------


@pytest.fixture
def trl(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")


def quiet() -> None:
    os.environ.update({"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"})


def in_both_precisions(degrees: Degrees | None, folder: str) -> list[Shown]:
    """In fp64 and in fp32, from the same weights."""
    dtypes = (torch.float64, torch.float32)
    return [train_sft(degrees, folder, 1, dtype=x, weights=torch.float32) for x in dtypes]


def train_sft(degrees: Degrees | None, folder: str, batch: int, **more: Any) -> Shown:
    return show(*sft_trainer(degrees, folder, batch, **more))


def sft_trainer(
    degrees: Degrees | None,
    folder: str,
    batch: int,
    *,
    lora: bool = False,
    dtype: torch.dtype = torch.float64,
    weights: torch.dtype | None = None,
) -> tuple[Any, Watch]:
    quiet()
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    cls, own = kind(SFTTrainer, degrees)
    watch = Watch()
    packed = {"packing": True, "max_length": 32, "shuffle_dataset": False}
    data = [{key: row[key] for key in ("input_ids", "labels")} for row in rows(29)]
    lengths = [*([19, 12] * 12), *([20] * 5)]  # two of the first fill a sequence
    data = [
        {key: values[:length] for key, values in row.items()}
        for row, length in zip(data, lengths, strict=True)
    ]
    adapter = {"target_modules": ["q_proj", "c_proj"], "init_lora_weights": False, "r": 4}
    trainer = cls(
        model=real_model(STARCODER2, dtype=weights or dtype).to(dtype),
        args=SFTConfig(**settings(folder, batch, gradient_accumulation_steps=2), **packed),
        train_dataset=Dataset.from_list(data[:24]),
        eval_dataset=Dataset.from_list(data[24:]),
        processing_class=ByT5Tokenizer(),
        callbacks=[watch],
        peft_config=LoraConfig(**adapter, task_type="CAUSAL_LM") if lora else None,
        **own,
    )
    return trainer, watch


@pytest.mark.parametrize("degrees", MORE_MESHES)
def test_sft_packed(degrees: Degrees, tmp_path: Path, trl: None) -> None:
    together(train_sft, degrees, tmp_path)


def test_sft_in_fp32(tmp_path: Path, trl: None) -> None:
    """What differs is rounding: fp32 with sequence parallelism is as near to fp64 as without."""
    exact, plain = run_on_ranks(1, in_both_precisions, None, str(tmp_path / "one"))[0]
    found = run_on_ranks(2, in_both_precisions, SP2, str(tmp_path))[0][1]
    compare([found], plain, exact=3e-6)
    for mine, other, truth in zip(*(x["gradients"] for x in (found, plain, exact)), strict=True):
        largest = max(x.abs().max() for x in truth.values())
        ours, theirs = (
            max((x[name] - truth[name]).abs().max() for name in truth) / largest
            for x in (mine, other)
        )
        print(f"from fp64: {ours:.1e} sharded, {theirs:.1e} plain")
        assert ours < max(2 * theirs, 1e-6)


def test_sft_with_lora(tmp_path: Path, trl: None) -> None:
    together(train_sft, SP2, tmp_path, lora=True)


def adapters(degrees: Degrees | None, folder: str) -> dict[str, Tensor]:
    """What peft opens of the adapters that a trainer has trained, and what else it is asked."""
    quiet()
    from peft import PeftModel
    from safetensors.torch import load_file

    trainer = sft_trainer(degrees, folder, 2 if degrees is None else 1, lora=True)[0]
    trainer.train()
    trainer.model.save_pretrained(f"{folder}/adapters")
    if degrees is not None:
        with pytest.raises(UserError, match=r"compute_loss\(return_outputs=True\): .* logits"):
            trainer.compute_loss(trainer.model, {}, return_outputs=True)
        with pytest.raises(UserError, match=r"label_smoothing_factor = 0.1: TRL's trainers"):
            checks.check(type(trainer), SimpleNamespace(label_smoothing_factor=0.1), {})
        torch.distributed.barrier()
    PeftModel.from_pretrained(real_model(STARCODER2), f"{folder}/adapters")
    return load_file(f"{folder}/adapters/adapter_model.safetensors")


def test_adapters_are_saved_as_peft_does(tmp_path: Path, trl: None) -> None:
    expected = run_on_ranks(1, adapters, None, str(tmp_path / "one"))[0]
    assert all(x.any() for x in expected.values())
    for found in run_on_ranks(2, adapters, DP2, str(tmp_path)):
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def train_dpo(
    degrees: Degrees | None,
    folder: str,
    batch: int,
    *,
    lora: bool = False,
    held_out: int = 7,
    **loss: Any,
) -> Shown:
    quiet()
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    cls, own = kind(DPOTrainer, degrees)
    watch = Watch()
    texts = [f"{i} is {'even' if i % 2 == 0 else 'odd'}" for i in range(20)]
    pairs = [
        {"prompt": f"say {i}: ", "chosen": text, "rejected": text[::-1][: 4 + i % 5]}
        for i, text in enumerate(texts)
    ]
    model = real_model(BYTES, dtype=torch.float64)
    reference = copy.deepcopy(model)
    for parameter in reference.parameters():
        parameter.data = parameter.data * 0.9
    adapter = {"target_modules": ["q_proj", "c_proj"], "init_lora_weights": False, "r": 4}
    more = {"peft_config": LoraConfig(**adapter, task_type="CAUSAL_LM")} if lora else {}
    trainer = cls(
        model=model,
        ref_model=None if lora else reference,
        args=DPOConfig(**settings(folder, batch), **{"beta": 0.1, "max_length": 64} | loss),
        train_dataset=Dataset.from_list(pairs[:12]),
        eval_dataset=Dataset.from_list(pairs[12 : 12 + held_out]),
        processing_class=ByT5Tokenizer(),
        callbacks=[watch],
        **more,
        **own,
    )
    return show(trainer, watch)


@pytest.mark.parametrize("degrees", MORE_MESHES)
def test_dpo(degrees: Degrees, tmp_path: Path, trl: None) -> None:
    together(train_dpo, degrees, tmp_path)


def test_dpo_with_lora(tmp_path: Path, trl: None) -> None:
    together(train_dpo, SP2, tmp_path, lora=True)


EVERY_DPO = ["hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot"]
EVERY_DPO += ["aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm", "sigmoid"]


def test_dpo_of_every_kind(tmp_path: Path, trl: None) -> None:
    """All of TRL's losses of pairs in one sum, of another beta and divergence."""
    together(train_dpo, SP2, tmp_path, **every_dpo())


def every_dpo() -> Shown:
    weights = [0.1 + 0.1 * index for index in range(len(EVERY_DPO))]
    return {"loss_type": EVERY_DPO, "loss_weights": weights, "beta": 0.05, "label_smoothing": 0.1}


@pytest.mark.slow
@pytest.mark.parametrize("degrees", [DP2, DP2_SP2])
def test_dpo_of_every_kind_is_that_of_ddp(degrees: Degrees, tmp_path: Path, trl: None) -> None:
    # DDP counts some pairs twice where they do not fill the batches of all ranks.
    as_ddp(train_dpo, degrees, tmp_path, batch=2, held_out=8, **every_dpo())


@pytest.mark.parametrize("degrees", MORE_MESHES)
def test_dpo_of_another_divergence(degrees: Degrees, tmp_path: Path, trl: None) -> None:
    other = {"f_divergence_type": "js_divergence", "ld_alpha": 0.5, "beta": 0.02}
    together(train_dpo, degrees, tmp_path, **other)


def train_kto(degrees: Degrees | None, folder: str, batch: int) -> Shown:
    quiet()
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    cls, own = kind(KTOTrainer, degrees)
    watch = Watch()
    texts = [f"{i} is {'even' if i % 2 == 0 else 'odd'}" for i in range(20)]
    answers = [
        {"prompt": f"say {i}: ", "completion": text[: 4 + i % 7], "label": i % 2 > 0}
        for i, text in enumerate(texts)
    ]
    model = real_model(BYTES, dtype=torch.float64)
    reference = copy.deepcopy(model)
    for parameter in reference.parameters():
        parameter.data = parameter.data * 0.9
    # Both kinds on each rank: TRL's metrics of none are in fp32, and the others are in fp64 here.
    arguments = settings(folder, 2 * batch, train_sampling_strategy="sequential")
    arguments |= {"beta": 0.1, "max_length": 64}
    trainer = cls(
        model=model,
        ref_model=reference,
        args=KTOConfig(**arguments),
        train_dataset=Dataset.from_list(answers[:12]),
        eval_dataset=Dataset.from_list(answers[12:]),
        processing_class=ByT5Tokenizer(),
        callbacks=[watch],
        **own,
    )
    return show(trainer, watch)


@pytest.mark.parametrize("degrees", MORE_MESHES)
def test_kto(degrees: Degrees, tmp_path: Path, trl: None) -> None:
    """Its KL looks at the batch of a rank."""
    (together if degrees == SP2 else as_ddp)(train_kto, degrees, tmp_path)


def train_rewards(degrees: Degrees | None, folder: str, batch: int) -> Shown:
    quiet()
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    cls, own = kind(RewardTrainer, degrees)
    watch = Watch()
    pairs = [
        {"chosen": f"{i} is {'even' if i % 2 == 0 else 'odd'}", "rejected": "no"[: 1 + i % 2] * i}
        for i in range(1, 17)
    ]
    model = classifier_of(BYTES | {"num_labels": 1, "pad_token_id": 0})
    arguments = settings(folder, batch, per_device_eval_batch_size=2)
    trainer = cls(
        model=model,
        args=RewardConfig(**arguments, max_length=64, center_rewards_coefficient=0.1),
        train_dataset=Dataset.from_list(pairs[:12]),
        eval_dataset=Dataset.from_list(pairs[12:]),
        processing_class=ByT5Tokenizer(),
        callbacks=[watch],
        **own,
    )
    return show(trainer, watch)


@pytest.mark.parametrize("degrees", MORE_MESHES)
def test_rewards(degrees: Degrees, tmp_path: Path, trl: None) -> None:
    together(train_rewards, degrees, tmp_path)


# --- DPO from the TOML ----------------------------------------------------------------------------


def dpo_through_trl(material: Path, folder: str) -> Shown:
    """The pairs of test_loss_settings.py, all in each step, in one process."""
    quiet()
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    watch = Watch()
    model, reference = (
        AutoModelForCausalLM.from_pretrained(material / name, dtype=torch.float64)
        for name in ("start", "other")
    )
    own = {"gradient_accumulation_steps": 1, "learning_rate": LR, "lr_scheduler_type": "constant"}
    own |= {"optim": "adamw_torch", "adam_beta2": 0.95, "adam_epsilon": 1e-6}
    trainer = DPOTrainer(
        model=model,
        ref_model=reference,
        args=DPOConfig(**settings(folder, len(PAIRS), **own), beta=BETA, max_length=64),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=load_tokenizer("bytes"),
        callbacks=[watch],
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {"logs": logs, "gradients": watch.gradients}


def test_dpo_from_the_toml_is_that_of_trl(tmp_path: Path, trl: None) -> None:
    write_material(tmp_path)
    through_trl = run_on_ranks(1, dpo_through_trl, tmp_path, str(tmp_path / "trl"))[0]
    # Trainer decays some parameters only.
    wanted = dpo(tmp_path) | {"optimizer.weight_decay": 0.0, "training.steps": STEPS}
    for found in on_ranks(tmp_path, wanted, SP2):
        for step, log in enumerate(through_trl["logs"]):
            assert found.losses[step] == pytest.approx(log["loss"], rel=1e-6, abs=1e-6)
            assert found.norms[step] == pytest.approx(log["grad_norm"], rel=1e-5)
            for name, value in found.rewards[step].items():
                assert value == pytest.approx(log[f"rewards/{name}"], rel=1e-5, abs=1e-6)
        pairs = zip(found.gradients, through_trl["gradients"], strict=True)
        for step, (mine, other) in enumerate(pairs):
            largest = max(x.abs().max() for x in other.values())
            worst = max((mine[name] - x).abs().max() for name, x in other.items())
            assert worst / largest < 1e-6, step


# --- GRPO -----------------------------------------------------------------------------------------


def given_completions(prompts: list[str], trainer: Any) -> dict[str, list]:
    """Completions of several lengths that do not depend on the rank, and no generation.

    There are four of each prompt, one after the other.
    """
    made = {"prompt_ids": [], "completion_ids": [], "logprobs": None}
    for index, prompt in enumerate(prompts):
        number = index % 4
        length = 3 + (len(prompt) + 2 * number + trainer.state.global_step) % 7
        made["prompt_ids"].append([3 + x for x in prompt.encode()])
        ids = [(11 * number + 7 * len(prompt) + 5 * i) % 250 + 3 for i in range(length)]
        made["completion_ids"].append(ids)
    return made


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(sum(ids) % 17) for ids in completion_ids]


def train_grpo(
    degrees: Degrees | None, folder: str, batch: int, *, lora: bool = False, **loss: Any
) -> Shown:
    quiet()
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    cls, own = kind(GRPOTrainer, degrees)
    watch = Watch()
    adapter = {"target_modules": ["q_proj", "c_proj"], "init_lora_weights": False, "r": 4}
    if lora:
        own |= {"peft_config": LoraConfig(**adapter, task_type="CAUSAL_LM")}
    own |= {"rollout_func": given_completions, "reward_funcs": reward, "callbacks": [watch]}
    prompts = [{"prompt": "say" + i * "!"} for i in range(8)]
    arguments = settings(folder, 4 * batch) | {"max_completion_length": 16, "num_generations": 4}
    trainer = cls(
        model=real_model(BYTES, dtype=torch.float64),
        args=GRPOConfig(**arguments | loss),
        train_dataset=Dataset.from_list(prompts),
        eval_dataset=Dataset.from_list(prompts[:4]),
        processing_class=ByT5Tokenizer(),
        **own,
    )
    return show(trainer, watch)


@pytest.mark.parametrize("degrees", MORE_MESHES)
@pytest.mark.parametrize(
    "loss",
    [
        pytest.param({"temperature": 0.8}, marks=pytest.mark.slow),
        {"loss_type": "grpo", "num_iterations": 2, "epsilon": 0.1},
        {"loss_type": "cispo", "lora": True, "beta": 0.1},
    ],
    ids=["dapo", "grpo", "cispo-kl-lora"],
)
def test_grpo_of_given_completions(
    degrees: Degrees, loss: Shown, tmp_path: Path, trl: None
) -> None:
    (together if degrees == SP2 else as_ddp)(train_grpo, degrees, tmp_path, **loss)


def start_grpo(folder: str) -> None:
    quiet()
    from trl import GRPOConfig, GRPOTrainer

    cls, own = kind(GRPOTrainer, SP2)
    model = real_model(BYTES, dtype=torch.float32)
    cls(model=model, args=GRPOConfig(**settings(folder, 2)), reward_funcs=len, **own)


def test_trainers_that_generate_are_refused(tmp_path: Path, trl: None) -> None:
    with pytest.raises(RankFailure, match="it generates with the model it trains"):
        run_on_ranks(2, start_grpo, str(tmp_path))
    from trl import GRPOTrainer, RLOOTrainer

    told = {
        GRPOTrainer: "elsewhere by rollout_func, or train",
        RLOOTrainer: "elsewhere to GRPOTrainer, or train",
    }
    for base, words in told.items():
        with pytest.raises(UserError, match=words):
            checks.check(type("Long", (UlyssesTrainer, base), {}), SimpleNamespace(), {})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trainer", "trl_sft"])
def test_the_examples(name: str, tmp_path: Path, trl: None) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += [f"scripts/examples/{name}.py", "tiny", "LICENSE", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=300)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
