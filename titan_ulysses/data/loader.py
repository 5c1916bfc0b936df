"""The batches of this rank.

Every rank of a sequence-parallel group reads the same samples and slices them itself. Data
therefore needs no communication, and a position in the stream means the same on any mesh.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import xxhash

from titan_ulysses.data.packing import SampleStream
from titan_ulysses.distributed.sequence import (
    IGNORE_INDEX,
    Documents,
    chunk_length,
    local_slice,
)


@dataclass(frozen=True)
class Batch:
    """This rank's slice of B rows of S tokens.

    It holds T = S / P tokens of each row, those of `local_slice`.
    """

    input_ids: torch.Tensor
    """[B, T] int64"""
    labels: torch.Tensor
    """[B, T] int64, shifted before the slice was taken; `IGNORE_INDEX` if nothing is predicted"""
    position_ids: torch.Tensor
    """[B, T] int64, the positions in the document, not in the slice"""
    documents: Documents
    """The document lengths of each whole row: B tuples that each sum to S. They are on the host, so
    that attention can read them without a device synchronization.
    """
    attention_mask: torch.Tensor | None = None
    """[B, T] int64, 0 at padding; None without padding. Only the router loss reads it."""
    position_limits: Documents | None = None
    """The largest position of each document plus 1; None if positions are counted from 0. RoPE
    types whose frequencies depend on the length use it in place of the document lengths.
    """
    chunk_tokens: int | None = None
    """The tokens of a chunk of the whole sequence, of which each rank has a slice; None: all S."""

    def to(self, device: torch.device | str) -> Batch:
        """Copy the tensors of the batch to `device` without making the host wait."""
        # A copy from pageable memory would make the host wait in spite of `non_blocking`.
        pin = torch.device(device).type == "cuda"

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return (tensor.pin_memory() if pin else tensor).to(device, non_blocking=True)

        return replace(
            self,
            input_ids=move(self.input_ids),
            labels=move(self.labels),
            position_ids=move(self.position_ids),
            attention_mask=None if self.attention_mask is None else move(self.attention_mask),
        )


class Loader:
    """Batches of `batch_size` = B rows for one rank, from a stream of sequences.

    A global micro-batch consists of the next `batch_size * batch_degree` sequences. Data-parallel
    rank `batch_rank` takes the `batch_rank`-th block of B sequences. Of each sequence it takes the
    `sp_rank`-th of `sp_degree` = P slices (see `sequence.local_slice`). S must be a multiple of P.
    stream_chunk_tokens is the setting of the model that trains on the batches.
    """

    def __init__(
        self,
        sequences: SampleStream,
        *,
        batch_size: int,
        batch_rank: int = 0,
        batch_degree: int = 1,
        sp_rank: int = 0,
        sp_degree: int = 1,
        stream_chunk_tokens: int = -1,
    ) -> None:
        assert 0 <= batch_rank < batch_degree, (batch_rank, batch_degree)
        assert 0 <= sp_rank < sp_degree, (sp_rank, sp_degree)
        assert sequences.seq_len % sp_degree == 0, (sequences.seq_len, sp_degree)
        self.sequences = sequences
        self.batch_size, self.batch_rank, self.batch_degree = batch_size, batch_rank, batch_degree
        self.sp_rank, self.sp_degree = sp_rank, sp_degree
        self.chunk_tokens = chunk_length(stream_chunk_tokens, sequences.seq_len, sp_degree)
        self._consumed = 0  # number of sequences that all ranks together have read
        self._hash = xxhash.xxh3_128()

    def next_batch(self) -> Batch:
        first = self._consumed
        self._consumed += self.batch_size * self.batch_degree
        return self.read(range(first, self._consumed))

    def read(self, indices: Sequence[int]) -> Batch:
        """Return this rank's part of a global micro-batch that consists of these sequences.

        The position of the loader does not change. If there are too few sequences, rows without
        labels fill the batch.
        """
        assert 0 < len(indices) <= self.batch_size * self.batch_degree, len(indices)
        first = self.batch_rank * self.batch_size
        rows = [self.sequences[i] for i in indices[first : first + self.batch_size]]
        if missing := self.batch_size - len(rows):
            row = self.sequences[indices[0]]
            rows += [row._replace(labels=torch.full_like(row.labels, IGNORE_INDEX))] * missing
        self._hash = xxhash.xxh3_128()
        for row in rows:
            self._hash.update(row.input_ids.numpy())

        def stacked(whole_rows: list[torch.Tensor]) -> torch.Tensor:
            return local_slice(
                torch.stack(whole_rows),
                rank=self.sp_rank,
                degree=self.sp_degree,
                chunk_tokens=self.chunk_tokens,
            )

        return Batch(
            input_ids=stacked([row.input_ids for row in rows]),
            labels=stacked([row.labels for row in rows]),
            position_ids=stacked([row.position_ids for row in rows]),
            documents=tuple(row.document_lengths for row in rows),
            chunk_tokens=self.chunk_tokens,
        )

    def fingerprint(self) -> str:
        """Return a hash of the tokens of the last batch: of whole sequences, before the slice.

        The ranks of a sequence-parallel group must have the same.
        """
        return self._hash.hexdigest()

    def documents(self, batches_ago: int) -> list[str]:
        """Return the documents of an earlier batch of this rank; 1: the last batch."""
        first = self._consumed - batches_ago * self.batch_size * self.batch_degree
        first += self.batch_rank * self.batch_size
        rows = range(first, first + self.batch_size)
        return [document for row in rows for document in self.sequences.documents(row)]

    def epochs(self) -> float | dict[str, float]:
        """Return how often all ranks together have read the data, by source if several."""
        return self.sequences.epochs(self._consumed)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data, which is the same on every rank and every mesh.

        It is the number of sequences that all ranks together have consumed, and for streamed data
        also the position in the data set.
        """
        state: dict[str, Any] = {"sequences_consumed": self._consumed}
        if position := self.sequences.position(self._consumed):
            state["position"] = position
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._consumed = int(state["sequences_consumed"])
        self.sequences.seek(self._consumed, state.get("position"))
