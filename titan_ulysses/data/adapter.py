"""The data adapter: slices the batches of any loader for this rank, in a custom training loop.

It converts the inputs that transformers models take (unshifted labels, 2-D padding masks, packed
rows) to the inputs of the sharded model. Everything is computed on whole rows, on the host, before
the slice is taken.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from titan_ulysses.data.images import KINDS, Visuals, positions_of_rows
from titan_ulysses.data.loader import Batch
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.mesh import Mesh
from titan_ulysses.distributed.sequence import IGNORE_INDEX, chunk_length, padded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from titan_ulysses.model.vision import Vision

CHECK_EVERY = 100
"""Steps between checks that the ranks of a sequence-parallel group have loaded the same rows."""
TOKEN_KEYS = ("input_ids", "labels", "position_ids", "attention_mask", "seq_idx")
BORDER_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def shard(
    loader: Iterable[Mapping[str, Any]],
    model: PreTrainedModel,
    *,
    accumulate: int = 1,
) -> Iterator[dict[str, Any]]:
    """Yield this rank's slice of each batch as keyword arguments: `model(**batch).loss`.

    model is a result of `parallelize`: its mesh, and the chunks in which it streams, say which
    tokens are this rank's. A batch of `loader` is a mapping with `input_ids` [B, S]. It may also
    contain:
    - `labels`, unshifted as in transformers; without them every token is a label,
    - `attention_mask` [B, S], with padding on either side,
    - the documents packed in a row, as `position_ids` that fall back, as `seq_idx`, or as
      `cu_seq_lens_q` over all B * S tokens,
    - of a model of images and text, what its processor makes of the images and videos of all rows,
      in the order of their placeholders: `pixel_values`, `image_grid_thw` and so on. Each rank
      keeps those that are dealt to it (see `images.py`).

    Positions may start at any number and are used as given; see `_document_starts` for
    positions that jump ahead. B and S may change from batch to batch. All ranks of a
    sequence-parallel group must load the same rows, ranks along `mesh.batch` must load different
    rows, and every rank must load the same number of batches. `loader` is not read beyond the
    optimizer step whose batches are being yielded.

    Of a model for sequence classification, `labels` are those of the documents, in their order: [N]
    classes, or [N] or [N, C] values. Without them there is no loss, and `.logits` are the scores
    [N, C] of the last token of each document, on every rank that shares the rows.

    Each yielded dict has `input_ids`, `labels` (shifted, none across a document border) and
    `position_ids`, all [B, T] with T = ceil(S / P), and `documents`. It has `position_limits` if
    positions are not counted from 0, `attention_mask` [B, T] if any token is padding, and
    `chunk_tokens` (see `sequence.local_slice`) if the sequence has more than one chunk.
    `num_items_in_batch` is the number of labels in `accumulate` batches on all ranks: step the
    optimizer once per `accumulate` batches.

    Raise `UserError` for a batch that contradicts itself, or that differs between ranks that share
    a sequence.
    """
    if accumulate < 1:
        raise UserError(f"shard: accumulate = {accumulate}: must be at least 1.")
    mesh, sharding = _mesh_of(model, "shard"), model.sharding
    classifies = type(model).__name__.endswith("ForSequenceClassification")
    read = read_documents if classifies else partial(read_rows, vision=sharding.vision)
    kinds = sharding.vision is not None
    return _batches(loader, mesh, accumulate, sharding.stream_chunk_tokens, read, kinds)


def local_slice(whole: Tensor, model: PreTrainedModel) -> Tensor:
    """Return this rank's tokens of a tensor of whole sequences, as `shard(loader, model)` cuts
    batches: [B, S, ...] -> [B, T, ...], on the mesh's device.

    Zeros fill it up to a multiple of P, as in what `score` returns. UserError if batches of S
    tokens were cut otherwise.
    """
    mesh = _mesh_of(model, "local_slice")
    whole = padded(whole.to(mesh.device), mesh.sp.size())
    length = whole.shape[1]
    chunk_tokens = chunk_length(model.sharding.stream_chunk_tokens, length, mesh.sp.size())
    if (cuts := mesh.cuts.get(length)) and chunk_tokens not in cuts:
        raise UserError(
            f"local_slice: batches of {length} tokens were not cut as this model streams them. "
            "Let the model cut them: shard(loader, model)."
        )
    return mesh.local_slice(whole, chunk_tokens=chunk_tokens)


def _mesh_of(model: PreTrainedModel, caller: str) -> Mesh:
    """Return the mesh on which a model runs now. UserError if it was not sharded."""
    sharding = getattr(model, "sharding", None)
    if sharding is None:
        raise UserError(
            f"{caller}: {type(model).__name__} is not a model that `parallelize` has returned. "
            "Call model = parallelize(model, mesh) before."
        )
    return sharding.mesh


def _batches(
    loader: Iterable[Mapping[str, Any]],
    mesh: Mesh,
    accumulate: int,
    stream_chunk_tokens: int,
    read: Callable[[Mapping[str, Any]], Batch],
    has_images: bool = False,
) -> Iterator[dict[str, Any]]:
    source, ranks = iter(loader), mesh.loss.size()
    for step in count():
        group = [read(batch) for batch in islice(source, accumulate)]
        if has_images and mesh.batch.size() > 1:
            group = with_kinds_of_all(group, accumulate, mesh)
        batches = [slice_rows(rows, mesh, stream_chunk_tokens) for rows in group]
        valid = sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in batches)
        counts = torch.tensor([valid, len(group)]).to(mesh.device)
        dist.all_reduce(counts, group=mesh.loss.get_group())
        # Only a rank whose loader has ended reads the total number of batches: reading it
        # everywhere would make every step wait for the device.
        if len(group) < accumulate and (others := counts[1].item()) != len(group) * ranks:
            raise UserError(
                f"shard: this rank's loader ended after {step * accumulate + len(group)} batches, "
                f"but others continue ({others} batches in this step, on {ranks} ranks). Every "
                "rank needs the same number: use drop_last=True, or a DistributedSampler."
            )
        if not group:
            return
        if step % CHECK_EVERY == 0:
            check_same_rows(group, mesh)
        for batch in batches:
            yield batch.to(mesh.device).inputs() | {"num_items_in_batch": counts[0]}


def with_kinds_of_all(group: list[Batch], accumulate: int, mesh: Mesh) -> list[Batch]:
    """Return the batches of a step with the kinds of images that any rank has in each. Collective.

    The host waits for it, because all ranks run the tower in a micro-batch, or none does.
    """
    present = torch.zeros(accumulate, len(KINDS), dtype=torch.int64)
    for found, rows in zip(present, group, strict=False):
        for item in rows.visuals.items if rows.visuals else ():
            found[KINDS.index(item.kind)] = 1
    everyone = present.to(mesh.device)
    dist.all_reduce(everyone, group=mesh.loss.get_group())
    kinds = [
        tuple(kind for kind, n in zip(KINDS, found, strict=True) if n)
        for found in everyone.tolist()
    ]
    pairs = zip(group, kinds, strict=False)
    return [replace(x, visuals=replace(x.visuals or Visuals(), kinds=k)) for x, k in pairs]


def read_rows(batch: Mapping[str, Any], vision: Vision | None = None) -> Batch:
    """Return the whole rows of one batch: their documents, positions and shifted labels.

    Tensors are int64, on the host. Positions are as given, or counted from 0 in each document; in a
    family that counts them along several axes, they are its own of each document. vision: that of
    the model, which knows what else a batch has.

    Raise `UserError` if the entries of the batch contradict each other.
    """
    tensors = _tensors(batch, vision)
    input_ids = tensors["input_ids"]
    padding = _padding(tensors)
    starts = _document_starts(tensors, padding)
    index = torch.arange(input_ids.shape[1])
    position_ids = counted = index - (index * starts).cummax(dim=1).values
    if "position_ids" in tensors:
        position_ids = tensors["position_ids"].where(~padding, counted)
    labels = tensors.get("labels", input_ids)
    if ((labels < 0) & (labels != IGNORE_INDEX)).any():
        raise UserError(
            f'batch["labels"] has {labels.min()}: labels are token ids, or {IGNORE_INDEX} for none.'
        )
    # At the end of a document, the next token belongs to another document or does not exist.
    crosses = F.pad(starts[:, 1:], (0, 1), value=True)
    labels = labels.roll(-1, dims=1).masked_fill(crosses | padding, IGNORE_INDEX)
    documents = tuple(
        tuple(F.pad(row.nonzero()[:, 0], (0, 1), value=len(row)).diff().tolist()) for row in starts
    )
    position_limits = None
    if not torch.equal(position_ids, counted):
        pieces = [row.split(lengths) for row, lengths in zip(position_ids, documents, strict=True)]
        position_limits = tuple(tuple(int(piece.max()) + 1 for piece in row) for row in pieces)
    mask = (~padding).long() if padding.any() else None
    rows = Batch(input_ids, labels, position_ids, documents, mask, position_limits)
    return rows if vision is None else with_images(rows, tensors, vision)


def read_documents(batch: Mapping[str, Any]) -> Batch:
    """Return the whole rows of a batch of a classifier, which scores the last token of a document.

    See `shard` for its labels; padding is no document. Raise `UserError` as `read_rows` does, and
    if there is not one label a document.
    """
    targets = batch.get("labels") if isinstance(batch, Mapping) else None
    rows = read_rows({key: x for key, x in batch.items() if key != "labels"})
    ends = torch.zeros_like(rows.input_ids, dtype=torch.bool)
    for row, lengths in zip(ends, rows.documents, strict=True):
        row[torch.tensor(lengths).cumsum(0) - 1] = True
    if rows.attention_mask is not None:
        ends &= rows.attention_mask.bool()
    count = int(ends.sum())
    targets = None if targets is None else torch.as_tensor(targets).cpu()
    if count == 0 or (targets is not None and targets.shape[:1] != (count,)):
        raise UserError(
            f'batch["labels"] is {[] if targets is None else list(targets.shape)}, and its rows '
            f"have {count} documents: a classifier takes one label for each."
        )
    labels = torch.full_like(rows.input_ids, IGNORE_INDEX)
    labels[ends] = torch.arange(count)
    return replace(rows, labels=labels, num_documents=count, targets=targets)


def with_images(rows: Batch, tensors: Mapping[str, Tensor], vision: Vision) -> Batch:
    """Return rows with their images, and the positions that those lead to."""
    visuals, pixels = vision.read(rows.input_ids, tensors)
    position_ids = rows.position_ids
    if vision.positions is not None:
        position_ids = positions_of_rows(
            vision.positions, rows.input_ids, rows.documents, visuals.items
        )
    return replace(rows, position_ids=position_ids, visuals=visuals, pixels=pixels)


def _tensors(batch: Mapping[str, Any], vision: Vision | None) -> dict[str, Tensor]:
    """Return the entries of the batch as int64 tensors on the host, after checking their shapes."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise UserError(
            'shard: a batch must be a mapping with "input_ids" [B, S]: use a collate_fn that '
            "returns one."
        )
    of_images = () if vision is None else vision.batch_keys
    if unknown := sorted(set(batch) - {*TOKEN_KEYS, *BORDER_KEYS, *of_images}):
        raise UserError(
            f"batch[{unknown[0]!r}]: the sharded model would ignore this part of the input. Drop "
            "it in the collate_fn; these are read: "
            f"{', '.join((*TOKEN_KEYS, *BORDER_KEYS, *of_images))}."
        )
    given = {key: torch.as_tensor(x).cpu() for key, x in batch.items() if x is not None}
    tensors = {key: x if key in of_images else x.long() for key, x in given.items()}
    if (mask := tensors.get("attention_mask")) is not None and mask.ndim != 2:
        raise UserError(
            f'batch["attention_mask"] has {mask.ndim} dimensions, {list(mask.shape)}: masks of '
            "queries x keys are not supported. Give [B, S] for padding, and position_ids, seq_idx "
            "or cu_seq_lens_q for documents."
        )
    shape = tensors["input_ids"].shape
    if len(shape) != 2 or 0 in shape:
        raise UserError(f'batch["input_ids"] is {list(shape)}: it must be [B, S], and not empty.')
    for key in set(TOKEN_KEYS) & tensors.keys():
        if tensors[key].shape != shape:
            raise UserError(
                f"batch[{key!r}] is {list(tensors[key].shape)}, input_ids is {list(shape)}: both "
                "must have the same shape."
            )
    return tensors


def _padding(tensors: dict[str, Tensor]) -> Tensor:
    """Return a [B, S] bool tensor that marks the padding tokens.

    The other tokens of a row must be contiguous, since a document has no holes.
    """
    mask = tensors.get("attention_mask", torch.ones_like(tensors["input_ids"]))
    if not ((mask == 0) | (mask == 1)).all():
        raise UserError(
            'batch["attention_mask"] has values other than 0 and 1: it can only say what is '
            "padding."
        )
    if (holes := F.pad(mask, (1, 0)).diff(dim=1).eq(1).sum(dim=1) > 1).any():
        raise UserError(
            f'batch["attention_mask"] has a hole in row {int(holes.nonzero()[0])}: padding may '
            "only be on the left or the right of a row. Give documents by position_ids, seq_idx or "
            "cu_seq_lens_q."
        )
    return mask == 0


def _document_starts(tensors: dict[str, Tensor], padding: Tensor) -> Tensor:
    """Return a [B, S] bool tensor that marks the first token of each document.

    Padding counts as a document. All keys that describe documents must agree. According to
    `position_ids`, a document begins where positions do not grow. Where they jump ahead by more
    than 1, the other keys decide. Without other keys, a jump is a border only if the batch has no
    attention mask, as in transformers (`find_packed_sequence_indices`).
    """
    others = {}
    if "seq_idx" in tensors:
        others["seq_idx"] = F.pad(tensors["seq_idx"].diff(dim=1) != 0, (1, 0), value=True)
    if "cu_seq_lens_q" in tensors:
        others["cu_seq_lens_q"] = _starts_of_lengths(tensors)
    by_key = others
    if "position_ids" in tensors:
        steps = tensors["position_ids"].diff(dim=1)
        begins, jumps = F.pad(steps != 1, (1, 0), value=True), F.pad(steps > 1, (1, 0))
        if others:
            begins = begins.where(~jumps, next(iter(others.values())))
        elif "attention_mask" in tensors:
            begins &= ~jumps
        by_key = {"position_ids": begins} | others
    # A border lies between tokens and padding. Inside padding, the document keys are ignored.
    before = F.pad(padding[:, :-1], (1, 0))
    edge, inside = padding != before, padding & before
    edge[:, 0] = True
    first, starts = "attention_mask", edge
    for key, its in by_key.items():
        its = (its & ~inside) | edge
        if first in by_key and (differs := its != starts).any():
            row, token = differs.nonzero()[0].tolist()
            raise UserError(
                f'batch["{key}"] and batch["{first}"] disagree: only one of them begins a document '
                f"at token {token} of row {row}."
            )
        first, starts = key, its
    return starts


def _starts_of_lengths(tensors: dict[str, Tensor]) -> Tensor:
    """Return a [B, S] bool tensor that marks where documents begin, according to `cu_seq_lens_q`.

    `cu_seq_lens_q` [documents + 1] holds the borders of the documents in all B * S tokens.
    """
    shape, borders = tensors["input_ids"].shape, tensors["cu_seq_lens_q"]
    lengths, tokens = borders.diff(), shape.numel()
    if (
        borders.ndim != 1
        or len(borders) < 2
        or borders[0] != 0
        or borders[-1] != tokens
        or (lengths < 0).any()
    ):
        raise UserError(
            f'batch["cu_seq_lens_q"] = {borders.tolist()[:8]}... must grow from 0 to {tokens}, the '
            f"number of tokens in input_ids {list(shape)}; the lengths sum to {int(lengths.sum())}."
        )
    if not torch.equal(tensors.get("cu_seq_lens_k", borders), borders):
        raise UserError(
            'batch["cu_seq_lens_k"] differs from cu_seq_lens_q: queries and keys must belong to '
            "the same documents."
        )
    for key in ("max_length_q", "max_length_k"):
        if key in tensors and tensors[key] < lengths.max():
            raise UserError(
                f'batch["{key}"] = {int(tensors[key])}, but cu_seq_lens_q has {int(lengths.max())} '
                "tokens."
            )
    starts = torch.zeros(tokens, dtype=torch.bool)
    starts[borders[:-1][lengths > 0]] = True
    starts = starts.view(shape)
    if not starts[:, 0].all():
        raise UserError(
            f'batch["cu_seq_lens_q"]: a document extends past the end of a row of {shape[1]} '
            "tokens."
        )
    return starts


def slice_rows(rows: Batch, mesh: Mesh, stream_chunk_tokens: int) -> Batch:
    """Return this rank's slice of whole rows, and note on the mesh how they were cut."""
    rank, degree = mesh.sp.get_local_rank(), mesh.sp.size()
    batch = rows.local(rank=rank, degree=degree, stream_chunk_tokens=stream_chunk_tokens)
    if degree > 1:
        mesh.cuts.setdefault(sum(batch.documents[0]), set()).add(batch.chunk_tokens)
    return batch


def check_same_rows(group: list[Batch], mesh: Mesh) -> None:
    """Raise `UserError` if ranks of a sequence-parallel group have loaded different rows.

    Collective. The error is raised on every rank.
    """
    checksum = 0
    for rows in group:
        for tensor in (rows.input_ids, rows.labels, rows.position_ids):
            checksum = zlib.crc32(
                tensor.contiguous().numpy(), zlib.crc32(repr(tensor.shape).encode(), checksum)
            )
    mine, sp = torch.tensor([checksum], device=mesh.device), mesh.sp.size()
    everyone = mine.new_empty(mesh.loss.size())
    dist.all_gather_into_tensor(everyone, mine, group=mesh.loss.get_group())
    groups = zip(everyone.view(-1, sp).tolist(), mesh.world.mesh.view(-1, sp).tolist(), strict=True)
    for checksums, ranks in groups:
        if len(set(checksums)) > 1:
            raise UserError(
                f"shard: ranks {ranks} share a sequence (sequence-parallel degree {sp}), but their "
                "loaders gave different batches. Let the loader depend on mesh.batch alone: "
                "DistributedSampler(data, num_replicas=mesh.batch.size(), "
                "rank=mesh.batch.get_local_rank()), and the same seed on every rank."
            )
