"""Documents -> sequences of exactly S tokens: ids, labels already shifted, positions, document
lengths.

Everything is computed on the whole sequence, on the host, before any rank takes its slice of it:
labels are shifted and documents are told apart here and nowhere else.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch

from titan_ulysses.data.corpus import Corpus
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.sequence import IGNORE_INDEX

PADDING_ID = 0
_LOOK_AHEAD = 1024
"""Pieces among which best_fit chooses: with so many, one that nearly fits is nearly always
there.
"""


class PackedSample(NamedTuple):
    """S tokens, made of documents, pieces of documents and padding, which must not see each
    other.
    """

    input_ids: torch.Tensor
    """[S] int64"""
    labels: torch.Tensor
    """[S] int64, already shifted: labels[t] is the token after input_ids[t] in its document, also
    where that token is the first of the next sequence; `IGNORE_INDEX` at a document's last token,
    and where the label is not trained on.
    """
    position_ids: torch.Tensor
    """[S] int64, from 0 in each piece"""
    document_lengths: tuple[int, ...]
    """the pieces' lengths, padding being the last of them; their sum is S"""


def slice_document(
    tokens: np.ndarray, trained: np.ndarray | None, *, begin: int, end: int, document_end: int
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, labels) [end - begin] of a piece of the document that ends at `document_end`."""
    # Where the document goes on, the piece's last label is the token behind it.
    known = min(end + 1, document_end)
    following = tokens[begin + 1 : known].astype(np.int64)
    labels = np.full(end - begin, IGNORE_INDEX, dtype=np.int64)
    labels[: known - begin - 1] = (
        following
        if trained is None
        else np.where(trained[begin + 1 : known], following, IGNORE_INDEX)
    )
    return tokens[begin:end], labels


def concat_pieces(pieces: Iterable[tuple[np.ndarray, np.ndarray]], size: int) -> PackedSample:
    """One sequence of (ids, labels), filled up with padding, which is a document of its own without
    labels.
    """
    input_ids = np.full(size, PADDING_ID, dtype=np.int64)
    labels = np.full(size, IGNORE_INDEX, dtype=np.int64)
    position_ids, counting = np.empty(size, dtype=np.int64), np.arange(size)
    lengths: list[int] = []
    at = 0
    for piece, its_labels in pieces:
        stop = at + len(piece)
        input_ids[at:stop], labels[at:stop], position_ids[at:stop] = (
            piece,
            its_labels,
            counting[: len(piece)],
        )
        lengths.append(len(piece))
        at = stop
    if at < size:
        position_ids[at:] = counting[: size - at]
        lengths.append(size - at)
    return PackedSample(
        torch.from_numpy(input_ids),
        torch.from_numpy(labels),
        torch.from_numpy(position_ids),
        tuple(lengths),
    )


def shuffled(count: int, *, seed: int, epoch: int) -> np.ndarray:
    """[count] int64: a permutation that belongs to (seed, epoch).

    Sorting raw draws, because numpy keeps a bit generator's stream from release to release, but not
    what `Generator.permutation` makes of it: a run resumed elsewhere must find the same order.
    """
    draws = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(count)
    return np.argsort(draws, kind="stable")


class SampleStream:
    """An endless, deterministic stream of sequences of `seq_len` = S tokens; `sequences[i]` for
    every i >= 0.

    `len(sequences)` counts those of one epoch, where they are whole: of held-out data they hold
    every token once.
    """

    seq_len: int
    notes: list[str]
    """What there is to say about the data: what was left out, cut or padded."""

    def __getitem__(self, index: int) -> PackedSample:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def epochs(self, consumed: int) -> float | dict[str, float]:
        """How often the data has been read after `consumed` sequences; by source where there are
        several.
        """
        raise NotImplementedError

    def describe(self) -> str:
        """What the stream is made of, in one line or a few."""
        raise NotImplementedError

    def position(self, consumed: int) -> dict[str, Any] | None:
        """What else, beside the number, a stream without random access needs to go on from there;
        JSON.
        """
        return None

    def seek(self, consumed: int, position: dict[str, Any] | None) -> None:
        """Go on after `consumed` sequences, where `position` was taken."""


class PackedSequences(SampleStream):
    """Documents end to end, with random access.

    Each epoch is a permutation of the documents, drawn from (seed, epoch). The epochs' documents
    form one token stream and sequence i is its tokens [i*S, (i+1)*S), so no token of an epoch is
    lost or repeated. A document cut by a sequence's end goes on in the next sequence as a document
    of its own. `shuffle=False` keeps the documents' order. `once`: there is one epoch, and padding
    fills its last sequence. `setting` names the data in messages.

    Raises `UserError` when the data is shorter than one sequence, unless it is read once.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        seq_len: int,
        seed: int,
        shuffle: bool = True,
        once: bool = False,
        setting: str = "data.path",
    ) -> None:
        self.corpus = corpus
        self.seq_len = seq_len
        self.seed = seed
        self.shuffle = shuffle
        self.once = once
        self.notes: list[str] = []
        self.epoch_tokens = corpus.num_tokens
        if self.epoch_tokens < seq_len and not once:
            raise UserError(
                f"training.seq_len = {seq_len} is longer than all of {setting}, "
                f"{self.epoch_tokens} tokens in {len(corpus)} document(s): lower training.seq_len "
                "or give more data"
            )
        self._epoch = -1  # the epoch whose order is held; sequences are mostly read in order
        self._order = self._starts = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return (
            -(-self.epoch_tokens // self.seq_len)
            if self.once
            else self.epoch_tokens // self.seq_len
        )

    def epochs(self, consumed: int) -> float:
        return consumed * self.seq_len / self.epoch_tokens

    def describe(self) -> str:
        found = f"{len(self.corpus):,} document(s), {self.epoch_tokens:,} tokens, end to end"
        return "; ".join([found, *self.notes])

    def __getitem__(self, index: int) -> PackedSample:
        corpus = self.corpus
        spans = self._pieces(index * self.seq_len)
        pieces = (slice_document(corpus.tokens, corpus.trained, **span) for span in spans)
        return concat_pieces(pieces, self.seq_len)

    def _pieces(self, start: int) -> Iterator[dict[str, int]]:
        """The S stream tokens from `start` on, or as many as there are, as arguments of
        `slice_document`.
        """
        assert start >= 0 and not (self.once and start >= self.epoch_tokens), start
        epoch, offset = divmod(start, self.epoch_tokens)
        self._enter(epoch)
        place = int(np.searchsorted(self._starts, offset, side="right")) - 1
        skipped = offset - int(self._starts[place])
        remaining = self.seq_len
        while remaining:
            if place == len(self._order):
                if self.once:
                    return
                epoch, place = epoch + 1, 0
                self._enter(epoch)
            document = self._order[place]
            begin = int(self.corpus.begins[document]) + skipped
            document_end = int(self.corpus.ends[document])
            end = min(document_end, begin + remaining)
            yield {"begin": begin, "end": end, "document_end": document_end}
            remaining -= end - begin
            place, skipped = place + 1, 0

    def _enter(self, epoch: int) -> None:
        """Hold the epoch's order of documents, and where each of them starts in the epoch's
        stream.
        """
        if epoch == self._epoch:
            return
        count = len(self.corpus)
        self._order = (
            shuffled(count, seed=self.seed, epoch=epoch) if self.shuffle else np.arange(count)
        )
        lengths = self.corpus.lengths[self._order]
        self._starts = np.cumsum(lengths) - lengths
        self._epoch = epoch


class PaddedSequences(SampleStream):
    """Documents in one piece wherever they fit, the rest of a sequence padded; random access.

    A sequence holds one document, or with `best_fit` as many as fit, as `fit` chooses them.
    Documents of more than S tokens are cut into pieces of S; the label of a piece's last token is
    the document's next one. What goes together is decided once; each epoch is a permutation of the
    sequences, drawn from (seed, epoch), in which every token comes once.

    Raises `UserError` where there is no document.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        seq_len: int,
        seed: int,
        best_fit: bool = False,
        shuffle: bool = True,
        setting: str = "data.path",
    ) -> None:
        if not len(corpus):
            raise UserError(f"{setting} has no document to train on: give more data")
        self.corpus = corpus
        self.seq_len = seq_len
        self.seed = seed
        self.shuffle = shuffle
        self.best_fit = best_fit
        self.notes: list[str] = []
        order = (
            shuffled(len(corpus), seed=seed, epoch=0)
            if shuffle and best_fit
            else np.arange(len(corpus))
        )
        counts = -(-corpus.lengths[order] // seq_len)
        documents = np.repeat(order, counts)
        # Of the piece in its document.
        number = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
        begins = corpus.begins[documents] + number * seq_len
        ends = np.minimum(begins + seq_len, corpus.ends[documents])
        places, self._bounds = np.arange(len(documents)), np.arange(len(documents) + 1)
        if best_fit:
            places, self._bounds = best_fit_bins(ends - begins, seq_len)
        self._pieces = np.stack([begins, ends, corpus.ends[documents]], axis=1)[places]
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def epochs(self, consumed: int) -> float:
        return consumed / len(self)

    @property
    def fill_rate(self) -> float:
        """Which part of the sequences is not padding."""
        return self.corpus.num_tokens / (len(self) * self.seq_len)

    def describe(self) -> str:
        how = "best fit" if self.best_fit else "a sequence each"
        found = (
            f"{len(self.corpus):,} document(s), {self.corpus.num_tokens:,} tokens, {how}: "
            f"{len(self):,} sequence(s)"
        )
        return "; ".join([f"{found} filled to {self.fill_rate:.1%}", *self.notes])

    def __getitem__(self, index: int) -> PackedSample:
        epoch, place = divmod(index, len(self))
        if epoch != self._epoch:
            count = len(self)
            self._order = (
                shuffled(count, seed=self.seed, epoch=epoch) if self.shuffle else np.arange(count)
            )
            self._epoch = epoch
        here = self._order[place]
        pieces = self._pieces[self._bounds[here] : self._bounds[here + 1]].tolist()
        tokens, trained = self.corpus.tokens, self.corpus.trained
        cuts = (
            slice_document(tokens, trained, begin=begin, end=end, document_end=last)
            for begin, end, last in pieces
        )
        return concat_pieces(cuts, self.seq_len)


def best_fit_bins(
    lengths: np.ndarray, size: int, look_ahead: int = _LOOK_AHEAD
) -> tuple[np.ndarray, np.ndarray]:
    """Pieces of at most `size` tokens -> (order [pieces], bounds [bins + 1]): bin b holds
    order[bounds[b]:bounds[b+1]].

    Of the next `look_ahead` pieces that wait, the longest that fits comes into the bin (of equal
    ones the first), until none does; so a bin begins with the longest of all, and short ones fill
    it up. O(pieces * log(look_ahead)).
    """
    assert not len(lengths) or int(lengths.max()) <= size, (lengths.max(), size)
    arriving = iter(enumerate(lengths.tolist()))
    # (length, -place), sorted: of equal lengths the first comes last.
    waiting: list[tuple[int, int]] = []
    order: list[int] = []
    bounds, space = [0], size
    while True:
        for place, length in islice(arriving, look_ahead - len(waiting)):
            insort(waiting, (length, -place))
        chosen = bisect_right(waiting, (space, 1)) - 1
        if chosen >= 0:
            length, place = waiting.pop(chosen)
            order.append(-place)
            space -= length
        elif space < size:
            bounds.append(len(order))
            space = size
        else:
            return np.array(order, dtype=np.int64), np.array(bounds, dtype=np.int64)
