"""Images and videos of rows: where they are, their sizes, and their pixels.

Each is read twice. While the data is prepared, every rank reads the header, which is enough to know
how many tokens it takes. Later the rank that encodes it reads its pixels. `RefusedRow` says in one
sentence what is wrong with one that cannot be used.

pillow reads images, and PyAV reads videos. They are imported when the first one is met.
"""

from __future__ import annotations

import base64
import binascii
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from titan_ulysses.data.images import KINDS, Kind
from titan_ulysses.distributed.errors import RefusedRow, UserError, one_line

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers.video_utils import VideoMetadata

_SOURCES = ("image", "video", "path", "url", "base64", "bytes", "image_url", "video_url")
_MODES = frozenset({"1", "L", "P", "LA", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"})
"""Modes of pillow that it converts to RGB without loss of range."""
_NO_IMAGES = {
    b"version https://git-lfs": "it is a pointer of Git LFS: run `git lfs pull`",
    b"<svg": "it is an SVG drawing: give it as PNG",
    b"%PDF": "it is a PDF: give each page as an image",
    b"<!doctype html": "it is a web page",
    b"<html": "it is a web page",
    b"ftypheic": "it is HEIC, which pillow cannot read alone: give it as JPEG",
}
_MOST_PIXELS = 178_956_970
"""Of an image: twice pillow's `MAX_IMAGE_PIXELS`, from which on it refuses to open one."""


class Media(NamedTuple):
    """An image or video of a row: the path of its file, or its content."""

    kind: Kind
    name: str
    """for messages: its number in the row, and its path"""
    path: str = ""
    row: str = ""
    """the place of its row"""
    data: bytes = b""
    """the file's content as it was given, if it has no path"""

    def open(self) -> BinaryIO:
        """Return its file. Raise `RefusedRow` if there is none, or nothing in it."""
        if self.path:
            try:
                if os.path.getsize(self.path) and os.path.isfile(self.path):
                    return open(self.path, "rb")
                why = "it is empty" if os.path.isfile(self.path) else "it is not a file"
            except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
                why = getattr(error, "strerror", None) or str(error)
            raise RefusedRow(f"{self.name}: {why}")
        if not self.data:
            raise RefusedRow(f"{self.name}: it is empty")
        return BytesIO(self.data)


# --- rows -----------------------------------------------------------------------------------------


def take_media(
    messages: list[dict[str, Any]], record: dict[str, Any], folder: Path
) -> tuple[list[dict[str, Any]], tuple[Media, ...]]:
    """Return messages whose images and videos are only marked as such, and these in their order.

    An item of a message's content is {"type": "image"} or "video" with the source under the name of
    its kind, "path", "base64", "bytes" or "url" (of a file, or with its data). Without a source it
    is the next of the columns "images" or "videos" of the record, as in TRL. Relative paths begin
    in `folder`.
    """
    columns = {kind: _column(record, kind) for kind in KINDS}
    rests = {kind: iter(values) for kind, values in columns.items()}
    counts, found, changed = dict.fromkeys(KINDS, 0), [], []
    for message in messages:
        content = message.get("content")
        if not isinstance(content, list):
            changed.append(message)
            continue
        items = []
        for item in content:
            kind = _kind(item)
            if kind is not None:
                counts[kind] += 1
                value = _source(item, kind, next(rests[kind], None))
                found.append(_media(value, kind, f"{kind} {counts[kind]}", folder))
                item = {"type": kind}
            items.append(item)
        changed.append({**message, "content": items})
    for kind, values in columns.items():
        if left := len([*rests[kind]]):
            raise RefusedRow(
                f'"{kind}s" has {len(values)}, and the messages have a place, '
                f'{{"type": "{kind}"}}, for {len(values) - left} of them'
            )
    return changed, tuple(found)


def has_media(messages: list[dict[str, Any]]) -> bool:
    """Return whether any message has an image or video."""
    contents = (message.get("content") for message in messages)
    return any(_kind(item) for x in contents if isinstance(x, list) for item in x)


def _column(record: dict[str, Any], kind: str) -> list[Any]:
    values = record.get(f"{kind}s")
    return [x for x in values if x is not None] if isinstance(values, list) else []


def _kind(item: Any) -> Kind | None:
    kind = str(item.get("type")).removesuffix("_url") if isinstance(item, dict) else None
    if kind in ("audio", "input_audio"):
        raise RefusedRow("a message has audio, which is not read")
    return next((known for known in KINDS if known == kind), None)


def _source(item: dict[str, Any], kind: str, of_column: Any) -> Any:
    """Return (key, value) of where an item says that its file is."""
    if unknown := sorted(item.keys() - {"type", "text", *_SOURCES}):
        raise RefusedRow(
            f'the {kind} of a message has "{unknown[0]}", which is not read: set data.max_pixels, '
            "data.video_fps and data.max_frames for all"
        )
    given = [(key, item[key]) for key in _SOURCES if item.get(key) is not None]
    if len(given) != 1 and (given or of_column is None):
        keys = " and ".join(f'"{key}"' for key, _ in given) or f'no source, nor a column "{kind}s"'
        raise RefusedRow(f"the {kind} of a message has {keys}: give one")
    return given[0] if given else ("", of_column)


def _media(source: tuple[str, Any], kind: Kind, name: str, folder: Path) -> Media:
    key, value = source
    if isinstance(value, dict):  # as `datasets` stores an image, or OpenAI's form
        value = next((value[k] for k in ("bytes", "path", "url") if value.get(k)), None)
    if isinstance(value, bytes | bytearray):
        return Media(kind, name, data=bytes(value))
    if not isinstance(value, str):
        raise RefusedRow(
            f"{name}: it is given as {type(value).__name__}: give a path, bytes or base64"
        )
    if match := re.match(r"data:[^,]*;base64,", value):
        return Media(kind, name, data=_from_base64(value[match.end() :], name))
    value = value.removeprefix("file://")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", value):
        raise RefusedRow(
            f'{name}: "{value[:80]}" is a URL, and nothing is downloaded: give the path of a file'
        )
    if key == "base64":
        return Media(kind, name, data=_from_base64(value, name))
    # transformers also takes base64 where a path may stand.
    if len(value) > 255 and key in ("image", "video", ""):
        return Media(kind, name, data=_from_base64(value, name))
    path = str(folder / Path(value).expanduser())
    return Media(kind, f'{name} ("{path}")', path=path)


def _from_base64(text: str, name: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RefusedRow(f"{name}: its base64 is damaged ({error})") from error


# --- images ---------------------------------------------------------------------------------------


def image_size(media: Media, *, max_pixels: int, decode: bool = False) -> tuple[int, int]:
    """Return (height, width) of an image as the processor gets it, from its header.

    It is upright, and has at most `max_pixels` (0: any number). The pixels are decoded only with
    `decode`, or where the end of the file is not that of a whole image.
    """
    with media.open() as file, _reading(media), _opened(file) as image:
        width, height = image.size
        if not width * height:
            raise RefusedRow(f"it has no pixels ({width} x {height})")
        # Photos of phones (MPO) hold a second, small one.
        if image.format != "MPO" and getattr(image, "is_animated", False):
            raise RefusedRow(
                f"it is an animation of {getattr(image, 'n_frames', 'several')} frames: give one "
                "frame, or a video"
            )
        if image.mode not in _MODES:
            raise RefusedRow(
                f"its pixels are of the kind {image.mode}, which would lose their range in 8 bits: "
                "convert it to RGB"
            )
        # pillow decodes a PNG to look for an orientation behind the pixels.
        known = image.format != "PNG" or "exif" in image.info
        if known and image.getexif().get(0x0112, 1) >= 5:  # turned by 90 degrees
            width, height = height, width
        if decode or not _is_whole(file, image.format):
            image.load()
    return scaled_down(height, width, max_pixels)


def decode_image(media: Media, *, max_pixels: int) -> Image:
    """Return an image in RGB, upright, scaled down to at most `max_pixels`.

    Raise `RefusedRow` if it cannot be decoded.
    """
    from PIL.Image import Resampling
    from transformers.image_utils import load_image

    with media.open() as file, _reading(media), _opened(file) as opened:
        image = load_image(opened)
        height, width = scaled_down(image.height, image.width, max_pixels)
        if (width, height) != image.size:
            image = image.resize((width, height), Resampling.BICUBIC)
    return image


def scaled_down(height: int, width: int, max_pixels: int) -> tuple[int, int]:
    """Return the size of an image or frame of at most `max_pixels` (0: any), of the same shape."""
    if not max_pixels or height * width <= max_pixels:
        return height, width
    factor = math.sqrt(max_pixels / (height * width))
    # One of 1 x 10,000 has to stay an image.
    return max(1, int(height * factor)), max(1, int(width * factor))


@contextmanager
def _opened(file: BinaryIO) -> Iterator[Image]:
    pillow = _import("PIL.Image", "images need pillow")
    with warnings.catch_warnings():
        # Of more than half of _MOST_PIXELS.
        warnings.simplefilter("ignore", pillow.DecompressionBombWarning)
        with pillow.open(file) as image:
            yield image


def _is_whole(file: BinaryIO, kind: str | None) -> bool:
    """Return whether the file ends as an image of its kind does; False if that is not known."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 2**16))
    end = file.read()
    file.seek(0)
    start = file.read(8)
    if kind in ("JPEG", "MPO"):
        return b"\xff\xd9" in end[-64:]
    if kind == "PNG":
        return end.endswith(b"IEND\xaeB`\x82")
    return kind == "WEBP" and int.from_bytes(start[4:8], "little") + 8 <= size


@contextmanager
def _reading(media: Media) -> Iterator[None]:
    """Raise `RefusedRow`, with the name, for whatever a decoder raises about a damaged file."""
    try:
        yield
    except RefusedRow as error:
        raise RefusedRow(f"{media.name}: {error}") from error
    except UserError:
        raise
    except MemoryError as error:
        raise RefusedRow(f"{media.name}: there is not enough memory to decode it") from error
    except Exception as error:
        raise RefusedRow(f"{media.name}: {_why(error, media)}") from error


def _why(error: Exception, media: Media) -> str:
    kind = type(error).__name__
    if kind == "DecompressionBombError":
        return f"it has more than {_MOST_PIXELS:,} pixels: scale it down"
    if kind == "UnidentifiedImageError":
        with media.open() as file:
            start = file.read(256).lower()
        known = (why for mark, why in _NO_IMAGES.items() if mark.lower() in start)
        return next(known, "it is no image that pillow can read")
    if "Decompressed data too large" in str(error):
        return f"it is a decompression bomb ({one_line(error)})"
    return f"it is damaged or cut short ({one_line(error)})"


# --- videos ---------------------------------------------------------------------------------------

SampleFrames = Callable[..., np.ndarray]
"""VideoMetadata -> the frames to take, by number."""


def video_frames(media: Media, sample: SampleFrames, *, max_pixels: int) -> VideoMetadata:
    """Return what the header of a video says, with the size of its frames as the processor gets
    them, and `frames_indices`, those that are taken.
    """
    from transformers.video_utils import VideoMetadata

    with media.open() as file, _reading(media), _container(file) as container:
        stream = container.streams.video[0]
        if not stream.frames or not stream.average_rate:
            raise RefusedRow(
                "its header does not say how many frames it has, and how fast: write it as mp4"
            )
        found = VideoMetadata(
            total_num_frames=int(stream.frames),
            fps=float(stream.average_rate),
            duration=float(stream.frames / stream.average_rate),
            video_backend="pyav",
            height=stream.height,
            width=stream.width,
        )
        found.frames_indices = [int(i) for i in sample(found)]
        found.height, found.width = scaled_down(stream.height, stream.width, max_pixels)
    return found


def decode_video(media: Media, found: VideoMetadata) -> np.ndarray:
    """Return the frames of a video, [frames, height, width, 3] uint8, as `found` says."""
    from transformers.video_utils import read_video_pyav

    wanted = np.array(found.frames_indices)
    with media.open() as file, _reading(media):
        frames, read = read_video_pyav(file, lambda metadata: wanted)
        if len(frames) != len(wanted) or read.total_num_frames != found.total_num_frames:
            raise RefusedRow(
                f"{len(wanted)} frames of {found.total_num_frames} were wanted, and "
                f"{len(frames)} can be decoded: it is cut short, or has changed"
            )
        if frames.shape[1:3] != (found.height, found.width):
            import torch
            from torchvision.transforms.v2 import functional as transforms

            planes = torch.from_numpy(frames).movedim(-1, 1)
            planes = transforms.resize(planes, [found.height, found.width], antialias=True)
            frames = planes.movedim(1, -1).numpy()
    return frames


@contextmanager
def _container(file: BinaryIO) -> Iterator[Any]:
    av = _import("av", "videos need PyAV")
    with av.open(file) as container:
        if not container.streams.video:
            raise RefusedRow("it has no pictures: it is sound or text")
        yield container


def _import(module: str, needs: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{needs}, which cannot be imported ({one_line(error)}): pip install "
            "'titan-ulysses[vision]'"
        ) from error
