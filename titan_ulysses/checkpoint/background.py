"""Saving without waiting (checkpoint.async_mode = "async"): the next steps run while bytes are
written.

What DCP's own async_save does, with this project's writer: the tensors are copied to host memory,
and a thread with a process group of its own writes the copy. The copy is kept and used again for
the next save, because touching fresh memory costs more than copying, and for a save that has
failed, which async_save could repeat only with the weights of a later step.
"""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor

from titan_ulysses.checkpoint.writing import CheckpointWriter, SaveFailed
from titan_ulysses.distributed.device import module_of, pin
from titan_ulysses.distributed.tensors import plain_pieces


class BackgroundSave:
    """One save at a time, written by a thread. A save that has failed can be written again."""

    def __init__(self, writer: CheckpointWriter):
        self.writer = writer
        self.step: int | None = None
        """The step that is being written or has failed; None if there is none."""
        self.tries = 0
        self._copy: dict[str, Any] = {}
        self._state: dict[str, Any] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, step: int, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        """Copy the tensors, which may change from then on, and begin to write step-<step>."""
        assert self.step is None, "one save is in flight at most"
        self._copy = copied(tensors, self._copy)
        module_of().synchronize()  # copies to page-locked memory do not wait for the device
        self.step, self._state, self.tries = step, state, 0
        self.again()

    def again(self) -> None:
        """Begin to write the copy once more."""
        self.tries, self._error = self.tries + 1, None
        arguments = self.step, module_of().current_device()
        self._thread = threading.Thread(
            target=self._write, args=arguments, name="checkpoint", daemon=True
        )
        self._thread.start()

    @property
    def has_failed(self) -> bool:
        """Whether the last save has ended without success. Waits for nothing."""
        ended = self._thread is not None and not self._thread.is_alive()
        return ended and self._error is not None

    def wait(self) -> str | None:
        """Wait until the save in flight has ended, and return why it failed, or None."""
        if self.step is None or self._thread is None:
            return None
        self._thread.join()
        if isinstance(self._error, SaveFailed):
            return str(self._error)
        if self._error is not None:
            raise self._error
        self.step = None
        return None

    def _write(self, step: int, device: int | str) -> None:
        try:
            module_of().set_device(device)  # a thread begins on the first one
            self.writer.write(step, self._copy, self._state)
        except BaseException as error:  # raised again by the thread that trains
            self._error = error


def copied(value: Any, kept: Any = None) -> Any:
    """Return a copy of a state dict with all tensors in host memory, page-locked for a GPU.

    kept: an earlier copy of a state dict of the same shapes, whose memory is used again.
    """
    if isinstance(value, dict):
        return {name: copied(x, (kept or {}).get(name)) for name, x in value.items()}
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    if not isinstance(kept, Tensor) or kept.shape != value.shape or kept.dtype != value.dtype:
        kept = value.to("cpu", copy=True)
        if any(piece.device.type != "cpu" for piece in plain_pieces(value)):
            pin(kept)
        return kept
    for target, source in zip(plain_pieces(kept), plain_pieces(value), strict=True):
        target.copy_(source, non_blocking=True)
    return kept
