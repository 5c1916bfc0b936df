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

Writes long.json and, where matplotlib is installed, long.png to --output.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from titan_ulysses.data.adapter import shard
from titan_ulysses.data.tokenizer import encode
from titan_ulysses.distributed.mesh import Mesh
from titan_ulysses.observability.pictures import picture
from titan_ulysses.tools.long_texts import (
    add_options,
    batches_of,
    check_options,
    draw_codes,
    draw_key,
    draw_keys,
    fill,
    grid,
    heat_map,
    run,
)
from titan_ulysses.train.evaluation import log_probs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_OFTEN = 10
"""How often the word of `words` is in the text; the others are there twice."""
_AROUND = 0.1
"""How far from the depth, as a share of the text, it may be."""


class Puzzle(NamedTuple):
    """What is put into a text, and what is asked about it."""

    pieces: list[tuple[float, str]]
    """(depth, text) of each"""
    question: str
    answer: str
    filler: Callable[[], Iterator[str]] | None = None
    """makes the text around the pieces, in parts that none of them divides; None: it is --text"""


class Trial(NamedTuple):
    prompt: list[int]
    answer: list[int]


class Cell(NamedTuple):
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
    return Puzzle(pieces, f"\nThe secret code of {keys[0]} is", f" {codes[0]}")


def variables(draw: random.Random, depth: float, count: int) -> Puzzle:
    """A chain of `count` variables; each but the first has the value of the one before it."""
    names = [name.upper() for name in draw_keys(draw, count)]
    (value,) = draw_codes(draw, 1)
    shares = sorted(draw.random() for _ in range(count - 1))
    places = [depth, *(depth + (1 - depth) * share for share in shares)]
    lines = [f"\nVAR {names[0]} = {value}\n"]
    lines += [f"\nVAR {new} = VAR {old}\n" for old, new in zip(names, names[1:], strict=False)]
    question = f"\nThe variables with the value {value}, in the order of the text, are"
    return Puzzle(list(zip(places, lines, strict=True)), question, " " + ", ".join(names))


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

    return Puzzle(pieces, "\nThe word that is most often in this list is", f" {often}", filler)


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
    return Puzzle([(depth, says(person, place))], asked, f" {place.capitalize()}", filler)


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
    puzzle = TASKS[task](draw, depth, count)

    def ids(one: str) -> list[int]:
        return encode(tokenizer, one, ends=False).tolist()

    answer = ids(puzzle.answer)
    around, borders = text, None
    if puzzle.filler:
        around, borders = [], [0]
        for some in puzzle.filler():
            around += ids(some)
            if len(around) >= length:
                break
            borders.append(len(around))
    prompt = fill(
        tokenizer,
        around,
        length=length,
        pieces=[(place, ids(piece)) for place, piece in puzzle.pieces],
        question=ids(puzzle.question),
        answer_tokens=len(answer),
        draw=draw,
        borders=borders,
        what=f"what {task} needs",
    )
    return Trial(prompt, answer)


@torch.no_grad()
def answer_scores(
    model: PreTrainedModel, mesh: Mesh, trials: Sequence[Trial], *, length: int
) -> list[tuple[float, float]]:
    """Return (loss, share of likeliest tokens) of each trial's answer, both over its tokens.

    Collective.
    """
    found: list[tuple[float, float]] = []
    for batch in shard(batches_of(trials, mesh, length=length), model):
        of_tokens = log_probs(model, batch)
        losses = -of_tokens.log_probs.sum(dim=1, dtype=torch.float64)
        likeliest = of_tokens.is_top1.sum(dim=1)
        found += zip(losses.tolist(), likeliest.tolist(), strict=True)
    sizes = [len(trial.answer) for trial in trials]
    return [(loss / n, top / n) for (loss, top), n in zip(found, sizes, strict=True)]


def evaluate(
    model: PreTrainedModel,
    mesh: Mesh,
    tokenizer: PreTrainedTokenizerBase,
    text: Sequence[int],
    options: Any,
) -> Iterator[Cell]:
    for task in options.tasks:
        for length, depth, seeds in grid(options):
            shared = {"task": task, "length": length, "depth": depth, "count": options.count}
            trials = [make_trial(tokenizer, text, **shared, seed=seed) for seed in seeds]
            scores = answer_scores(model, mesh, trials, length=length)
            losses, shares = zip(*scores, strict=True)
            n = len(scores)
            exact = sum(share == 1 for share in shares) / n
            yield Cell(task, length, depth, sum(losses) / n, sum(shares) / n, exact)


def draw_maps(cells: Sequence[Cell], options: Any, path: Path) -> None:
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


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="titan-ulysses eval-long",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, output="outputs/long")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS], metavar="TASK")
    parser.add_argument(
        "--count", type=int, default=4, help="codes in needles, variables in a chain (4)"
    )
    options = parser.parse_args(argv)
    check_options(options, count=2)
    options.tasks = [task for task in TASKS if task in options.tasks]
    return options


def main(argv: list[str]) -> None:
    options = parse(argv)

    def check(tokenizer: PreTrainedTokenizerBase, text: list[int]) -> None:
        for task, length in product(options.tasks, options.lengths):
            shared = {"task": task, "length": length, "depth": 0, "count": options.count}
            make_trial(tokenizer, text, **shared, seed="")

    def say(cell: Cell) -> str:
        return (
            f"{cell.task:<9} {cell.length:>9,} tokens, depth {cell.depth:4.0%}: loss "
            f"{cell.loss:.3f}, likeliest tokens {cell.likeliest:.0%}, exact {cell.exact:.0%}"
        )

    run(options, name="long", check=check, evaluate=evaluate, say=say, draw=draw_maps)
