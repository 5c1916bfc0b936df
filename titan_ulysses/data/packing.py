"""Documents -> sequences of exactly S tokens: ids, labels already shifted, positions, document lengths.

Everything is computed on the whole sequence, on the host, before any rank takes its slice of it: labels are shifted
and documents are told apart here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from titan_ulysses.errors import UserError

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Corpus:
    """Tokenized documents, one after the other, none of them empty."""

    tokens: np.ndarray
    """[number of tokens] uint8, uint16 or uint32, the smallest that holds every id."""
    offsets: np.ndarray
    """[documents + 1] int64: document d is tokens[offsets[d]:offsets[d + 1]]."""

    @classmethod
    def from_documents(cls, documents: Iterable[np.ndarray]) -> Corpus:
        """From 1-D integer arrays of token ids; those without a token are left out."""
        # Narrowed one by one, so that a generator of wide arrays never holds more than one of them.
        kept = [_narrow(document) for document in documents if len(document)]
        tokens = np.concatenate(kept) if kept else np.empty(0, dtype=np.uint8)
        offsets = np.zeros(len(kept) + 1, dtype=np.int64)
        np.cumsum([len(document) for document in kept], out=offsets[1:])
        return cls(tokens, offsets)

    def __len__(self) -> int:
        """The number of documents."""
        return len(self.offsets) - 1

    def __getitem__(self, document: int) -> np.ndarray:
        assert 0 <= document < len(self), (document, len(self))
        return self.tokens[self.offsets[document] : self.offsets[document + 1]]

    def split_held_out(self, every: int = 100) -> tuple[Corpus, Corpus]:
        """(train, held out): the last document of each `every` is held out; of fewer than `every`, the last one.

        Raises `UserError` for a single document, which leaves nothing to train on.
        """
        assert every >= 2, every
        count = len(self)
        if count < 2:
            raise UserError(
                f"validation.path is not set and data.path has {count} document(s), none to hold out: "
                "set validation.path, give at least 2 documents, or set validation.enable = false"
            )
        held_out = {*range(every - 1, count, every)} or {count - 1}
        train = (self[d] for d in range(count) if d not in held_out)
        return Corpus.from_documents(train), Corpus.from_documents(self[d] for d in sorted(held_out))


def _narrow(document: np.ndarray) -> np.ndarray:
    smallest, largest = int(document.min()), int(document.max())
    assert document.ndim == 1 and smallest >= 0, (document.shape, smallest)
    return document.astype(np.min_scalar_type(largest))


class Sequence(NamedTuple):
    """S tokens, made of one or more documents or pieces of documents that must not see each other."""

    input_ids: torch.Tensor
    """[S] int64"""
    labels: torch.Tensor
    """[S] int64, already shifted: labels[t] is the token after input_ids[t] in its document, also where that token is
    the first of the next sequence; `IGNORE_INDEX` at a document's last token."""
    position_ids: torch.Tensor
    """[S] int64, from 0 in each piece"""
    document_lengths: tuple[int, ...]
    """the pieces' lengths; their sum is S"""


class PackedSequences:
    """An endless, deterministic stream of sequences of `seq_len` = S tokens, with random access.

    Each epoch is a permutation of the documents, drawn from (seed, epoch). The epochs' documents form one token stream
    and sequence i is its tokens [i*S, (i+1)*S), so no token of an epoch is lost or repeated. A document cut by a
    sequence's end goes on in the next sequence as a document of its own. `shuffle=False` keeps the documents' order.

    `sequences[i]` works for every i >= 0; `len(sequences)` counts the whole sequences of one epoch, which is what a
    validation pass reads. `setting` names the data in messages.

    Raises `UserError` when the data is shorter than one sequence.
    """

    def __init__(
        self, corpus: Corpus, *, seq_len: int, seed: int, shuffle: bool = True, setting: str = "data.path"
    ) -> None:
        self.corpus, self.seq_len, self.seed, self.shuffle = corpus, seq_len, seed, shuffle
        self.epoch_tokens = len(corpus.tokens)
        if self.epoch_tokens < seq_len:
            raise UserError(
                f"training.seq_len = {seq_len} is longer than all of {setting}, {self.epoch_tokens} tokens in "
                f"{len(corpus)} document(s): lower training.seq_len or give more data"
            )
        self._epoch = -1  # the epoch whose order is held; sequences are mostly read in order
        self._order = self._starts = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.epoch_tokens // self.seq_len

    def __getitem__(self, index: int) -> Sequence:
        size = self.seq_len
        input_ids, labels, position_ids = (np.empty(size, dtype=np.int64) for _ in range(3))
        counting = np.arange(size)
        lengths: list[int] = []
        at = 0
        for begin, end, document_end in self._pieces(index * size):
            stop = at + end - begin
            input_ids[at:stop] = self.corpus.tokens[begin:end]
            labels[at : stop - 1] = input_ids[at + 1 : stop]
            labels[stop - 1] = self.corpus.tokens[end] if end < document_end else IGNORE_INDEX
            position_ids[at:stop] = counting[: stop - at]
            lengths.append(stop - at)
            at = stop
        assert at == size, (at, size)
        tensors = (torch.from_numpy(array) for array in (input_ids, labels, position_ids))
        return Sequence(*tensors, document_lengths=tuple(lengths))

    def _pieces(self, start: int) -> Iterator[tuple[int, int, int]]:
        """The S stream tokens from `start` on as (begin, end, end of the whole document), indices into the corpus."""
        assert start >= 0, start
        epoch, offset = divmod(start, self.epoch_tokens)
        self._enter(epoch)
        place = int(np.searchsorted(self._starts, offset, side="right")) - 1
        skipped = offset - int(self._starts[place])
        remaining = self.seq_len
        while remaining:
            if place == len(self._order):
                epoch, place = epoch + 1, 0
                self._enter(epoch)
            document = self._order[place]
            begin, document_end = int(self.corpus.offsets[document]) + skipped, int(self.corpus.offsets[document + 1])
            end = min(document_end, begin + remaining)
            yield begin, end, document_end
            remaining -= end - begin
            place, skipped = place + 1, 0

    def _enter(self, epoch: int) -> None:
        """Hold the epoch's order of documents, and where each of them starts in the epoch's stream."""
        if epoch == self._epoch:
            return
        count = len(self.corpus)
        if self.shuffle:
            # Sorting raw draws, because numpy keeps a bit generator's stream from release to release, but not what
            # `Generator.permutation` makes of it: a run resumed elsewhere must find the same order.
            draws = np.random.PCG64(np.random.SeedSequence([self.seed, epoch])).random_raw(count)
            self._order = np.argsort(draws, kind="stable")
        else:
            self._order = np.arange(count)
        lengths = np.diff(self.corpus.offsets)[self._order]
        self._starts = np.cumsum(lengths) - lengths
        self._epoch = epoch
