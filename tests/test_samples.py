"""What a run generates at validations, against transformers' own generation."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from helpers.ranks import run_on_ranks
from helpers.runs import Settings, logged, train, write_run
from titan_ulysses.data.tokenizer import encode, load_tokenizer

PROMPTS = ["the tale", "a"]


def test_samples_are_those_of_transformers(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """On two ranks that share each sequence; before the first step, and of what is exported."""
    import torch

    settings: Settings = {
        "validation.enable": True,
        "validation.prompts": PROMPTS,
        "validation.prompt_tokens": 7,
        "parallelism.sequence_parallel_degree": 2,
        "training.steps": 3,
        "lr_scheduler.warmup_steps": 0,
        "optimizer.lr": 1e-2,
        "checkpoint.export": True,
        "metrics.enable_report": True,
    }
    run_on_ranks(2, train, write_run(tmp_path), settings)
    run = tmp_path / "outputs" / "run"
    found = [line["validation_samples"] for line in logged(run) if "validation_loss" in line]
    assert len(found) == 2 and found[0] != found[1]
    model = AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float32)
    tokenizer = load_tokenizer("bytes")
    for prompt in PROMPTS:
        ids = torch.tensor(encode(tokenizer, prompt, ends=False).astype("int64"))[None]
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=7, do_sample=False
        )
        new = [x for x in out[0, ids.shape[1] :].tolist() if x != tokenizer.eos_token_id]
        assert found[1][prompt] == tokenizer.decode(new, clean_up_tokenization_spaces=False)
    assert f'sample: "{PROMPTS[0]}" -> "' in capfd.readouterr().out
    assert "at the last one" in (run / "report.html").read_text()
    assert b"validation_samples/1" in b"".join(
        file.read_bytes() for file in (run / "tensorboard").iterdir()
    )
