"""What a run tells while it trains: a console line a step, `metrics.jsonl`, TensorBoard, W&B; what its numbers mean."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from transformers import PreTrainedConfig

from titan_ulysses.evaluation import perplexity
from titan_ulysses.wandb_run import WandbRun

# Dense bf16 FLOP/s, from NVIDIA's data sheets; the first name contained in the device's name counts.
_PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of one device, or None where it is not known (then MFU is not known either)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for known, flops in _PEAK_FLOPS.items() if known in name), None)


def flops_per_token(model: nn.Module) -> int:
    """FLOPs of forward and backward a token without attention's scores: 6 a weight that multiplies.

    Of those, 2 are its gradient's, which a frozen one has not, and 2 that of its input, which what lies before
    everything that is trained has not. Embeddings are looked up, not multiplied; a head tied to them is multiplied. Of
    a layer's experts a token meets `num_experts_per_tok`. Recomputation is not counted (MFU).
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    config = model.config
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
    met = min(getattr(config, "num_experts_per_tok", None) or 1, experts)
    flops, backward_passes = 0, False
    for name, parameter in model.named_parameters():
        backward_passes |= parameter.requires_grad
        if parameter is not embedding or parameter is head:
            each = 6 if parameter.requires_grad else 4 if backward_passes else 2
            flops += each * (parameter.numel() * met // experts if ".experts." in name else parameter.numel())
    return flops


def describe_parameters(model: nn.Module) -> str:
    """How many there are, and how many of them are trained."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{total:,} parameters" + (f", of which {trained:,} are trained" if trained < total else "")


def attention_flops(config: PreTrainedConfig, documents: tuple[tuple[int, ...], ...]) -> int:
    """FLOPs of forward and backward of causal attention over documents of L tokens.

    They are 3 * layers * Hq * (D + Dv) * L^2: a head has two matrix products in forward, of 2 * L^2
    * D and 2 * L^2 * Dv, half of it masked away, and twice as many in backward.
    """
    squares = sum(length * length for row in documents for length in row)
    heads = config.num_hidden_layers * config.num_attention_heads
    return 3 * heads * sum(_head_sizes(config)) * squares


def _head_sizes(config: PreTrainedConfig) -> tuple[int, int]:
    """D of queries and keys, Dv of values. In latent attention `head_dim` is that of RoPE alone."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if (without_rope := getattr(config, "qk_nope_head_dim", None)) is not None:
        size = without_rope + config.qk_rope_head_dim
    return size, getattr(config, "v_head_dim", None) or size


def peak_memory_gib(device: torch.device) -> float:
    """Highest memory so far: allocated by torch on a CUDA device, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


class MetricsLogger:
    """Writes one logged step to the console, to metrics.jsonl, to TensorBoard and to wandb. Only rank 0 has one.

    Resuming after `steps_done` steps drops what a killed run logged after them, so that no step is logged twice; a run
    that begins drops everything, also what was logged before the first step.
    """

    def __init__(
        self, folder: Path, *, steps_done: int, total_steps: int, console: Console, wandb: WandbRun | None = None
    ):
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 writes

        self.console, self._wandb = console, wandb
        first_step = steps_done + 1 if steps_done else 0
        self._file = _reopen(folder / "metrics.jsonl", before=first_step)
        self._tensorboard = SummaryWriter(folder / "tensorboard", purge_step=first_step)
        self._total = total_steps
        self._bar = Progress(
            TextColumn("[bold]training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,  # a log file gets lines, no bars
        )
        self._task = self._bar.add_task("training", total=total_steps, completed=steps_done)
        self._bar.start()

    def log(self, step: int, values: dict[str, Any]) -> None:
        """One object a logged step: `step` and values (None where a number is not known)."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(step, values)
        # A terminal's lines end between words; a log file's lines do not end early.
        wraps = self.console.is_terminal
        self.console.print(_line(step, self._total, values), highlight=False, soft_wrap=not wraps)
        self._bar.update(self._task, completed=step)

    def close(self) -> None:
        self._bar.stop()
        self._file.close()
        self._tensorboard.close()
        if self._wandb:
            self._wandb.close()


def _reopen(path: Path, *, before: int):
    """Open a JSON-lines file to append, keeping only the lines of earlier steps; cut lines of a kill are dropped."""
    if path.exists():
        aside = path.with_name(f".{path.name}.partial")
        with open(path) as old, open(aside, "w") as new:
            for line in old:
                if line.endswith("\n") and json.loads(line)["step"] < before:
                    new.write(line)
        os.replace(aside, path)
    return open(path, "a")


def describe_validation(loss: float, by_position: Sequence[tuple[int, float, int]]) -> list[str]:
    """A line about the loss, and one about where in a document it falls (see `Evaluation`): in at most five ranges of
    positions, each up to where the next one begins."""
    ranges = list(by_position)
    groups = []
    while ranges:  # by twos, from the last one, since it is the far positions that tell whether context is used
        size = 2 if len(groups) < 4 else len(ranges)
        groups.append(ranges[-size:])
        del ranges[-size:]
    means = []
    for group in reversed(groups):
        mean = sum(mean * labels for _, mean, labels in group) / sum(labels for *_, labels in group)
        means.append(f"{short(group[0][0])}+ {mean:.3f}")
    return [f"loss {loss:.4f}  perplexity {perplexity(loss):,.2f}", f"by position: {'  '.join(means)}"]


def short(count: int) -> str:
    """A number of tokens in few characters: 512, 64K, 1M. Of powers of two nothing is lost."""
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if count >= unit and count % unit == 0:
            return f"{count // unit}{name}"
    return str(count)


def _line(step: int, total: int, values: dict[str, Any]) -> str:
    head = f"step {step:>{len(str(total))}}/{total}  "
    if "validation_loss" in values:
        loss, *more = describe_validation(values["validation_loss"], values["validation_by_position"])
        return "\n".join([f"{head}[bold]validation {loss}[/]", *(f"  {line}" for line in more)])
    return (  # of 80 columns where there is no MFU to tell
        f"{head}[bold]loss {values['loss']:.4f}[/]  "
        f"grad {values['grad_norm']:.3f}  lr {values['lr']:.2e}  {values['tokens_per_second']:,.0f} tok/s  "
        f"peak {values['peak_memory_gib']:.2f} GiB" + ("" if values["mfu"] is None else f"  MFU {values['mfu']:.1%}")
    )
