"""The progress line of a run, below its other lines on a terminal: which step, how much of it is
done, the time so far and the time left.

Within a step or a validation, progress is measured as work in tokens x blocks. It is counted in the
calls of the blocks: a block that is called with part of its tokens has done that part. On CUDA this
is the work that has been launched, and the device may be behind it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.constrain import Constrain
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from torch import Tensor, nn

from titan_ulysses.launch import heartbeat

_SLOW = 2.0
"""Seconds after which the progress within a part is shown. Nobody could read it in a shorter part.
"""
_BACKWARD = 2
"""The work of a backward in units of a forward: it has two matrix products for each of forward's.
"""


class BlockWork:
    """Counts the work of a model's blocks, in forwards of one token through one block. Never waits
    for the device.

    The forward of a block counts 1 per token, its recomputation by activation checkpointing 1 more,
    and its backward 2. Work counts as done when the next work begins.
    """

    forward: int
    """the work of one token in a forward through all blocks"""
    training: int
    """the work of one token in a training step: forward, recomputation and backward"""

    def __init__(
        self, blocks: Sequence[nn.Module], *, embedding_is_trained: bool, checkpoint_every: int
    ):
        """blocks: the wrapped blocks of the model. checkpoint_every: how many blocks share an
        activation checkpoint; 0: no checkpoints.
        """
        trained = (
            i for i, block in enumerate(blocks) if any(p.requires_grad for p in block.parameters())
        )
        # Blocks before the first trained parameter have no backward.
        first = 0 if embedding_is_trained else next(trained, len(blocks))
        self.forward, again, self._done, self._begun = len(blocks), 0, 0, 0
        if checkpoint_every and first < len(blocks):
            again = len(blocks) - first // checkpoint_every * checkpoint_every
        self.training = self.forward + again + _BACKWARD * (len(blocks) - first)
        for block in blocks:
            block.register_forward_pre_hook(self._enter, with_kwargs=True)
            block.register_forward_hook(self._leave)

    def take(self) -> int:
        """Return the work since the last call, and start counting from 0 again."""
        done, self._done, self._begun = self._done + self._begun, 0, 0
        return done

    @property
    def done(self) -> int:
        return self._done

    def _begin(self, work: int) -> None:
        self._done, self._begun = self._done + self._begun, work

    def _enter(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._begin(_tokens(next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))))

    def _leave(self, block: nn.Module, args: tuple, output: Any) -> None:
        """Count the block's backward as begun when the gradient of its output is complete."""
        hidden = output if isinstance(output, Tensor) else output[0]
        if hidden.requires_grad:
            work = _BACKWARD * _tokens(hidden)
            hidden.register_hook(lambda _: self._begin(work))


def _tokens(hidden: Tensor) -> int:
    return hidden.shape[:-1].numel()


def shows(console: Console) -> bool:
    """Return whether progress is shown: on a terminal, but not in a log file or where quiet."""
    return console.is_terminal and not console.quiet


class Progress:
    """The progress of a run. `with progress:` shows it where console is a terminal.

    Call `begin` at the beginning of each part and `finish_step` after each step. total: the number
    of steps of the run, of which `done` were made before. work: counts the work within a part;
    None: it is not counted.
    """

    def __init__(
        self, console: Console, *, total: int, done: int = 0, work: BlockWork | None = None
    ):
        self.part, self._console = "", console
        self._total, self._done, self._work = total, done, work
        self._expected, self._is_step = 0, False
        self._periods: deque[float] = deque(maxlen=100)
        self._steps = 0  # steps since this object was made
        self._started = self._part_began = self._step_ended = time.monotonic()
        self._live = None
        if shows(console):
            self._live = Live(console=console, get_renderable=self._line, refresh_per_second=4)

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if kind is None:  # else the part is what went wrong
            self.begin("")
        if self._live:
            self._live.stop()

    def begin(
        self, part: str, *, tokens: int = 0, trains: bool = False, is_step: bool = False
    ) -> None:
        """Begin a new part, named `part` on the line.

        tokens: how many tokens of this rank go through all blocks; 0: the work is not counted.
        trains: whether there is a backward. is_step: whether the part is one of the run's steps.
        """
        now, expected = time.monotonic(), 0
        heartbeat.enter(part)
        if self._work:
            self._work.take()
            expected = tokens * (self._work.training if trains else self._work.forward)
        if is_step and not self._steps:
            self._step_ended = now
        self.part, self._expected, self._is_step, self._part_began = part, expected, is_step, now

    def finish_step(self) -> None:
        """Count a step as made. Everything until the end of the next step counts as the next step's
        time, including validation and checkpoints.
        """
        now = time.monotonic()
        if self._steps == 1:
            # The first step allocates and compiles, so its time counts only until the second ends.
            self._periods.clear()
        self._periods.append(now - self._step_ended)
        self._step_ended, self._steps, self._done = now, self._steps + 1, self._done + 1
        self._is_step = False

    @property
    def fraction(self) -> float:
        """The share of the current part that is done, from 0 to 1."""
        return min(1.0, self._work.done / self._expected) if self._work and self._expected else 0.0

    def seconds_left(self, now: float) -> float | None:
        """Return the seconds until the last step ends, from the mean time of the last steps, or
        from the progress within the first step. None where neither is known.
        """
        fraction = self.fraction if self._is_step else 0.0
        if self._periods:
            return (self._total - self._done - fraction) * sum(self._periods) / len(self._periods)
        if fraction < 0.02:
            return None
        return (self._total - self._done - fraction) * (now - self._part_began) / fraction

    def _line(self) -> Constrain:
        now, fraction = time.monotonic(), self.fraction
        is_slow = self._expected and now - self._part_began > _SLOW
        label = self.part or f"{self._done} of {self._total} steps"
        if self._is_step and self._total > 1:
            label += f" of {self._total}"
        left = self.seconds_left(now)
        times = (
            f"elapsed {duration(now - self._started)}, left "
            f"{'-:--:--' if left is None else duration(left)}"
        )
        # The bar shows the progress of a part that takes long, else that of the run.
        bar = ProgressBar(1, fraction) if is_slow else ProgressBar(self._total, self._done)
        line = Table.grid(padding=(0, 1), expand=True)
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True)
        line.add_row(f"[bold]{label}[/]" + (f" {fraction:4.0%}" if is_slow else ""), bar, times)
        # Leave room for the ^C that a terminal prints. If it wrapped to the next line, this line
        # could not be erased.
        return Constrain(line, self._console.width - 3)


def duration(seconds: float) -> str:
    """Format seconds as "0:01:05" or "2 days, 0:01:05"."""
    return str(timedelta(seconds=round(seconds)))
