"""Long texts with something to find in them, and the model that is asked: what the commands
needle and eval-long share.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from titan_ulysses.checkpoint import safetensors as weights
from titan_ulysses.config.fields import expand_path
from titan_ulysses.data.adapter import shard
from titan_ulysses.data.files import find_files, read_text
from titan_ulysses.data.tokenizer import encode, load_tokenizer
from titan_ulysses.distributed.errors import UsageError, UserError, first_failure
from titan_ulysses.distributed.mesh import Mesh, build_mesh, init_distributed
from titan_ulysses.model import hf
from titan_ulysses.observability.pictures import SHADES, has_matplotlib
from titan_ulysses.setup.parallelize import parallelize
from titan_ulysses.setup.resolve import resolve_model
from titan_ulysses.tools import parser_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
_ROW_TOKENS = 16384
"""The most tokens of a rank in one forward, unless a single sequence has more."""
_MOST_CODES = 10_000
"""The most codes of a text: a tenth of those with five digits."""


def draw_key(draw: random.Random) -> str:
    return "".join(draw.choices(_SYLLABLES, k=3))


def draw_keys(draw: random.Random, count: int) -> list[str]:
    """Draw `count` different keys."""
    keys: dict[str, None] = {}
    while len(keys) < count:
        keys[draw_key(draw)] = None
    return [*keys]


def draw_codes(draw: random.Random, count: int) -> list[str]:
    """Draw `count` different numbers of five digits."""
    return [str(code) for code in draw.sample(range(10_000, 100_000), count)]


class Puzzle(NamedTuple):
    """What is put into a text, and what is asked about it."""

    pieces: list[tuple[float, str]]
    """(depth, text) of each"""
    question: str
    answers: list[str]
    """the right one first, then others that a model might give"""
    what: str
    """pieces and question, as messages name them"""
    filler: Callable[[], Iterator[str]] | None = None
    """makes the text around the pieces, in parts that none of them divides; None: it is --text"""


class Trial(NamedTuple):
    """Token ids of a text with its pieces and question, and of the answers, the right one first."""

    prompt: list[int]
    answers: list[list[int]]


def hide(
    puzzle: Puzzle,
    tokenizer: PreTrainedTokenizerBase,
    text: Sequence[int],
    *,
    length: int,
    draw: random.Random,
) -> Trial:
    """Build a trial that has `length` tokens, its longest answer included.

    It is a part of text, which draw chooses, with each of the pieces at its depth; those of one
    depth stand in their order. Then the question. UserError where pieces and question alone are
    longer than length, or where text is too short.
    """

    def ids(one: str) -> list[int]:
        return encode(tokenizer, one, ends=False).tolist()

    pieces = [(depth, ids(piece)) for depth, piece in puzzle.pieces]
    question, answers = ids(puzzle.question), [ids(answer) for answer in puzzle.answers]
    borders: list[int] | None = None  # where a piece may stand; None: anywhere
    if puzzle.filler:
        filled, borders = list[int](), [0]
        for some in puzzle.filler():
            filled += ids(some)
            if len(filled) >= length:
                break
            borders.append(len(filled))
        text = filled
    first = tokenizer("")["input_ids"][:1]
    # The token that the model expects at the beginning, if any.
    start = first if first == [tokenizer.bos_token_id] else []
    used = len(start) + sum(len(piece) for _, piece in pieces) + len(question)
    room = length - used - max(map(len, answers))
    if room < 0:
        raise UserError(
            f"--lengths {length}: {puzzle.what} alone are {length - room} tokens; give a larger "
            "one."
        )
    if room > len(text):
        raise UserError(
            f"--lengths {length}: --text has {len(text):,} tokens only; give a longer one."
        )

    def at_border(place: int) -> int:
        return borders[bisect_right(borders, place) - 1] if borders else place

    begin = at_border(draw.randrange(len(text) - room + 1))
    hay = [*text[begin : begin + room]]
    prompt, before = [*start], 0
    for depth, piece in sorted(pieces, key=lambda one: one[0]):
        place = max(before, at_border(begin + round(depth * room)) - begin)
        prompt += [*hay[before:place], *piece]
        before = place
    return Trial([*prompt, *hay[before:], *question], answers)


def read_haystack(
    tokenizer: PreTrainedTokenizerBase, path: str, *, tokens: int, seed: int
) -> list[int]:
    """Join the files at path, in a random order, until there are `tokens` token ids or no more
    files. seed chooses the order.
    """
    files = find_files(expand_path(path), extensions=[".txt", ".md", ".py"], setting="--text")
    text: list[int] = []
    for file in random.Random(seed).sample([*files.values()], len(files)):
        text += encode(tokenizer, read_text(file, "utf-8", "--text"), ends=False).tolist()
        if len(text) >= tokens:
            break
    return text


def open_model(folder: str, mesh: Mesh, *, longest: int) -> PreTrainedModel:
    """Open the model in folder, sharded, in bf16 on a GPU and fp32 on a CPU.

    UserError where the model has fewer positions than `longest`.
    """
    dtype = "bfloat16" if mesh.device.type == "cuda" else "float32"
    spec = resolve_model(
        folder, world_size=mesh.loss.size(), device_type=mesh.device.type, param_dtype=dtype
    )
    positions = getattr(spec.model_config, "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise UserError(
            f"--lengths {longest} is longer than the model's max_position_embeddings = "
            f"{positions}: give shorter ones, or raise it in {folder}/config.json."
        )
    weights.find(folder)
    model = hf.build_on_meta(spec.whole_config, spec.options.param_dtype)
    parallelize(model, mesh, spec.options)
    hf.allocate(model, mesh.device)
    weights.load(model, folder)
    return model.eval()


def scores_of(
    model: PreTrainedModel,
    mesh: Mesh,
    trials: Sequence[Trial],
    score: Callable[[PreTrainedModel, dict[str, Any]], torch.Tensor],
    *,
    length: int,
) -> torch.Tensor:
    """Return what `score` makes of a batch [B, ...], of all answers [trials, answers, ...].

    A batch is of `shard`, as large as a rank can take, and only answers have labels. Collective.
    """
    rows = [(trial.prompt, answer) for trial in trials for answer in trial.answers]
    at_once = max(1, _ROW_TOKENS * mesh.sp.size() // length)

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for some in (rows[first : first + at_once] for first in range(0, len(rows), at_once)):
            ids = torch.zeros(len(some), length, dtype=torch.long)
            mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
            for row, (prompt, answer) in enumerate(some):
                end = len(prompt) + len(answer)
                ids[row, :end] = torch.tensor([*prompt, *answer])
                mask[row, :end] = 1
                labels[row, len(prompt) : end] = torch.tensor(answer)
            yield {"input_ids": ids, "attention_mask": mask, "labels": labels}

    with torch.no_grad():
        found = torch.cat([score(model, batch) for batch in shard(batches(), model)])
    return found.unflatten(0, (len(trials), -1)).cpu()


def run(
    options: argparse.Namespace,
    *,
    name: str,
    make: Callable[..., Trial],
    score: Callable[[PreTrainedModel, dict[str, Any]], torch.Tensor],
    result_of: Callable[..., Any],
    say: Callable[[Any], str],
    draw: Callable[[list[Any], Any, Path], None],
    tasks: Sequence[str] | None = None,
    more: dict[str, Any] | None = None,
) -> None:
    """Open model and texts on all ranks, evaluate every cell, and write NAME.json and NAME.png.

    make(tokenizer, text, length=, depth=, seed=) makes a trial, and raises UserError for lengths
    that cannot be. result_of(length, depth, trials, scores of them) makes the NamedTuple of a cell
    from what `scores_of` returns, and say is its line on the console. Both take the task too, as
    `task=` and as the first argument, where there are tasks. draw(cells, options, path) draws the
    picture. more is written to NAME.json, too.
    """
    init_distributed()
    mesh, longest = build_mesh(sequence=dist.get_world_size()), options.lengths[-1]
    tokenizer = load_tokenizer(options.model)
    text = read_haystack(tokenizer, options.text, tokens=4 * longest, seed=options.seed)
    cases: list[dict[str, str]] = [{}] if tasks is None else [{"task": task} for task in tasks]
    # Errors in the lengths are reported before the model is read, which takes time.
    for case, length in product(cases, options.lengths):
        make(tokenizer, text, **case, length=length, depth=0, seed="")
    options.output = options.output or folder_beside(options.model, name)
    _make_folder(options.output)
    model = open_model(options.model, mesh, longest=longest)
    speaks, cells = dist.get_rank() == 0, []
    for case, length, depth in product(cases, options.lengths, options.depths):
        seeds = [f"{options.seed} {length} {trial}" for trial in range(options.trials)]
        shared = {**case, "length": length, "depth": depth}
        trials = [make(tokenizer, text, **shared, seed=seed) for seed in seeds]
        scores = scores_of(model, mesh, trials, score, length=length)
        cells.append(result_of(*case.values(), length, depth, trials, scores))
        if speaks:
            print(say(cells[-1]), flush=True)
    if not speaks:
        return
    found = (more or {}) | {key: value for key, value in vars(options).items() if key != "output"}
    found["cells"] = [cell._asdict() for cell in cells]
    (options.output / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
    if has_matplotlib():
        draw(cells, options, options.output / f"{name}.png")
    pictures = f", {name}.png" if has_matplotlib() else " (no picture: pip install matplotlib)"
    print(f"{options.output}/{name}.json{pictures}")


def folder_beside(model: str, name: str) -> Path:
    """Return where results of a model go: its folder, or that of the run that exported it; of a
    name on the hub, outputs/.
    """
    folder = Path(model)
    if not folder.is_dir():
        return Path("outputs") / name
    of_run = (folder.parent / "config.toml").exists()
    return (folder.parent if of_run else folder) / name


def _make_folder(folder: Path) -> None:
    """Make the folder of the results on rank 0. UserError, on every rank, if that fails."""
    problem = None
    try:
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                problem = "it is not writable"
    except OSError as error:
        problem = error.strerror
    if problem := first_failure(problem):
        raise UserError(f"--output {folder}: {problem}. Choose another folder.")


def heat_map(
    axes: Any, cells: Iterable[float], options: Any, *, low: float, high: float, form: str
) -> None:
    """Draw cells, by length and then by depth, as a grid with a number in each.

    low, high: the ends of the colours. form: how numbers are written, as ".0f".
    """
    lengths, depths = options.lengths, options.depths
    grid = torch.tensor([*cells]).view(len(lengths), len(depths)).T
    axes.imshow(grid, cmap=SHADES, vmin=low, vmax=high, aspect="auto")
    for row, column in product(range(len(depths)), range(len(lengths))):
        value = grid[row, column].item()
        color = "white" if (value - low) / (high - low) < 0.55 else "black"
        axes.text(column, row, f"{value:{form}}", ha="center", va="center", color=color)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set(xlabel="length, tokens", ylabel="depth")


def long_texts_parser(
    command: str, description: str | None, *, output: str
) -> argparse.ArgumentParser:
    """Return a parser of the options that both commands have. `output` names the default folder of
    the results (see `folder_beside`).
    """
    parser = parser_of(command, description)
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        help="folder with a model and its tokenizer, such as a run's export/",
    )
    add("--lengths", type=int, nargs="+", default=[512, 1024, 2048], metavar="TOKENS")
    add("--depths", type=float, nargs="+", default=[0, 0.25, 0.5, 0.75, 1], metavar="SHARE")
    add("--trials", type=int, default=8, help="texts and needles a cell (8)")
    add("--seed", type=int, default=0)
    texts = "file, folder or pattern of the texts"
    add("--text", default="{stdlib}/*.py", metavar="PATH", help=texts)
    where = f"folder of the results ({output}/ in the folder of the model, or of its run)"
    add("--output", type=Path, metavar="FOLDER", help=where)
    return parser


def checked(options: argparse.Namespace, **least: int) -> argparse.Namespace:
    """Return the options that both commands have, checked and sorted. UserError for what cannot be.

    least: the lower bounds of the numbers of codes.
    """
    for name, bound in ({"trials": 1} | least).items():
        if getattr(options, name) < bound:
            value = getattr(options, name)
            raise UsageError(f"--{name} {value}: at least {bound}.")
    for name in least:
        if (value := getattr(options, name)) > _MOST_CODES:
            raise UsageError(f"--{name} {value}: at most {_MOST_CODES:,}.")
    if wrong := [depth for depth in options.depths if not 0 <= depth <= 1]:
        raise UsageError(f"--depths {wrong[0]}: a share of the text, from 0 to 1.")
    options.lengths, options.depths = sorted(set(options.lengths)), sorted(set(options.depths))
    return options
