"""Show what a run would train on: the first documents of its data, trained tokens in colour.

    titan-ulysses show-data --config my.toml --rows 2
    titan-ulysses show-data --config my.toml --data.source chat --data.path ~/chats.jsonl

Takes the options of train.py, and --rows: how many rows of each source are shown. Of chats it also
counts the tokens of each role, with what the chat template writes around them. Nothing is trained,
and no model is loaded but its tokenizer. On a terminal, what is trained on is green; elsewhere, as
in a file, it is between [[ and ]]. A chat is several documents where the chat template writes
earlier turns differently once others follow: each is what the model would see. By role, a turn that
is repeated in several documents is counted once.
An image or video is shown in place of its placeholders: its number of tokens, and its file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice

import numpy as np
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from titan_ulysses.config.cli import parse_command_line
from titan_ulysses.config.load import load_config
from titan_ulysses.config.schema import SourceSettings
from titan_ulysses.data.chat import tokens_by_role
from titan_ulysses.data.encoding import Encoder
from titan_ulysses.data.megatron import find_megatron, read_megatron
from titan_ulysses.data.pipeline import encoder_of
from titan_ulysses.data.processor import open_vision
from titan_ulysses.data.records import BadRow, Chat, Encoded, Row
from titan_ulysses.data.sources import open_rows
from titan_ulysses.data.tokenizer import load_tokenizer, num_token_ids
from titan_ulysses.distributed.errors import RefusedRow, UsageError
from titan_ulysses.model.hf import load_model_config
from titan_ulysses.tools import parser_of

TRAINED = "bold green"
IMAGE = "bold cyan"


def runs_of(document: Encoded) -> list[tuple[bool, np.ndarray]]:
    """Return (trained on, ids) of each run of tokens that are trained on, or are not.

    The first token of a document is never predicted.
    """
    trained = np.ones(len(document.ids), bool) if document.trained is None else document.trained
    trained = trained & (np.arange(len(trained)) > 0)
    borders = np.flatnonzero(np.diff(trained)) + 1
    parts = np.split(document.ids, borders)
    return [(bool(trained[at]), ids) for at, ids in zip([0, *borders], parts, strict=True)]


def written(tokenizer: PreTrainedTokenizerBase, document: Encoded, *, coloured: bool) -> Text:
    """Return the document's text, with what is trained on in colour or between brackets."""
    text, at = Text(), 0
    firsts = {one.spans[0][0]: i for i, one in enumerate(document.visuals)}
    places = {span for one in document.visuals for span in one.spans}
    borders = sorted({x for span in places for x in span})
    for is_trained, ids in runs_of(document):
        cuts = [x - at for x in borders if 0 < x - at < len(ids)]
        for part in np.split(ids, cuts):
            if (at, at + len(part)) in places:
                if at in firsts:
                    shown = described(document, firsts[at])
                    text.append(shown, style=IMAGE)
                at += len(part)
                continue
            at += len(part)
            words = tokenizer.decode(part.tolist(), clean_up_tokenization_spaces=False)
            if is_trained and not coloured:
                words = f"[[{words}]]"
            text.append(words, style=TRAINED if is_trained else "dim")
    return text


def described(document: Encoded, index: int) -> str:
    """Return what stands for an image or video of the document: its tokens, patches and file."""
    visual, media = document.visuals[index], document.media[index]
    grid = " x ".join(map(str, visual.grid))
    patches = f" of {grid} patches" if grid else ""
    return f"<{media.name}: {visual.features:,} tokens{patches}>"


def first_rows(
    source: SourceSettings, encoder: Encoder, *, setting: str, count: int
) -> Iterator[tuple[Row | BadRow, Encoded | BadRow]]:
    """Yield (row, what became of it) of the first rows of a source."""
    if source.source == "tokens" and (files := find_megatron(source.path, setting)):
        ids = num_token_ids(encoder.tokenizer)
        corpus, _ = read_megatron(files, num_token_ids=ids, skip=True, setting=setting)
        for number in range(min(count, len(corpus))):
            document = Encoded(corpus[number])
            yield Row(f"document {number}", document), document
        return
    for row in islice(open_rows(source, setting), count):
        yield row, encoder(row)


def show_source(
    console: Console, encoder: Encoder, source: SourceSettings, *, setting: str, rows: int
) -> None:
    """Print the first rows of a source, and how many of their tokens are trained on."""
    if not source.path:
        raise UsageError(f"{setting} is not set: give a file or folder to read")
    tokenizer = encoder.tokenizer
    encoder.check(source.source)
    shown, counts, roles, unknown = 0, [], Counter[str](), ""
    for row, encoded in first_rows(source, encoder, setting=setting, count=rows):
        shown, place = shown + 1, row.place
        if isinstance(encoded, BadRow):
            console.print(Text(f"--- {place}: cannot be used: {encoded.reason}", style="bold red"))
            continue
        if isinstance(row, Row) and isinstance(row.content, Chat):
            try:
                roles.update(tokens_by_role(tokenizer, row.content))
            except RefusedRow as error:
                unknown = f" (without {place} and others like it: {error})"
        documents = [*encoded.documents()]
        for number, document in enumerate(documents, start=1):
            tokens = len(document.ids)
            if not tokens:
                continue
            trained = sum(len(ids) for is_trained, ids in runs_of(document) if is_trained)
            of = f", document {number} of {len(documents)}" if len(documents) > 1 else ""
            head = f"--- {place}{of}: {tokens:,} tokens, {trained:,} trained on"
            console.print(Text(head, style="bold"))
            console.print(written(tokenizer, document, coloured=console.is_terminal))
            counts.append((tokens, trained))
    tokens, trained = (sum(column) for column in zip((0, 0), *counts, strict=True))
    total = (
        f"{setting}: {shown:,} row(s) shown, {len(counts):,} document(s), {tokens:,} tokens, of "
        f"which {trained:,} are trained on"
    )
    console.print(Text(total, style="bold"))
    if roles or unknown:
        more = {} if source.train_on == "all" else {"assistant": f" ({trained:,} trained on)"}
        each = ", ".join(f"{role} {count:,}{more.get(role, '')}" for role, count in roles.items())
        console.print(
            Text(f"{setting}: tokens by role: {each or 'not known'}{unknown}", style="bold")
        )


def main(argv: list[str]) -> None:
    parser = parser_of("show-data", __doc__)
    help_ = "how many rows of each source are shown (3)"
    parser.add_argument("--rows", nargs="?", default="3", const="", metavar="N", help=help_)
    options, settings = parser.parse_known_args(argv)
    if not options.rows.isdecimal() or not int(options.rows):
        raise UsageError(f"--rows {options.rows}: needs a number of rows, at least 1")
    command = parse_command_line(settings)
    config = load_config(command.config_path, command.overrides)
    tokenizer = load_tokenizer(config.model.tokenizer or config.model.path)
    vision = None
    console = Console(soft_wrap=True, highlight=False)
    sources: dict[str, SourceSettings] = {
        f"data.mixture[{n}].path": entry for n, entry in enumerate(config.data.mixture)
    }
    if config.data.source == "chat" or any(x.source == "chat" for x in config.data.mixture):
        vision = open_vision(config, load_model_config(config.model.path, config.model.config))
    for setting, source in (sources or {"data.path": config.data}).items():
        encoder = encoder_of(tokenizer, vision, source)
        show_source(console, encoder, source, setting=setting, rows=int(options.rows))
