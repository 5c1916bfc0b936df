"""Combines several streams of sequences: mixed in given proportions, or one after the other."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from itertools import accumulate
from typing import Any

import numpy as np

from titan_ulysses.data.packing import PackedSample, SampleStream

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio
_BLOCK = 4096


class CombinedSequences(SampleStream):
    """Several streams, by the name of their source."""

    def __init__(self, sources: dict[str, SampleStream]) -> None:
        self.sources, self.notes = sources, []
        self._parts = [*sources.values()]
        self.seq_len = self._parts[0].seq_len
        self.visual_counts = dict(sum((Counter(x.visual_counts) for x in self._parts), Counter()))

    def parts(self) -> dict[str, SampleStream]:
        return self.sources


class MixedSequences(CombinedSequences):
    """A mixture of sources, in which each sequence comes from one source.

    Each source is a stream of its own, with its own epochs. The source of sequence i is chosen as
    follows: [0, 1) is divided into one interval per source, whose length is the source's weight,
    and the fractional part of (offset + i * golden ratio) falls into one of them. The offset is
    drawn from `seed`. This Weyl sequence is spread so evenly that among any n consecutive
    sequences, hence also in a global batch, the count of each source is within O(log n) of its
    share. The computation uses integers modulo 2^64, so it is the same on every machine.
    """

    def __init__(
        self, sources: dict[str, SampleStream], weights: list[float], *, seed: int
    ) -> None:
        assert len(sources) == len(weights) and sources, (sources, weights)
        super().__init__(sources)
        self.source_names = [*sources]
        total = sum(weights)
        self.weights = [weight / total for weight in weights]
        if abs(total - 1) > 1e-6:
            shares = ", ".join(f"{weight:.4g}" for weight in self.weights)
            self.notes.append(
                f"the weights sum to {total:.6g}, not 1: divided by that, they are {shares}"
            )
        borders = np.cumsum(weights)[:-1] / total
        self._borders = np.array(
            [min(int(border * 2.0**64), 2**64 - 1) for border in borders], dtype=np.uint64
        )
        self._offset = np.random.PCG64(np.random.SeedSequence([seed])).random_raw(1)
        # For each block of `_BLOCK` sequences: how many sequences of each source come before it.
        self._before = [np.zeros(len(sources), dtype=np.int64)]

    def _find(self, index: int) -> tuple[str, SampleStream, int]:
        """Return the source of a sequence, by name and as a stream, and its number there."""
        source = int(self._sources(index, index + 1)[0])
        place = int(self._counts(index)[source])
        return self.source_names[source], self._parts[source], place

    def __getitem__(self, index: int) -> PackedSample:
        _, part, place = self._find(index)
        return part[place]

    def document_lengths(self, index: int) -> tuple[int, ...] | None:
        _, part, place = self._find(index)
        return part.document_lengths(place)

    def source(self, index: int) -> str:
        return self._find(index)[0]

    def documents(self, index: int) -> list[str]:
        name, part, place = self._find(index)
        return [f"{one} of {name}" for one in part.documents(place)]

    def content(self) -> dict[str, str]:
        return {
            name: found for name, part in self.sources.items() for found in part.content().values()
        }

    def _each(self, consumed: int) -> Iterator[tuple[str, SampleStream, int]]:
        """Yield each source and how many of the first `consumed` sequences are of it."""
        return zip(self.source_names, self._parts, self._counts(consumed).tolist(), strict=True)

    def epochs(self, consumed: int) -> dict[str, Any]:
        return {name: part.epochs(count) for name, part, count in self._each(consumed)}

    def sequences_per_epoch(self) -> Fraction | None:
        found = self._parts[self.source_names.index(self.largest())].sequences_per_epoch()
        share = Fraction(self.weights[self.source_names.index(self.largest())])
        return None if found is None else found / share

    def largest(self) -> str:
        sizes = [part.sequences_per_epoch() for part in self._parts]
        if None in sizes:  # it is streamed
            return self.source_names[sizes.index(None)]
        return max(zip(sizes, self.source_names, strict=True))[1]

    def describe(self) -> str:
        lines = [
            f"{weight:.4g} of {name}: {part.describe()}"
            for (name, part), weight in zip(self.sources.items(), self.weights, strict=True)
        ]
        return "\n".join([f"a mixture of {len(lines)}", *lines, *self.notes])

    def position(self, consumed: int) -> dict[str, Any] | None:
        found = {name: part.position(count) for name, part, count in self._each(consumed)}
        return found if any(found.values()) else None

    def seek(self, consumed: int, position: dict[str, Any] | None) -> None:
        for name, part, count in self._each(consumed):
            part.seek(count, (position or {}).get(name))

    def _sources(self, first: int, last: int) -> np.ndarray:
        """Return the source of each of the sequences [first, last)."""
        with np.errstate(over="ignore"):  # overflow is intended: arithmetic modulo 2^64
            points = self._offset + np.arange(first, last, dtype=np.uint64) * np.uint64(_GOLDEN)
        return np.asarray(np.searchsorted(self._borders, points, side="right"))

    def _counts(self, index: int) -> np.ndarray:
        """Return how many of the sequences before `index` come from each source."""
        block = index // _BLOCK
        while len(self._before) <= block:
            first = (len(self._before) - 1) * _BLOCK
            self._before.append(self._before[-1] + self._count(first, first + _BLOCK))
        return self._before[block] + self._count(block * _BLOCK, index)

    def _count(self, first: int, last: int) -> np.ndarray:
        return np.bincount(self._sources(first, last), minlength=len(self._parts))


class ChainedSequences(CombinedSequences):
    """The held-out sequences of several sources, one source after the other.

    Every sequence of every source comes once, whatever the weights of the sources.
    """

    def __init__(self, sources: dict[str, SampleStream]) -> None:
        super().__init__(sources)
        self._ends = [*accumulate(len(part) for part in self._parts)]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> PackedSample:
        source = bisect_right(self._ends, index)
        return self._parts[source][index - (self._ends[source - 1] if source else 0)]

    def describe(self) -> str:
        lines = [f"{name}: {part.describe()}" for name, part in self.sources.items()]
        return "\n".join([f"{len(lines)} sources, one after the other", *lines])
