"""Sequences from a data set that is read during training.

There is no random access, no known length, and nothing is written to disk.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from titan_ulysses.data.corpus import CorpusStats
from titan_ulysses.data.encoding import Encoder
from titan_ulysses.data.packing import PackedSample, SampleStream, concat_pieces, slice_document
from titan_ulysses.data.records import Encoded
from titan_ulysses.data.sources import DatasetRows
from titan_ulysses.distributed.errors import UserError


class StreamedSequences(SampleStream):
    """Documents of a streamed data set, packed end to end.

    In each epoch, the order of the data set's files and of the rows within a buffer is drawn from
    (seed, epoch). Sequences can only be read in increasing order. Each rank tokenizes all of them,
    including those of other data-parallel ranks, because a sequence begins where the one before it
    ends. `position` is the epoch, the row and the token in that row at which a sequence begins; it
    is the same on every mesh. To continue there, the rows before it are read again but not
    tokenized.
    """

    def __init__(
        self,
        rows: DatasetRows,
        encoder: Encoder,
        *,
        seq_len: int,
        seed: int,
        skip_bad: bool = False,
    ) -> None:
        self.rows, self.encoder, self.skip_bad = rows, encoder, skip_bad
        self.seq_len, self.seed = seq_len, seed
        self.notes: list[str] = []
        self.stats = CorpusStats()
        self.seek(0, None)

    def __len__(self) -> int:
        raise AssertionError("a stream has no known length")

    def __getitem__(self, index: int) -> PackedSample:
        self._advance(index)
        self._index += 1
        return concat_pieces(self._pieces(), self.seq_len)

    def epochs(self, consumed: int) -> float:
        """Return the number of complete epochs: the length of an epoch is not known in advance."""
        return float(self._epoch)

    def describe(self) -> str:
        return "; ".join(["streamed, end to end", *self.notes])

    def position(self, consumed: int) -> dict[str, int]:
        self._advance(consumed)
        return {"epoch": self._epoch, "row": self._row, "offset": self._offset}

    def seek(self, consumed: int, position: dict[str, int] | None) -> None:
        position = position or {"epoch": 0, "row": 0, "offset": 0}
        self._index = consumed if any(position.values()) else 0
        self._epoch, self._row = position["epoch"], position["row"]
        self._offset = position["offset"]
        self._documents = self._read(skip=self._row)
        self._document: Encoded | None = None
        self._epoch_is_empty = self._row == 0  # no document has been found in this epoch yet
        self._advance(consumed)

    def _advance(self, index: int) -> None:
        """Move forward to the beginning of sequence `index`."""
        assert index >= self._index, f"a stream goes forward: {index} after {self._index}"
        for _ in range(self._index, index):
            for _ in self._pieces():
                pass
        self._index = index

    def _pieces(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the pieces (ids, labels) of the next S tokens."""
        remaining = self.seq_len
        while remaining:
            row = self._current()
            ends = np.cumsum(row.lengths or (len(row.ids),))
            begin = self._offset
            document_end = int(ends[np.searchsorted(ends, begin, side="right")])
            end = min(document_end, begin + remaining)
            yield slice_document(row.ids, row.trained, begin, end, document_end)
            self._offset, remaining = end, remaining - (end - begin)

    def _current(self) -> Encoded:
        """Return the current document, or the next one if all its tokens have been read.

        At the end of an epoch the next epoch begins. Raise `UserError` if a whole epoch has no
        document.
        """
        while self._document is None or self._offset >= len(self._document.ids):
            if self._document is not None:
                self._row, self._offset, self._document = self._row + 1, 0, None
            found = next(self._documents, None)
            if found is not None:
                (self._row, self._document), self._epoch_is_empty = found, False
                continue
            if self._epoch_is_empty:
                raise self.stats.nothing_in(self.rows.setting)
            self._epoch, self._row, self._offset = self._epoch + 1, 0, 0
            self._documents, self._epoch_is_empty = self._read(skip=0), True
        return self._document

    def _read(self, *, skip: int) -> Iterator[tuple[int, Encoded]]:
        """Yield (row number, document) of the current epoch, from row `skip` on."""
        seed = int(np.random.SeedSequence([self.seed, self._epoch]).generate_state(1)[0])
        for number, row in enumerate(self.rows.shuffled(seed, skip=skip), start=skip):
            kept = self.stats.keep(
                [self.encoder(row)], setting=self.rows.setting, skip=self.skip_bad
            )
            for document in kept:
                if document.visuals:
                    raise UserError(
                        f"{self.rows.setting}: row {number + 1} has an image or video, and a "
                        "stream would cut it at the end of a sequence: set streaming = false"
                    )
                yield number, document
