"""What is logged of a run's steps: losses, speed, memory, and how evenly attention is spread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from titan_ulysses.data.loader import Batch, Loader
from titan_ulysses.distributed.device import module_of
from titan_ulysses.distributed.hardware import peak_flops
from titan_ulysses.observability.metrics import (
    MetricsLogger,
    PeakMemory,
    attention_flops,
    flops_per_token,
)
from titan_ulysses.observability.wandb import WandbRun
from titan_ulysses.train.evaluation import Evaluation
from titan_ulysses.train.preflight import Preflight
from titan_ulysses.train.step import StepMetrics, TrainState

_UNEVEN = 1.5
"""The balance of a step from which on one document is named, if it is the reason."""


class StepLog:
    """Logs steps and validations, on rank 0 (on the others `log_step` only measures).

    A line is about the interval since the one before. preflight: the plan, on rank 0. say: prints a
    line.
    """

    def __init__(
        self, state: TrainState, *, preflight: Preflight | None, say: Callable[[str], None]
    ):
        self.state, self._preflight, self._say = state, preflight, say
        self.peak_memory = PeakMemory(state.mesh.device)
        self.collectives: dict[str, dict[str, int]] = {}
        """calls and bytes of each kind of collective in a step"""
        self._imbalance = Imbalance()
        self._logger: MetricsLogger | None = None

    def open(self, folder: Path, console: Console) -> None:
        """Open the files of the log, on rank 0."""
        config, self._first_step = self.state.config, self.state.step
        if dist.get_rank():
            return
        wandb = None
        if config.metrics.enable_wandb:
            values = config.model_dump()
            wandb = WandbRun(folder, name=config.job.name, config=values, say=self._say)
        self._logger = MetricsLogger(
            folder,
            steps_done=self.state.step,
            total_steps=config.training.steps,
            console=console,
            wandb=wandb,
        )

    def close(self) -> None:
        if self._logger:
            self._logger.close()

    def begin_interval(self) -> None:
        self._began, self._logged_step, self._attention_flops = (
            time.perf_counter(),
            self.state.step,
            0,
        )

    @contextmanager
    def excluded_from_step_time(self) -> Iterator[None]:
        """Exclude the time spent in this context from the time of training steps."""
        started = time.perf_counter()
        yield
        self._began += time.perf_counter() - started

    def note(self, batches: list[Batch]) -> None:
        """Count the attention of a step's micro-batches."""
        assert self.state.loader is not None
        if uneven := self._imbalance.note(self.state.step, self.state.loader):
            self._say(uneven)
        self._attention_flops += sum(
            attention_flops(self.state.spec.model_config, batch.documents) for batch in batches
        )

    def log_step(self, metrics: StepMetrics, lr: float) -> None:
        """Log the last step, which the device must have finished. Collective."""
        state, config = self.state, self.state.config.training
        assert state.loader is not None
        steps, batch_size = state.step - self._logged_step, state.spec.degrees.global_batch_size
        values: dict[str, Any] = {
            "loss": metrics.loss.item(),
            "grad_norm": metrics.grad_norm.item(),
        }
        # The ranks that share a sequence count the same documents, so each adds its part.
        attention = torch.tensor(
            self._attention_flops / state.spec.degrees.sequence, dtype=torch.float64
        )
        dist.all_reduce(attention)
        balance = self._imbalance.take()
        router_loss = metrics.router_loss
        values["router_loss"] = None if router_loss is None else router_loss.item()
        if (of_layers := metrics.indexer_losses) is not None:
            values["indexer_loss"] = of_layers.sum().item()
            by_layer = {str(i): loss for i, loss in enumerate(of_layers.tolist())}
            values["indexer_loss_by_layer"] = by_layer
        others = {name: value.item() for name, value in metrics.metrics.items()}
        values["prediction_loss"] = others.pop("prediction_loss", None)
        values |= {"rewards": others} if others else {}
        if metrics.row_losses and state.loader.sequences.source_names:
            values["loss_by_source"] = self._by_source(metrics.row_losses)
        peak = torch.tensor(self.peak_memory.gib())
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        if self._logger:
            seconds = time.perf_counter() - self._began
            tokens = steps * batch_size * config.seq_len
            values |= {
                "skipped_steps": state.skipped,
                "lr": lr,
                "tokens": state.step * batch_size * config.seq_len,
                "epoch": state.loader.epochs(),
                "balance": balance,
                "tokens_per_second": tokens / seconds,
                "step_seconds": seconds / steps,
                "peak_memory_gib": peak.item(),
                "planned_memory_gib": self._preflight.planned_gib if self._preflight else None,
                "collectives": self.collectives,
                "mfu": self._mfu(tokens, attention.item(), seconds),
            }
            self._logger.log(state.step, values)
            for line in self._news_of_plan(peak.item()):
                self._say(line)
        self.begin_interval()

    def _by_source(self, row_losses: list[Tensor]) -> dict[str, float]:
        """Return the mean loss of each source of a mixture that the last step has. Collective."""
        loader, mesh = self.state.loader, self.state.mesh
        assert loader is not None
        names = loader.sequences.source_names
        sums = torch.zeros(2, len(names), dtype=torch.float64)
        for batch, of_batch in enumerate(row_losses):
            sources = loader.sources(len(row_losses) - batch)
            places = torch.tensor([names.index(name) for name in sources])
            sums.index_add_(1, places, of_batch.cpu())
        sums = sums.to(mesh.device)
        dist.all_reduce(sums, group=mesh.loss.get_group())
        of_sources = zip(names, *sums.tolist(), strict=True)
        return {name: total / count for name, total, count in of_sources if count}

    def _mfu(self, tokens: int, attention: float, seconds: float) -> float | None:
        """Return the share of the device's peak that was used; None where that is not known."""
        device, config = self.state.mesh.device, self.state.config.training
        name = "" if device.type == "cpu" else module_of(device).get_device_name(device)
        peak = peak_flops(name) if config.param_dtype == "bfloat16" else None
        flops = tokens * flops_per_token(self.state.model) + attention
        return flops / seconds / (peak * dist.get_world_size()) if peak else None

    def _news_of_plan(self, peak_gib: float) -> list[str]:
        """Return the plan if it was not ready at the start, and later the measured peak next to it.

        The peak is compared once a step has run with the optimizer's state in memory.
        """
        if not self._preflight:
            return []
        lines, state = self._preflight.news(), self.state
        if state.step - self._first_step > 1 or state.step == state.config.training.steps:
            counts_files = self.peak_memory.counts_files
            lines += self._preflight.measured(peak_gib, counts_files=counts_files)
        return lines

    def log_validation(
        self, sets: Mapping[str, Evaluation], of_all: Evaluation, samples: dict[str, str]
    ) -> None:
        if self._logger:
            values = {f"validation_{name}": value for name, value in of_all._asdict().items()}
            if "" not in sets:
                values["validation_sets"] = {name: one._asdict() for name, one in sets.items()}
            if samples:
                values["validation_samples"] = samples
            self._logger.log(self.state.step, values)


class Imbalance:
    """Collects the balance of steps for the log, and names once a document that makes it uneven."""

    def __init__(self) -> None:
        self._balances: list[float] = []
        self._has_warned = False

    def note(self, step: int, loader: Loader) -> str | None:
        """Note the step of the loader's last batch.

        Returns a sentence, the first time that one document costs more than all others of its step
        together and the ranks wait for it.
        """
        shares = loader.step_of_last_batch().shares
        if shares is None:
            return None
        self._balances.append(shares.balance)
        if self._has_warned or shares.balance < _UNEVEN or shares.part <= 0.5:
            return None
        self._has_warned = True
        documents = loader.sequences.documents(shares.costliest)
        # Padding comes last and is no document of the data.
        name = [*map("document {}".format, documents), "padding"][shares.document]
        return (
            f"step {step}: {name} has {shares.part:.0%} of the step's attention, so that the step "
            f"takes {shares.balance:.2g} times as long there as if it were spread evenly. No "
            "assignment of sequences to ranks can change that: raise "
            "parallelism.sequence_parallel_degree, or training.global_batch_size"
        )

    def take(self) -> float | None:
        """Return the mean balance since the last call; None if it is not known or there is none."""
        balances, self._balances = self._balances, []
        return sum(balances) / len(balances) if balances else None
