"""Packs documents into sequences of exactly S tokens, with labels, positions and document lengths.

Everything is computed on the whole sequence, on the host, before any rank takes its slice. For the
data of a run, this is the only place where labels are shifted and documents are separated.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch

from titan_ulysses.data.corpus import Corpus, JoinedTokens
from titan_ulysses.data.images import Kind, Visual
from titan_ulysses.data.media import Media
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.sequence import IGNORE_INDEX

Span = tuple[int, int, int]
"""[begin, end) of a piece of a document, and the document's end: indices into a corpus' tokens."""
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
    """[S] int64, from 0 in each piece; [A, S] where images are counted along A axes"""
    document_lengths: tuple[int, ...]
    """the lengths of the pieces, with padding as the last piece; their sum is S"""
    reference: torch.Tensor | None = None
    """[2 * pairs] fp64: the reference's log-probabilities of the completions; None: not known"""
    desirable: torch.Tensor | None = None
    """[pairs] bool: whether the first completion of each pair is desirable; None: not known"""
    loss_inputs: dict[str, torch.Tensor] = {}  # noqa: RUF012  a default that nobody changes
    """[S, ...] each: what the loss reads besides the labels, by name (see `teacher_of_labels`)"""
    padding: int = 0
    """the number of tokens at the end that are padding"""
    visuals: tuple[Visual, ...] = ()
    """its images and videos, by their first placeholders"""
    media: tuple[Media, ...] = ()
    """of each of them, where its pixels are"""


def slice_document(
    tokens: np.ndarray | JoinedTokens,
    trained: np.ndarray | None,
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
    if trained is not None:
        following = np.where(trained[begin + 1 : known], following, IGNORE_INDEX)
    labels = np.full(end - begin, IGNORE_INDEX, dtype=np.int64)
    labels[: len(following)] = following
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
        input_ids[at:stop], labels[at:stop] = piece, its_labels
        position_ids[at:stop] = counting[: len(piece)]
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


def teacher_of_labels(
    teacher: np.ndarray, spans: Iterable[Span], size: int
) -> dict[str, torch.Tensor]:
    """Return what the teacher says of each label of a sequence of `size` tokens, as loss inputs.

    `teacher_ids` [size, k] int64 and `teacher_logits` [size, k] fp32, 0 where there is no label.
    """
    found, at = np.zeros((size, teacher.shape[1]), dtype=teacher.dtype), 0
    for begin, end, document_end in spans:
        following = teacher[begin + 1 : min(end + 1, document_end)]  # as in `slice_document`
        found[at : at + len(following)] = following
        at += end - begin
    return {
        "teacher_ids": torch.from_numpy(found["id"].astype(np.int64)),
        "teacher_logits": torch.from_numpy(np.ascontiguousarray(found["log_prob"])),
    }


def with_visuals(sample: PackedSample, corpus: Corpus, spans: Sequence[Span]) -> PackedSample:
    """Return a sequence of whole documents with their images, and positions that go with them."""
    stored, at, found, axes = corpus.visuals, 0, [], []
    for begin, end, _ in spans:
        found += [(one.at(at), media) for one, media in stored.between(begin, end)]
        positions = stored.positions_of(begin, end)
        axes += [] if positions is None else [positions]
        at += end - begin
    position_ids = sample.position_ids
    if axes:
        position_ids = position_ids.repeat(len(axes[0]), 1)
        position_ids[:, :at] = torch.from_numpy(np.concatenate(axes, axis=1))
    return sample._replace(
        position_ids=position_ids,
        visuals=tuple(visual for visual, _ in found),
        media=tuple(media for _, media in found),
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
    visual_counts: dict[Kind, int] = {}  # noqa: RUF012  a default that nobody changes
    """How many images and videos the data has, by the kinds that it has; none in text."""

    def __getitem__(self, index: int) -> PackedSample:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def document_lengths(self, index: int) -> tuple[int, ...] | None:
        """Return `self[index].document_lengths` without reading a token.

        None if it is known only once it is read, as in data without random access.
        """
        return None

    def source(self, index: int) -> str:
        """Return the name of the source of a mixture that sequence `index` comes from."""
        return ""

    def parts(self) -> dict[str, SampleStream]:
        """Return the streams that it is made of, by source; itself as "" where there is one."""
        return {"": self}

    def documents(self, index: int) -> list[str]:
        """Return the document of each piece of sequence `index`, for a message.

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

    def sequences_per_epoch(self) -> Fraction | None:
        """Return the sequences after which the data, or its largest source, has been read once.

        None if that is not known, as of streamed data.
        """
        return None

    def largest(self) -> str:
        """Return the name of the largest source of a mixture."""
        return ""

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


class CorpusSequences(SampleStream):
    """Sequences of the documents of a corpus, with random access.

    A subclass says which spans of the corpus a sequence holds (`_spans`). In each epoch documents,
    or whole sequences, come in an order drawn from (seed, epoch), or in their own with
    `shuffle=False`.
    """

    def __init__(self, corpus: Corpus, *, seq_len: int, seed: int, shuffle: bool) -> None:
        self.corpus, self.seq_len, self.seed, self.shuffle = corpus, seq_len, seed, shuffle
        self.notes: list[str] = []
        self.visual_counts = corpus.visuals.counts if corpus.visuals else {}
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def _spans(self, index: int) -> list[Span]:
        raise NotImplementedError

    def __getitem__(self, index: int) -> PackedSample:
        corpus, spans = self.corpus, self._spans(index)
        pieces = (slice_document(corpus.tokens, corpus.trained, *span) for span in spans)
        sample = concat_pieces(pieces, self.seq_len)
        if corpus.visuals:
            sample = with_visuals(sample, corpus, spans)
        if corpus.teacher is None:
            return sample
        inputs = teacher_of_labels(corpus.teacher, spans, self.seq_len)
        return sample._replace(loss_inputs=inputs)

    def document_lengths(self, index: int) -> tuple[int, ...]:
        lengths = tuple(end - begin for begin, end, _ in self._spans(index))
        padding = self.seq_len - sum(lengths)
        return (*lengths, padding) if padding else lengths

    def documents(self, index: int) -> list[str]:
        return [*map(str, self.corpus.numbers_at([begin for begin, *_ in self._spans(index)]))]

    def content(self) -> dict[str, str]:
        return {"data": self.corpus.content}

    def _epoch(self, epoch: int, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the order of the items in an epoch, and the sum of the sizes before each."""
        if epoch not in self._epochs:
            count = len(sizes)
            order = (
                shuffled(count, seed=self.seed, epoch=epoch) if self.shuffle else np.arange(count)
            )
            starts = np.cumsum(sizes[order]) - sizes[order]
            # Two epochs are kept: a step may have sequences of both, in any order.
            self._epochs = dict([*self._epochs.items()][-1:]) | {epoch: (order, starts)}
        return self._epochs[epoch]


class PackedSequences(CorpusSequences):
    """Documents packed end to end.

    The documents of all epochs form one token stream, and sequence i is its tokens [i*S, (i+1)*S),
    so no token of an epoch is lost or repeated. A document that is cut at the end of a sequence
    continues in the next sequence as a document of its own. With `once` there is one epoch, and
    padding fills its last sequence. `setting` names the data in messages.

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
        super().__init__(corpus, seq_len=seq_len, seed=seed, shuffle=shuffle)
        self.once, self._lengths = once, corpus.lengths
        self.epoch_tokens = corpus.num_tokens
        if self.epoch_tokens < seq_len and not once:
            raise UserError(
                f"training.seq_len = {seq_len} is longer than all of {setting}, "
                f"{self.epoch_tokens} tokens in {len(corpus)} document(s): lower training.seq_len "
                "or give more data"
            )

    def __len__(self) -> int:
        whole, rest = divmod(self.epoch_tokens, self.seq_len)
        return whole + (self.once and rest > 0)

    def epochs(self, consumed: int) -> float:
        return consumed * self.seq_len / self.epoch_tokens

    def sequences_per_epoch(self) -> Fraction:
        return Fraction(self.epoch_tokens, self.seq_len)

    def describe(self) -> str:
        found = f"{len(self.corpus):,} document(s), {self.epoch_tokens:,} tokens, end to end"
        return "; ".join([found, *self.notes])

    def _spans(self, index: int) -> list[Span]:
        spans: list[Span] = []
        position, stop = index * self.seq_len, (index + 1) * self.seq_len
        if self.once:
            stop = min(stop, self.epoch_tokens)
        assert 0 <= position < stop, index
        while position < stop:
            epoch, offset = divmod(position, self.epoch_tokens)
            order, starts = self._epoch(epoch, self._lengths)
            end = min(offset + stop - position, self.epoch_tokens)
            first = int(np.searchsorted(starts, offset, side="right")) - 1
            last = int(np.searchsorted(starts, end, side="left"))
            documents = order[first:last]
            begins, document_ends = self.corpus.begins[documents], self.corpus.ends[documents]
            ends = document_ends.copy()
            ends[-1] = begins[-1] + end - starts[last - 1]
            begins[0] += offset - starts[first]
            spans += zip(begins.tolist(), ends.tolist(), document_ends.tolist(), strict=True)
            position += end - offset
        return spans


class PaddedSequences(CorpusSequences):
    """Documents that are not cut if they fit into a sequence, with padding.

    A sequence contains one document, or with `best_fit` several, chosen by `best_fit_bins`. A
    document of more than S tokens is cut into pieces of S tokens; the label of a piece's last token
    is the next token of the document. A pair of documents stays together, as two documents that
    follow each other; it must not be longer than S. The assignment of documents to sequences is
    computed once. Each epoch is a permutation of the sequences, so every token comes once per
    epoch. With labels_prompts, prompts have labels too, and the loss input `completion` [S] bool
    says which labels are those of completions.

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
        labels_prompts: bool = False,
    ) -> None:
        super().__init__(corpus, seq_len=seq_len, seed=seed, shuffle=shuffle)
        if not len(corpus):
            raise UserError(f"{setting} has no document to train on: give more data")
        self.best_fit, self.labels_prompts = best_fit, labels_prompts
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

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def epochs(self, consumed: int) -> float:
        return consumed / len(self)

    def sequences_per_epoch(self) -> Fraction:
        return Fraction(len(self))

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

    def __getitem__(self, index: int) -> PackedSample:
        sample, corpus = super().__getitem__(index), self.corpus
        if self.labels_prompts:
            spans = self._spans(index)
            whole = (slice_document(corpus.tokens, None, *span) for span in spans)
            inputs = {"completion": sample.labels != IGNORE_INDEX}
            sample = concat_pieces(whole, self.seq_len)._replace(loss_inputs=inputs)
        if corpus.reference is not None:
            reference = torch.from_numpy(corpus.reference[self.pairs(index)])
            sample = sample._replace(reference=reference.flatten())
        if corpus.desirable is not None:
            desirable = torch.from_numpy(corpus.desirable[self.pairs(index)])
            sample = sample._replace(desirable=desirable)
        return sample

    def pairs(self, index: int) -> np.ndarray:
        """Return the pairs of completions in a sequence, as indices of documents, in its order."""
        return self._documents[self._places(index)]

    def _spans(self, index: int) -> list[Span]:
        spans: list[Span] = []
        for begin, split, end, document_end in self._pieces[self._places(index)].tolist():
            spans += [(begin, split, split)] if begin < split else []  # a pair has two
            spans.append((split, end, document_end))
        return spans

    def _places(self, index: int) -> slice:
        """Return which of the pieces are in a sequence."""
        epoch, place = divmod(index, len(self))
        here = self._epoch(epoch, self._bounds[1:])[0][place]
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
