"""How far a run is, below its lines on a terminal: which step, how much of it, how long it has
taken and will take.

Within a step and within a validation, work is counted in tokens x blocks, where it is done: a block
that is called for a part of its tokens has done that part. On CUDA that is the work which is
launched; the device may be some of it behind.
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

_SLOW = 2.0
"""Seconds from which on what a step has done is shown: of shorter ones nobody could read it."""
_BACKWARD = 2
"""Forwards that a backward is worth: it has two matrix products for each of forward's."""


class BlockWork:
    """Counts what the blocks of a model do, in forwards of a token through a block; waits for
    nothing.

    A block's forward counts as one a token, again where a checkpoint computes it again, and its
    backward as two. What has begun counts when the next begins.
    """

    forward: int
    """what a token counts in a forward through all blocks"""
    training: int
    """what it counts in a step: forward, backward and what is computed again"""

    def __init__(
        self, blocks: Sequence[nn.Module], *, embedding_is_trained: bool, checkpoint_every: int
    ):
        """blocks: of the model, wrapped; checkpoint_every: how many of them are a checkpoint, 0:
        none.
        """
        trained = (
            i for i, block in enumerate(blocks) if any(p.requires_grad for p in block.parameters())
        )
        # What lies before has no backward.
        first = 0 if embedding_is_trained else next(trained, len(blocks))
        self.forward, again, self._done, self._begun = len(blocks), 0, 0, 0
        if checkpoint_every and first < len(blocks):
            again = len(blocks) - first // checkpoint_every * checkpoint_every
        self.training = self.forward + again + _BACKWARD * (len(blocks) - first)
        for block in blocks:
            block.register_forward_pre_hook(self._enter, with_kwargs=True)
            block.register_forward_hook(self._leave)

    def take(self) -> int:
        """What was done, and let it begin at 0 again."""
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
        """Count the backward where the gradient of what the block returns is complete."""
        hidden = output if isinstance(output, Tensor) else output[0]
        if hidden.requires_grad:
            work = _BACKWARD * _tokens(hidden)
            hidden.register_hook(lambda _: self._begin(work))


def _tokens(hidden: Tensor) -> int:
    return hidden.shape[:-1].numel()


def shows(console: Console) -> bool:
    """Whether there is anybody to show progress to: a log file gets lines, no bars."""
    return console.is_terminal and not console.quiet


class Progress:
    """`with progress:` shows it where console is a terminal. `begin` each part; `finish_step` after
    each step.

    total: the run's steps, of which done were made before. work: what counts within a part; None:
    nothing does.
    """

    def __init__(
        self, console: Console, *, total: int, done: int = 0, work: BlockWork | None = None
    ):
        self.part, self._console = "", console
        self._total, self._done, self._work = total, done, work
        self._expected, self._is_step = 0, False
        self._periods: deque[float] = deque(maxlen=100)
        self._steps = 0  # made here
        self._started = self._part_began = self._step_ended = time.monotonic()
        self._live = None
        if shows(console):
            self._live = Live(console=console, get_renderable=self._line, refresh_per_second=4)

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        self.begin("")
        if self._live:
            self._live.stop()

    def begin(
        self, part: str, *, tokens: int = 0, trains: bool = False, is_step: bool = False
    ) -> None:
        """What is being done from now on.

        tokens: this rank's, that go through all blocks, and where it trains, back; 0: nothing
        counts. is_step: whether it is one of the run's steps.
        """
        now, expected = time.monotonic(), 0
        if self._work:
            self._work.take()
            expected = tokens * (self._work.training if trains else self._work.forward)
        if is_step and not self._steps:
            self._step_ended = now
        self.part, self._expected, self._is_step, self._part_began = part, expected, is_step, now

    def finish_step(self) -> None:
        """A step is made. What follows until the next one's end is part of its time: validation,
        checkpoints.
        """
        now = time.monotonic()
        if self._steps == 1:
            # The first step allocates and compiles: it counts while there is no other.
            self._periods.clear()
        self._periods.append(now - self._step_ended)
        self._step_ended, self._steps, self._done = now, self._steps + 1, self._done + 1
        self._is_step = False

    @property
    def fraction(self) -> float:
        """How much of the part is done, 0 to 1."""
        return min(1.0, self._work.done / self._expected) if self._work and self._expected else 0.0

    def seconds_left(self, now: float) -> float | None:
        """Of all steps, from the mean of the last ones, or from what of the first one is done;
        None: not known.
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
        # Of a part that takes long, the bar is about the part; else about the run.
        bar = ProgressBar(1, fraction) if is_slow else ProgressBar(self._total, self._done)
        line = Table.grid(padding=(0, 1), expand=True)
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True)
        line.add_row(f"[bold]{label}[/]" + (f" {fraction:4.0%}" if is_slow else ""), bar, times)
        # Room behind it for the ^C that a terminal writes by itself: in a line of its own it would
        # leave ours standing.
        return Constrain(line, self._console.width - 3)


def duration(seconds: float) -> str:
    """0:01:05, or 2 days, 0:01:05."""
    return str(timedelta(seconds=round(seconds)))
