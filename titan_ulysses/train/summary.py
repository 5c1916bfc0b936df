"""What a run prints about itself.

Before the first step it prints its setup, and after the last one where its files are.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Protocol

from rich import markup
from rich.console import Console

from titan_ulysses.checkpoint.initial import describe_initial_weights
from titan_ulysses.distributed.sequence import chunk_length
from titan_ulysses.launch.nodes import ranks_per_node, spans_nodes
from titan_ulysses.memory.allocator import describe_allocator
from titan_ulysses.model import hf
from titan_ulysses.model.nf4 import describe_quantized
from titan_ulysses.model.remote_code import describe_unused_code
from titan_ulysses.observability.metrics import describe_parameters
from titan_ulysses.observability.page import PAGE
from titan_ulysses.optim.adamw import missing_compiler
from titan_ulysses.setup.options import obstacle_to_streaming
from titan_ulysses.train.imbalance import expected_balance
from titan_ulysses.ulysses.heads import idle_ranks
from titan_ulysses.ulysses.linear_attention import describe_layers

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

    from titan_ulysses.config.schema import Config
    from titan_ulysses.config.validate import MeshDegrees
    from titan_ulysses.data.loader import Loader
    from titan_ulysses.distributed.mesh import Mesh
    from titan_ulysses.observability.metrics import PeakMemory
    from titan_ulysses.setup.resolve import RunSpec
    from titan_ulysses.train.best import Best
    from titan_ulysses.train.loss import CrossEntropy


class Run(Protocol):
    """The attributes of a `Trainer` that are used here."""

    config: Config
    spec: RunSpec
    degrees: MeshDegrees
    folder: Path
    console: Console
    mesh: Mesh
    model: PreTrainedModel
    optimizer: torch.optim.Optimizer | None
    loader: Loader | None
    validation_loaders: dict[str, Loader]
    step: int
    best: Best
    float8_layers: int
    loss: CrossEntropy
    attention_kernel: str | None
    plan_lines: list[str]
    peak_memory: PeakMemory


def print_run_summary(run: Run) -> None:
    """Print the model, the data, the mesh, choices made for the user, and the plan.

    The origin of the weights is printed too.
    """
    d, t, mesh = run.degrees, run.config.training, run.mesh
    beginning = describe_initial_weights(run.config, run.step) if run.loader else ""
    spread = expected_balance(run.loader) if run.loader else None
    run.console.print(
        f"[bold]{markup.escape(run.config.job.name)}[/]: {hf.class_name(run.model)}, "
        f"{describe_parameters(run.model)}\n"
        f"{markup.escape(_data(run))}\n"
        f"mesh: dp_replicate {d.replicate} x dp_shard {d.shard} x sp {d.sequence} on "
        f"{mesh.device.type}; "
        f"{t.seq_len:,} tokens a sequence, {t.seq_len // d.sequence:,} a rank; "
        f"{d.global_batch_size} sequence(s) "
        f"a step ({d.accumulation_steps} accumulated)\n{markup.escape(run.spec.core_reason)}"
        + (f"\n{markup.escape(run.attention_kernel)}" if run.attention_kernel else "")
        + (f"\n{spread}" if spread else "")
        + "".join(f"\n{line}" for line in _choices(run))
        + (f"\n{markup.escape(beginning)}" if beginning else "")
        + "".join(f"\n{markup.escape(line)}" for line in run.plan_lines),
        highlight=False,
        soft_wrap=not run.console.is_terminal,
    )


def _data(run: Run) -> str:
    """Return a line about the training data, and one about each named validation set."""
    sets = {name: one.sequences.describe() for name, one in run.validation_loaders.items()}
    lines = [f"validation set {name}: {described}" for name, described in sets.items() if name]
    loader = run.loader or run.validation_loaders.get("")
    return "\n".join([*([f"data: {loader.sequences.describe()}"] if loader else []), *lines])


def _choices(run: Run) -> list[str]:
    """Return a line for each choice made for the user and for each setting without effect."""
    memory = run.config.memory
    tokens = run.spec.local_tokens
    degree = run.degrees.sequence
    lines = []
    streaming = _streaming(run)
    idle = idle_ranks(getattr(run.model.config, "num_attention_heads", degree), degree)
    if idle and not streaming.startswith("streamed"):
        lines.append(f"[bold]{idle}[/]")
    ranks = run.mesh.world.size()
    if across := spans_nodes(sequence=degree, world_size=ranks, per_node=ranks_per_node(ranks)):
        lines.append(f"[bold]{across}[/]")
    if whole := run.spec.part_of:
        lines.append(
            f"{whole} is multi-modal: its text part alone is trained and exported, as a "
            f"{run.spec.model_config.model_type}"
        )
    if code := describe_unused_code(run.model.config):
        lines.append(markup.escape(code))
    if memory.mlp_tile_tokens > tokens:
        tile = memory.mlp_tile_tokens
        lines.append(
            f"memory.mlp_tile_tokens = {tile} is more than the {tokens:,} tokens of a rank: one "
            "tile"
        )
    if about := run.loss.describe(run.config):
        lines.append(markup.escape(about))
    if layers := describe_layers(run.model, run.mesh.device.type):
        lines.append(markup.escape(layers))
    if streaming:
        lines.append(streaming)
    if not streaming.startswith("streamed"):
        unused = {
            "activation_checkpoint.keep_attention": run.config.activation_checkpoint.keep_attention,
            "memory.stream_offload": memory.stream_offload,
        }
        lines += [
            f'{key} = "{value}" changes nothing: layers are not streamed'
            for key, value in unused.items()
            if value != "none"
        ]
    return lines + _choices_of_device(run)


def _choices_of_device(run: Run) -> list[str]:
    """Return those lines of `_choices` that are about devices, their memory, and the optimizer."""
    memory, checkpoint, lines = run.config.memory, run.config.checkpoint, []
    if checkpoint.enable and checkpoint.async_mode == "async" and run.optimizer is not None:
        lines.append("checkpoints are written in the background, from a copy in host memory")
    if run.mesh.device.type == "cuda":
        lines.append(describe_allocator())
    if quantized := describe_quantized(run.model):
        lines.append(quantized)
    if run.float8_layers:
        lines.append(f"float8: {run.float8_layers} linear layers")
        if not run.config.compile.enable:
            lines.append(
                "[bold]float8 without compile.enable is slow[/]: scales and casts take several "
                "passes a product. Set compile.enable = true"
            )
    if run.mesh.device.type == "cpu":
        on = [name for name in ("parameter_offload", "optimizer_offload") if getattr(memory, name)]
        lines += [
            f"memory.{name} changes nothing: the device is the CPU, all is in host memory"
            for name in on
        ]
    elif memory.parameter_offload and memory.optimizer_offload:
        lines.append(
            "memory.optimizer_offload adds nothing to memory.parameter_offload, which covers it"
        )
    if run.peak_memory.counts_files:
        lines.append(
            "peak memory counts the pages of mapped files too: this system does not tell them apart"
        )
    if getattr(run.optimizer, "wants_compiler", False) and (missing := missing_compiler()):
        lines.append(
            f"[bold]the optimizer's step is not compiled[/], which is slow: {missing} is missing"
        )
    return lines


_PLACES = {
    "none": "",
    "host": "; hidden states in host memory",
    "disk": "; hidden states in files",
}


def _streaming(run: Run) -> str:
    """Return a line about the chunks of a sequence; empty if nobody asked and there are none."""
    setting, length = run.config.memory.stream_chunk_tokens, run.config.training.seq_len
    wanted = chunk_length(setting, length, run.degrees.sequence)
    if wanted is None:
        rounded = f", rounded up for {run.degrees.sequence} ranks," if setting < length else ""
        return (
            f"memory.stream_chunk_tokens = {setting}{rounded} is not less than training.seq_len = "
            f"{length}: one chunk, which is not streamed"
            if setting > 0
            else ""
        )
    if run.model.sharding.stream_chunk_tokens == -1:
        reason = obstacle_to_streaming(run.model.config, run.spec.options, run.mesh.device.type)
        return f"not streamed: {reason or 'this family does not train exactly chunk by chunk'}"
    wanted = (
        chunk_length(run.model.sharding.stream_chunk_tokens, length, run.degrees.sequence) or length
    )
    rounded = f" (memory.stream_chunk_tokens = {setting})" if 0 < setting != wanted else ""
    return (
        f"streamed: {-(-length // wanted)} chunks of {wanted:,} tokens{rounded}, "
        f"{wanted // run.degrees.sequence:,} a rank{_PLACES[run.config.memory.stream_offload]}"
    )


def print_completion(run: Run) -> None:
    """Print where all files that the run has written are."""
    lines = [
        f"Done: {run.step} steps. In {run.folder}:",
        "  config.toml, metrics.jsonl, tensorboard/",
    ]
    if run.config.metrics.enable_report and (run.folder / PAGE).is_file():
        lines.append("  report.html  a page with its losses, memory, speed and balance")
    if run.config.checkpoint.enable:
        newest = f"{run.config.checkpoint.folder}/step-{run.step}"
        lines.append(
            f"  {newest}  from which the same command goes on with a larger training.steps"
        )
        best = run.best.step if run.best.keeps else None
        if best not in (None, run.step):
            lines.append(f"  {run.config.checkpoint.folder}/step-{best}  the best one, exported")
    if run.config.checkpoint.export:
        lines.append("  export/  opens with AutoModelForCausalLM.from_pretrained")
        if run.config.lora.rank:
            lines.append(
                "  adapter/  opens with peft.PeftModel.from_pretrained, on the model that this "
                "began with"
            )
    print_wrapped(run.console, "\n".join(lines))


def print_wrapped(console: Console, text: str) -> None:
    """Print text as it is; on a terminal, wrap long lines between words.

    A path that is broken into lines cannot be copied. Brackets in a path are not markup.
    """

    def between_words(line: str) -> str:
        return textwrap.fill(
            line,
            console.width,
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )

    if console.is_terminal:
        text = "\n".join(map(between_words, text.splitlines()))
    console.print(text, highlight=False, soft_wrap=True, markup=False)
