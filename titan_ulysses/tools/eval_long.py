"""Evaluate what a model does with a long text, by task, length, and depth: the kinds of tasks of
RULER (arXiv 2404.06654), made here.

    titan-ulysses eval-long outputs/quickstart/export --lengths 512 1024
    torchrun --nproc-per-node 8 -m titan_ulysses eval-long MODEL \\
        --lengths 65536 262144 --tasks variables

| task | the text has | asked is |
|---|---|---|
| needles | secret codes of several names; one at the depth, the others anywhere | that code |
| variables | a chain of assignments, the first one at the depth | the variables with that value |
| words | words that are there twice, and one more often, around the depth | that word |
| questions | where people live, a sentence each; one person's at the depth | where they live |

Nothing is generated. The answer is given to the model after the question, and each of its tokens is
scored given those before it: by its loss, and by whether it is the likeliest token. If all are, a
model that decodes greedily would answer so. The ranks share each sequence. A length counts all
tokens of a row. Depth 0 is the beginning of the text, and 1 its end. The same seed makes the same
texts, which at one length have the same answers at every depth. needles and variables are hidden in
--text; the other two tasks fill the text with their own kind.

Writes long.json and, where matplotlib is installed, long.png to --output: long/ beside the model.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
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
    draw_keys,
    heat_map,
    hide,
    long_texts_parser,
    run,
)
from titan_ulysses.train.evaluation import log_probs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_OFTEN = 10
"""How often the word of `words` is in the text; the others are there twice."""
_AROUND = 0.1
"""How far from the depth, as a share of the text, it may be."""


class TaskResult(NamedTuple):
    """The result of all trials of one task with one length and depth."""

    task: str
    length: int
    depth: float
    loss: float
    """mean cross-entropy of an answer's tokens, in nats; the mean of that over the answers"""
    likeliest: float
    """share of the answers' tokens that are the likeliest, likewise"""
    exact: float
    """share of the answers of which all tokens are the likeliest"""


# --- the tasks ------------------------------------------------------------------------------------


def needles(draw: random.Random, depth: float, count: int) -> Puzzle:
    """`count` codes, of which one is asked for."""
    keys, codes = draw_keys(draw, count), draw_codes(draw, count)
    places = [depth, *(draw.random() for _ in range(count - 1))]
    pieces = [
        (place, f"\nThe secret code of {key} is {code}.\n")
        for place, key, code in zip(places, keys, codes, strict=True)
    ]
    return Puzzle(
        pieces, f"\nThe secret code of {keys[0]} is", [f" {codes[0]}"], "what needles needs"
    )


def variables(draw: random.Random, depth: float, count: int) -> Puzzle:
    """A chain of `count` variables; each but the first has the value of the one before it."""
    names = [name.upper() for name in draw_keys(draw, count)]
    (value,) = draw_codes(draw, 1)
    shares = sorted(draw.random() for _ in range(count - 1))
    places = [depth, *(depth + (1 - depth) * share for share in shares)]
    lines = [f"\nVAR {names[0]} = {value}\n"]
    lines += [f"\nVAR {new} = VAR {old}\n" for old, new in zip(names, names[1:], strict=False)]
    question = f"\nThe variables with the value {value}, in the order of the text, are"
    pieces = list(zip(places, lines, strict=True))
    return Puzzle(pieces, question, [" " + ", ".join(names)], "what variables needs")


def words(draw: random.Random, depth: float, count: int) -> Puzzle:
    """One word `_OFTEN` times around the depth, in a list in which each other word is twice."""
    often, seed = draw_key(draw), draw.random()
    places = [depth + _AROUND * draw.uniform(-1, 1) for _ in range(_OFTEN)]
    pieces = [(min(1.0, max(0.0, place)), f" {often}") for place in places]

    def filler() -> Iterator[str]:
        own = random.Random(seed)
        while True:
            some = [draw_key(own) for _ in range(16)]
            listed = [word for word in own.sample(2 * some, 32) if word != often]
            for first in range(0, len(listed), 4):
                yield "".join(f" {word}" for word in listed[first : first + 4])

    question = "\nThe word that is most often in this list is"
    return Puzzle(pieces, question, [f" {often}"], "what words needs", filler)


def questions(draw: random.Random, depth: float, count: int) -> Puzzle:
    """Where one person lives, in a text in which each sentence says it of another person."""
    person, place, seed = draw_key(draw), draw_key(draw), draw.random()

    def says(who: str, where: str) -> str:
        return f"\n{who.capitalize()} lives in the town of {where.capitalize()}."

    def filler() -> Iterator[str]:
        own = random.Random(seed)
        while True:
            who = draw_key(own)
            if who != person:
                yield says(who, draw_key(own))

    asked = f"\nQuestion: where does {person.capitalize()} live? Answer: in the town of"
    answers, what = [f" {place.capitalize()}"], "what questions needs"
    return Puzzle([(depth, says(person, place))], asked, answers, what, filler)


TASKS: dict[str, Callable[[random.Random, float, int], Puzzle]] = {
    "needles": needles,
    "variables": variables,
    "words": words,
    "questions": questions,
}


# --- texts and scores -----------------------------------------------------------------------------


def make_trial(
    tokenizer: PreTrainedTokenizerBase,
    text: Sequence[int],
    *,
    task: str,
    length: int,
    depth: float,
    count: int,
    seed: str,
) -> Trial:
    """Make a trial of `length` tokens with its answer. `seed` chooses all that depth does not.

    UserError where pieces and question alone are longer than length, or where text is too short.
    """
    draw = random.Random(f"{seed} {task}")
    return hide(TASKS[task](draw, depth, count), tokenizer, text, length=length, draw=draw)


def answer_scores(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    """Return the loss and the number of likeliest tokens of each row's answer, [B, 2].

    Collective.
    """
    of_tokens = log_probs(model, batch)
    found = torch.stack([-of_tokens.log_probs.double(), of_tokens.is_top1.double()], dim=-1)
    return found.sum(dim=1)


def result_of(
    task: str, length: int, depth: float, trials: Sequence[Trial], scores: torch.Tensor
) -> TaskResult:
    """Sum up the scores [trials, 1, 2] of a cell."""
    sizes = [len(trial.answers[0]) for trial in trials]
    each = [
        (loss / n, top / n) for (loss, top), n in zip(scores[:, 0].tolist(), sizes, strict=True)
    ]
    losses, shares = zip(*each, strict=True)
    n = len(trials)
    exact = sum(share == 1 for share in shares) / n
    return TaskResult(task, length, depth, sum(losses) / n, sum(shares) / n, exact)


def draw_maps(cells: Sequence[TaskResult], options: Any, path: Path) -> None:
    """Draw each task in a row: the loss, the likeliest tokens, the exact answers."""
    size = (4 + 2.4 * len(options.lengths), len(options.tasks) * (1.6 + 0.4 * len(options.depths)))
    with picture(path, size=size, panels=(len(options.tasks), 3)) as (figure, panels):
        worst = max(0.1, *(cell.loss for cell in cells))
        for row, task in enumerate(options.tasks):
            own = [cell for cell in cells if cell.task == task]
            loss, likeliest, exact = panels[3 * row : 3 * row + 3]
            # Of every map, what is good is bright.
            found = (-cell.loss for cell in own)
            heat_map(loss, found, options, low=-worst, high=0, form=".2f")
            shares = (100 * cell.likeliest for cell in own)
            heat_map(likeliest, shares, options, low=0, high=100, form=".0f")
            whole = (100 * cell.exact for cell in own)
            heat_map(exact, whole, options, low=0, high=100, form=".0f")
            loss.set_title(f"{task}: log-probability, nats a token", fontsize=9)
            likeliest.set_title("likeliest tokens of the answer, %", fontsize=9)
            exact.set_title("answers of only likeliest tokens, %", fontsize=9)
        figure.suptitle(f"{options.model}: {options.trials} trials a cell", fontsize=10)


def say(cell: TaskResult) -> str:
    return (
        f"{cell.task:<9} {cell.length:>9,} tokens, depth {cell.depth:4.0%}: loss "
        f"{cell.loss:.3f}, likeliest tokens {cell.likeliest:.0%}, exact {cell.exact:.0%}"
    )


def main(argv: list[str]) -> None:
    parser = long_texts_parser("eval-long", __doc__, output="long")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS], metavar="TASK")
    counted = "codes in needles, variables in a chain (4)"
    parser.add_argument("--count", type=int, default=4, help=counted)
    options = checked(parser.parse_args(argv), count=2)
    options.tasks = [task for task in TASKS if task in options.tasks]
    run(
        options,
        name="long",
        make=partial(make_trial, count=options.count),
        score=answer_scores,
        result_of=result_of,
        say=say,
        draw=draw_maps,
        tasks=options.tasks,
    )
