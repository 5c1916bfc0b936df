"""Evaluate whether a model finds a fact in a long text, for each length of the text and each depth
at which the fact stands in it.

    titan-ulysses needle outputs/quickstart/export --lengths 512 1024
    torchrun --nproc-per-node 8 -m titan_ulysses needle MODEL --lengths 65536 262144 --trials 4

A needle, such as "The secret code of zorabi is 48213.", is put into a text, and the text ends with
the question "The secret code of zorabi is". Nothing is generated. Instead, the log-probability of
several codes after the question is computed: of the right code, and of others that the needle does
not contain. Each code is one row of a forward, in which the ranks share the sequence. Accuracy is
how often the right code has the highest log-probability; guessing finds 1 in --candidates. A length
counts all tokens of a row. Depth 0 is the beginning of the text, and 1 its end. The same seed makes
the same texts and needles, which at one length are the same at every depth.

Writes needle.json and, where matplotlib is installed, needle.png to --output: needle/ beside the
model.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from titan_ulysses.observability.pictures import picture
from titan_ulysses.tools.long_texts import (
    Puzzle,
    Trial,
    checked,
    draw_codes,
    draw_key,
    heat_map,
    hide,
    long_texts_parser,
    run,
)
from titan_ulysses.train.evaluation import score

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

QUESTION = "\nThe secret code of {key} is"
ANSWER = " {code}"
NEEDLE = QUESTION + ANSWER + ".\n"


class NeedleResult(NamedTuple):
    """The result of all trials with one length and depth."""

    length: int
    depth: float
    accuracy: float
    log_probability: float
    """mean log-probability per token of the right code, over all trials, in nats"""


def make_trial(
    tokenizer: PreTrainedTokenizerBase,
    text: Sequence[int],
    *,
    length: int,
    depth: float,
    candidates: int,
    seed: str,
) -> Trial:
    """Make a trial of `length` tokens, its longest code included.

    `seed` chooses the key, the codes, and the part of text that is taken. UserError where needle
    and question alone are longer than `length`, or where text is too short.
    """
    draw = random.Random(seed)
    key, (code, *others) = draw_key(draw), draw_codes(draw, candidates)
    puzzle = Puzzle(
        [(depth, NEEDLE.format(key=key, code=code))],
        QUESTION.format(key=key),
        [ANSWER.format(code=one) for one in (code, *others)],
        "needle and question",
    )
    return hide(puzzle, tokenizer, text, length=length, draw=draw)


def code_scores(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    """Return the log-probability of the code of each row, [B]. Collective."""
    return score(model, batch).sum(dim=1, dtype=torch.float64).float()


def result_of(
    length: int, depth: float, trials: Sequence[Trial], scores: torch.Tensor
) -> NeedleResult:
    """Sum up the log-probabilities [trials, codes] of a cell."""
    of_tokens = [
        right / len(trial.answers[0])
        for right, trial in zip(scores[:, 0].tolist(), trials, strict=True)
    ]
    accuracy = (scores[:, 0] > scores[:, 1:].amax(dim=1)).double().mean().item()
    return NeedleResult(length, depth, accuracy, sum(of_tokens) / len(of_tokens))


def draw_map(cells: Sequence[NeedleResult], options: Any, path: Path) -> None:
    """Draw accuracy and log-probability side by side, with a number in every cell."""
    size = (3 + 1.7 * len(options.lengths), 2.2 + 0.5 * len(options.depths))
    with picture(path, size=size, panels=(1, 2)) as (figure, panels):
        guessing = f"{100 / options.candidates:.3g}"
        panels[0].set_title(
            f"right among {options.candidates} codes, %\n(guessing: {guessing})", fontsize=10
        )
        heat_map(
            panels[0], (100 * cell.accuracy for cell in cells), options, low=0, high=100, form=".0f"
        )
        panels[1].set_title("log-probability of the right code,\nnats a token", fontsize=10)
        low = min(-0.1, *(cell.log_probability for cell in cells))
        found = (cell.log_probability for cell in cells)
        heat_map(panels[1], found, options, low=low, high=0, form=".2f")
        figure.suptitle(f"{options.model}: {options.trials} trials a cell", fontsize=10)


def main(argv: list[str]) -> None:
    parser = long_texts_parser("needle", __doc__, output="needle")
    parser.add_argument("--candidates", type=int, default=8, help="codes to choose from (8)")
    options = checked(parser.parse_args(argv), candidates=2)
    chance = 1 / options.candidates

    def say(cell: NeedleResult) -> str:
        return (
            f"{cell.length:>9,} tokens, depth {cell.depth:4.0%}: accuracy {cell.accuracy:4.0%} "
            f"(guessing: {chance:.0%}), log-probability {cell.log_probability:.3f} a token"
        )

    run(
        options,
        name="needle",
        make=partial(make_trial, candidates=options.candidates),
        score=code_scores,
        result_of=result_of,
        say=say,
        draw=draw_map,
        more={"chance": chance},
    )
