"""What a run says of itself: before its first step what it is, after its last where everything lies."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from rich import markup
from rich.console import Console

from titan_ulysses.begin import describe_beginning
from titan_ulysses.memory.allocator import describe_allocator
from titan_ulysses.memory.optimizer import missing_compiler
from titan_ulysses.metrics import describe_parameters
from titan_ulysses.model import hf
from titan_ulysses.model.remote_code import describe_unused_code
from titan_ulysses.ulysses.heads import idle_ranks

if TYPE_CHECKING:
    from titan_ulysses.trainer import Trainer


def begin(run: Trainer) -> None:
    """Model, data, mesh, what was chosen for the user, where the weights come from, and the plan."""
    d, t, mesh = run.degrees, run.config.training, run.mesh
    beginning = describe_beginning(run.config, run.step) if run.loader else ""
    run.console.print(
        f"[bold]{markup.escape(run.config.job.name)}[/]: {hf.class_name(run.model)}, {describe_parameters(run.model)}\n"
        f"data: {markup.escape((run.loader or run.validation_loader).sequences.describe())}\n"
        f"mesh: dp_replicate {d.replicate} x dp_shard {d.shard} x sp {d.sequence} on {mesh.device.type}; "
        f"{t.seq_len:,} tokens a sequence, {t.seq_len // d.sequence:,} a rank; {d.global_batch_size} sequence(s) "
        f"a step ({d.accumulation_steps} accumulated)\n{markup.escape(run.core_reason)}"
        + "".join(f"\n{line}" for line in _choices(run))
        + (f"\n{markup.escape(beginning)}" if beginning else "")
        + "".join(f"\n{markup.escape(line)}" for line in run.plan_lines),
        highlight=False,
        soft_wrap=not run.console.is_terminal,
    )


def _choices(run: Trainer) -> list[str]:
    """What was chosen for the user, or changes nothing."""
    memory, tokens, degree, lines = run.config.memory, run.batch_tokens, run.degrees.sequence, []
    if idle := idle_ranks(getattr(run.model.config, "num_attention_heads", degree), degree):
        lines.append(f"[bold]{idle}[/]")
    if unused := describe_unused_code(run.model.config):
        lines.append(markup.escape(unused))
    if memory.mlp_tile_tokens > tokens:
        tile = memory.mlp_tile_tokens
        lines.append(f"memory.mlp_tile_tokens = {tile} is more than the {tokens:,} tokens of a rank: one tile")
    if run.mesh.device.type == "cuda":
        lines.append(describe_allocator())
    if run.float8_layers:
        lines.append(f"float8: {run.float8_layers} linear layers")
    if run.mesh.device.type == "cpu":
        on = [name for name in ("parameter_offload", "optimizer_offload") if getattr(memory, name)]
        lines += [f"memory.{name} changes nothing: the device is the CPU, all is in host memory" for name in on]
    elif memory.parameter_offload and memory.optimizer_offload:
        lines.append("memory.optimizer_offload adds nothing to memory.parameter_offload, which covers it")
    if getattr(run.optimizer, "wants_compiler", False) and (missing := missing_compiler()):
        lines.append(f"[bold]the optimizer's step is not compiled[/], which is slow: {missing} is missing")
    return lines


def end(run: Trainer) -> str:
    lines = [f"Done: {run.step} steps. In {run.folder}:", "  config.toml, metrics.jsonl, tensorboard/"]
    if run.config.checkpoint.enable:
        newest = f"{run.config.checkpoint.folder}/step-{run.step}"
        lines.append(f"  {newest}  from which the same command goes on with a larger training.steps")
    if run.config.checkpoint.export:
        lines.append("  export/  opens with AutoModelForCausalLM.from_pretrained")
        if run.config.lora.rank:
            lines.append("  adapter/  opens with peft.PeftModel.from_pretrained, on the model that this began with")
    return "\n".join(lines)


def say(console: Console, text: str) -> None:
    """As it is: a path broken into lines cannot be copied, and brackets in it are no markup. What is too long for a
    terminal goes on in another line after a word."""

    def between_words(line: str) -> str:
        whole = {"break_long_words": False, "break_on_hyphens": False}
        return textwrap.fill(line, console.width, subsequent_indent="    ", **whole)

    if console.is_terminal:
        text = "\n".join(map(between_words, text.splitlines()))
    console.print(text, highlight=False, soft_wrap=True, markup=False)
