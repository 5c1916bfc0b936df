"""Chats with images and videos: their tokens from the headers, and later their pixels.

The model's own processor is called with images on torch's meta device, which have a size and no
pixels. What it returns is thus exact, whatever a family puts between the placeholders: the ends of
rows, the times of frames, tiles and a thumbnail. A processor that reads values gets black images.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from titan_ulysses.config.schema import Config
from titan_ulysses.data.images import KINDS, Pixels, Visual, cost_of
from titan_ulysses.data.media import Media, decode_image, decode_video, image_size, video_frames
from titan_ulysses.data.records import Encoded
from titan_ulysses.data.tokenizer import BYTES
from titan_ulysses.distributed.errors import RefusedRow, UserError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, ProcessorMixin
    from transformers.video_utils import VideoMetadata

_LAYOUT_ONLY = {"do_rescale": False, "do_normalize": False, "input_data_format": "channels_first"}
"""Normalization reads values, which an image on the meta device has not."""


def open_vision(config: Config, model_config: PreTrainedConfig) -> VisionProcessor | None:
    """Return what reads chats with images for a run; None if its model or tokenizer has no images.

    It is also None where pillow or torchvision is missing, which only data with images needs.
    """
    name = config.model.tokenizer or config.model.path
    if name == BYTES:
        return None
    from transformers import AutoProcessor, ProcessorMixin

    try:
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, ImportError):
        return None  # a row with an image says why, see `chat.why_no_vision`
    if not isinstance(processor, ProcessorMixin):
        return None
    data = config.data
    return VisionProcessor(
        processor, model_config, data.max_pixels, data.video_fps, data.max_frames
    )


@dataclass(frozen=True)
class VisionProcessor:
    """A processor with the settings of [data]. It is pickled and sent to worker processes."""

    processor: ProcessorMixin
    config: PreTrainedConfig
    """of the model"""
    max_pixels: int = 0
    video_fps: float = 0.0
    max_frames: int = 0
    decodes: bool = False
    """look at the pixels while the data is prepared"""

    def read(self, text: str, media: tuple[Media, ...]) -> tuple[Encoded, np.ndarray]:
        """Return a text that the chat template wrote, as the model reads it, and its offsets.

        Those are [tokens, 2] int64, the characters of the text that each token stands for; what a
        placeholder is replaced by stands for the placeholder. media: those of the whole chat, of
        which the text has the first ones. Raise `RefusedRow` if one of them cannot be used.
        """
        shown = self._shown(text, media)
        layout = self._layout(text, shown)
        # Some processors return tensors.
        ids = torch.as_tensor(layout["input_ids"][0]).numpy().astype(np.uint32)
        expanded = torch.as_tensor(layout["offset_mapping"][0]).numpy().reshape(-1, 2)
        offsets, visuals, found = expanded.copy(), [], []
        for place in layout["text_replacement_offsets"][0]:
            kind, (begin, end) = place["type"], place["new_span"]
            first, last = (int(np.searchsorted(expanded[:, 0], at)) for at in (begin, end))
            offsets[last:] = expanded[last:] - (end - place["span"][1])
            offsets[first:last] = place["span"]
            number = sum(visual.kind == kind for visual in visuals)
            visuals.append(self._visual(kind, number, ids, first, last, layout))
            found.append([one for one in shown if one.kind == kind][number])
        positions = None
        if self._positions:
            axes = self._positions(torch.from_numpy(ids.astype(np.int64)), visuals)
            positions = axes.T.numpy().astype(np.int32)
        read = Encoded(ids, visuals=tuple(visuals), media=tuple(found), positions=positions)
        return read, offsets

    def placeholder(self, kind: str) -> int:
        """Return the id of the token that stands for a feature row of an image or video."""
        names = (f"{kind}_token_id", f"{kind}_token_index", "image_token_id", "image_token_index")
        return next(x for name in names if (x := getattr(self.config, name, None)) is not None)

    def pixels(self, media: Media, visual: Visual) -> Pixels:
        """Return what the model's tower takes of an image or video, decoded.

        Raise `RefusedRow` if it cannot be decoded, or has changed since the data was prepared.
        """
        processor = self.processor
        if media.kind == "image":
            found = processor.image_processor(
                [decode_image(media, max_pixels=self.max_pixels)], return_tensors="pt"
            )
        else:
            header = self._header(media)
            frames = torch.from_numpy(decode_video(media, header)).movedim(-1, 1)
            found = processor.video_processor(
                [frames], video_metadata=[header], do_sample_frames=False, return_tensors="pt"
            )
        grid = found.get(f"{media.kind}_grid_thw")
        if grid is not None and tuple(grid[0].tolist()) != visual.grid:
            raise RefusedRow(
                f"{media.name}: it takes {tuple(grid[0].tolist())} patches now, and took "
                f"{visual.grid} when the data was prepared. If it was changed on purpose, remove "
                "the prepared data (data.cache_folder)"
            )
        unused = processor.unused_input_names
        return {k: x for k, x in found.items() if k not in unused and isinstance(x, torch.Tensor)}

    def fingerprint(self) -> str:
        """Return all that determines the result of `read`, besides the tokenizer."""
        settings = (self.max_pixels, self.video_fps, self.max_frames, self.decodes)
        return f"{self.processor.to_json_string()} {self.config.model_type} {settings}"

    @cached_property
    def _positions(self) -> Any:
        from titan_ulysses.model.hf import build_on_meta
        from titan_ulysses.model.vision import positions_of

        return positions_of(build_on_meta(self.config, torch.float32))

    def check(self, text: str, media: tuple[Media, ...]) -> None:
        """Raise `RefusedRow` unless the text of a whole chat has a place for each of its images and
        videos: a template may leave them out, and a message may hold the text of a placeholder.
        """
        for kind in KINDS:
            token = getattr(self.processor, f"{kind}_token", None)
            here, count = [m for m in media if m.kind == kind], text.count(token) if token else 0
            if here and not token:
                name = type(self.processor).__name__
                raise RefusedRow(f"it has a {kind}, and {name} takes none")
            if count != len(here):
                raise RefusedRow(
                    f"the text has the placeholder {token} {count} times, for {len(here)} {kind}(s)"
                )

    def _shown(self, text: str, media: tuple[Media, ...]) -> tuple[Media, ...]:
        """Return those of a chat that a part of its text has: the first ones of each kind."""
        shown: list[Media] = []
        for kind in KINDS:
            if token := getattr(self.processor, f"{kind}_token", None):
                shown += [m for m in media if m.kind == kind][: text.count(token)]
        return tuple(shown)

    @cached_property
    def _device(self) -> str:
        """Where images without pixels are: "meta", or "cpu" if the processor reads their values."""
        try:
            image = torch.empty(3, 64, 64, dtype=torch.uint8, device="meta")
            self._call(self.processor.image_token, [image])
        except Exception:  # of any kind
            return "cpu"
        return "meta"

    def _call(self, text: str, images: list[torch.Tensor], **videos: Any) -> dict[str, Any]:
        return self.processor(
            text=[text],
            images=images or None,
            text_kwargs={"add_special_tokens": False, "return_offsets_mapping": True},
            return_text_replacement_offsets=True,
            images_kwargs=_LAYOUT_ONLY,
            **videos,
        )

    def _layout(self, text: str, media: tuple[Media, ...]) -> dict[str, Any]:
        """Call the processor with the sizes of images and videos alone."""
        images = [self._blank(m) for m in media if m.kind == "image"]
        headers = [self._header(m) for m in media if m.kind == "video"]
        videos: dict[str, Any] = {}
        if headers:
            sizes = [(len(h.frames_indices), 3, h.height, h.width) for h in headers]
            options = {**_LAYOUT_ONLY, "do_sample_frames": False, "video_metadata": headers}
            videos = {"videos": [*map(self._empty, sizes)], "videos_kwargs": options}
        try:
            found = self._call(text, images, **videos)
        except Exception as error:  # of any kind: for example one of 1 x 1,000 pixels
            raise RefusedRow(self._refusal(error, media)) from error
        if "text_replacement_offsets" not in found:
            raise UserError(
                f"{type(self.processor).__name__} does not say where it puts the placeholders of "
                "images (return_text_replacement_offsets): it cannot be used with data.source = "
                '"chat"'
            )
        return found

    def _refusal(self, error: Exception, media: tuple[Media, ...]) -> str:
        """Return why the processor refuses images or videos, with the name of the first of them."""
        for one in media:
            if one.kind == "image":
                try:
                    self.processor.image_processor([self._blank(one)], **_LAYOUT_ONLY)
                except Exception as its:
                    return f"{one.name}: the processor refuses it ({one_line(its)})"
        return f"the processor refuses its images and videos ({one_line(error)})"

    def _blank(self, media: Media) -> torch.Tensor:
        size = image_size(media, max_pixels=self.max_pixels, decode=self.decodes)
        return self._empty((3, *size))

    def _empty(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.uint8, device=self._device)

    def _header(self, media: Media) -> VideoMetadata:
        def sample(found: VideoMetadata) -> np.ndarray:
            options = {"fps": self.video_fps} if self.video_fps else {}
            frames = np.asarray(self.processor.video_processor.sample_frames(found, **options))
            if self.max_frames and len(frames) > self.max_frames:
                places = np.linspace(0, len(frames) - 1, self.max_frames).round().astype(int)
                frames = frames[places]
            return frames

        return video_frames(media, sample, max_pixels=self.max_pixels)

    def _visual(
        self, kind: Any, number: int, ids: np.ndarray, first: int, last: int, layout: dict[str, Any]
    ) -> Visual:
        """Return number `number` of its kind, whose tokens are ids[first:last]."""
        is_placeholder = np.concatenate([[0], ids[first:last] == self.placeholder(kind), [0]])
        edges = (np.flatnonzero(np.diff(is_placeholder)) + first).tolist()
        spans = tuple(zip(edges[::2], edges[1::2], strict=True))
        grids, seconds = layout.get(f"{kind}_grid_thw"), layout.get("second_per_grid_ts")
        grid = () if grids is None else tuple(int(n) for n in grids[number])
        tower = getattr(self.config, "vision_config", self.config)
        visual = Visual(kind, spans, grid)
        parts = [grid[1] * grid[2]] * grid[0] if grid else [visual.features]
        return replace(
            visual,
            cost=cost_of(parts, getattr(tower, "hidden_size", 1)),
            seconds=None if kind == "image" or seconds is None else float(seconds[number]),
        )
