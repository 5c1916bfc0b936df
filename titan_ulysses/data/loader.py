"""The batches of this rank.

Every rank of a sequence-parallel group reads the same samples and slices them itself. Data
therefore needs no communication, and a position in the stream means the same on any mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor

from titan_ulysses.data.balance import DealtStep, deal_step
from titan_ulysses.data.decoding import Decoder
from titan_ulysses.data.images import Kind, Pixels, Visuals
from titan_ulysses.data.media import Media
from titan_ulysses.data.packing import PackedSample, SampleStream
from titan_ulysses.distributed.device import copied_to
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.sequence import IGNORE_INDEX, Documents, chunk_length, local_slice


@dataclass(frozen=True)
class Batch:
    """B rows of S tokens: whole, or what one rank holds of them, T tokens of each row (`local`)."""

    input_ids: Tensor
    """[B, T] int64"""
    labels: Tensor
    """[B, T] int64, shifted before the slice was taken; `IGNORE_INDEX` if nothing is predicted"""
    position_ids: Tensor
    """[B, T] int64, the positions in the document, not in the slice; [A, B, T] in a family that
    counts them along A axes
    """
    documents: Documents
    """The document lengths of each whole row: B tuples that each sum to S. They are on the host, so
    that attention can read them without a device synchronization.
    """
    attention_mask: Tensor | None = None
    """[B, T], 0 or False at padding; None without padding. Only the router loss reads it."""
    position_limits: Documents | None = None
    """The largest position of each document plus 1; None if positions are counted from 0. RoPE
    types whose frequencies depend on the length use it in place of the document lengths.
    """
    chunk_tokens: int | None = None
    """The tokens of a chunk of the whole sequence, of which each rank has a slice; None: all S."""
    reference: Tensor | None = None
    """[2 * pairs] fp64, the reference's log-probabilities of the completions of all rows, if they
    were computed before training (train/references.py).
    """
    desirable: Tensor | None = None
    """[pairs] bool, of all rows: whether their first completion is desirable (KTO)."""
    num_documents: int | None = None
    """Of a classifier, how many documents the whole rows have. `labels` are then the number of the
    document that ends at a token.
    """
    targets: Tensor | None = None
    """[num_documents, ...]: the classes or values of these documents, whole on each rank."""
    next_ids: Tensor | None = None
    """[B, T], for a prediction layer: the token after each one. It and next_labels are made of
    whole rows, because the next token may be on another rank.
    """
    next_labels: Tensor | None = None
    """[B, T]: the label of the token after each one; `IGNORE_INDEX` at the end of a document"""
    loss_inputs: dict[str, Tensor] = field(default_factory=dict)
    """[B, T, ...] each: what the loss reads of each label, by name."""
    fill_rows: int = 0
    """The last rows that only fill up the batch: they have no labels."""

    @property
    def filled(self) -> Documents:
        """The document lengths of the rows that count."""
        return self.documents[: len(self.documents) - self.fill_rows]

    visuals: Visuals | None = None
    """The images and videos of all whole rows; None for a model of text."""
    pixels: tuple[Pixels, ...] | None = None
    """Of each of `visuals` that is here, in order: of whole rows all, or None if added later."""

    def inputs(self) -> dict[str, Any]:
        """Return the arguments of the model's forward: what is there, without that of the loss."""
        of_loss = ("reference", "desirable", "loss_inputs", "fill_rows", "next_ids", "next_labels")
        return {k: x for k, x in vars(self).items() if x is not None and k not in of_loss}

    def with_next(self) -> Batch:
        """Return whole rows with `next_ids` and `next_labels`."""
        labels = self.labels.roll(-1, dims=1)
        for row, lengths in zip(labels, self.documents, strict=True):
            row[torch.tensor(lengths).cumsum(0) - 1] = IGNORE_INDEX
        return replace(self, next_ids=self.input_ids.roll(-1, dims=1), next_labels=labels)

    def local(self, *, rank: int, degree: int, stream_chunk_tokens: int) -> Batch:
        """Return what one of P = degree ranks holds of whole rows, with T = ceil(S / P).

        If P does not divide S, padding is added behind each row: a document of its own, without
        labels. stream_chunk_tokens is the setting of the model that takes the batch.
        """
        whole, missing = self, -self.input_ids.shape[1] % degree
        if missing:
            mask, limits = self.attention_mask, self.position_limits
            mask = torch.ones_like(self.input_ids) if mask is None else mask
            positions = torch.arange(missing).expand(*self.position_ids.shape[:-1], -1)
            whole = replace(
                self,
                input_ids=F.pad(self.input_ids, (0, missing)),
                labels=F.pad(self.labels, (0, missing), value=IGNORE_INDEX),
                position_ids=torch.cat([self.position_ids, positions], dim=-1),
                documents=tuple((*row, missing) for row in self.documents),
                attention_mask=F.pad(mask, (0, missing)),
                position_limits=limits and tuple((*row, missing) for row in limits),
            )
        chunk_tokens = chunk_length(stream_chunk_tokens, whole.input_ids.shape[1], degree)
        cut = partial(local_slice, rank=rank, degree=degree, chunk_tokens=chunk_tokens)
        # Without those whose second dimension is not that of tokens.
        names = ("reference", "desirable", "targets", "pixels")
        others: dict[str, Any] = {name: getattr(whole, name) for name in names}
        without: dict[str, Any] = dict.fromkeys((*names, "position_ids"))
        each = replace(whole, chunk_tokens=chunk_tokens, **without)
        if others["pixels"] is not None and self.visuals is not None:
            own = self.visuals.own(rank, degree)
            others["pixels"] = tuple(others["pixels"][i] for i in own)
        position_ids = cut(whole.position_ids, dim=whole.position_ids.ndim - 1)
        return replace(each._each_tensor(cut), position_ids=position_ids, **others)

    def to(self, device: torch.device | str) -> Batch:
        """Copy the tensors of the batch to `device`; to a GPU without making the host wait."""
        return self._each_tensor(lambda x: copied_to(x, device))

    def _each_tensor(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors = {k: change(x) for k, x in vars(self).items() if isinstance(x, Tensor)}
        loss_inputs = {name: change(x) for name, x in self.loss_inputs.items()}
        pixels = self.pixels and tuple({k: change(x) for k, x in p.items()} for p in self.pixels)
        return replace(self, **tensors, loss_inputs=loss_inputs, pixels=pixels)


_AHEAD = 1
"""Batches whose images are decoded while one is computed."""


class _Opened(NamedTuple):
    """The rows of a batch, of which this rank's images are being decoded."""

    rows: list[PackedSample]
    visuals: Visuals
    pixels: list[tuple[Media, Future]]


def _stacked_positions(rows: list[PackedSample]) -> Tensor:
    """Return [A, B, S], or [B, S] where no row counts along axes. Text does so along one."""
    axes = max(len(x) if (x := row.position_ids).ndim == 2 else 0 for row in rows)
    alike = [x.expand(axes, -1) if axes else x for x in (row.position_ids for row in rows)]
    return torch.stack(alike, dim=-2)


@dataclass(eq=False)
class Loader:
    """Batches of `batch_size` = B rows for one rank, from a stream of sequences.

    A step consists of the next `accumulation_steps` * `batch_degree` * B sequences, on every mesh.
    They are dealt to its micro-batches and to the data-parallel ranks, of which this one is
    `batch_rank`, by what their attention costs (`balance.py`); those of data without random access
    in their order. Of each sequence the rank takes the `sp_rank`-th of `sp_degree` = P slices (see
    `sequence.local_slice`). S must be a multiple of P. stream_chunk_tokens is the setting of the
    model that trains on the batches. predicts: it has a prediction layer.

    vocab_size: of that model. A token outside of it is a `UserError` that names the sequence; None
    does not look.

    decoder: what decodes images, of which the rank needs its own. It begins with those of the next
    batches while the step is computed.
    """

    sequences: SampleStream
    batch_size: int
    batch_rank: int = 0
    batch_degree: int = 1
    accumulation_steps: int = 1
    sp_rank: int = 0
    sp_degree: int = 1
    stream_chunk_tokens: int = -1
    predicts: bool = False
    vocab_size: int | None = None
    decoder: Decoder | None = None

    def __post_init__(self) -> None:
        assert 0 <= self.batch_rank < self.batch_degree, (self.batch_rank, self.batch_degree)
        assert 0 <= self.sp_rank < self.sp_degree, (self.sp_rank, self.sp_degree)
        seq_len = self.sequences.seq_len
        assert seq_len % self.sp_degree == 0, (seq_len, self.sp_degree)
        self._origin = 0  # number of sequences that had been read when this loader began
        self._batches = 0  # number of batches since then
        self._steps: dict[int, DealtStep] = {}
        self._ahead: dict[int, _Opened] = {}
        self._hash = xxhash.xxh3_128()

    @property
    def _consumed(self) -> int:
        """The number of sequences that all ranks together have read."""
        return self._origin + self._batches * self.batch_size * self.batch_degree

    def next_batch(self) -> Batch:
        number = self._batches
        for later in range(number, number + (_AHEAD if self._kinds else 0) + 1):
            if later not in self._ahead:
                rows = [self._checked(index) for index in self._rows(later)]
                self._ahead[later] = self._opened(rows)
        self._batches += 1
        return self._batch(self._ahead.pop(number))

    @property
    def _kinds(self) -> tuple[Kind, ...]:
        """The kinds of images and videos in the data."""
        return tuple(self.sequences.visual_counts)

    def _opened(self, rows: list[PackedSample]) -> _Opened:
        """Begin to decode this rank's images of whole sequences."""
        items = tuple(one.at(0, row=i) for i, row in enumerate(rows) for one in row.visuals)
        media = [one for row in rows for one in row.media]
        visuals, pixels = Visuals(items, self._kinds), []
        if self.decoder is not None:
            own = visuals.own(self.sp_rank, self.sp_degree)
            pixels = [(media[i], self.decoder.start(media[i], items[i])) for i in own]
        return _Opened(rows, visuals, pixels)

    def _checked(self, index: int) -> PackedSample:
        """Return a sequence whose tokens are all in the vocabulary."""
        sample = self.sequences[index]
        if self.vocab_size is not None:
            low, high = (int(end) for end in sample.input_ids.aminmax())
            if low < 0 or high >= self.vocab_size:
                raise UserError(
                    f"sequence {index:,} of the data has token {low if low < 0 else high}, outside "
                    f"of the model's vocabulary of {self.vocab_size:,}: its tokens were damaged "
                    "after the run began. Check the disk they are on (data.cache_folder or "
                    "data.path) and run the same command again."
                )
        return sample

    def step_of_last_batch(self) -> DealtStep:
        """Return how the step is dealt that the last batch belongs to."""
        return self._deal((self._batches - 1) // self.accumulation_steps)

    def next_steps(self, count: int) -> list[DealtStep]:
        """Return how the next steps are dealt. A step must not have begun."""
        first = self._batches // self.accumulation_steps
        return [self._deal(step) for step in range(first, first + count)]

    def _rows(self, batch: int) -> list[int]:
        """Return the sequences of this rank's batch number `batch` since the loader began."""
        step, micro_batch = divmod(batch, self.accumulation_steps)
        return self._deal(step).sequences[micro_batch][self.batch_rank]

    def _deal(self, step: int) -> DealtStep:
        if step not in self._steps:
            ranks, batch_size = self.batch_degree, self.batch_size
            count = batch_size * ranks * self.accumulation_steps
            first = self._origin + step * count
            # One rank alone reads them in their order.
            lengths = [
                self.sequences.document_lengths(index) if ranks > 1 else None
                for index in range(first, first + count)
            ]
            dealt = deal_step(first, lengths, ranks=ranks, batch_size=batch_size)
            # Those of batches ahead are kept too.
            self._steps = dict([*self._steps.items()][-_AHEAD:]) | {step: dealt}
        return self._steps[step]

    def read(self, indices: Sequence[int]) -> Batch:
        """Return this rank's part of a global micro-batch that consists of these sequences, in
        their order.

        The position of the loader does not change. If there are too few sequences, rows without
        labels fill the batch.
        """
        assert 0 < len(indices) <= self.batch_size * self.batch_degree, len(indices)
        first = self.batch_rank * self.batch_size
        rows = [self._checked(i) for i in indices[first : first + self.batch_size]]
        missing = self.batch_size - len(rows)
        if missing:
            row = self._checked(indices[0])
            row = row._replace(
                labels=torch.full_like(row.labels, IGNORE_INDEX), padding=len(row.labels)
            )
            if row.visuals:  # nothing is decoded for a row that only fills
                row = row._replace(input_ids=torch.zeros_like(row.input_ids), visuals=(), media=())
            rows += [row] * missing
        return replace(self._batch(self._opened(rows)), fill_rows=missing)

    def _batch(self, opened: _Opened) -> Batch:
        """Return this rank's slice of whole sequences, with the pixels of its images."""
        rows = opened.rows
        self._hash = xxhash.xxh3_128()
        for row in rows:
            self._hash.update(row.input_ids.numpy())
        references = [row.reference for row in rows if row.reference is not None]
        desirable = [row.desirable for row in rows if row.desirable is not None]
        mask = None
        if any(row.padding for row in rows):
            tokens = torch.tensor([len(row.labels) - row.padding for row in rows])
            mask = torch.arange(self.sequences.seq_len) < tokens[:, None]
        whole = Batch(
            input_ids=torch.stack([row.input_ids for row in rows]),
            labels=torch.stack([row.labels for row in rows]),
            position_ids=_stacked_positions(rows),
            documents=tuple(row.document_lengths for row in rows),
            attention_mask=mask,
            reference=torch.cat(references) if references else None,
            desirable=torch.cat(desirable) if desirable else None,
            loss_inputs={
                name: torch.stack([row.loss_inputs[name] for row in rows])
                for name in rows[0].loss_inputs
            },
            visuals=opened.visuals if self._kinds else None,
        )
        if self.predicts:
            whole = whole.with_next()
        local = whole.local(
            rank=self.sp_rank, degree=self.sp_degree, stream_chunk_tokens=self.stream_chunk_tokens
        )
        if self.decoder is None or not self._kinds:
            return local
        return replace(local, pixels=tuple(self.decoder.finish(*one) for one in opened.pixels))

    def fingerprint(self) -> str:
        """Return a hash of the tokens of the last batch: of whole sequences, before the slice.

        The ranks of a sequence-parallel group must have the same.
        """
        return self._hash.hexdigest()

    def documents(self, batches_ago: int) -> list[str]:
        """Return the documents of an earlier batch of this rank; 1: the last batch."""
        rows = self._rows(self._batches - batches_ago)
        return [document for row in rows for document in self.sequences.documents(row)]

    def sources(self, batches_ago: int) -> list[str]:
        """Return the source of each row of an earlier batch of this rank; 1: the last batch."""
        return [self.sequences.source(row) for row in self._rows(self._batches - batches_ago)]

    def epochs(self) -> float | dict[str, float]:
        """Return how often all ranks together have read the data, by source if several."""
        return self.sequences.epochs(self._consumed)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data, which is the same on every rank and every mesh.

        It is the number of sequences that all ranks together have consumed, and for streamed data
        also the position in the data set. A step must not have begun.
        """
        assert self._batches % self.accumulation_steps == 0, "in the middle of a step"
        state: dict[str, Any] = {"sequences_consumed": self._consumed}
        if position := self.sequences.position(self._consumed):
            state["position"] = position
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._origin, self._batches = int(state["sequences_consumed"]), 0
        self._steps, self._ahead = {}, {}
        self.sequences.seek(self._consumed, state.get("position"))
