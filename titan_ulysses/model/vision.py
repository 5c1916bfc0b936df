"""Images and videos of a vision-language model under sequence parallelism.

The images of a micro-batch are dealt to the P ranks of a sequence (`data/images.py`). Each rank
gives its own to the unmodified `get_image_features` or `get_video_features`. One all-to-all takes
each feature row to the rank that has its placeholder, and the unmodified model is called with
this rank's `input_ids` and positions, and with the features as `mm_encoder_outputs`, transformers'
own hook for features that were made before. So each image is encoded once, on one rank, and the
exchange in backward takes the gradient of its rows back to that rank, once.

Features that are added to hidden states after some layers (DeepStack, arXiv 2406.04334) travel as
more columns of the same rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PreTrainedConfig, PreTrainedModel

from titan_ulysses.data.images import KINDS, DocumentPositions, Kind, Pixels, Visual, Visuals
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.mesh import Mesh
from titan_ulysses.model import hf
from titan_ulysses.model.pixels import ONE_PLACEHOLDER, PixelInputs, collate, runs_of

_HOOK = "mm_encoder_outputs"


_REFUSED = {
    "gemma3": "its text attends both ways inside an image",
    "gemma4": "its text attends both ways inside an image",
    "llama4": "its head is inside its text",
}
"""Families that would train wrongly, with the reason."""

_PROJECTORS = ("merger", "projector", "connector", "adapter", "aligner")
"""Parts of the names of what takes a tower's output to the text, which may be inside the tower."""


def check_vision_setting(vision: str, config: PreTrainedConfig) -> None:
    """Raise UserError if model.vision is not about this model."""
    if hf.has_vision(config) and vision == "off":
        raise UserError(
            f'model: "{config.model_type}" is multi-modal: images and text. Set model.vision = '
            '"frozen", which trains all but its vision tower, or "train". Its text part alone can '
            "be trained if it is saved as a model of its own; of qwen3_5, model.path is enough."
        )
    if vision != "off" and not hf.has_vision(config):
        raise UserError(
            f'model.vision = "{vision}": "{config.model_type}" is not a model of images and text '
            'for transformers. Set it to "off".'
        )


def takes_features(kind: type[PreTrainedConfig]) -> bool:
    """Return whether the model of this config class has the hook, which came in 5.18."""
    forward = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[kind].forward
    return _HOOK in inspect.signature(forward).parameters


def check_vision(config: PreTrainedConfig) -> None:
    """Raise UserError for a family whose images cannot be encoded apart from its text, and for a
    transformers without the hook for features.
    """
    family = config.model_type
    if not takes_features(type(config)):
        raise UserError(
            f'model: "{family}" in transformers {transformers.__version__} does not take features '
            f"that were made before ({_HOOK}), which sequence parallelism needs. Install a newer "
            "transformers, or take another model."
        )
    if reason := _REFUSED.get(family):
        raise UserError(
            f'model: "{family}" cannot be trained with images by this version: {reason}.'
        )
    if getattr(config.get_text_config(), "output_router_logits", False):
        raise UserError(
            f'model: "{family}" has output_router_logits = true: a router loss over images and '
            "text is not supported. Set it to false in text_config of the model's config."
        )


def freeze_towers(model: PreTrainedModel) -> None:
    """Freeze the vision towers of a model, but not what projects their output to the text."""
    for tower in towers(model):
        own = next(name for name, module in model.named_modules() if module is tower)
        for name, parameter in tower.named_parameters():
            if not any(part in f"{own}.{name}" for part in _PROJECTORS):
                parameter.requires_grad_(False)


def encoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part of a vision-language model that takes tokens and features to hidden states.

    It has `get_image_features`. In most families it is the model without its head.
    """
    if model.base_model is model:
        raise UserError(
            f'model: "{model.config.model_type}" keeps its head inside its text, and this version '
            "trains models of images and text whose head is outside."
        )
    return model.base_model


class Vision:
    """The vision side of a sharded model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.encoder, self.config = encoder_of(model), model.config
        self.inputs = {
            kind: PixelInputs(self.encoder, model.config, kind)
            for kind in KINDS
            if hasattr(self.encoder, f"get_{kind}_features")
        }
        self.positions = positions_of(model)

    @property
    def batch_keys(self) -> tuple[str, ...]:
        """What a batch may have besides the keys of a text."""
        names = {x: None for inputs in self.inputs.values() for x in inputs.names}
        return (*names, "second_per_grid_ts", "mm_token_type_ids")

    def read(self, ids: Tensor, batch: Mapping[str, Tensor]) -> tuple[Visuals, tuple[Pixels, ...]]:
        """Return the images and videos of a batch of whole rows, and the pixels of each.

        ids [B, S]. batch has what the family's processor makes besides them, where the images of
        all rows follow each other. UserError if they are not as many as the placeholders ask for.
        """
        kinds = [*self.inputs]
        if self.config.model_type in ONE_PLACEHOLDER:
            kinds = [kind for kind in kinds if self.inputs[kind].pixels in batch] or ["image"]
            if len(kinds) > 1:
                raise UserError(
                    f'shard: "{self.config.model_type}" has one placeholder for images and videos, '
                    "so its model takes either in a forward. Put them into different batches."
                )
        found = [
            pair
            for inputs in (self.inputs[kind] for kind in kinds)
            for pair in inputs.items(batch, runs_of(ids == inputs.placeholder))
        ]
        found.sort(key=lambda pair: (pair[0].row, pair[0].spans))
        items, pixels = zip(*found, strict=True) if found else ((), ())
        return Visuals(items), pixels

    def encode(
        self,
        visuals: Visuals,
        pixels: Sequence[Pixels],
        mesh: Mesh,
        *,
        seq_len: int,
        chunk_tokens: int | None,
    ) -> dict[str, Any]:
        """Return the `mm_encoder_outputs` of this rank's placeholders; {} if there is no image.

        pixels: of the items that are dealt to this rank. The rows of the whole sequence are cut as
        `sequence.local_slice` cuts it. Collective.
        """
        kinds = visuals.kinds
        if kinds is None:  # other data-parallel ranks may have any
            here = {item.kind for item in visuals.items} if mesh.batch.size() == 1 else self.inputs
            kinds = tuple(kind for kind in self.inputs if kind in here)
        if not kinds:
            return {}
        rank, degree = mesh.sp.get_local_rank(), mesh.sp.size()
        own = [visuals.items[i] for i in visuals.own(rank, degree)]
        if len(own) != len(pixels):
            raise UserError(
                f"model: this rank has the pixels of {len(pixels)} images and videos, and "
                f"{len(own)} are dealt to it. Let `shard` make the batches, or see "
                "titan_ulysses/data/images.py."
            )
        given = [*zip(own, pixels, strict=True)]
        made = {
            kind: self._features(kind, own, [p for item, p in given if item.kind == kind])
            for kind in kinds
        }
        rows = torch.cat([made[kind].rows for kind in kinds])
        plan = _plan(visuals, kinds, rank, degree, seq_len, chunk_tokens)
        rows = _exchange(rows, plan, mesh.sp)
        # Of kinds that are nowhere in these rows the model is given none. Without any, it is given
        # no rows, so that backward reaches the tower as on other data-parallel ranks.
        present = {item.kind for item in visuals.items} or {*kinds}
        return {
            kind: made[kind].like(part)
            for kind, part in zip(kinds, rows.split(plan.of_kinds), strict=True)
            if kind in present
        }

    def count_features(self, kind: Kind, pixels: Pixels) -> int:
        """Return the number of feature rows of an item, by encoding it."""
        with torch.no_grad():
            return len(self._features(kind, None, [pixels]).rows)

    def _features(self, kind: Kind, own: list[Visual] | None, pixels: list[Pixels]) -> _Features:
        """Return the features of this rank's items of a kind, [0, columns] if there are none.

        own: all items of the rank, to check that they have as many placeholders; None: no check.
        """
        device = next(self.encoder.parameters()).device
        given = collate(pixels or [self.inputs[kind].example()])
        given = {name: x.to(device) for name, x in given.items()}
        output = getattr(self.encoder, f"get_{kind}_features")(**given, return_dict=True)
        features = _Features.of(output)
        wanted = sum(x.features for x in own or () if x.kind == kind)
        if own is not None and pixels and len(features.rows) != wanted:
            raise UserError(
                f"model: {len(pixels)} {kind}s have {len(features.rows)} feature rows, and their "
                f"placeholders in the text are {wanted}."
            )
        # Without its own, a rank encodes the smallest, so that FSDP gathers the tower on all ranks,
        # and in backward too: no row of it is used, but they are a part of the graph.
        return features if pixels else features.first(0)


@dataclass
class _Features:
    """The features of images as one matrix, and the form in which a model makes and takes them."""

    rows: Tensor
    """[n, columns]: those of the embeddings, then those of each level of DeepStack"""
    widths: list[int]
    output: type
    field: str
    is_split: bool
    """Whether the model has one tensor an image, or one of all; and how many dimensions it has."""
    dims: int

    @classmethod
    def of(cls, output: Any) -> _Features:
        has_pooled = getattr(output, "pooler_output", None) is not None
        field = "pooler_output" if has_pooled else "last_hidden_state"
        features = getattr(output, field)
        is_split = not isinstance(features, Tensor)
        one = features[0] if is_split else features
        levels = getattr(output, "deepstack_features", None) or []
        parts = [_matrix(x) for x in (features, *levels)]
        return cls(
            torch.cat(parts, dim=1) if levels else parts[0],
            [x.shape[1] for x in parts],
            type(output),
            field,
            is_split,
            one.ndim,
        )

    def first(self, count: int) -> _Features:
        return replace(self, rows=self.rows[:count])

    def like(self, rows: Tensor) -> Any:
        """Return other rows in the same form."""
        features, *levels = (self._formed(x) for x in rows.split(self.widths, dim=1))
        deepstack = {"deepstack_features": levels} if levels else {}
        return self.output(**{self.field: features}, **deepstack)

    def _formed(self, rows: Tensor) -> Any:
        rows = rows.view(*[1] * (self.dims - 2), *rows.shape)
        return (rows,) if self.is_split else rows


def _matrix(features: Any) -> Tensor:
    """Return [n, h] of a tensor, or of one tensor an image, of [..., h]."""
    if isinstance(features, Tensor):
        return features.flatten(0, -2)
    return torch.cat([x.flatten(0, -2) for x in features])


@dataclass(frozen=True)
class _Plan:
    """Which rows go where in the exchange of features, on the host."""

    send: Tensor
    """[n]: this rank's rows in the order in which they leave it"""
    sent: list[int]
    """how many go to each rank"""
    received: list[int]
    """how many come from each rank"""
    place: Tensor
    """[m]: for each placeholder of this rank, its row among those that come"""
    of_kinds: list[int]
    """of the m, how many are of each kind"""


def _plan(
    visuals: Visuals,
    kinds: Sequence[Kind],
    rank: int,
    degree: int,
    seq_len: int,
    chunk_tokens: int | None,
) -> _Plan:
    """Return how the feature rows of a micro-batch of rows of S = seq_len tokens travel.

    A rank makes its rows by kind, then by item, then in the order of the placeholders. The model
    takes them by kind, then by row of the batch, then in the order of its tokens.
    """
    spans = [
        (kinds.index(item.kind), item.row, owner, i, begin, end)
        for i, (item, owner) in enumerate(zip(visuals.items, visuals.owners(degree), strict=True))
        for begin, end in item.spans
    ]
    table = torch.tensor(spans, dtype=torch.int64).view(-1, 6)
    lengths = table[:, 5] - table[:, 4]
    kind, row, owner, item, begin = table[:, :5].repeat_interleave(lengths, dim=0).unbind(1)
    starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    token = begin + torch.arange(len(begin)) - starts
    # As `sequence.local_slice` cuts a chunk after the other among the ranks.
    size = chunk_tokens or seq_len
    chunk = token // size
    of_rank = (seq_len - chunk * size).clamp(max=size) // degree
    holder = (token - chunk * size) // of_rank
    # A stable sort by several keys is one by each of them, from the last to the first.
    made = _order(kind, item)
    taken = _order(kind, row, token)
    mine = made[owner[made] == rank]
    leaving = _order(holder[mine], kind[mine], row[mine], token[mine])
    here = taken[holder[taken] == rank]
    coming = _order(owner[here])
    return _Plan(
        send=leaving,
        sent=torch.bincount(holder[mine], minlength=degree).tolist(),
        received=torch.bincount(owner[here], minlength=degree).tolist(),
        place=torch.empty_like(coming).scatter_(0, coming, torch.arange(len(coming))),
        of_kinds=torch.bincount(kind[here], minlength=len(kinds)).tolist(),
    )


def _order(*keys: Tensor) -> Tensor:
    """Return the indices that sort by the first key, then by the second, and so on."""
    order = torch.arange(len(keys[0]))
    for key in reversed(keys):
        order = order[torch.argsort(key[order], stable=True)]
    return order


def _exchange(rows: Tensor, plan: _Plan, mesh: DeviceMesh) -> Tensor:
    """[n, columns] of the images that this rank encodes -> [m, columns] of its placeholders.

    One all-to-all in forward, and one in backward, which takes gradients the other way.
    """
    device = rows.device
    moved = rows.index_select(0, plan.send.to(device, non_blocking=True))
    if mesh.size() > 1:
        moved = funcol.all_to_all_single_autograd(moved, plan.received, plan.sent, mesh.get_group())
        moved = funcol.wait_tensor(moved)
    return moved.index_select(0, plan.place.to(device, non_blocking=True))


def positions_of(model: PreTrainedModel) -> DocumentPositions | None:
    """Return the function that positions the tokens of a document, or None where that is to count.

    It is the family's own `get_rope_index`, of the document alone.
    """
    encoder = encoder_of(model)
    rope_index = getattr(encoder, "get_rope_index", None)
    if rope_index is None:
        return None
    takes = inspect.signature(rope_index).parameters

    def positions(ids: Tensor, visuals: Sequence[Visual]) -> Tensor:
        kinds = torch.zeros_like(ids)
        inputs: dict[str, Any] = {}
        for number, kind in enumerate(KINDS, start=1):
            items = [x for x in visuals if x.kind == kind]
            for begin, end in (span for x in items for span in x.spans):
                kinds[begin:end] = number
            if items and items[0].grid:
                inputs[f"{kind}_grid_thw"] = torch.tensor([x.grid for x in items])
            if seconds := [x.seconds for x in items if x.seconds is not None]:
                inputs["second_per_grid_ts"] = torch.tensor(seconds)
        inputs = {name: x for name, x in inputs.items() if name in takes}
        found, _ = rope_index(ids[None], mm_token_type_ids=kinds[None], **inputs)
        return found[:, 0]

    return positions


def towers(model: PreTrainedModel) -> Iterator[nn.Module]:
    """Yield the parts of a vision-language model that are called as a whole, besides its text."""
    text = model.get_decoder()
    inside = {*text.modules()}
    for child in encoder_of(model).children():
        if (
            child not in inside
            and not inside & {*child.modules()}
            and any(True for _ in child.parameters())
        ):
            yield child


def tower_blocks(tower: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of a tower: what stands in a list, and not in a list inside of it."""
    for child in tower.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from tower_blocks(child)
