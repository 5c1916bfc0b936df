"""The metrics of a run: how they are computed, and how they are logged to the console (one line per
step), `metrics.jsonl`, TensorBoard and W&B.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import IO, TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import nn

from titan_ulysses.distributed.atomic import whole_file
from titan_ulysses.distributed.device import module_of
from titan_ulysses.launch.run_store import host_name
from titan_ulysses.model.families import (
    attention_layers,
    head_sizes,
    layer_configs,
    layer_types,
)
from titan_ulysses.model.hf import output_layer
from titan_ulysses.model.prediction import layer_of
from titan_ulysses.observability.wandb import WandbRun
from titan_ulysses.ulysses.indexer import INDEXED
from titan_ulysses.ulysses.linear_attention import recurrence_flops

if TYPE_CHECKING:  # importing transformers first is noisy, see model/__init__.py
    from transformers import PreTrainedConfig

_SPIKE_WINDOW = 32
"""How many logged losses the median is of."""
_SPIKE_LEAST = 16
"""So many losses must be known before one can be a spike."""
_SPIKE_DEVIATIONS = 8.0
_SPIKE_FLAT = 0.02
"""The least deviation, as a fraction of the median: a flat loss must not make noise a spike."""


def flops_per_token(model: nn.Module) -> int:
    """Return the FLOPs of forward and backward per token, without attention scores: 6 for each
    weight that is used in a matrix product.

    2 of the 6 are for the gradient of the weight, which a frozen weight does not have. Another 2
    are for the gradient of the input, which is not computed before the first trained parameter.
    Embeddings are looked up and not multiplied, but a head that is tied to them is multiplied. Of
    the experts of a layer, a token uses `num_experts_per_tok`. Recomputation is not counted, as in
    definition of MFU. The recurrences of linear attention have no weights; theirs are added.
    Of a model of images and text, it is the text: what an image costs depends on its size.
    """
    embedding, head = model.get_input_embeddings().weight, output_layer(model).weight
    config, towers = model.config.get_text_config(), set()
    if config is not model.config:
        text = {*model.get_decoder().parameters(), embedding, head}
        towers = {*model.parameters()} - text
    experts = (
        getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
    )
    met = min(getattr(config, "num_experts_per_tok", None) or 1, experts)
    flops, backward_passes = 0, False
    for name, parameter in model.named_parameters():
        backward_passes |= parameter.requires_grad
        if parameter not in towers and (parameter is not embedding or parameter is head):
            each = 6 if parameter.requires_grad else 4 if backward_passes else 2
            flops += each * (
                parameter.numel() * met // experts if ".experts." in name else parameter.numel()
            )
    if layer_of(model):  # the head is used twice
        flops += 6 * head.numel()
    return flops + 3 * recurrence_flops(model)


def describe_parameters(model: nn.Module) -> str:
    """Return the number of parameters in words, and how many of them are trained."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{total:,} parameters" + (
        f", of which {trained:,} are trained" if trained < total else ""
    )


def attention_flops(config: PreTrainedConfig, documents: tuple[tuple[int, ...], ...]) -> int:
    """Return the FLOPs of forward and backward of causal attention over documents.

    For a document of L tokens they are 3 * layers * Hq * (D + Dv) * L^2, with the layers that have
    attention. In forward a head has two matrix products, of 2 * L^2 * D and 2 * L^2 * Dv FLOPs, and
    the causal mask removes half of them. Backward has twice as many. Where an indexer chooses K
    keys for each query, K (2 L - K) stands in place of L^2, and the indexer's own scores are added,
    which have no backward.
    """
    lengths = [length for row in documents for length in row]
    squares = sum(length * length for length in lengths)
    layers = layer_configs(config)
    of_layers = len(layers) if len(layers) > 1 else attention_layers(config)
    sizes = sum(sum(head_sizes(layer)) for layer in layers) * (of_layers // len(layers))
    each = 3 * config.num_attention_heads * sizes // max(1, of_layers)
    if not (indexed := (layer_types(config) or []).count(INDEXED)):
        return each * of_layers * squares
    count = config.index_topk
    hidden = sum((length - count) ** 2 for length in lengths if length > count)
    scored = sum(length**2 - count**2 for length in lengths if length > count)
    indexers = (getattr(config, "indexer_types", None) or ["full"] * indexed).count("full")
    scores = indexers * config.index_n_heads * config.index_head_dim * scored
    return each * (of_layers * squares - indexed * hidden) + scores


class PeakMemory:
    """The peak of memory so far.

    On a CUDA device, this is the memory that torch has allocated there since the process began.

    On a CPU, it is the process's own memory since this object was made: anonymous and shared
    memory, without the pages of mapped files, such as the data cache, which the system takes back
    when it needs them. Linux keeps only the peak of all resident pages. Each reading subtracts the
    pages of files at that time, and then resets the kernel's peak (that of `ru_maxrss` too). So
    files that are mapped and unmapped between two readings cause an error of at most their size.
    Where the system has no such figures, all resident pages count, and `counts_files` is True.
    """

    def __init__(self, device: torch.device):
        self._device, self._peak, self._files = device, 0, 0
        self.counts_files = False
        if device.type == "cpu":
            self._look()
            # The peak until now is that of loading, which maps the files of the weights.
            self._peak = 0

    def gib(self) -> float:
        if self._device.type != "cpu":
            return module_of(self._device).max_memory_allocated(self._device) / 2**30
        self._look()
        return self._peak / 2**30

    def _look(self) -> None:
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
            fields = dict(line.split(":", 1) for line in lines)
            peak, now, files = (
                1024 * int(fields[name].split()[0]) for name in ("VmHWM", "VmRSS", "RssFile")
            )
        except (OSError, KeyError):
            self.counts_files = True
            peak = now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
                1 if sys.platform == "darwin" else 1024
            )
            files = 0
        self._peak = max(self._peak, now - files, peak - max(files, self._files))
        self._files = files


class LossSpikes:
    """Says of each logged loss whether it is a spike, given those logged `earlier`.

    That is more than 8 median absolute deviations, scaled to a standard deviation, above the
    median of the last 32 finite losses. A level that stays is the median after 16 of them.
    """

    def __init__(self, earlier: Iterable[float] = ()):
        self._last: deque[float] = deque(earlier, maxlen=_SPIKE_WINDOW)

    def is_spike(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        known = [*self._last]
        self._last.append(loss)
        if len(known) < _SPIKE_LEAST:
            return False
        middle = median(known)
        deviation = 1.4826 * median(abs(one - middle) for one in known)
        return loss - middle > _SPIKE_DEVIATIONS * max(deviation, _SPIKE_FLAT * abs(middle))


class MetricsLogger:
    """Writes logged steps to the console, metrics.jsonl, TensorBoard and wandb. Only rank 0 has a
    logger.

    A run that resumes after `steps_done` steps drops what a killed run logged after them, so that
    no step is logged twice. A run that begins drops everything, including what was logged before
    the first step. A log that cannot be written is said once, and ends no run.
    """

    def __init__(
        self,
        folder: Path,
        *,
        steps_done: int,
        total_steps: int,
        console: Console,
        wandb: WandbRun | None = None,
    ):
        self.console, self._wandb = console, wandb
        first_step = steps_done + 1 if steps_done else 0
        self._path = folder / "metrics.jsonl"
        self._file, dropped, losses = _reopen(self._path, before=first_step)
        self._spikes = LossSpikes(losses)
        if dropped:
            console.print(
                f"WARNING: {folder / 'metrics.jsonl'}: {dropped} line(s) that are not metrics "
                "were dropped."
            )
        self._total = total_steps
        self._failed: set[str] = set()
        self._events: EventFile | None = None
        with self._said(folder / "tensorboard"):
            self._events = EventFile(folder / "tensorboard", first_step=first_step)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Log `values` at `step`. A value is None where it is not known.

        In the file, which other programs read, one that is not finite is null.
        """
        if "loss" in values:
            values["loss_spike"] = self._spikes.is_spike(values["loss"])
        with self._said(self._path):
            self._file.write(json.dumps({"step": step, **_finite(values)}) + "\n")
            self._file.flush()
        with self._said(self._path.with_name("tensorboard")):
            if self._events:
                self._events.log(step, scalars(values))
                self._events.log_texts(step, values.get("validation_samples", {}))
        if self._wandb:
            self._wandb.log(step, values)
        # Long lines are wrapped between words on a terminal, and not wrapped in a log file.
        wraps = self.console.is_terminal
        self.console.print(_line(step, self._total, values), highlight=False, soft_wrap=not wraps)

    @contextmanager
    def _said(self, path: Path) -> Iterator[None]:
        """Say that a file cannot be written, once, and go on: the checkpoints are what counts."""
        try:
            yield
        except OSError as error:
            if path.name not in self._failed:
                self._failed.add(path.name)
                why = error.strerror or str(error)
                warning = f"WARNING: {path}: {why}: steps will be missing from it. The run goes on."
                self.console.print(warning, markup=False, highlight=False)

    def close(self) -> None:
        with self._said(self._path):
            self._file.close()
        with self._said(self._path.with_name("tensorboard")):
            if self._events:
                self._events.close()
        if self._wandb:
            self._wandb.close()


class EventFile:
    """A file of events in TensorBoard's folder, which drops there what was logged from `first_step`
    on. Written in the thread of the caller: an error in one of TensorBoard is a traceback.
    """

    def __init__(self, folder: Path, *, first_step: int):
        # Slow to import, and only rank 0 writes.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{host_name()}.{os.getpid()}"
        self._file = open(folder / name, "xb")  # noqa: SIM115  closed by `close`
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        self._write(step=first_step, session_log=SessionLog(status=SessionLog.START))
        self._file.flush()

    def log(self, step: int, values: Iterator[tuple[str, float]]) -> None:
        found = [self._summary.Value(tag=name, simple_value=value) for name, value in values]
        self._write(step=step, summary=self._summary(value=found))
        self._file.flush()

    def log_texts(self, step: int, texts: dict[str, str]) -> None:
        """Log what the model made of each prompt, in TensorBoard's page of texts."""
        from tensorboard.plugins.text.summary_v2 import text_pb

        for number, (prompt, text) in enumerate(texts.items()):
            # TensorBoard reads Markdown: as code, a text stays as it is.
            shown = "".join(f"    {line}\n" for line in f"{prompt}[[{text}]]".split("\n"))
            self._write(step=step, summary=text_pb(f"validation_samples/{number}", shown))

    def close(self) -> None:
        self._file.close()

    def _write(self, **fields: Any) -> None:
        event = self._event(wall_time=time.time(), **fields)
        self._records.write(event.SerializeToString())


def scalars(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield (name, number) of each number in values, for TensorBoard.

    Names are paths, such as `collectives/all_to_all/bytes` and `epoch/<source>`. The loss by
    position is `validation_by_position/from_00512`, with zeros in front so that the order of the
    names is the order of the positions.
    """
    for name, value in values.items():
        if name.endswith("by_position"):
            width = len(str(value[-1][0]))
            yield from ((f"{prefix}{name}/from_{first:0{width}}", mean) for first, mean, _ in value)
        elif isinstance(value, dict):
            yield from scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            yield f"{prefix}{name}", value


def _finite(value: Any) -> Any:
    """Return a value with None for the numbers in it that JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _reopen(path: Path, *, before: int) -> tuple[IO[str], int, list[float]]:
    """Open a JSON-lines file to append, and keep only the lines of steps less than `before`.

    A last line that a killed run left incomplete is dropped. Return the file, how many other
    lines were dropped because they are not objects with a step, and the last losses that are kept.
    """
    dropped, losses = 0, deque[float](maxlen=_SPIKE_WINDOW)
    if path.exists():
        with whole_file(path) as aside, open(path, "rb") as old, open(aside, "wb") as new:
            for line in old:
                values = _metrics_of(line)
                if values is None:
                    dropped += line.endswith(b"\n")
                elif values["step"] < before:
                    new.write(line)
                    if isinstance(loss := values.get("loss"), float):
                        losses.append(loss)
    return open(path, "a"), dropped, [*losses]


def _metrics_of(line: bytes) -> dict[str, Any] | None:
    """Return the values of a complete line of metrics, or None if it is not one."""
    try:
        values = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    is_one = isinstance(values, dict) and type(values.get("step")) is int
    return values if is_one and line.endswith(b"\n") else None


def perplexity(loss: float) -> float:
    """Return exp(loss), or inf where that is too large for a float."""
    return math.exp(loss) if not loss > 700 else math.inf


def describe_validation(loss: float, by_position: Sequence[tuple[int, float, int]]) -> list[str]:
    """Return a line about the loss, and one about the loss by position in the document (see
    `Evaluation`).

    The second line has at most five ranges of positions, each up to where the next one begins.
    """
    ranges = list(by_position)
    groups = []
    # Ranges are joined in pairs from the last one, so that the coarsest group is at the first
    # positions: the far positions show whether the model uses its context.
    while ranges:
        size = 2 if len(groups) < 4 else len(ranges)
        groups.append(ranges[-size:])
        del ranges[-size:]
    means = []
    for group in reversed(groups):
        mean = sum(mean * labels for _, mean, labels in group) / sum(labels for *_, labels in group)
        means.append(f"{short(group[0][0])}+ {mean:.3f}")
    return [
        f"loss {loss:.4f}  perplexity {perplexity(loss):,.2f}",
        f"by position: {'  '.join(means)}",
    ]


def describe_evaluation(fields: dict[str, Any]) -> list[str]:
    """Return a line about the loss of an `Evaluation`, and one about the loss by position, or about
    the rewards of pairs of completions.
    """
    if "rewards" not in fields:
        return describe_validation(fields["loss"], fields["by_position"])
    means = "  ".join(f"{name} {value:.3f}" for name, value in fields["rewards"].items())
    return [f"loss {fields['loss']:.4f}", f"rewards: {means}"]


def describe_sets(sets: Mapping[str, Any]) -> list[str]:
    """Return a line about the losses of named validation sets, if there are any.

    A set is an `Evaluation` or its fields. The name of what is no named set is empty.
    """
    found = {name: x if isinstance(x, dict) else x._asdict() for name, x in sets.items() if name}
    each = "  ".join(f"{name} {fields['loss']:.4f}" for name, fields in found.items())
    return [f"sets: {each}"] if found else []


def short(count: int) -> str:
    """Format a number of tokens in few characters, without loss: 512, 64K (65,536), 1M (2^20)."""
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if count >= unit and count % unit == 0:
            return f"{count // unit}{name}"
    return str(count)


def describe_samples(samples: dict[str, str]) -> list[str]:
    """Return lines of at most 80 columns: the end of each prompt, and how the model goes on."""
    found = []
    for sample in samples.items():
        prompt, text = (json.dumps(one, ensure_ascii=False)[1:-1] for one in sample)
        prompt = prompt if len(prompt) <= 24 else f"...{prompt[-21:]}"
        text = text if len(text) <= 36 else f"{text[:33]}..."
        found.append(f'sample: "{prompt}" -> "{text}"')
    return found


def _line(step: int, total: int, values: dict[str, Any]) -> str:
    head = f"step {step:>{len(str(total))}}/{total}  "
    if "validation_loss" in values:
        found = {name.removeprefix("validation_"): value for name, value in values.items()}
        loss, *more = describe_evaluation(found)
        more += describe_sets(found.get("sets", {}))
        more += map(escape, describe_samples(found.get("samples", {})))
        return "\n".join([f"{head}[bold]validation {loss}[/]", *(f"  {line}" for line in more)])
    # The line fits 80 columns where MFU is not known.
    return (
        f"{head}[bold]loss {values['loss']:.4f}[/]  grad {values['grad_norm']:.3f}  lr "
        f"{values['lr']:.2e}  {values['tokens_per_second']:,.0f} tok/s  peak "
        f"{values['peak_memory_gib']:.2f} GiB"
        + ("" if values["mfu"] is None else f"  MFU {values['mfu']:.1%}")
        + (f"  margin {rewards['margins']:.3f}" if (rewards := values.get("rewards")) else "")
        + ("  [bold]loss spike[/]" if values["loss_spike"] else "")
    )
