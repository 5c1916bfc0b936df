"""Does plain transformers get the loss that the run logged? Opens <run>/export and evaluates the held-out text.

    python scripts/check_export.py outputs/quickstart

Each document is a forward of its own, on one process, with transformers' own attention and torch's cross-entropy.
Exits with 1 where the two losses differ by more than 1e-5.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from titan_ulysses.config_file import load_config
from titan_ulysses.data import open_sequences

TOLERANCE = 1e-5


@torch.no_grad()
def held_out_loss(run: Path, tokens: int) -> float:
    """Mean cross-entropy of the exported model over the first `tokens` predicted tokens of the held-out text."""
    model = AutoModelForCausalLM.from_pretrained(run / "export").eval()
    _, held_out = open_sequences(load_config(run / "config.toml"), AutoTokenizer.from_pretrained(run / "export"))
    total, count, index = 0.0, 0, 0
    while count < tokens:
        sequence, start = held_out[index], 0
        for length in sequence.document_lengths:
            span = slice(start, start + length)
            logits = model(input_ids=sequence.input_ids[None, span], use_cache=False).logits[0]
            total += F.cross_entropy(logits.float(), sequence.labels[span], reduction="sum").double().item()
            count += int((sequence.labels[span] != -100).sum())
            start += length
        index += 1
    assert count == tokens, f"the run validated on {tokens} tokens, these sequences have {count}"
    return total / count


def main() -> None:
    run = Path(sys.argv[1])
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    logged = [line for line in lines if "validation_loss" in line][-1]
    found = held_out_loss(run, logged["validation_tokens"])
    difference = abs(found - logged["validation_loss"])
    print(
        f"held-out loss of step {logged['step']}: the run logged {logged['validation_loss']:.8f}, "
        f"plain transformers gets {found:.8f}, difference {difference:.1e} over {logged['validation_tokens']:,} tokens"
    )
    sys.exit(difference > TOLERANCE)


if __name__ == "__main__":
    main()
