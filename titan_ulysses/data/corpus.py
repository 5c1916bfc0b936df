"""Tokenized documents, in memory or memory-mapped from files, and counts of what was left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from titan_ulysses.data.encoding import Encoded
from titan_ulysses.data.files import section_of
from titan_ulysses.data.sources import BadRow
from titan_ulysses.distributed.errors import UserError

if TYPE_CHECKING:
    from titan_ulysses.data.megatron import JoinedTokens


@dataclass(frozen=True)
class Corpus:
    """Documents as spans of one array of tokens. No document is empty."""

    tokens: np.ndarray | JoinedTokens
    """[tokens] of some integer dtype, of which only spans within a document are taken."""
    begins: np.ndarray
    """[documents] int64: document d is tokens[begins[d]:ends[d]]."""
    ends: np.ndarray
    """[documents] int64."""
    trained: np.ndarray | None = None
    """[tokens] bool: which tokens are trained on, that is predicted; None: all of them."""
    numbers: np.ndarray | None = None
    """[documents] int64: the number of each document in the data; None: they are all there."""
    content: str = ""
    """a hash of all documents of the data, those included that are not selected; "": unknown"""
    splits: np.ndarray | None = None
    """[documents] int64: where the second half of each pair of documents begins, counted from the
    pair's begin; None: they are no pairs. A pair counts as one document."""
    reference: np.ndarray | None = None
    """[documents, 2] float64: the reference's log-probabilities of the chosen and the rejected
    completion of each pair; None: they were not computed before training."""
    teacher: np.ndarray | None = None
    """[tokens, k] TOP: a teacher's largest log-probabilities of each token; None: none."""

    @classmethod
    def from_documents(cls, documents: Iterable[np.ndarray | Encoded]) -> Corpus:
        """Build a corpus from 1-D integer arrays of token ids, or from `Encoded` rows.

        Documents without a token are left out. `tokens` gets the smallest dtype that holds every
        id.
        """
        ids, masks, splits, teachers = [], [], [], []
        for document in documents:
            row = document if isinstance(document, Encoded) else Encoded(document)
            for encoded in row.documents() if len(row.ids) else ():
                # Each array is narrowed as it arrives, so that only one wide array is in memory at
                # a time.
                ids.append(_narrow(encoded.ids))
                masks.append(encoded.trained)
                splits.append(encoded.split)
                teachers.append(encoded.teacher)
        tokens = np.concatenate(ids) if ids else np.empty(0, dtype=np.uint8)
        trained = None
        if any(mask is not None for mask in masks):
            whole = (
                np.ones(len(one), bool) if mask is None else mask
                for one, mask in zip(ids, masks, strict=True)
            )
            trained = np.concatenate([*whole])
        ends = np.cumsum([len(one) for one in ids], dtype=np.int64)
        begins = np.append(0, ends)[:-1].astype(np.int64)
        pairs = None if None in splits or not splits else np.array(splits, dtype=np.int64)
        given = [one for one in teachers if one is not None]
        teacher = np.concatenate(given) if given else None
        assert len(given) in (0, len(ids)), "a teacher's words for some documents only"
        hasher = xxhash.xxh3_128()
        for array in (tokens, ends, trained, pairs, teacher):
            if array is not None:
                hasher.update(np.ascontiguousarray(array).view(np.uint8).data)
        return cls(
            tokens,
            begins,
            ends,
            trained,
            content=hasher.hexdigest(),
            splits=pairs,
            teacher=teacher,
        )

    def __len__(self) -> int:
        """The number of documents."""
        return len(self.begins)

    def __getitem__(self, document: int) -> np.ndarray:
        assert 0 <= document < len(self), (document, len(self))
        return self.tokens[self.begins[document] : self.ends[document]]

    @property
    def lengths(self) -> np.ndarray:
        """[documents] int64."""
        return self.ends - self.begins

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def select(self, documents: np.ndarray) -> Corpus:
        """Return some of the documents, by index or mask. Tokens are not copied."""
        numbers = np.arange(len(self)) if self.numbers is None else self.numbers
        return replace(
            self,
            begins=self.begins[documents],
            ends=self.ends[documents],
            numbers=numbers[documents],
            splits=None if self.splits is None else self.splits[documents],
            reference=None if self.reference is None else self.reference[documents],
        )

    def numbers_at(self, places: Sequence[int]) -> list[int]:
        """Return the number in the data of the document at each place, an index into `tokens`."""
        # Documents may have been reordered, as by their length.
        order = np.argsort(self.begins, kind="stable")
        found = order[np.searchsorted(self.begins[order], places, side="right") - 1]
        return (found if self.numbers is None else self.numbers[found]).tolist()

    def split_held_out(
        self, every: int = 100, *, setting: str = "data.path"
    ) -> tuple[Corpus, Corpus]:
        """Split into (train, held out), where the last of each `every` documents is held out.

        With fewer than `every` documents, the last one is held out. Raise `UserError` for fewer
        than 2 documents, which would leave nothing to train on.
        """
        assert every >= 2, every
        count = len(self)
        if count < 2:
            raise UserError(
                f"validation.path is not set and {setting} has {count} document(s), none to hold "
                "out: set validation.path, give at least 2 documents, or set validation.enable = "
                "false"
            )
        held_out = np.zeros(count, dtype=bool)
        held_out[every - 1 :: every] = True
        held_out[-1] |= not held_out.any()
        return self.select(~held_out), self.select(held_out)


def _narrow(document: np.ndarray) -> np.ndarray:
    smallest, largest = int(document.min()), int(document.max())
    assert document.ndim == 1 and smallest >= 0, (document.shape, smallest)
    return document.astype(np.min_scalar_type(largest))


@dataclass
class CorpusStats:
    """Counts of the rows that became documents, and of those that were left out."""

    documents: int = 0
    tokens: int = 0
    empty: int = 0
    bad: int = 0
    first_bad: str = ""
    divided: int = 0
    """rows that became several documents"""
    parts: int = 0
    """those documents"""
    parsed_calls: int = 0
    """tool calls whose arguments were JSON text"""

    def keep(
        self, encoded: Iterable[Encoded | BadRow], *, setting: str, skip: bool
    ) -> Iterator[Encoded]:
        """Yield the rows that have a token, and count rows and documents.

        Raise `UserError` for a bad row, unless `skip`.
        """
        for document in encoded:
            if isinstance(document, BadRow):
                self.bad += 1
                # JSON can express half of a surrogate pair, which can be neither printed nor kept.
                text = f"{document.place}: {document.reason}"
                text = text.encode(errors="backslashreplace").decode()
                self.first_bad = self.first_bad or text
                if not skip:
                    raise UserError(
                        f"{setting}: {text}. Correct it, or set "
                        f'{section_of(setting)}.bad_lines = "skip" to leave such lines out and '
                        "count them"
                    )
            elif not len(document.ids):
                self.empty += 1
            else:
                parts = 1 if document.lengths is None else len(document.lengths)
                self.documents += parts
                if parts > 1:
                    self.divided, self.parts = self.divided + 1, self.parts + parts
                self.tokens += len(document.ids)
                self.parsed_calls += document.parsed_calls
                yield document

    def notes(self) -> list[str]:
        """Return a note for each kind of row that was left out, if any."""
        notes = (
            [f"{self.bad:,} bad line(s) skipped (the first: {self.first_bad})"] if self.bad else []
        )
        return notes + ([f"{self.empty:,} empty one(s) left out"] if self.empty else [])
