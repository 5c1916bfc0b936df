"""Decodes images and videos ahead of the step, each on the one rank that encodes it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial

import numpy as np
import torch

from titan_ulysses.data.encoding import do_job, worker_pool
from titan_ulysses.data.images import Kind, Pixels, Visual
from titan_ulysses.data.media import Media
from titan_ulysses.data.packing import SampleStream
from titan_ulysses.data.processor import VisionProcessor
from titan_ulysses.distributed.errors import RefusedRow, UserError
from titan_ulysses.launch.host import usable_cores

FEW = 500
"""Data with up to this many images is decoded in a thread: a worker process, which imports torch
and transformers, starts about as long as these take.
"""
_MOST_WORKERS = 8


def open_decoder(
    vision: VisionProcessor | None, streams: Iterable[SampleStream | None]
) -> Decoder | None:
    """Return what decodes the images of these streams, or None if they have none."""
    opened = [one for one in streams if one is not None]  # not by `if one`: some have no length
    counts = sum((Counter(one.visual_counts) for one in opened), Counter[Kind]())
    return Decoder(vision, count=counts.total()) if counts and vision else None


class Decoder:
    """Worker processes of a rank, which decode images and videos; for few of them, a thread.

    count: how many the data of the run has.
    """

    def __init__(self, vision: VisionProcessor, *, count: int) -> None:
        self.decoded: list[str] = []
        """where those are that were decoded here, for tests"""
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = min(_MOST_WORKERS, max(1, usable_cores() // ranks - 1))  # a core is the rank's
        self._pool: Executor
        self._decode: Callable[..., dict[str, np.ndarray]] = partial(_decode, vision)
        if count <= FEW:
            self._pool = ThreadPoolExecutor(1, "decoder")
        else:
            self._pool, self._decode = worker_pool(workers, self._decode), do_job

    def start(self, media: Media, visual: Visual) -> Future[dict[str, np.ndarray]]:
        """Begin to decode one."""
        return self._pool.submit(self._decode, media, visual)

    def finish(self, media: Media, future: Future[dict[str, np.ndarray]]) -> Pixels:
        """Wait for one. Raise `UserError` if it cannot be decoded."""
        try:
            found = future.result()
        except RefusedRow as error:
            raise UserError(
                f'{media.row}: {error}. Repair it, or set bad_lines = "skip": then each image is '
                "also decoded while the data is prepared, and such rows are left out"
            ) from error
        except BrokenProcessPool as error:
            raise UserError(
                "A process that decodes images was killed (out of memory?). Free memory, or lower "
                "data.max_pixels."
            ) from error
        self.decoded.append(f"{media.row}: {media.name}")
        return {name: torch.from_numpy(array) for name, array in found.items()}

    def close(self) -> None:
        """End the processes. What was begun is given up."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _decode(vision: VisionProcessor, media: Media, visual: Visual) -> dict[str, np.ndarray]:
    """Decode one. numpy's arrays are sent as bytes, not as a file descriptor for each tensor."""
    pixels = vision.pixels(media, visual)
    return {name: tensor.contiguous().numpy() for name, tensor in pixels.items()}
