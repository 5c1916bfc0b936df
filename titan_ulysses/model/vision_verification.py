"""What verification needs of a family of images and text: a tiny model, and documents with images.

The whole model gets each document alone, with the pixels of its images, and so runs the family's
own code for positions, masks and placeholders. The sharded one gets the documents packed, and each
rank encodes the images that are dealt to it (see `vision.py`).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from titan_ulysses.data.adapter import with_images
from titan_ulysses.data.images import Pixels
from titan_ulysses.data.loader import Batch
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.mesh import Mesh
from titan_ulysses.distributed.sequence import IGNORE_INDEX
from titan_ulysses.model import hf
from titan_ulysses.model.pixels import ONE_PLACEHOLDER, collate
from titan_ulysses.model.vision import Vision, positions_of

_WORDS = 40
"""Tokens below are words; the tiny config has all special tokens above."""
_LAYERS = ("depth", "num_hidden_layers", "num_layers", "layers")
_TOWER = {
    "num_heads": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "num_position_embeddings": 16,
    "window_size": 64,
}
"""Largest widths of the tiny tower, for those of these names that its config has."""


def shrink_vision(
    config: PreTrainedConfig, shrink: Callable[[PreTrainedConfig], PreTrainedConfig]
) -> PreTrainedConfig:
    """Return a copy of config with a tiny text, by shrink(text config), and a tiny tower."""
    tiny = copy.deepcopy(config)
    text = tiny.get_text_config()
    place = next(key for key in tiny.sub_configs if getattr(tiny, key, None) is text)
    text = shrink(text)
    setattr(tiny, place, text)
    tower = tiny.vision_config
    narrow = dict(_TOWER)
    # qwen2_vl calls the width of its tower embed_dim, and that of its output hidden_size.
    width = "embed_dim" if isinstance(getattr(tower, "embed_dim", None), int) else "hidden_size"
    narrow |= {width: 32} | dict.fromkeys(_LAYERS, 2)
    for name, most in narrow.items():
        if isinstance(getattr(tower, name, None), int):
            setattr(tower, name, min(most, getattr(tower, name)))
    for name, value in vars(tiny).items():  # of a projector
        if name.endswith("hidden_size") and value == getattr(config.vision_config, width, None):
            setattr(tiny, name, getattr(tower, width))
    for name in ("out_hidden_size", "hidden_size", "text_hidden_size"):
        if name != width and isinstance(getattr(tower, name, None), int):
            setattr(tower, name, text.hidden_size)
    for name, layers in (("deepstack_visual_indexes", [0, 1]), ("fullatt_block_indexes", [1])):
        if getattr(tower, name, None):
            setattr(tower, name, layers)
    special = [k for k, x in vars(tiny).items() if _is_token(k) and isinstance(x, int) and x >= 0]
    for number, name in enumerate(special):
        setattr(tiny, name, _WORDS + number)
    for owner in (tiny, tower):
        for name, value in vars(owner).items():
            if "drop" in name and isinstance(value, float):
                setattr(owner, name, 0.0)
            elif name == "initializer_range":
                owner.initializer_range = 0.2
    try:
        counts_along_axes = positions_of(hf.build_on_meta(tiny, torch.float32)) is not None
    except UserError:  # perhaps because its heads have too few frequencies for its axes
        counts_along_axes = True
    if counts_along_axes:
        _fit_axes(text)
    return tiny


def _fit_axes(text: PreTrainedConfig) -> None:
    """Share the frequencies of a narrow head among the three axes of its positions."""
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("partial_rotary_factor", 1.0) < 0.5:  # too few for each axis to have one
        rope["partial_rotary_factor"] = 0.5
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    each, rest = divmod(int(size * rope.get("partial_rotary_factor", 1.0)) // 2, 3)
    rope["mrope_section"] = [each, each, each + rest]


def _is_token(name: str) -> bool:
    return name.endswith(("token_id", "token_index"))


class VisionBatch:
    """A row of packed documents: one with two images, one of words alone, and one with a video.

    Every data-parallel rank gets the same row. It has the places of `verification._TestBatch`.
    """

    what = "documents with images, packed and sharded, against each document alone"

    def __init__(self, mesh: Mesh, model: PreTrainedModel) -> None:
        self.vision = Vision(model)
        self.generator = torch.Generator().manual_seed(1)
        documents = [
            self._document(["image", 3, "image_wide", 2]),
            self._document([]),
            self._document(["image", "text"]),
        ]
        one_kind = model.config.model_type in ONE_PLACEHOLDER
        if "video" in self.vision.inputs and not one_kind:
            documents.append(self._document(["video"]))
        missing = -sum(len(ids) for ids, _ in documents) % mesh.sp.size()
        if missing:
            documents.append((torch.arange(1, missing + 1), []))
        self.documents = documents
        ids = torch.cat([ids for ids, _ in documents])[None]
        positions = torch.cat([torch.arange(len(ids)) for ids, _ in documents])[None]
        labels = ids.roll(-1, dims=1)
        labels = labels.masked_fill((positions.roll(-1) == 0) | (labels >= _WORDS), IGNORE_INDEX)
        rows = Batch(ids, labels, positions, (tuple(len(ids) for ids, _ in documents),))
        pixels = _joined([x for _, of_document in documents for x in of_document])
        self.rows = with_images(rows, pixels, self.vision)

    def _document(self, pieces: list[str | int]) -> tuple[Tensor, list[Pixels]]:
        """Return the ids and the pixels of a document of words, and what is between them."""
        parts, pixels = [self._words(4)], []
        for piece in pieces:
            if isinstance(piece, str) and piece != "text":
                kind, _, wide = piece.partition("_")
                inputs = next(x for x in self.vision.inputs.values() if x.kind == kind)
                item = inputs.example(units=(1, 2) if wide else (1, 1))
                values = torch.randn(item[inputs.pixels].shape, generator=self.generator)
                item = item | {inputs.pixels: values.to(torch.float64)}
                rows = self.vision.count_features(inputs.kind, item)
                parts.append(torch.full((rows,), inputs.placeholder or 0))
                pixels.append(item)
            parts.append(self._words(3))
        return torch.cat(parts), pixels

    def _words(self, count: int) -> Tensor:
        return torch.randint(3, _WORDS, (count,), generator=self.generator)

    def loss_whole(self, model: PreTrainedModel) -> Tensor:
        """Return the loss of unmodified transformers, with each document alone."""
        takes = inspect.signature(type(model).forward).parameters
        device, start = model.device, 0
        total = torch.zeros((), dtype=torch.float64, device=device)
        for ids, pixels in self.documents:
            inputs: dict[str, Any] = _joined(pixels)
            if "mm_token_type_ids" in takes and pixels:
                inputs["mm_token_type_ids"] = self._kinds(ids)[None]
            inputs = {name: x.to(device) for name, x in inputs.items()}
            logits = model(input_ids=ids[None].to(device), use_cache=False, **inputs).logits[0]
            labels = self.rows.labels[0, start : start + len(ids)].to(device)
            start += len(ids)
            total = total + F.cross_entropy(
                logits.double(), labels, ignore_index=IGNORE_INDEX, reduction="sum"
            )
        return total / (self.rows.labels != IGNORE_INDEX).sum()

    def _kinds(self, ids: Tensor) -> Tensor:
        kinds = torch.zeros_like(ids)
        for number, inputs in enumerate(self.vision.inputs.values(), start=1):
            kinds[(ids == inputs.placeholder) & (kinds == 0)] = number
        return kinds


def _joined(pixels: list[Pixels]) -> Pixels:
    """Return the inputs of images and videos as a batch has them."""
    kinds: dict[tuple[str, ...], list[Pixels]] = {}
    for one in pixels:
        kinds.setdefault(tuple(one), []).append(one)
    return {name: x for of_kind in kinds.values() for name, x in collate(of_kind).items()}
