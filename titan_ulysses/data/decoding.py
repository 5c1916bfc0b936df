"""Decodes images and videos ahead of the step, each on the one rank that encodes it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import numpy as np
import torch

from titan_ulysses.data.encoding import become_worker
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
        self._vision = vision
        self.decoded: list[str] = []
        """where those are that were decoded here, for tests"""
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = min(_MOST_WORKERS, max(1, usable_cores() // ranks - 1))  # a core is the rank's
        self._pool: Executor
        if count <= FEW:
            self._pool = ThreadPoolExecutor(1, "decoder")
            return
        # Spawn, not fork: torch may have running threads.
        self._pool = ProcessPoolExecutor(
            workers,
            mp_context=get_context("spawn"),
            initializer=_start_worker,
            initargs=(vision,),
        )

    def start(self, media: Media, visual: Visual) -> Future[dict[str, np.ndarray]]:
        """Begin to decode one."""
        if isinstance(self._pool, ThreadPoolExecutor):
            return self._pool.submit(_decode, media, visual, self._vision)
        return self._pool.submit(_decode, media, visual)

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


_vision: VisionProcessor
"""Of a worker process, once it has started."""


def _start_worker(vision: VisionProcessor) -> None:
    global _vision
    _vision = vision
    torch.set_num_threads(1)  # there is a process for each core already
    become_worker()


def _decode(
    media: Media, visual: Visual, vision: VisionProcessor | None = None
) -> dict[str, np.ndarray]:
    """Decode one. numpy's arrays are sent as bytes, not as a file descriptor for each tensor."""
    pixels = (vision or _vision).pixels(media, visual)
    return {name: tensor.contiguous().numpy() for name, tensor in pixels.items()}
