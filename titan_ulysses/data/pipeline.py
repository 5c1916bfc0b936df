"""The data of a run: from its settings to streams of sequences.

A row becomes a document of token ids (`encoding`), one of a corpus that is cached on disk
(`cache`), a piece of a sequence (`packing`), and part of the batch of a rank (`loader`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from titan_ulysses.config.schema import Config, SourceSettings
from titan_ulysses.data.cache import read_corpus
from titan_ulysses.data.corpus import Corpus
from titan_ulysses.data.encoding import Encoder
from titan_ulysses.data.mixture import ChainedSequences, MixedSequences
from titan_ulysses.data.packing import PackedSequences, PaddedSequences, SampleStream
from titan_ulysses.data.sources import DatasetRows, open_rows
from titan_ulysses.data.stream import StreamedSequences
from titan_ulysses.distributed.errors import UsageError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from titan_ulysses.data.processor import VisionProcessor


def open_sequences(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    vision: VisionProcessor | None = None,
    *,
    eval_only: bool = False,
) -> tuple[SampleStream | None, SampleStream | None]:
    """Return the training stream and the held-out stream of a run.

    The first is None if `eval_only`. The second is None if validation is disabled, or has named
    sets (see `open_validation_sets`). Training data is shuffled and has no end. Held-out data
    contains every token once, in the order of its files; sequences that are not full are padded. It
    comes from `validation.path` or `validation.split`, read with the settings of [data], or from
    documents held out of each training source. `vision` reads chats with images.
    """
    data, validation = config.data, config.validation
    # Whether validation has data of its own, in place of documents held out of training data.
    encoder = partial(encoder_of, tokenizer, vision)
    has_own = validation.enable and bool(validation.path or validation.split or validation.sets)
    training = held_out = None
    if not (has_own and eval_only):
        sources: dict[str, SourceSettings] = {
            f"data.mixture[{i}].path": entry for i, entry in enumerate(data.mixture)
        }
        splits = validation.enable and not has_own
        opened = [
            _open(config, encoder(source), source, setting, splits=splits)
            for setting, source in (sources or {"data.path": data}).items()
        ]
        training, held_out = opened[0]
        if sources:
            paths = [entry.path for entry in data.mixture]
            names = [x if x not in paths[:i] else f"{x} ({i})" for i, x in enumerate(paths)]
            streams, rests = zip(*opened, strict=True)
            weights = [entry.weight for entry in data.mixture]
            mixed = dict(zip(names, streams, strict=True))
            training = MixedSequences(mixed, weights, seed=config.training.seed)
            if splits:
                held_out = ChainedSequences(dict(zip(names, rests, strict=True)))
    if has_own and not validation.sets:
        changes = {
            "path": validation.path or data.path,
            "split": validation.split or data.split,
            "streaming": False,
            "teacher_top_k": 0,  # held-out data is for the cross-entropy
        }
        setting = "validation.path" if validation.path else "validation.split: data.path"
        source = data.model_copy(update=changes)
        found = _read(config, encoder(source), source, setting)
        held_out = _pack(config, setting, *found, held_out=True)
    return None if eval_only else training, held_out


def open_validation_sets(
    config: Config, tokenizer: PreTrainedTokenizerBase, vision: VisionProcessor | None = None
) -> dict[str, SampleStream]:
    """Return {name: held-out sequences} of [[validation.sets]], each with its own packing."""
    streams = {}
    for i, entry in enumerate(config.validation.sets if config.validation.enable else ()):
        setting = f"validation.sets[{i}].path"
        found = _read(config, encoder_of(tokenizer, vision, entry), entry, setting)
        streams[entry.name] = _pack(config, setting, *found, held_out=True, packing=entry.packing)
    return streams


def encoder_of(
    tokenizer: PreTrainedTokenizerBase, vision: VisionProcessor | None, source: SourceSettings
) -> Encoder:
    """Return what encodes the rows of a source. Bad images are left out while it is read, if any
    are: no rank can leave a row out later.
    """
    decodes = source.bad_lines == "skip"
    return Encoder(tokenizer, source.train_on, vision and replace(vision, decodes=decodes))


def _open(
    config: Config, encoder: Encoder, source: SourceSettings, setting: str, *, splits: bool
) -> tuple[SampleStream, SampleStream | None]:
    """Return the training stream of one source and, if `splits`, a stream of held-out documents."""
    training, held_out = config.training, None
    if source.streaming:
        encoder.check(source.source)
        rows = open_rows(source, setting)
        if not isinstance(rows, DatasetRows):
            raise UsageError(
                f'{setting} = "{source.path}" is files, but only data sets can be streamed: set '
                "streaming = false"
            )
        options = {"seq_len": training.seq_len, "seed": training.seed}
        skip = source.bad_lines == "skip"
        return StreamedSequences(rows, encoder, **options, skip_bad=skip), None
    corpus, notes = _read(config, encoder, source, setting)
    if splits:
        corpus, rest = corpus.split_held_out(setting=setting)
        held_out = _pack(config, f"the held-out documents of {setting}", rest, held_out=True)
    return _pack(config, setting, corpus, notes), held_out


def _read(
    config: Config, encoder: Encoder, source: SourceSettings, setting: str
) -> tuple[Corpus, list[str]]:
    """Return the documents of a source, and notes about them for the log."""
    if not source.path:
        raise UsageError(f"{setting} is not set: give a file or folder to read")
    folder = config.data.cache_folder
    corpus, stats = read_corpus(source, encoder, cache_folder=folder, setting=setting)
    return corpus, stats.notes(source.source)


def _pack(
    config: Config,
    setting: str,
    corpus: Corpus,
    notes: Sequence[str] = (),
    *,
    held_out: bool = False,
    packing: str = "",
) -> SampleStream:
    """Return the sequences of a corpus. What is held out comes once, in its order."""
    key = "packing" if packing else "data.packing"
    seq_len, packing = config.training.seq_len, packing or config.data.packing
    if corpus.visuals and packing == "concat":
        raise UserError(
            f'{setting} has images or videos, and {key} = "concat" would cut them at the ends of '
            f'sequences: set {key} = "best_fit", or "none" for one document in a sequence'
        )
    # Documents longer than a sequence are dropped here, or split later by the packing.
    whole = corpus.splits is not None or bool(corpus.visuals)
    if long := int((corpus.lengths > seq_len).sum()):
        drops = config.data.long_documents == "drop"
        if whole and not drops:
            what, one = "pair(s) of completions, with their prompts,", "a pair"
            if corpus.visuals:
                what, one = "document(s)", "a document with images"
            raise UserError(
                f"{setting}: {long:,} {what} are longer than training.seq_len = {seq_len} (the "
                f"longest has {corpus.lengths.max():,} tokens), and {one} cannot be cut: raise "
                'training.seq_len, or set data.long_documents = "drop"'
            )
        corpus = corpus.select(corpus.lengths <= seq_len) if drops else corpus
        notes = [
            *notes,
            f"{long:,} longer than {seq_len:,} tokens {'left out' if drops else 'split'}",
        ]
    if not len(corpus):
        cure = "raise training.seq_len" if whole else 'set data.long_documents = "split"'
        raise UserError(
            f"{setting}: each document is longer than training.seq_len = {seq_len}: {cure}"
        )
    if held_out and corpus.lengths.max() < 2:
        raise UserError(
            f"{setting}: no document has more than one token, so there is nothing to predict: "
            "give longer documents"
        )
    options: dict[str, Any] = {
        "seq_len": seq_len,
        "seed": config.training.seed,
        "shuffle": not held_out,
        "setting": setting,
    }
    if packing == "concat":
        sequences: SampleStream = PackedSequences(corpus, **options, once=held_out)
    else:
        options |= {"labels_prompts": config.loss.name == "orpo"}
        sequences = PaddedSequences(corpus, **options, best_fit=packing == "best_fit")
    sequences.notes += notes
    return sequences
