"""A run counted in steps: its epochs, and shares of it or of an epoch, once its data is open."""

from __future__ import annotations

from fractions import Fraction
from math import ceil

from titan_ulysses.config.schema import Config
from titan_ulysses.data.packing import SampleStream
from titan_ulysses.distributed.errors import UsageError


def counted(
    config: Config, training: SampleStream, *, sequences_per_step: int
) -> tuple[Config, list[str]]:
    """Return a config in which all is counted in whole steps, and lines that say what was counted.

    That is training.steps, lr_scheduler.warmup_steps, and the intervals of validations and
    checkpoints. The result follows from the data and the config alone, so that a run that resumes
    counts alike. UserError for epochs of data whose length is not known.
    """
    lines, sequences = [], training.sequences_per_epoch()
    epoch = None if sequences is None else sequences / sequences_per_step

    def in_epochs(share: float, setting: str) -> int:
        if epoch is None:
            raise UsageError(
                f"{setting}: the data is streamed, so the length of an epoch is not known. Count "
                "in steps, or set streaming = false"
            )
        return max(1, ceil(Fraction(str(share)) * epoch))

    steps = config.training.steps
    if epochs := config.training.epochs:
        setting = f"training.epochs = {epochs:g}"
        steps = min(steps, in_epochs(epochs, setting))
        of = f" of {training.largest()}, the largest source" if training.source_names else ""
        lines.append(f"{setting}{of}: {in_epochs(epochs, setting):,} step(s)")
        if steps < in_epochs(epochs, setting):
            lines[-1] += f"; training.steps = {steps:,} ends the run before"

    def interval(section: str) -> int:
        every = getattr(config, section).interval
        if isinstance(every, int):
            return every
        if isinstance(every, float):
            found = max(1, ceil(Fraction(str(every)) * steps))
        else:
            share = every.removesuffix("epoch").strip()
            found = in_epochs(float(share or 1), f'{section}.interval = "{every}"')
        if getattr(config, section).enable:
            lines.append(f"{section}.interval = {every}: every {found:,} step(s)")
        return found

    scheduler = config.lr_scheduler
    warmup = scheduler.warmup_steps or ceil(Fraction(str(scheduler.warmup_ratio)) * steps)
    if warmup > steps:
        too_long = f"lr_scheduler.warmup_steps = {warmup:,} is more than the {steps:,} step(s)"
        lines.append(f"{too_long} of the run: shortened to {steps:,}")
    changes = {
        "training": {"steps": steps},
        "lr_scheduler": {"warmup_steps": min(warmup, steps)},
        "validation": {"interval": interval("validation")},
        "checkpoint": {"interval": interval("checkpoint")},
    }
    sections = {
        name: getattr(config, name).model_copy(update=update) for name, update in changes.items()
    }
    return config.model_copy(update=sections), lines
