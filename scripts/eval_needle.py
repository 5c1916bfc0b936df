"""Evaluate whether a model finds a fact in a long text, for each length of the text and each depth
at which the fact stands in it.

    python scripts/eval_needle.py outputs/quickstart/export --lengths 512 1024
    torchrun --nproc-per-node 8 scripts/eval_needle.py MODEL --lengths 65536 262144 --trials 4

A needle, such as "The secret code of zorabi is 48213.", is put into a text, and the text ends with
the question "The secret code of zorabi is". Nothing is generated. Instead, the log-probability of
several codes after the question is computed: of the right code, and of others that the needle does
not contain. Each code is one row of a forward, in which the ranks share the sequence. Accuracy is
how often the right code has the highest log-probability; guessing finds 1 in --candidates. A length
counts all tokens of a row. Depth 0 is the beginning of the text, and 1 its end. The same seed makes
the same texts and needles, which at one length are the same at every depth.

Writes needle.json and, where matplotlib is installed, needle.png to --output.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from titan_ulysses.checkpoint import safetensors as weights
from titan_ulysses.config.schema import expand_path
from titan_ulysses.data.adapter import shard
from titan_ulysses.data.files import find_files, read_text
from titan_ulysses.data.tokenizer import encode, load_tokenizer
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.failure import exit_on_error
from titan_ulysses.distributed.mesh import Mesh, build_mesh, init_distributed
from titan_ulysses.model import hf
from titan_ulysses.observability.pictures import SHADES, has_matplotlib, picture
from titan_ulysses.setup.parallelize import parallelize
from titan_ulysses.setup.resolve import resolve_model
from titan_ulysses.train.evaluation import score

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

QUESTION = "\nThe secret code of {key} is"
ANSWER = " {code}"
NEEDLE = QUESTION + ANSWER + ".\n"
_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
_ROW_TOKENS = 16384
"""The most tokens of a rank in one forward, unless a single sequence has more."""


class Trial(NamedTuple):
    """A text with its needle and question, and the codes to choose from, the right one first."""

    prompt: list[int]
    codes: list[list[int]]


class Cell(NamedTuple):
    """The result of all trials with one length and depth."""

    length: int
    depth: float
    accuracy: float
    log_probability: float
    """mean log-probability per token of the right code, over all trials, in nats"""


def draw_key(draw: random.Random) -> str:
    return "".join(draw.choices(_SYLLABLES, k=3))


def draw_codes(draw: random.Random, count: int) -> list[str]:
    """Draw `count` different numbers of five digits."""
    return [str(code) for code in draw.sample(range(10_000, 100_000), count)]


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

    def ids(template: str, code: str = code) -> list[int]:
        return encode(tokenizer, template.format(key=key, code=code), ends=False).tolist()

    codes = [ids(ANSWER, one) for one in (code, *others)]
    needle, question = ids(NEEDLE), ids(QUESTION)
    first = tokenizer("")["input_ids"][:1]
    # The token that the model expects at the beginning, if any.
    start = first if first == [tokenizer.bos_token_id] else []
    room = length - len(start) - len(needle) - len(question) - max(map(len, codes))
    if room < 0:
        raise UserError(
            f"--lengths {length}: needle and question alone are {length - room} tokens; give a "
            "larger one."
        )
    if room > len(text):
        raise UserError(
            f"--lengths {length}: --text has {len(text):,} tokens only; give a longer one."
        )
    begin, before = draw.randrange(len(text) - room + 1), round(depth * room)
    hay = [*text[begin : begin + room]]
    return Trial([*start, *hay[:before], *needle, *hay[before:], *question], codes)


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


def code_scores(
    model: PreTrainedModel, mesh: Mesh, trials: Sequence[Trial], *, length: int
) -> list[float]:
    """Return the log-probability of every code of every trial after its prompt. Collective."""
    rows = [(trial.prompt, code) for trial in trials for code in trial.codes]
    at_once = max(1, _ROW_TOKENS * mesh.sp.size() // length)
    found: list[float] = []
    for batch in shard(
        (pad(rows[i : i + at_once], length) for i in range(0, len(rows), at_once)), mesh
    ):
        found += score(model, batch).sum(dim=1, dtype=torch.float64).tolist()
    return found


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


def find_needles(
    model: PreTrainedModel,
    mesh: Mesh,
    tokenizer: PreTrainedTokenizerBase,
    text: Sequence[int],
    options: Any,
) -> Iterator[Cell]:
    for length in options.lengths:
        for depth in options.depths:
            shared = {"length": length, "depth": depth, "candidates": options.candidates}
            seeds = [f"{options.seed} {length} {trial}" for trial in range(options.trials)]
            trials = [make_trial(tokenizer, text, **shared, seed=seed) for seed in seeds]
            found = torch.tensor(code_scores(model, mesh, trials, length=length)).view(
                len(trials), -1
            )
            of_tokens = [
                right / len(trial.codes[0])
                for right, trial in zip(found[:, 0].tolist(), trials, strict=True)
            ]
            accuracy = (found[:, 0] > found[:, 1:].amax(dim=1)).double().mean().item()
            yield Cell(length, depth, accuracy, sum(of_tokens) / len(of_tokens))


def draw_map(cells: Sequence[Cell], options: Any, path: Path) -> None:
    """Draw accuracy and log-probability side by side, with a number in every cell."""
    lengths, depths = options.lengths, options.depths
    size = (3 + 1.7 * len(lengths), 2.2 + 0.5 * len(depths))
    with picture(path, size=size, panels=(1, 2)) as (figure, panels):
        titles = {
            "accuracy": (
                f"right among {options.candidates} codes, %\n(guessing: "
                f"{100 / options.candidates:.3g})",
                100,
            ),
            "log_probability": ("log-probability of the right code,\nnats a token", 1),
        }
        for axes, (name, (title, unit)) in zip(panels, titles.items(), strict=True):
            grid = (
                torch.tensor([getattr(cell, name) * unit for cell in cells])
                .view(len(lengths), len(depths))
                .T
            )
            low, high = (0, 100) if unit == 100 else (min(grid.min().item(), -0.1), 0)
            axes.imshow(grid, cmap=SHADES, vmin=low, vmax=high, aspect="auto")
            for row, column in product(range(len(depths)), range(len(lengths))):
                value = grid[row, column].item()
                number = f"{value:.0f}" if unit == 100 else f"{value:.2f}"
                color = "white" if (value - low) / (high - low) < 0.55 else "black"
                axes.text(column, row, number, ha="center", va="center", color=color)
            axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
            axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
            axes.set_title(title, fontsize=10)
            axes.set(xlabel="length, tokens", ylabel="depth of the needle")
        figure.suptitle(f"{options.model}: {options.trials} trials a cell", fontsize=10)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    parser.add_argument("--candidates", type=int, default=8, help="codes to choose from (8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--text",
        default="{stdlib}/*.py",
        metavar="PATH",
        help="file, folder or pattern of the texts",
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/needle"), metavar="FOLDER")
    options = parser.parse_args(argv)
    for name, least in (("trials", 1), ("candidates", 2)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} {getattr(options, name)}: at least {least}.", exit_code=2)
    if wrong := [depth for depth in options.depths if not 0 <= depth <= 1]:
        raise UserError(f"--depths {wrong[0]}: a share of the text, from 0 to 1.", exit_code=2)
    options.lengths, options.depths = sorted(set(options.lengths)), sorted(set(options.depths))
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    init_distributed()
    mesh, longest = build_mesh(sequence=dist.get_world_size()), options.lengths[-1]
    tokenizer = load_tokenizer(options.model)
    text = read_haystack(tokenizer, options.text, tokens=4 * longest, seed=options.seed)
    # Errors in the lengths are reported before the model is read, which takes time.
    for length in options.lengths:
        make_trial(tokenizer, text, length=length, depth=0, candidates=options.candidates, seed="")
    model = open_model(options.model, mesh, longest=longest)
    speaks = dist.get_rank() == 0
    cells = []
    for cell in find_needles(model, mesh, tokenizer, text, options):
        cells.append(cell)
        if speaks:
            said = (
                f"accuracy {cell.accuracy:4.0%}, log-probability {cell.log_probability:.3f} a token"
            )
            print(f"{cell.length:>9,} tokens, depth {cell.depth:4.0%}: {said}", flush=True)
    if speaks:
        options.output.mkdir(parents=True, exist_ok=True)
        about = {
            "chance": 1 / options.candidates,
            **{k: v for k, v in vars(options).items() if k != "output"},
        }
        about["cells"] = [cell._asdict() for cell in cells]
        (options.output / "needle.json").write_text(json.dumps(about, indent=2) + "\n")
        if has_matplotlib():
            draw_map(cells, options, options.output / "needle.png")
        pictures = ", needle.png" if has_matplotlib() else " (no picture: pip install matplotlib)"
        print(f"guessing: {1 / options.candidates:.0%}. {options.output}/needle.json{pictures}")


if __name__ == "__main__":
    with exit_on_error():
        main()
