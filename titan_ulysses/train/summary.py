"""What a run prints about itself.

Before the first step it prints its setup, and after the last one where its files are.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

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
from titan_ulysses.observability.report_page import PAGE
from titan_ulysses.optim.adamw import missing_compiler
from titan_ulysses.setup.options import obstacle_to_streaming
from titan_ulysses.ulysses.heads import idle_ranks
from titan_ulysses.ulysses.linear_attention import describe_layers

if TYPE_CHECKING:
    from pathlib import Path

    from titan_ulysses.data.loader import Loader
    from titan_ulysses.train.step import TrainState

_BALANCED_STEPS = 10
"""How many steps `expected_balance` looks at."""


def print_run_summary(
    state: TrainState, console: Console, *, plan: list[str], counts_files: bool
) -> None:
    """Print the model, the data, the mesh, choices made for the user, and the plan.

    The origin of the weights is printed too. counts_files: see `PeakMemory`.
    """
    config, degrees, loader = state.config, state.spec.degrees, state.loader
    seq_len = config.training.seq_len
    lines = [
        f"[bold]{markup.escape(config.job.name)}[/]: {hf.class_name(state.model)}, "
        f"{describe_parameters(state.model)}",
        *map(markup.escape, _data(state)),
        f"mesh: dp_replicate {degrees.replicate} x dp_shard {degrees.shard} x sp "
        f"{degrees.sequence} on {state.mesh.device.type}; "
        f"{seq_len:,} tokens a sequence, {seq_len // degrees.sequence:,} a rank; "
        f"{degrees.global_batch_size} sequence(s) "
        f"a step ({degrees.accumulation_steps} accumulated)",
        markup.escape(state.spec.core_reason),
        markup.escape(state.attention_kernel or ""),
        (expected_balance(loader) if loader else None) or "",
        *_choices(state),
        *_choices_of_device(state, counts_files=counts_files),
        markup.escape(describe_initial_weights(config, state.step) if loader else ""),
        *map(markup.escape, plan),
    ]
    text = "\n".join(filter(None, lines))
    console.print(text, highlight=False, soft_wrap=not console.is_terminal)


def expected_balance(loader: Loader) -> str | None:
    """Return a sentence about the next steps; None where their balance is not known, or where one
    rank reads all data.
    """
    shares = [step.shares for step in loader.next_steps(_BALANCED_STEPS)]
    known = [one for one in shares if one is not None]
    if len(known) < len(shares):
        return None
    dealt, before = (
        sum(getattr(one, name) for one in known) / len(known) for name in ("balance", "in_order")
    )
    return (
        f"balance: in the next {len(known)} steps, attention takes {dealt:.3f} times as long as "
        f"evenly spread over the data-parallel ranks (in the order of the data {before:.3f})"
    )


def _data(state: TrainState) -> Iterator[str]:
    """Yield a line about the training data, and one about each named validation set."""
    if loader := state.loader or state.validation_loaders.get(""):
        yield f"data: {loader.sequences.describe()}"
    for name, validation in state.validation_loaders.items():
        if name:
            yield f"validation set {name}: {validation.sequences.describe()}"


def _choices(state: TrainState) -> Iterator[str]:
    """Yield a line for each choice made for the user and for each setting without effect."""
    config, model, degree = state.config, state.model, state.spec.degrees.sequence
    streaming = _streaming(state)
    is_streamed = streaming.startswith("streamed")
    idle = idle_ranks(getattr(state.spec.model_config, "num_attention_heads", degree), degree)
    if idle and not is_streamed:
        yield f"[bold]{idle}[/]"
    ranks = state.mesh.world.size()
    if across := spans_nodes(sequence=degree, world_size=ranks, per_node=ranks_per_node(ranks)):
        yield f"[bold]{across}[/]"
    if whole := state.spec.part_of:
        yield (
            f"{whole} is multi-modal: its text part alone is trained, as a "
            f"{state.spec.model_config.model_type}, and an export has the rest as it was"
        )
    if code := describe_unused_code(model.config):
        yield markup.escape(code)
    if (tile := config.memory.mlp_tile_tokens) > (tokens := state.spec.local_tokens):
        yield (
            f"memory.mlp_tile_tokens = {tile} is more than the {tokens:,} tokens of a rank: one "
            "tile"
        )
    yield markup.escape(state.loss.describe(config))
    yield markup.escape(describe_layers(model, state.mesh.device.type))
    yield streaming
    unused = {
        "activation_checkpoint.keep_attention": config.activation_checkpoint.keep_attention,
        "memory.stream_offload": config.memory.stream_offload,
    }
    for key, value in unused.items():
        if value != "none" and not is_streamed:
            yield f'{key} = "{value}" has no effect: layers are not streamed'


def _choices_of_device(state: TrainState, *, counts_files: bool) -> Iterator[str]:
    """Yield such lines about devices, their memory, and the optimizer."""
    config, memory, device_type = state.config, state.config.memory, state.mesh.device.type
    if config.checkpoint.enable and config.checkpoint.async_mode == "async" and state.optimizer:
        yield "checkpoints are written in the background, from a copy in host memory"
    if device_type == "cuda":
        yield describe_allocator()
    yield describe_quantized(state.model)
    if state.float8_layers:
        yield f"float8: {state.float8_layers} linear layers"
        if not config.compile.enable:
            yield (
                "[bold]float8 without compile.enable is slow[/]: scales and casts take several "
                "passes a product. Set compile.enable = true"
            )
    if device_type == "cpu":
        for name in ("parameter_offload", "optimizer_offload"):
            if getattr(memory, name):
                yield (
                    f"memory.{name} has no effect: the device is the CPU, and everything is in "
                    "host memory"
                )
    elif memory.parameter_offload and memory.optimizer_offload:
        yield "memory.optimizer_offload adds nothing to memory.parameter_offload, which covers it"
    if counts_files:
        yield (
            "peak memory counts the pages of mapped files too: this system does not distinguish "
            "them"
        )
    if getattr(state.optimizer, "wants_compiler", False) and (missing := missing_compiler()):
        yield f"[bold]the optimizer's step is not compiled[/], which is slow: {missing} is missing"


_PLACES = {"none": "", "host": "; hidden states in host memory", "disk": "; hidden states in files"}


def _streaming(state: TrainState) -> str:
    """Return a line about the chunks of a sequence; empty if there are none and none were asked
    for.
    """
    config, model, degree = state.config, state.model, state.spec.degrees.sequence
    setting, length = config.memory.stream_chunk_tokens, config.training.seq_len
    if chunk_length(setting, length, degree) is None:
        rounded = f", rounded up for {degree} ranks," if setting < length else ""
        return (
            f"memory.stream_chunk_tokens = {setting}{rounded} is not less than training.seq_len = "
            f"{length}: one chunk, which is not streamed"
            if setting > 0
            else ""
        )
    if model.sharding.stream_chunk_tokens == -1:
        reason = obstacle_to_streaming(
            model.config.get_text_config(), state.spec.options, state.mesh.device.type
        )
        return f"not streamed: {reason or 'this family does not train exactly chunk by chunk'}"
    chunk = chunk_length(model.sharding.stream_chunk_tokens, length, degree) or length
    rounded = f" (memory.stream_chunk_tokens = {setting})" if 0 < setting != chunk else ""
    return (
        f"streamed: {-(-length // chunk)} chunks of {chunk:,} tokens{rounded}, "
        f"{chunk // degree:,} a rank{_PLACES[config.memory.stream_offload]}"
    )


def print_completion(state: TrainState, console: Console, folder: Path, *, length: str) -> None:
    """Print where all files that the run has written are. length: the setting that ends it."""
    config = state.config
    lines = [
        f"Done: {state.step} steps. In {folder}:",
        "  config.toml, metrics.jsonl, tensorboard/",
    ]
    if config.metrics.enable_report and (folder / PAGE).is_file():
        lines.append("  report.html  a page with its losses, memory, speed and balance")
    if config.checkpoint.enable:
        newest = f"{config.checkpoint.folder}/step-{state.step}"
        lines.append(f"  {newest}  from which the same command goes on with a larger {length}")
        if (best := state.step_to_export) != state.step:
            lines.append(f"  {config.checkpoint.folder}/step-{best}  the best one, exported")
    if config.checkpoint.export:
        is_of_images = state.spec.part_of or config.model.vision != "off"
        kind = "ImageTextToText" if is_of_images else "CausalLM"
        kind = "SequenceClassification" if state.spec.scores else kind
        lines.append(f"  export/  opens with AutoModelFor{kind}.from_pretrained")
        if config.lora.rank:
            lines.append(
                "  adapter/  opens with peft.PeftModel.from_pretrained, on the model that this "
                "run started from"
            )
    print_wrapped(console, "\n".join(lines))


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
