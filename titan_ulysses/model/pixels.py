"""What a family's processor makes of images and videos, and how a batch of them is taken apart.

Families agree on the names of these tensors and on little else. Which ones a family has is read
from the arguments of its own `get_image_features` and `get_video_features`. There are images as
rows of patches with a grid (qwen), whole images and tiles of one size (llava, internvl), images
with as many tiles as the largest (llava_next), and images filled up to the largest (mistral3).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import select_best_resolution

from titan_ulysses.data.images import Kind, Pixels, Visual, cost_of
from titan_ulysses.distributed.errors import UserError

_PATCH = ("patch_size", "spatial_patch_size")
_MERGE = ("spatial_merge_size", "merge_kernel_size", "merge_size")
_SETTINGS = {
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "vision_aspect_ratio",
    "batch_num_images",
    "kwargs",
}
"""Arguments of `get_image_features` that are not about one image; they have defaults."""

ONE_PLACEHOLDER = {"glm46v", "glm4v", "glm4v_moe", "glm_ocr"}
"""Families whose videos have the placeholders of images, so that a batch cannot have both."""

_PATCHES_AS_IMAGES = {"kimi_k25", "paddleocr_vl"}
"""Families whose patches are not rows of numbers, but images of [channels, patch, patch]."""

Run = tuple[int, int, int]
"""(row, begin, end) of placeholders that follow each other."""


@dataclass(frozen=True)
class PixelInputs:
    """The inputs of a family for images, or for videos."""

    encoder: PreTrainedModel
    """has `get_image_features`"""
    config: PreTrainedConfig
    """of the whole model"""
    kind: Kind

    @cached_property
    def names(self) -> list[str]:
        """The arguments of the family's function that a batch has a part of for each item."""
        function = getattr(self.encoder, f"get_{self.kind}_features")
        return [x for x in inspect.signature(function).parameters if x not in _SETTINGS]

    @property
    def pixels(self) -> str:
        return "pixel_values" if self.kind == "image" else "pixel_values_videos"

    @property
    def grid(self) -> str:
        return f"{self.kind}_grid_thw"

    @cached_property
    def placeholder(self) -> int | None:
        """The token that stands for a feature row."""
        if self.kind == "video" and self.config.model_type in ONE_PLACEHOLDER:
            return self.config.image_token_id
        for name in (f"{self.kind}_token_id", f"{self.kind}_token_index"):
            if (token := getattr(self.config, name, None)) is not None:
                return token
        return None

    def items(self, batch: Mapping[str, Tensor], runs: Sequence[Run]) -> Iterator[Found]:
        """Yield each item of a batch of whole rows with its pixels, in the order of the batch.

        runs: the placeholders of this kind. UserError if items and placeholders do not match.
        """
        of_items = self._split({name: batch[name] for name in self.names if name in batch})
        total = sum(end - begin for _, begin, end in runs)
        counts = self._feature_rows(of_items, [end - begin for _, begin, end in runs])
        if counts is None or sum(counts) != total:
            rows = "" if counts is None else f" of {sum(counts)} feature rows"
            raise UserError(
                f"shard: the batch has {len(of_items)} {self.kind}s{rows}, and {total} "
                f"placeholders of them (token {self.placeholder}) in input_ids. Give input_ids and "
                "pixels as the model's processor makes them, whole."
            )
        waiting = [*reversed(runs)]
        for index, (count, pixels) in enumerate(zip(counts, of_items, strict=True)):
            spans, row = [], 0
            while count:
                row, begin, end = waiting.pop()
                if end - begin > count:
                    waiting.append((row, begin + count, end))
                    end = begin + count
                spans.append((begin, end))
                count -= end - begin
            grid = pixels.get(self.grid)
            seconds = batch.get("second_per_grid_ts") if self.kind == "video" else None
            yield (
                Visual(
                    self.kind,
                    tuple(spans),
                    grid=() if grid is None else tuple(grid[0].tolist()),
                    cost=self.cost(pixels),
                    row=row,
                    seconds=None if seconds is None else float(seconds[index]),
                ),
                pixels,
            )

    def _split(self, inputs: Pixels) -> list[Pixels]:
        """Return the inputs of each item of a batch, as of a batch of one."""
        if not inputs:
            return []
        if "pixel_attention_mask" in inputs and inputs[self.pixels].ndim == 5:
            # Tiles of each row of the batch, filled up with tiles of zeros.
            inputs = {name: x.flatten(0, 1) for name, x in inputs.items()}
            real = inputs[self.pixels].flatten(1).ne(0).any(1)
            inputs = {name: x[real][:, None] for name, x in inputs.items()}
        count = len(inputs.get(self.grid, inputs[self.pixels]))
        sizes = dict.fromkeys(inputs, [1] * count)
        if self.grid in inputs:
            sizes[self.pixels] = inputs[self.grid].prod(-1).tolist()
        for name, x in inputs.items():
            if len(x) != sum(sizes[name]):
                raise UserError(
                    f"batch[{name!r}] is {list(x.shape)}: {count} {self.kind}s need "
                    f"{sum(sizes[name])} rows of it."
                )
        parts = {name: x.split(sizes[name]) for name, x in inputs.items()}
        return [{name: x[i] for name, x in parts.items()} for i in range(count)]

    def _feature_rows(self, items: Sequence[Pixels], runs: list[int]) -> list[int] | None:
        """Return the feature rows of each item; None if that cannot be known.

        runs: the lengths of the runs of placeholders.
        """
        merge = _number(self.config, *_MERGE)
        if items and self.grid in items[0]:
            counts = [int(x[self.grid].prod()) // merge**2 for x in items]
            # kimi_k25 has one row for a patch of all frames, and then one run for a video.
            return counts if sum(counts) == sum(runs) or len(runs) != len(items) else runs
        if self._has_sizes(items):
            cell = _number(self.config, *_PATCH) * merge
            return [int((x["image_sizes"][0] // cell).prod()) for x in items]
        if len(runs) == len(items):
            return runs
        each, rest = divmod(sum(runs), max(1, len(items)))
        return None if rest else [each] * len(items)

    def _has_sizes(self, items: Sequence[Pixels]) -> bool:
        """Whether an image is filled up to the largest, and its size says what is its own."""
        return bool(items) and "image_sizes" in items[0] and not self._tilings

    @property
    def _tilings(self) -> list[list[int]]:
        """The sizes in pixels of what an image is cut into tiles of, with one tile of the whole."""
        return getattr(self.config, "image_grid_pinpoints", None) or []

    def cost(self, pixels: Pixels) -> int:
        """Return what the tower computes for an item: see `images.cost_of`."""
        if self.grid in pixels:
            t, height, width = pixels[self.grid][0].tolist()
            parts = [height * width] * t
        else:
            x, patch = pixels[self.pixels], _number(self.config, *_PATCH)
            parts = [x.shape[-2:].numel() // patch**2] * x.shape[:-3].numel()
        return cost_of(parts, _number(self.config, "embed_dim", "hidden_size"))

    def example(self, *, units: tuple[int, int] = (1, 1)) -> Pixels:
        """Return the smallest item that the tower can encode, all ones.

        units: how many times as high and as wide, where a family takes any size.
        """
        patch, merge = _number(self.config, *_PATCH), _number(self.config, *_MERGE)
        channels = _number(self.config, "in_channels", "num_channels", "in_chans", default=3)
        height, width = (n * merge for n in units)
        if self.grid in self.names:
            row = channels * _number(self.config, "temporal_patch_size") * patch**2
            as_images = self.config.model_type in _PATCHES_AS_IMAGES
            one = (channels, patch, patch) if as_images else (row,)
            return {
                self.pixels: torch.ones(height * width, *one),
                self.grid: torch.tensor([[1, height, width]]),
            }
        size = _number(self.config, "image_size")
        tile = torch.ones(1, channels, size, size)
        if "spatial_shapes" in self.names:
            shape = [n * _number(self.config, "downsample_factor") for n in units]
            return {
                self.pixels: torch.ones(1, math.prod(shape), channels * patch**2),
                "spatial_shapes": torch.tensor([shape]),
                "pixel_attention_mask": torch.ones(1, math.prod(shape), dtype=torch.int64),
            }
        if "pixel_attention_mask" in self.names:
            mask = torch.ones(1, 1, size, size, dtype=torch.int64)
            return {self.pixels: tile[None], "pixel_attention_mask": mask}
        if "image_sizes" in self.names and (choices := self._tilings):
            best = select_best_resolution((size, size), choices)
            tiles = 1 + math.prod(best) // size**2
            sizes = torch.tensor([[size, size]])
            return {self.pixels: tile.expand(1, tiles, *tile.shape[1:]), "image_sizes": sizes}
        if "image_sizes" in self.names and self.config.vision_config.model_type == "pixtral":
            # Two rows of features at least: mistral3's own code takes one for a batch.
            tile = torch.ones(1, channels, height * patch, 2 * width * patch)
            return {self.pixels: tile, "image_sizes": torch.tensor([tile.shape[2:]])}
        return {self.pixels: tile if self.kind == "image" else tile[None]}


Found = tuple[Visual, Pixels]


def runs_of(placeholders: Tensor) -> list[Run]:
    """Return the runs of true values in the rows of a mask [B, S]."""
    edges = F.pad(placeholders.int(), (1, 1)).diff(dim=1)
    begins, ends = (edges == 1).nonzero().tolist(), (edges == -1).nonzero().tolist()
    return [(row, begin, end) for (row, begin), (_, end) in zip(begins, ends, strict=True)]


def collate(pixels: Sequence[Pixels]) -> Pixels:
    """Return the inputs of several items as those of one call.

    Where items have tensors of different sizes, zeros fill them up, as in the processors of these
    families.
    """
    collated = {}
    for name, first in pixels[0].items():
        parts = [x[name] for x in pixels]
        sizes = [max(dim) for dim in zip(*(x.shape[1:] for x in parts), strict=True)]
        for i, x in enumerate(parts):
            missing = [n - m for n, m in zip(sizes, x.shape[1:], strict=True)]
            if any(missing):
                parts[i] = F.pad(x, [n for m in reversed(missing) for n in (0, m)])
        collated[name] = first if len(parts) == 1 else torch.cat(parts)
    return collated


def _number(config: PreTrainedConfig, *names: str, default: int = 1) -> int:
    """Return the value of the first of these keys that the tower's config or the whole one has.

    Of a pair, as of height and width, it is the first.
    """
    for holder in (config.vision_config, config):
        for name in names:
            value = getattr(holder, name, None)
            value = value[0] if isinstance(value, list | tuple) else value
            if isinstance(value, int):
                return value
    return default
