"""Tokenized documents, in memory or memory-mapped from files, and counts of what was left out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import xxhash

from titan_ulysses.data.files import section_of
from titan_ulysses.data.images import KINDS, Kind, Visual
from titan_ulysses.data.media import Media
from titan_ulysses.data.records import TOP, BadRow, Encoded
from titan_ulysses.distributed.errors import UserError

_HELD_OUT_EVERY = 100
"""Of so many documents the last one is held out, where validation has no data of its own."""


class JoinedTokens:
    """Several arrays of tokens as one, of which slices within one of the arrays can be taken."""

    def __init__(self, parts: list[np.ndarray]) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *map(len, parts)])

    def __getitem__(self, span: slice) -> np.ndarray:
        part = int(np.searchsorted(self._starts, span.start, side="right")) - 1
        if part == len(self._parts):  # an empty slice at the end
            return self._parts[-1][:0]
        first = int(self._starts[part])
        assert span.stop <= max(span.start, self._starts[part + 1]), span
        return self._parts[part][span.start - first : span.stop - first]


@dataclass(frozen=True)
class StoredVisuals:
    """The images and videos of a corpus, in its order: where they stand, and their sources.

    The source is a path, or the content of the file that the row holds, as it is. Pixels are not
    stored.
    """

    begins: np.ndarray
    """[visuals] int64: the first placeholder of each, as an index into the corpus' tokens"""
    sizes: np.ndarray
    """[visuals, 3] int64: its kind, and the bytes of its description and of its content"""
    content: np.ndarray
    """[bytes] uint8: the description of each, in JSON, followed by its content"""
    rows: np.ndarray | None = None
    """[rows, 2] int64: the spans of tokens of rows that have some, in order; None: as below"""
    positions: np.ndarray | None = None
    """[tokens of these rows, axes] int32, from 0 in each document; None: positions are counted
    along one axis"""

    def between(self, begin: int, end: int) -> list[tuple[Visual, Media]]:
        """Return those of a span of tokens; they count from its first token."""
        first, last = (int(np.searchsorted(self.begins, at)) for at in (begin, end))
        found = []
        for index in range(first, last):
            _, size, data = self.sizes[index].tolist()
            at = int(self._ends[index]) - size - data
            about = json.loads(self.content[at : at + size].tobytes())
            name, path, row = about["media"]
            visual = Visual(
                about["kind"],
                tuple(map(tuple, about["spans"])),
                tuple(about["grid"]),
                about["cost"],
                seconds=about["seconds"],
            ).at(int(self.begins[index]) - begin)
            content = self.content[at + size : at + size + data].tobytes()
            found.append((visual, Media(about["kind"], name, path, row, content)))
        return found

    def positions_of(self, begin: int, end: int) -> np.ndarray | None:
        """Return the positions [axes, tokens] of a span of one document, from its first token."""
        if self.positions is None:
            return None
        row = int(np.searchsorted(self.rows[:, 0], begin, side="right")) - 1
        if row < 0 or begin >= self.rows[row, 1]:
            return np.tile(np.arange(end - begin), (self.positions.shape[1], 1))
        first = int(self._starts[row] + begin - self.rows[row, 0])
        return self.positions[first : first + end - begin].T

    @cached_property
    def _starts(self) -> np.ndarray:
        counts = self.rows[:, 1] - self.rows[:, 0]
        return counts.cumsum() - counts

    @cached_property
    def counts(self) -> dict[Kind, int]:
        """How many there are of each kind that there is."""
        kinds, counts = np.unique(self.sizes[:, 0], return_counts=True)
        return {KINDS[kind]: count for kind, count in zip(kinds, counts.tolist(), strict=True)}

    @cached_property
    def _ends(self) -> np.ndarray:
        return self.sizes[:, 1:].sum(axis=1).cumsum()


def _stored(row: Encoded, offset: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield what to append to the columns of `StoredVisuals` for a row that begins at `offset`."""
    for visual, its in zip(row.visuals, row.media, strict=True):
        begin = visual.spans[0][0]
        about = asdict(visual.at(-begin)) | {"media": (its.name, its.path, its.row)}
        text = json.dumps(about, separators=(",", ":")).encode()
        sizes = (KINDS.index(visual.kind), len(text), len(its.data))
        yield "visual_begins", np.array([offset + begin], dtype=np.int64)
        yield "visual_sizes", np.array(sizes, dtype=np.int64)
        yield "visual_content", np.frombuffer(text + its.data, dtype=np.uint8)
    if row.visuals and row.positions is not None:
        yield "visual_rows", np.array([offset, offset + len(row.ids)], dtype=np.int64)
        yield "visual_positions", row.positions


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
    document_ids: np.ndarray | None = None
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
    desirable: np.ndarray | None = None
    """[documents] bool: whether the first completion of each pair is desirable; None: not known"""
    visuals: StoredVisuals | None = None
    """The images and videos of the documents; None: there is none."""

    @classmethod
    def from_documents(cls, documents: Iterable[np.ndarray | Encoded]) -> Corpus:
        """Build a corpus from 1-D integer arrays of token ids, or from `Encoded` rows.

        Documents without a token are left out. `tokens` gets the smallest dtype that holds every
        id.
        """
        rows = (row if isinstance(row, Encoded) else Encoded(row) for row in documents)
        columns: dict[str, list[np.ndarray]] = {}
        for name, array in columns_of(row for row in rows if len(row.ids)):
            if name == "tokens":
                # Each array is narrowed as it arrives, so that only one wide array is in memory at
                # a time.
                assert array.ndim == 1 and array.min(initial=0) >= 0, (array.shape, array.min())
                array = array.astype(np.min_scalar_type(int(array.max(initial=0))))
            columns.setdefault(name, []).append(array)
        whole = {name: np.concatenate(arrays) for name, arrays in columns.items()}
        corpus, hasher = cls.from_columns(whole, content=""), xxhash.xxh3_128()
        parts = [corpus.tokens, corpus.ends, corpus.trained, corpus.splits, corpus.teacher]
        for part in [*parts, corpus.desirable, corpus.visuals and corpus.visuals.content]:
            if part is not None:
                hasher.update(np.ascontiguousarray(part).view(np.uint8).data)
        return replace(corpus, content=hasher.hexdigest())

    @classmethod
    def from_columns(cls, columns: dict[str, np.ndarray], *, content: str) -> Corpus:
        """Build a corpus from what `columns_of` yields, each column joined."""
        tokens, ends, teacher = columns["tokens"], columns["lengths"].cumsum(), None
        if "teacher" in columns:
            teacher = columns["teacher"].reshape(len(tokens), -1)
        visuals = None
        if "visual_begins" in columns:
            found: dict[str, Any] = {x: columns.get(f"visual_{x}") for x in VISUAL_COLUMNS}
            found["sizes"] = found["sizes"].reshape(-1, 3)
            if found["rows"] is not None:
                found["rows"] = found["rows"].reshape(-1, 2)
                tokens_with = int((found["rows"][:, 1] - found["rows"][:, 0]).sum())
                found["positions"] = found["positions"].reshape(tokens_with, -1)
            visuals = StoredVisuals(**found)
        return cls(
            tokens,
            ends - columns["lengths"],
            ends,
            columns.get("trained"),
            content=content,
            splits=columns.get("splits"),
            teacher=teacher,
            desirable=columns.get("desirable"),
            visuals=visuals,
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
        ids = np.arange(len(self)) if self.document_ids is None else self.document_ids
        names = ("begins", "ends", "splits", "reference", "desirable")
        columns = {name: getattr(self, name) for name in names} | {"document_ids": ids}
        return replace(self, **{k: x[documents] for k, x in columns.items() if x is not None})

    def numbers_at(self, places: Sequence[int]) -> list[int]:
        """Return the number in the data of the document at each place, an index into `tokens`."""
        # Documents may have been reordered, as by their length.
        order = np.argsort(self.begins, kind="stable")
        found = order[np.searchsorted(self.begins[order], places, side="right") - 1]
        return (found if self.document_ids is None else self.document_ids[found]).tolist()

    def split_held_out(self, *, setting: str = "data.path") -> tuple[Corpus, Corpus]:
        """Split into (train, held out), where the last of each 100 documents is held out.

        With fewer than 100 documents, the last one is held out. Raise `UserError` for fewer than 2
        documents, which would leave nothing to train on.
        """
        count = len(self)
        if count < 2:
            raise UserError(
                f"validation.path is not set and {setting} has {count} document(s), none to hold "
                "out: set validation.path, give at least 2 documents, or set validation.enable = "
                "false"
            )
        held_out = np.zeros(count, dtype=bool)
        held_out[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY] = True
        held_out[-1] |= not held_out.any()
        return self.select(~held_out), self.select(held_out)


VISUAL_COLUMNS = {
    "begins": np.int64,
    "sizes": np.int64,
    "content": np.uint8,
    "rows": np.int64,
    "positions": np.int32,
}
"""The columns of `StoredVisuals`, and their dtypes."""
COLUMNS = {
    "lengths": np.int64,
    "trained": bool,
    "splits": np.int64,
    "teacher": TOP,
    "desirable": bool,
} | {f"visual_{name}": dtype for name, dtype in VISUAL_COLUMNS.items()}
"""The dtypes of a corpus' columns. That of its tokens is as narrow as their ids allow."""


def columns_of(rows: Iterable[Encoded]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the arrays of a corpus' columns as rows arrive: (column, what to append to it).

    A column that no row needs is left out: the mask, the splits of pairs, the teacher's answers,
    those of images.
    """
    yield "tokens", np.empty(0, dtype=np.uint8)
    yield "lengths", np.empty(0, dtype=np.int64)
    tokens, masked = 0, False
    for row in rows:
        count = len(row.ids)
        yield "tokens", row.ids
        yield "lengths", np.array(row.lengths or (count,), dtype=np.int64)
        if row.trained is not None and not masked:
            masked = True
            yield "trained", np.ones(tokens, bool)  # of the rows before, without a mask
        if masked:
            yield "trained", np.ones(count, bool) if row.trained is None else row.trained
        if row.split is not None:
            yield "splits", np.array([row.split], dtype=np.int64)
        if row.teacher is not None:
            yield "teacher", row.teacher
        if row.desirable is not None:
            yield "desirable", np.array([row.desirable])
        yield from _stored(row, tokens)
        tokens += count


def with_other_completions(rows: Iterable[Encoded], *, setting: str) -> Iterator[Encoded]:
    """Yield each row with a second document: its prompt, and the completion of the row after it.

    That of the last row is the completion of the first. KTO estimates from them how far the model
    has moved from the reference. (TRL 1.16 takes the row before, within a batch.) `split` of a row
    is where its completion begins, and of what is yielded where the second document begins.
    """
    first = row = None
    for following in rows:
        if row is not None:
            yield _beside(row, following)
        first, row = first or following, following
    if row is first:
        raise UserError(
            f"{setting}: KTO compares a completion with that of another row, and there is no other "
            "one: give at least 2 rows"
        )
    assert row is not None and first is not None
    yield _beside(row, first)


def _beside(row: Encoded, other: Encoded) -> Encoded:
    arrays = [
        np.concatenate([mine, mine[: row.split], others[other.split :]])
        for mine, others in ((row.ids, other.ids), (row.trained, other.trained))
    ]
    return row._replace(ids=arrays[0], trained=arrays[1], split=len(row.ids))


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

    def nothing_in(self, where: str) -> UserError:
        """Return the error for data in which no row has become a document."""
        why = "; ".join(self.notes()) or "it is empty"
        return UserError(f"{where} has no document to train on ({why}): give data with text in it")

    def notes(self, kind: str = "") -> list[str]:
        """Return notes for the log about the rows of data.source = `kind`: what was left out, and
        what was changed.
        """
        notes = []
        if self.bad:
            notes.append(f"{self.bad:,} bad line(s) skipped (the first: {self.first_bad})")
        if self.empty:
            notes.append(f"{self.empty:,} empty one(s) left out")
        if kind == "chat" and self.divided:
            notes.append(
                f"{self.divided:,} chat(s) became {self.parts:,} samples, because the chat "
                "template writes earlier turns differently once others follow"
            )
        if self.parsed_calls:
            notes.append(
                f"{self.parsed_calls:,} tool call(s) had their arguments as JSON text, and are "
                "read as objects"
            )
        return notes
