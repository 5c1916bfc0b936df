"""Runs of a vision-language model as their users start them: trained on images, resumed, evaluated
and exported, on one rank and several, against plain transformers.
"""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from helpers.meshes import SP2, Degrees
from helpers.pictures import QWEN3_VL, picture, tiny_processor, write_chats
from helpers.ranks import RankFailure, run_on_ranks
from helpers.runs import learned, logged, refusal, train
from titan_ulysses.config.load import load_config
from titan_ulysses.config.schema import Config
from titan_ulysses.config.toml import to_toml
from titan_ulysses.data.packing import SampleStream
from titan_ulysses.data.pipeline import open_sequences
from titan_ulysses.data.processor import open_vision
from titan_ulysses.model.lora import add_adapters, initialize_adapters
from titan_ulysses.optim.optimizer import build_optimizer
from titan_ulysses.train.trainer import Trainer

pytest.importorskip("PIL")
pytest.importorskip("torchvision")
SHARED = {"parallelism.sequence_parallel_degree": 2}


def write_model(folder: Path, **text: Any) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**QWEN3_VL | {"text_config": {**QWEN3_VL["text_config"], **text}})
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)


def write_run(folder: Path) -> Path:
    """Write a tiny model with its processor, chats with images, and a config of three steps."""
    write_model(folder / "model")
    keys = {
        "job.dump_folder": folder / "outputs",
        "model.path": folder / "model",
        "model.vision": "train",
        "data.source": "chat",
        "data.path": write_chats(folder / "train", chats=16),
        "data.packing": "best_fit",
        "validation.enable": True,
        "validation.path": write_chats(folder / "held-out", chats=5, seed=1),
        "validation.interval": 2,
        "validation.steps": 0,
        "training.seq_len": 128,
        "training.global_batch_size": 4,
        "training.steps": 3,
        "training.param_dtype": "float32",
        "optimizer.lr": 3e-3,
        "lr_scheduler.warmup_steps": 1,
        "lr_scheduler.decay_type": "constant",
        "checkpoint.interval": 2,
        "metrics.enable_report": False,
    }
    path = folder / "run.toml"
    path.write_text("".join(f"{key} = {_toml(value)}\n" for key, value in keys.items()))
    return path


def _toml(value: Any) -> str:
    return to_toml(str(value) if isinstance(value, Path) else value)


def streams_of(config: Config) -> tuple[SampleStream, SampleStream]:
    vision = open_vision(config, AutoConfig.for_model(**QWEN3_VL))
    training, held_out = open_sequences(config, vision.processor.tokenizer, vision)
    return training, held_out


def plain_loss(model: Any, processor: Any, stream: SampleStream, index: int, lines: Any) -> Any:
    """Return the summed loss of a sequence, each of its chats alone with a plain processor call."""
    sample, at, total = stream[index], 0, torch.zeros(())
    for number in stream.documents(index):
        messages, folder = lines
        chat = json.loads(messages[int(number)])["messages"]
        for item in chat[0]["content"]:
            if item["type"] == "image" and "image" in item:
                item["image"] = str(folder / item["image"])
        inputs = processor.apply_chat_template(
            chat, tokenize=True, return_dict=True, return_tensors="pt"
        )
        logits, count = model(**inputs).logits[0], inputs["input_ids"].shape[1]
        labels = sample.labels[at : at + count]
        total = total + F.cross_entropy(logits, labels, reduction="sum")
        at += count
    return total


def lines_of(path: str) -> tuple[list[str], Path]:
    return Path(path).read_text().splitlines(), Path(path).parent


def train_plainly(config: Config) -> tuple[list[tuple[float, float]], list[float]]:
    """Return (loss, gradient norm) of each step, and the held-out losses that a run has too."""
    model = AutoModelForImageTextToText.from_pretrained(config.model.path, dtype=torch.float32)
    if config.lora.rank:  # what computes is peft
        add_adapters(model, config.lora)
        initialize_adapters(model, config.training.seed)
    processor = AutoProcessor.from_pretrained(config.model.path)
    training, held_out = streams_of(config)
    optimizer = build_optimizer(model, config.optimizer)
    found, validated = [], []

    def validate() -> None:
        with torch.no_grad():
            lines = lines_of(config.validation.path)
            losses = [
                plain_loss(model, processor, held_out, i, lines) for i in range(len(held_out))
            ]
        labels = sum(int((held_out[i].labels >= 0).sum()) for i in range(len(held_out)))
        validated.append(float(sum(losses) / labels))

    for step in range(config.training.steps):
        if step == 0:
            validate()
        size = config.training.global_batch_size
        rows = range(step * size, (step + 1) * size)
        count = sum(int((training[i].labels >= 0).sum()) for i in rows)
        lines = lines_of(config.data.path)
        losses = [plain_loss(model, processor, training, i, lines) / count for i in rows]
        sum(losses).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.training.max_norm)
        optimizer.step()
        optimizer.zero_grad()
        found.append((float(sum(losses).detach()), float(norm)))
        if step + 1 in (config.training.steps, config.validation.interval):
            validate()
    return found, validated


def killed(config: Path, settings: dict[str, Any]) -> None:
    """SIGKILL to all ranks in step 3, with images decoded ahead; the last checkpoint is of 2."""
    step = Trainer._step

    def dying(trainer: Trainer, *args: Any) -> Any:
        if trainer.state.step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(trainer, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", dying)
        train(config, settings)


def validated(run: Path) -> list[float]:
    return [line["validation_loss"] for line in logged(run) if "validation_loss" in line]


def test_runs_with_images_equal_plain_transformers(tmp_path: Path) -> None:
    """On two ranks that share each sequence, on 2 x 2, and killed in the middle."""
    config = write_run(tmp_path)
    runs = {"two": (2, SHARED), "four": (4, SHARED)}
    for name, (ranks, changes) in runs.items():
        run_on_ranks(ranks, train, config, {"job.name": name, **changes}, timeout=300)
    plain, held_out = train_plainly(load_config(config, []))
    for name in runs:
        found = learned(tmp_path / "outputs" / name)
        assert [step for step, *_ in found] == [1, 2, 3]
        for (_, *ours), theirs in zip(found, plain, strict=True):
            assert ours == pytest.approx(theirs, rel=2e-5), name
        assert validated(tmp_path / "outputs" / name) == pytest.approx(held_out, rel=2e-5), name
    assert not math.isclose(plain[0][0], plain[-1][0], rel_tol=1e-2)  # it has learned something

    # A run that is killed in its third step goes on with the same bits.
    again = {"job.name": "again", **SHARED}
    with pytest.raises(RankFailure, match="died with exit code -9"):
        run_on_ranks(2, killed, config, again)
    assert [step for step, *_ in learned(tmp_path / "outputs" / "again")] == [1, 2]
    run_on_ranks(2, train, config, again)
    assert learned(tmp_path / "outputs" / "again") == learned(tmp_path / "outputs" / "two")
    exports = [tmp_path / "outputs" / name / "export" for name in ("two", "again")]
    one, other = (load_file(folder / "model.safetensors") for folder in exports)
    assert one.keys() == other.keys() and all(torch.equal(one[x], other[x]) for x in one)

    # transformers opens the export, with the processor.
    model = AutoModelForImageTextToText.from_pretrained(exports[0])
    processor = AutoProcessor.from_pretrained(exports[0])
    assert type(processor).__name__ == "Qwen3VLProcessor" and processor.chat_template
    assert model.num_parameters() == sum(x.numel() for x in one.values())


@pytest.mark.slow  # test_lora.py trains adapters of text
def test_adapters_of_the_text(tmp_path: Path) -> None:
    """Against peft; and of a base in four bits, two ranks against one."""
    config, lora = write_run(tmp_path), {"model.vision": "frozen", "lora.rank": 4}
    write_model(tmp_path / "wide", intermediate_size=64)  # blocks of four bits have 64
    four_bits = lora | {"lora.quantize_base": "nf4", "model.path": str(tmp_path / "wide")}
    runs = {"two": SHARED | lora, "nf4-two": SHARED | four_bits, "nf4-one": four_bits}
    for name, changes in runs.items():
        run_on_ranks(2 if "two" in name else 1, train, config, {"job.name": name, **changes})
    found = {name: learned(tmp_path / "outputs" / name) for name in runs}
    plain, held_out = train_plainly(load_config(config, lora.items()))
    for (_, *ours), theirs in zip(found["two"], plain, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5)
    assert validated(tmp_path / "outputs" / "two") == pytest.approx(held_out, rel=2e-5)
    for (_, *ours), theirs in zip(found["nf4-two"], found["nf4-one"], strict=True):
        assert ours == pytest.approx(theirs[1:], rel=2e-5)
    assert found["nf4-two"] != found["two"]


def test_what_a_run_refuses(tmp_path: Path) -> None:
    """Images that would be cut, a broken one that only decoding shows, a model of text."""
    config = write_run(tmp_path)
    for changes, words in (
        ({"data.packing": "concat"}, 'data.packing = "concat" would cut them at the ends of seq'),
        ({"training.seq_len": 64}, "a document with images cannot be cut: raise training.seq_len"),
    ):
        (said,) = run_on_ranks(1, refusal, config, changes)
        assert words in said, said
    broken = tmp_path / "train" / "00-0.png"
    content = bytearray(broken.read_bytes())
    content[60] ^= 255
    broken.write_bytes(content)
    (said,) = run_on_ranks(1, refusal, config, {})
    assert 'chats.jsonl:1: image 1 ("' in said and "it is damaged or cut short (" in said, said
    assert 'set bad_lines = "skip"' in said
    run_on_ranks(1, train, config, {"data.bad_lines": "skip", "training.steps": 1})


def train_sft(
    degrees: Degrees | None, folder: str, batch: int, model_folder: str
) -> dict[str, Any]:
    """Train through TRL on chats with images of a column, each with its own number of images."""
    from test_integrations import Watch, kind, quiet, settings, show

    quiet()
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    cls, own = kind(SFTTrainer, degrees)
    watch = Watch()
    rows = [
        {
            "messages": [
                {
                    "role": "user",
                    "content": [*({"type": "image", "text": None} for _ in range(1 + number % 3))]
                    + [{"type": "text", "text": "what is it? "[: 3 + number % 9]}],
                },
                {"role": "assistant", "content": [{"type": "text", "text": f"it is {number}"}]},
            ],
            "images": [picture(number + i, 16 + 8 * i, 24) for i in range(1 + number % 3)],
        }
        for number in range(15)
    ]
    arguments = settings(folder, batch, gradient_accumulation_steps=2)
    trainer = cls(
        model=AutoModelForImageTextToText.from_pretrained(model_folder, dtype=torch.float32),
        args=SFTConfig(**arguments, max_length=None, gradient_checkpointing=False),
        train_dataset=Dataset.from_list(rows[:10]),
        eval_dataset=Dataset.from_list(rows[10:]),
        processing_class=AutoProcessor.from_pretrained(model_folder),
        callbacks=[watch],
        **own,
    )
    # A step is the mean over its labels, not that of the means of its micro-batches.
    trainer.model_accepts_loss_kwargs = True
    return show(trainer, watch)


def test_sft_of_a_model_of_images_through_trl(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from test_integrations import compare

    write_model(tmp_path / "model")
    more = (1, str(tmp_path / "model"))
    (plain,) = run_on_ranks(1, train_sft, None, str(tmp_path / "one"), *more, timeout=300)
    found = run_on_ranks(2, train_sft, SP2, str(tmp_path / "two"), *more, timeout=300)
    compare(found, plain, exact=1e-5)
