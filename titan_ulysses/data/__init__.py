"""From files to one rank's batch: `sources` -> `tokenizer` -> `packing` -> `loader`, one step a module.

Nothing is imported at once, so that looking at a configuration does not load torch or transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from titan_ulysses.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from titan_ulysses.config import Config
    from titan_ulysses.data.packing import PackedSequences


def open_sequences(
    config: Config, tokenizer: PreTrainedTokenizerBase
) -> tuple[PackedSequences, PackedSequences | None]:
    """The training stream and, where validation is enabled, the held-out one.

    Both are shuffled by documents, the held-out one always alike: the first few sequences of it, which a validation
    reads, are then a sample of all of it.
    """
    from titan_ulysses.data.packing import Corpus, PackedSequences
    from titan_ulysses.data.sources import text_documents
    from titan_ulysses.data.tokenizer import encode

    def read(path: str, setting: str) -> Corpus:
        data = config.data
        if not path:
            raise UserError(f"{setting} is not set: give a file or folder to read", exit_code=2)
        texts = text_documents(path, extensions=data.extensions, encoding=data.encoding, setting=setting)
        return Corpus.from_documents(encode(tokenizer, text) for _, text in texts)

    seq_len, held_out_setting = config.training.seq_len, "validation.path"
    training, held_out = read(config.data.path, "data.path"), None
    if config.validation.enable and config.validation.path:
        held_out = read(config.validation.path, held_out_setting)
    elif config.validation.enable:
        held_out_setting = "the held-out documents of data.path"
        training, held_out = training.split_held_out()
    return (
        PackedSequences(training, seq_len=seq_len, seed=config.training.seed),
        held_out and PackedSequences(held_out, seq_len=seq_len, seed=0, setting=held_out_setting),
    )
