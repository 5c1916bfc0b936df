"""The data pipeline, from files and data sets to the batch of one rank.

The stages are `sources` -> `encoding` -> `cache` -> `packing` -> `mixture` -> `loader`. They are
imported when they are used, so that inspecting a configuration does not load torch or transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from titan_ulysses.distributed.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from titan_ulysses.config.schema import Config, SourceSettings
    from titan_ulysses.data.corpus import Corpus
    from titan_ulysses.data.packing import SampleStream


def open_sequences(
    config: Config, tokenizer: PreTrainedTokenizerBase, *, eval_only: bool = False
) -> tuple[SampleStream | None, SampleStream | None]:
    """Return the training stream and the held-out stream of a run.

    The first is None if `eval_only`. The second is None if validation is disabled, or has named
    sets (see `open_validation_sets`). Training data is shuffled and has no end. Held-out data
    contains every token once, in the order of its files; sequences that are not full are padded. It
    comes from `validation.path` or `validation.split`, read with the settings of [data], or from
    documents held out of each training source.
    """
    data, validation = config.data, config.validation
    # Validation data of its own, instead of documents held out of the training data.
    apart = validation.enable and bool(validation.path or validation.split or validation.sets)
    held_out = None
    if apart and eval_only:
        training = None
    elif not data.mixture:
        training, held_out = _open(
            config, tokenizer, data, "data.path", splits=validation.enable and not apart
        )
    else:
        training, held_out = _open_mixture(
            config, tokenizer, splits=validation.enable and not apart
        )
    if apart and not validation.sets:
        changes = {
            "path": validation.path or data.path,
            "split": validation.split or data.split,
            "streaming": False,
            "teacher_top_k": 0,  # held-out data is for the cross-entropy
        }
        setting = "validation.path" if validation.path else "validation.split: data.path"
        corpus, notes = _read(config, tokenizer, data.model_copy(update=changes), setting)
        held_out = _pack(config, corpus, setting, held_out=True, notes=notes)
    return None if eval_only else training, held_out


def open_validation_sets(
    config: Config, tokenizer: PreTrainedTokenizerBase
) -> dict[str, SampleStream]:
    """Return {name: held-out sequences} of [[validation.sets]], each with its own packing."""
    found: dict[str, SampleStream] = {}
    for number, entry in enumerate(config.validation.sets if config.validation.enable else ()):
        setting = f"validation.sets[{number}].path"
        corpus, notes = _read(config, tokenizer, entry, setting)
        found[entry.name] = _pack(
            config, corpus, setting, held_out=True, notes=notes, packing=entry.packing
        )
    return found


def _open_mixture(
    config: Config, tokenizer: PreTrainedTokenizerBase, *, splits: bool
) -> tuple[SampleStream, SampleStream | None]:
    from titan_ulysses.data.mixture import ChainedSequences, MixedSequences

    entries = config.data.mixture
    training: dict[str, SampleStream] = {}
    held_out: dict[str, Any] = {}
    for number, entry in enumerate(entries):
        name = entry.path if entry.path not in training else f"{entry.path} ({number})"
        setting = f"data.mixture[{number}].path"
        training[name], held_out[name] = _open(config, tokenizer, entry, setting, splits=splits)
    weights = [entry.weight for entry in entries]
    mixed = MixedSequences(training, weights, seed=config.training.seed)
    return mixed, ChainedSequences(held_out) if splits else None


def _open(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    source: SourceSettings,
    setting: str,
    *,
    splits: bool,
) -> tuple[SampleStream, SampleStream | None]:
    """Return the training stream of one source and, if `splits`, a stream of held-out documents."""
    if source.streaming:
        return _stream(config, tokenizer, source, setting), None
    corpus, notes = _read(config, tokenizer, source, setting)
    held_out = None
    if splits:
        corpus, rest = corpus.split_held_out(setting=setting)
        held_out = _pack(
            config, rest, f"the held-out documents of {setting}", held_out=True, notes=[]
        )
    return _pack(config, corpus, setting, held_out=False, notes=notes), held_out


def _read(
    config: Config, tokenizer: PreTrainedTokenizerBase, source: SourceSettings, setting: str
) -> tuple[Corpus, list[str]]:
    from titan_ulysses.data.cache import read_corpus
    from titan_ulysses.data.encoding import Encoder

    if not source.path:
        raise UserError(f"{setting} is not set: give a file or folder to read", exit_code=2)
    encoder = Encoder(tokenizer, source.train_on)
    corpus, tally = read_corpus(
        source, encoder, cache_folder=config.data.cache_folder, setting=setting
    )
    notes = tally.notes()
    if source.source == "chat" and tally.divided:
        notes.append(
            f"{tally.divided:,} chat(s) became {tally.parts:,} samples, because the chat template "
            "writes earlier turns differently once others follow"
        )
    if tally.parsed_calls:
        notes.append(
            f"{tally.parsed_calls:,} tool call(s) had their arguments as JSON text, and are read "
            "as objects"
        )
    return corpus, notes


def _stream(
    config: Config, tokenizer: PreTrainedTokenizerBase, source: SourceSettings, setting: str
) -> SampleStream:
    from titan_ulysses.data.datasets import DatasetRows
    from titan_ulysses.data.encoding import Encoder
    from titan_ulysses.data.rows import open_rows
    from titan_ulysses.data.stream import StreamedSequences

    encoder = Encoder(tokenizer, source.train_on)
    encoder.check(source.source)
    rows = open_rows(source, setting)
    if not isinstance(rows, DatasetRows):
        raise UserError(
            f'{setting} = "{source.path}" are files, and streaming is for data sets: set streaming '
            "= false",
            exit_code=2,
        )
    training = config.training
    skip = source.bad_lines == "skip"
    return StreamedSequences(
        rows, encoder, seq_len=training.seq_len, seed=training.seed, skip_bad=skip
    )


def _pack(
    config: Config,
    corpus: Corpus,
    setting: str,
    *,
    held_out: bool,
    notes: list[str],
    packing: str = "",
) -> SampleStream:
    from titan_ulysses.data.packing import PackedSequences, PaddedSequences

    seq_len, packing = config.training.seq_len, packing or config.data.packing
    # Documents longer than a sequence are dropped here, or split later by the packing.
    if long := int((corpus.lengths > seq_len).sum()):
        drops = config.data.long_documents == "drop"
        if corpus.splits is not None and not drops:
            raise UserError(
                f"{setting}: {long:,} pair(s) of completions, with their prompts, are longer than "
                f"training.seq_len = {seq_len} (the longest has {corpus.lengths.max():,} tokens), "
                "and a pair cannot be cut: raise training.seq_len, or set data.long_documents = "
                '"drop"'
            )
        corpus = corpus.select(corpus.lengths <= seq_len) if drops else corpus
        notes = [
            *notes,
            f"{long:,} longer than {seq_len:,} tokens {'left out' if drops else 'split'}",
        ]
    if not len(corpus):
        raise UserError(
            f"{setting}: each document is longer than training.seq_len = {seq_len}: set "
            'data.long_documents = "split"'
        )
    if held_out and corpus.lengths.max() < 2:
        raise UserError(
            f"{setting}: no document has more than one token, so that none is predicted: give "
            "longer ones"
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
        sequences = PaddedSequences(corpus, **options, best_fit=packing == "best_fit")
    sequences.notes += notes
    return sequences
