"""What a run generates at validations, against transformers' own generation."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from helpers.ranks import run_on_ranks
from helpers.runs import Settings, logged, said_by, write_run
from titan_ulysses.data.tokenizer import encode, load_tokenizer

PROMPTS = ["the tale of a tale", "a"]
SETTINGS: Settings = {
    "validation.enable": True,
    "validation.prompts": PROMPTS,
    "validation.prompt_tokens": 7,
    "training.steps": 3,
    "lr_scheduler.warmup_steps": 0,
    "optimizer.lr": 1e-2,
    "checkpoint.export": True,
}
SHARED: Settings = {"parallelism.sequence_parallel_degree": 2, "memory.stream_chunk_tokens": 8}
SHARED["metrics.enable_report"] = True
"""Two ranks share a sequence, in chunks; the slices of one prompt end in padding. Both prompts are
sampled at once.
"""


def plainly(folder: Path, prompt: str) -> str:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = load_tokenizer("bytes")
    ids = torch.tensor(encode(tokenizer, prompt, ends=False).astype("int64"))[None]
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=7, do_sample=False)
    new = out[0, ids.shape[1] :].tolist()
    if new[-1] == model.generation_config.eos_token_id:
        new.pop()
    return tokenizer.decode(new, clean_up_tokenization_spaces=False)


def samples(config: Path, name: str, settings: Settings) -> dict[str, str]:
    """What a run on two ranks generates at its end: what transformers does with what it exports."""
    said, _ = run_on_ranks(2, said_by, config, SETTINGS | settings | {"job.name": name})
    assert said.count(f'sample: "{PROMPTS[0]}" -> "') == 2
    run = config.parent / "outputs" / name
    found = [line["validation_samples"] for line in logged(run) if "validation_loss" in line]
    assert len(found) == 2 and found[0] != found[1]
    assert found[1] == {prompt: plainly(run / "export", prompt) for prompt in PROMPTS}
    return found[1]


def test_samples_are_those_of_transformers(tmp_path: Path) -> None:
    config, run = write_run(tmp_path), tmp_path / "outputs" / "shared"
    first, second = samples(config, "shared", SHARED).values()
    assert "at the last one" in (run / "report.html").read_text()
    events = b"".join(file.read_bytes() for file in (run / "tensorboard").iterdir())
    assert b"validation_samples/1" in events
    # A token ends texts, as an end of turn does, because the model's own configuration names it.
    end = next(one for one in first[1:] if one.isascii() and one not in second)
    ended: Settings = {"model.config.eos_token_id": ord(end)}
    # One prompt at a time: with what follows they are longer than a batch.
    ended |= {"parallelism.data_parallel_shard_degree": 2, "training.local_batch_size": 1}
    assert samples(config, "ended", ended) == dict(
        zip(PROMPTS, (first[: first.index(end)], second), strict=True)
    )
