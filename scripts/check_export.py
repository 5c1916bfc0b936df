"""Check that plain transformers gets the loss that a run logged: open <run>/export, and evaluate it
on the held-out text.

    python scripts/check_export.py outputs/quickstart
    python scripts/check_export.py outputs/before --model MODEL --config X.toml
        for a run of --evaluate: compare with its evaluation.json; MODEL is the model it evaluated

Each document is a forward by itself, in one process, with the attention of transformers and the
cross-entropy of torch. Exits with 1 where the two losses differ by more than --tolerance.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from titan_ulysses.config.load import load_config
from titan_ulysses.data.pipeline import open_sequences
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.launch.failure import exit_on_error
from titan_ulysses.train.evaluation import spread


@torch.no_grad()
def held_out_loss(folder: Path, config: Path, tokens: int, sequences: int) -> float:
    """Return the mean cross-entropy of the model in folder over `sequences` sequences of the
    held-out text, which must have `tokens` labels.
    """
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    ).eval()
    settings = load_config(config, [("validation.enable", True)])
    if settings.validation.sets:
        raise UserError(
            f"{config}: [[validation.sets]] are several sets, and this script reads one: give a "
            "--config with validation.path"
        )
    _, held_out = open_sequences(
        settings, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    )
    assert held_out is not None
    total, count = 0.0, 0
    for index in spread(len(held_out), sequences):
        sequence, start = held_out[index], 0
        for length in sequence.document_lengths:
            span = slice(start, start + length)
            logits = model(input_ids=sequence.input_ids[None, span], use_cache=False).logits[0]
            # In fp64: over 49,152 fp32 logits on a CPU, torch's cross-entropy has an error of 7e-6,
            # always in the same direction.
            total += F.cross_entropy(logits.double(), sequence.labels[span], reduction="sum").item()
            count += int((sequence.labels[span] != -100).sum())
            start += length
    assert count == tokens, f"the run validated on {tokens} tokens, these sequences have {count}"
    return total / count


def logged(run: Path, *, evaluation: bool) -> tuple[float, int, int]:
    """Return the held-out loss that a run logged, its number of tokens and of sequences.

    evaluation: read those of --evaluate, else those of the last validation.
    UserError where it logged none.
    """
    file = run / ("evaluation.json" if evaluation else "metrics.jsonl")
    if not file.is_file():
        made = "--evaluate" if evaluation else "a run"
        raise UserError(f"{file}: not there; {made} writes it.")
    if evaluation:
        found = json.loads(file.read_text())
        return found["loss"], found["tokens"], found["sequences"]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    last = next((line for line in reversed(lines) if "validation_loss" in line), None)
    if last is None:
        raise UserError(
            f"{file}: the run has validated nothing, so there is no loss to compare with. Train "
            "with validation.enable = true, or evaluate with --evaluate, and give --model."
        )
    return last["validation_loss"], last["validation_tokens"], last["validation_sequences"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=Path)
    add("--model", type=Path, help="compare with evaluation.json, of this folder's weights")
    add("--config", type=Path, help="that the run had (default: config.toml of the run)")
    add("--tolerance", type=float, default=1e-5)
    args = parser.parse_args(argv)
    loss, tokens, sequences = logged(args.run, evaluation=args.model is not None)
    folder = args.model or args.run / "export"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a run writes export/ at its end.")
    found = held_out_loss(folder, args.config or args.run / "config.toml", tokens, sequences)
    difference = abs(found - loss)
    print(
        f"held-out loss: the run logged {loss:.8f}, plain transformers gets {found:.8f}, "
        f"difference {difference:.1e} over {tokens:,} tokens"
    )
    sys.exit(difference > args.tolerance)


if __name__ == "__main__":
    with exit_on_error():
        main()
