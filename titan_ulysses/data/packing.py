"""Packs documents into sequences of exactly S tokens, with labels, positions and document lengths.

Everything is computed on the whole sequence, on the host, before any rank takes its slice. For the
data of a run, this is the only place where labels are shifted and documents are separated.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable, Iterator
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from titan_ulysses.data.corpus import Corpus
from titan_ulysses.data.teacher import of_labels
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.sequence import IGNORE_INDEX

if TYPE_CHECKING:
    from titan_ulysses.data.megatron import JoinedTokens

PADDING_ID = 0
_LOOK_AHEAD = 1024
"""Number of pieces from which best_fit chooses: enough that one nearly always fits closely."""


class PackedSample(NamedTuple):
    """A sequence of S tokens: documents, pieces of documents and padding.

    These must not attend to each other.
    """

    input_ids: torch.Tensor
    """[S] int64"""
    labels: torch.Tensor
    """[S] int64, already shifted: labels[t] is the token after input_ids[t] in its document, even
    if that token is the first one of the next piece. `IGNORE_INDEX` at the last token of a
    document, at padding, and at labels that are not trained on.
    """
    position_ids: torch.Tensor
    """[S] int64, from 0 in each piece"""
    document_lengths: tuple[int, ...]
    """the lengths of the pieces, with padding as the last piece; their sum is S"""
    reference: torch.Tensor | None = None
    """[2 * pairs] fp64: the reference's log-probabilities of the completions; None: not known"""
    loss_inputs: dict[str, torch.Tensor] = {}  # noqa: RUF012  a default that nobody changes
    """[S, ...] each: what the loss reads beside the labels, by name (see `teacher.of_labels`)"""
    padding: int = 0
    """the number of tokens at the end that are padding"""


def slice_document(
    tokens: np.ndarray | JoinedTokens,
    trained: np.ndarray | None,
    *,
    begin: int,
    end: int,
    document_end: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (ids, labels), each [end - begin], of one piece of the document.

    `begin`, `end` and the document's end, `document_end`, are indices into `tokens`.
    """
    # If the document continues, the last label of the piece is the token after the piece.
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
    """Concatenate pieces (ids, labels) to one sequence of `size` tokens.

    The rest is filled with padding, which is a document of its own, without labels.
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
        padding=size - at,
    )


def shuffled(count: int, *, seed: int, epoch: int) -> np.ndarray:
    """Return a permutation [count] int64 that is determined by (seed, epoch).

    It is made by sorting raw random numbers, because a run that resumes on another machine must
    find the same order. numpy keeps the stream of a bit generator stable from release to release,
    but not the result of `Generator.permutation`.
    """
    draws = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(count)
    return np.argsort(draws, kind="stable")


class SampleStream:
    """A deterministic stream of sequences of `seq_len` = S tokens.

    A training stream is endless: `sequences[i]` exists for every i >= 0. A held-out stream contains
    every token once, with padding where needed. `len(sequences)` is the number of sequences in one
    epoch, or of whole ones if a sequence can cross the end of an epoch. Streamed and mixed data
    have no length.
    """

    seq_len: int
    notes: list[str]
    """Remarks about the data for the log: what was left out or cut, and a mixture's weights."""
    source_names: list[str] = []
    """Names of the sources of a mixture; empty where there is one source."""

    def __getitem__(self, index: int) -> PackedSample:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def document_lengths(self, index: int) -> tuple[int, ...] | None:
        """Return `self[index].document_lengths` without reading a token.

        None where only reading tells, which is so without random access.
        """
        return None

    def source(self, index: int) -> str:
        """Return the name of the source of a mixture that sequence `index` comes from."""
        return ""

    def parts(self) -> dict[str, SampleStream]:
        """Return the streams that it is made of, by source; itself as "" where there is one."""
        return {"": self}

    def documents(self, index: int) -> list[str]:
        """Return which documents sequence `index` holds, for a message.

        Documents are counted from 0, in the order of the data, empty ones left out. Those of data
        without random access are not known by number.
        """
        return [f"those of sequence {index}"]

    def content(self) -> dict[str, str]:
        """Return a hash of the documents that the stream is made of, by source; {} if unknown.

        Those of data without random access are not known before they are read.
        """
        return {}

    def epochs(self, consumed: int) -> float | dict[str, float]:
        """Return how often the data has been read after `consumed` sequences.

        The result is by source if there are several.
        """
        raise NotImplementedError

    def describe(self) -> str:
        """Describe the stream in one or a few lines."""
        raise NotImplementedError

    def position(self, consumed: int) -> dict[str, Any] | None:
        """Return what a stream without random access needs to continue after `consumed` sequences.

        The value is JSON-serializable. It is None for streams with random access, which need only
        the number.
        """
        return None

    def seek(self, consumed: int, position: dict[str, Any] | None) -> None:
        """Continue after `consumed` sequences, given what `position(consumed)` returned there."""


class PackedSequences(SampleStream):
    """Documents packed end to end, with random access.

    Each epoch is a permutation of the documents, drawn from (seed, epoch). The documents of all
    epochs form one token stream, and sequence i is its tokens [i*S, (i+1)*S), so no token of an
    epoch is lost or repeated. A document that is cut at the end of a sequence continues in the next
    sequence as a document of its own. With `shuffle=False` documents keep their order. With `once`
    there is one epoch, and padding fills its last sequence. `setting` names the data in messages.

    Raise `UserError` if the data is shorter than one sequence, unless `once`.
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
        # The order of two epochs is kept: a step may have sequences of both, in any order.
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._order = self._starts = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return (
            -(-self.epoch_tokens // self.seq_len)
            if self.once
            else self.epoch_tokens // self.seq_len
        )

    def content(self) -> dict[str, str]:
        return {"data": self.corpus.content}

    def epochs(self, consumed: int) -> float:
        return consumed * self.seq_len / self.epoch_tokens

    def describe(self) -> str:
        found = f"{len(self.corpus):,} document(s), {self.epoch_tokens:,} tokens, end to end"
        return "; ".join([found, *self.notes])

    def __getitem__(self, index: int) -> PackedSample:
        corpus = self.corpus
        spans = [*self._pieces(index * self.seq_len)]
        pieces = (slice_document(corpus.tokens, corpus.trained, **span) for span in spans)
        sample = concat_pieces(pieces, self.seq_len)
        if corpus.teacher is None:
            return sample
        bounds = ((span["begin"], span["end"], span["document_end"]) for span in spans)
        return sample._replace(loss_inputs=of_labels(corpus.teacher, bounds, self.seq_len))

    def document_lengths(self, index: int) -> tuple[int, ...]:
        position, end = index * self.seq_len, (index + 1) * self.seq_len
        lengths: list[int] = []
        while position < end:
            epoch, offset = divmod(position, self.epoch_tokens)
            if self.once and epoch:
                lengths.append(end - position)  # padding
                break
            self._enter(epoch)
            stop = min(offset + end - position, self.epoch_tokens)
            first = int(np.searchsorted(self._starts, offset, side="right"))
            last = int(np.searchsorted(self._starts, stop, side="left"))
            cuts = [offset, *self._starts[first:last].tolist(), stop]
            lengths += [b - a for a, b in pairwise(cuts)]
            position += stop - offset
        return tuple(lengths)

    def documents(self, index: int) -> list[str]:
        begins = [span["begin"] for span in self._pieces(index * self.seq_len)]
        return [*map(str, self.corpus.numbers_at(begins))]

    def _pieces(self, start: int) -> Iterator[dict[str, int]]:
        """Yield the pieces of the S stream tokens from `start` on, as `slice_document` arguments.

        At the end of a stream that is read once, there may be fewer tokens.
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
        """Compute the epoch's order of documents, and where each starts in the epoch's stream."""
        if epoch not in self._epochs:
            count = len(self.corpus)
            order = (
                shuffled(count, seed=self.seed, epoch=epoch) if self.shuffle else np.arange(count)
            )
            lengths = self.corpus.lengths[order]
            latest = [*self._epochs.items()][-1:]
            self._epochs = dict(latest) | {epoch: (order, np.cumsum(lengths) - lengths)}
        self._order, self._starts = self._epochs[epoch]


class PaddedSequences(SampleStream):
    """Documents that are not cut if they fit into a sequence, with padding and random access.

    A sequence contains one document, or with `best_fit` several, chosen by `best_fit_bins`. A
    document of more than S tokens is cut into pieces of S tokens; the label of a piece's last token
    is the next token of the document. A pair of documents stays together, as two documents that
    follow each other; it must not be longer than S. The assignment of documents to sequences is
    computed once. Each epoch is a permutation of the sequences, drawn from (seed, epoch), so every
    token comes once per epoch. With `shuffle=False` the order is kept.

    Raise `UserError` if there is no document.
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
        # best_fit combines documents that are close to each other in this order: shuffle it first.
        order = (
            shuffled(len(corpus), seed=seed, epoch=0)
            if shuffle and best_fit
            else np.arange(len(corpus))
        )
        counts = -(-corpus.lengths[order] // seq_len)
        documents = np.repeat(order, counts)
        # Cut every document into pieces; `number` is the index of a piece in its document.
        number = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
        begins = corpus.begins[documents] + number * seq_len
        ends = np.minimum(begins + seq_len, corpus.ends[documents])
        places, self._bounds = np.arange(len(documents)), np.arange(len(documents) + 1)
        if best_fit:
            places, self._bounds = best_fit_bins(ends - begins, seq_len, _LOOK_AHEAD)
        self._documents = documents[places]
        splits = 0 if corpus.splits is None else corpus.splits[documents]
        self._pieces = np.stack([begins, begins + splits, ends, corpus.ends[documents]], 1)[places]
        # The order of two epochs is kept: a step may have sequences of both, in any order.
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def content(self) -> dict[str, str]:
        return {"data": self.corpus.content}

    def epochs(self, consumed: int) -> float:
        return consumed / len(self)

    @property
    def fill_rate(self) -> float:
        """The fraction of all tokens that is not padding."""
        return self.corpus.num_tokens / (len(self) * self.seq_len)

    def describe(self) -> str:
        how = "best fit" if self.best_fit else "a sequence each"
        found = (
            f"{len(self.corpus):,} document(s), {self.corpus.num_tokens:,} tokens, {how}: "
            f"{len(self):,} sequence(s)"
        )
        return "; ".join([f"{found} filled to {self.fill_rate:.1%}", *self.notes])

    def document_lengths(self, index: int) -> tuple[int, ...]:
        lengths = [end - begin for begin, end, _ in self._spans(index)]
        padding = self.seq_len - sum(lengths)
        return (*lengths, padding) if padding else tuple(lengths)

    def documents(self, index: int) -> list[str]:
        begins = [begin for begin, *_ in self._spans(index)]
        return [*dict.fromkeys(map(str, self.corpus.numbers_at(begins)))]

    def __getitem__(self, index: int) -> PackedSample:
        corpus, spans = self.corpus, self._spans(index)
        cuts = (
            slice_document(corpus.tokens, corpus.trained, begin=begin, end=end, document_end=last)
            for begin, end, last in spans
        )
        sample = concat_pieces(cuts, self.seq_len)
        if corpus.reference is not None:
            reference = torch.from_numpy(corpus.reference[self.pairs(index)]).flatten()
            sample = sample._replace(reference=reference)
        if corpus.teacher is not None:
            sample = sample._replace(loss_inputs=of_labels(corpus.teacher, spans, self.seq_len))
        return sample

    def pairs(self, index: int) -> np.ndarray:
        """Return the pairs of completions in a sequence, as indices of documents, in its order."""
        return self._documents[self._places(index)]

    def _spans(self, index: int) -> list[tuple[int, int, int]]:
        """Return the (begin, end, end of its document) of each piece in a sequence.

        A pair has two.
        """
        spans = []
        for begin, split, end, last in self._pieces[self._places(index)].tolist():
            spans += [(begin, split, split)] if begin < split else []
            spans.append((split, end, last))
        return spans

    def _places(self, index: int) -> slice:
        """Return which of the pieces are in a sequence."""
        epoch, place = divmod(index, len(self))
        if epoch not in self._orders:
            count = len(self)
            order = (
                shuffled(count, seed=self.seed, epoch=epoch) if self.shuffle else np.arange(count)
            )
            self._orders = dict([*self._orders.items()][-1:]) | {epoch: order}
        here = self._orders[epoch][place]
        return slice(self._bounds[here], self._bounds[here + 1])


def best_fit_bins(lengths: np.ndarray, size: int, look_ahead: int) -> tuple[np.ndarray, np.ndarray]:
    """Assign pieces of at most `size` tokens to bins of `size` tokens.

    Return (order [pieces], bounds [bins + 1]): bin b holds order[bounds[b]:bounds[b+1]]. Among the
    next `look_ahead` waiting pieces, the longest that fits goes into the bin (the first of equal
    ones), until none fits. A bin thus begins with the longest waiting piece, and shorter pieces
    fill it up. O(pieces * log(look_ahead)).
    """
    assert not len(lengths) or int(lengths.max()) <= size, (lengths.max(), size)
    arriving = iter(enumerate(lengths.tolist()))
    # (length, -place), sorted. Of equal lengths the first piece comes last, so it is taken first.
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
