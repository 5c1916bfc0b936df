"""Long texts with something to find in them, and the model that is asked: what needle.py and
eval_long.py share.
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
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from titan_ulysses.checkpoint import safetensors as weights
from titan_ulysses.config.fields import expand_path
from titan_ulysses.data.files import find_files, read_text
from titan_ulysses.data.tokenizer import encode, load_tokenizer
from titan_ulysses.distributed.errors import UserError, first_failure
from titan_ulysses.distributed.mesh import Mesh, build_mesh, init_distributed
from titan_ulysses.model import hf
from titan_ulysses.observability.pictures import SHADES, has_matplotlib
from titan_ulysses.setup.parallelize import parallelize
from titan_ulysses.setup.resolve import resolve_model

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


def fill(
    tokenizer: PreTrainedTokenizerBase,
    text: Sequence[int],
    *,
    length: int,
    pieces: Sequence[tuple[float, list[int]]],
    question: list[int],
    answer_tokens: int,
    draw: random.Random,
    borders: Sequence[int] | None = None,
    what: str = "needle and question",
) -> list[int]:
    """Build a prompt that has `length` tokens together with its answer.

    A part of text, which draw chooses, with each of pieces, (depth, token ids), at its depth; those
    of one depth stand in their order. Then the question. borders: the places of text at which a
    piece may stand, in order, 0 first; None: all. UserError where pieces and question alone are
    longer than length (`what` names them), or where text is too short.
    """
    first = tokenizer("")["input_ids"][:1]
    # The token that the model expects at the beginning, if any.
    start = first if first == [tokenizer.bos_token_id] else []
    used = sum(len(piece) for _, piece in pieces)
    room = length - len(start) - used - len(question) - answer_tokens
    if room < 0:
        raise UserError(
            f"--lengths {length}: {what} alone are {length - room} tokens; give a larger one."
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
    return [*prompt, *hay[before:], *question]


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
    model = hf.build_on_meta(spec.model_config, spec.options.param_dtype)
    parallelize(model, mesh, spec.options)
    hf.allocate(model, mesh.device)
    weights.load(model, folder)
    return model.eval()


def pad(rows: Sequence[tuple[list[int], list[int]]], length: int) -> dict[str, torch.Tensor]:
    """Build a batch for `shard` from (prompt, code) of each row. Only the codes have labels."""
    shape = (len(rows), length)
    batch = {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
    }
    batch["labels"] = torch.full(shape, -100)
    for row, (prompt, code) in enumerate(rows):
        end = len(prompt) + len(code)
        batch["input_ids"][row, :end] = torch.tensor([*prompt, *code])
        batch["attention_mask"][row, :end] = 1
        batch["labels"][row, len(prompt) : end] = torch.tensor(code)
    return batch


def batches_of(
    rows: Sequence[tuple[list[int], list[int]]], mesh: Mesh, *, length: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches of (prompt, answer) rows for `shard`, as large as a rank can take."""
    at_once = max(1, _ROW_TOKENS * mesh.sp.size() // length)
    for first in range(0, len(rows), at_once):
        yield pad(rows[first : first + at_once], length)


def grid(options: Any) -> Iterator[tuple[int, float, list[str]]]:
    """Yield (length, depth, the seed of each trial) of every cell, by length and then by depth."""
    for length, depth in product(options.lengths, options.depths):
        yield length, depth, [f"{options.seed} {length} {trial}" for trial in range(options.trials)]


def run(
    options: argparse.Namespace,
    *,
    name: str,
    check: Callable[[PreTrainedTokenizerBase, list[int]], None],
    evaluate: Callable[..., Iterator[Any]],
    say: Callable[[Any], str],
    draw: Callable[[list[Any], Any, Path], None],
    more: dict[str, Any] | None = None,
) -> None:
    """Open model and texts on all ranks, evaluate every cell, and write NAME.json and NAME.png.

    check(tokenizer, text) raises UserError for lengths that cannot be. evaluate(model, mesh,
    tokenizer, text, options) yields a NamedTuple for each cell, and say is its line on the
    console. draw(cells, options, path) draws the picture. more is written to NAME.json, too.
    """
    init_distributed()
    mesh, longest = build_mesh(sequence=dist.get_world_size()), options.lengths[-1]
    tokenizer = load_tokenizer(options.model)
    text = read_haystack(tokenizer, options.text, tokens=4 * longest, seed=options.seed)
    # Errors in the lengths are reported before the model is read, which takes time.
    check(tokenizer, text)
    _make_folder(options.output)
    model = open_model(options.model, mesh, longest=longest)
    speaks, cells = dist.get_rank() == 0, []
    for cell in evaluate(model, mesh, tokenizer, text, options):
        cells.append(cell)
        if speaks:
            print(say(cell), flush=True)
    if not speaks:
        return
    found = (more or {}) | {key: value for key, value in vars(options).items() if key != "output"}
    found["cells"] = [cell._asdict() for cell in cells]
    (options.output / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
    if has_matplotlib():
        draw(cells, options, options.output / f"{name}.png")
    pictures = f", {name}.png" if has_matplotlib() else " (no picture: pip install matplotlib)"
    print(f"{options.output}/{name}.json{pictures}")


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


def add_options(parser: argparse.ArgumentParser, *, output: str) -> None:
    """Add the options that both scripts have. `output` is the default folder of the results."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="folder with a model and its tokenizer, such as a run's export/",
    )
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[512, 1024, 2048], metavar="TOKENS"
    )
    parser.add_argument(
        "--depths", type=float, nargs="+", default=[0, 0.25, 0.5, 0.75, 1], metavar="SHARE"
    )
    parser.add_argument("--trials", type=int, default=8, help="texts and needles a cell (8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--text",
        default="{stdlib}/*.py",
        metavar="PATH",
        help="file, folder or pattern of the texts",
    )
    parser.add_argument("--output", type=Path, default=Path(output), metavar="FOLDER")


def check_options(options: argparse.Namespace, **least: int) -> None:
    """Check and sort the options that both scripts have. UserError for what cannot be.

    least: the lower bounds of the numbers of codes.
    """
    for name, bound in ({"trials": 1} | least).items():
        if getattr(options, name) < bound:
            value = getattr(options, name)
            raise UserError(f"--{name} {value}: at least {bound}.", exit_code=2)
    for name in least:
        if (value := getattr(options, name)) > _MOST_CODES:
            raise UserError(f"--{name} {value}: at most {_MOST_CODES:,}.", exit_code=2)
    if wrong := [depth for depth in options.depths if not 0 <= depth <= 1]:
        raise UserError(f"--depths {wrong[0]}: a share of the text, from 0 to 1.", exit_code=2)
    options.lengths, options.depths = sorted(set(options.lengths)), sorted(set(options.depths))
