"""What is said of a plan: on the console, and in a summary in plain words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from titan_ulysses.observability.units import size_text, time_text
from titan_ulysses.plan.names import component_name, moment_name, tensor_name
from titan_ulysses.plan.planner import Plan, Setup, check_idle, check_nodes, estimate_plan
from titan_ulysses.plan.run_cost import (
    asks_for_cost,
    best_change,
    costs_at_lengths,
    grace_of,
    half_as_fast,
    other_kernels,
    run_cost,
)
from titan_ulysses.plan.search import SearchResult, differs, is_unlimited, with_settings
from titan_ulysses.plan.searches import assignments, options
from titan_ulysses.ulysses.kernels import NAMES

_WORTH_SAYING = 1e-3
"""The share of a step by which it must be longer for this to be said."""
_SHORT = 1.0
"""Seconds. In shorter steps, kernels may be too small to hide the time of their launch."""


def say(console: Console, plan: Plan) -> None:
    """Print everything about one plan."""
    setup, config = plan.setup, plan.setup.config
    tell = partial(console.print, highlight=False, soft_wrap=True)
    tell(
        f"[bold]{config.job.name}[/] planned for {setup.world_size} x {setup.gpu.name} "
        f"({size_text(setup.gpu_memory)} each, {config.plan.gpus_per_node} a node)"
    )
    tell(
        f"mesh: {setup.mesh}; {plan.seq_len:,} tokens a sequence, "
        f"{plan.seq_len // setup.degrees.sequence:,} a rank"
    )
    for warning in filter(None, (check_idle(plan), check_nodes(setup))):
        tell(f"[bold]{warning}[/]")
    for note in plan.notes:
        tell(f"[dim]{note}[/]")
    table = Table("component", title="GPU memory at the peak", title_justify="left", min_width=60)
    table.add_column("size", justify="right")
    table.add_column("share", justify="right")
    for row in component_rows(plan):
        table.add_row(*row)
    table.add_section()
    size, memory = size_text(plan.gpu_bytes), size_text(setup.gpu_memory)
    table.add_row("[bold]all[/]", f"[bold]{size}[/]", f"of {memory}")
    console.print(table)
    tell(f"The peak is in {moment_name(plan.peak.moment)}. The largest tensors then:")
    for size, name, shape in largest(plan, 6):
        tell(f"  {size:>11}  {name}{shape and f'  {shape}'}", markup=False)
    if plan.host_bytes:
        limit = f" of {size_text(setup.host_memory)}" if setup.host_memory else ""
        parts = _listed(plan.host_components, size_text)
        tell(f"host memory of a node: {size_text(plan.host_bytes)}{limit} ({parts})")
    if plan.disk_bytes:
        limit = f" of {size_text(setup.disk)}" if setup.disk else ""
        tell(f"files of a node: {size_text(plan.disk_bytes)}{limit}")
    for line in time_lines(plan):
        tell(line)
    tell(run_cost(plan).sentence())
    if asks_for_cost(plan):
        for line in choice_lines(plan):
            tell(line, markup=False)
    tell(grace_of(plan).sentence())


def _listed(values: Mapping[str, float], text: Callable[[float], str]) -> str:
    return ", ".join(f"{name} {text(value)}" for name, value in values.items() if value)


def gpu_components(plan: Plan) -> dict[str, float]:
    """Return the bytes of the peak by component, reserves included, and host memory where it is
    the GPU's.
    """
    shared = {"host memory": plan.host_bytes} if plan.setup.gpu.shares_memory else {}
    return plan.peak.components | {one.what: one.bytes for one in plan.setup.reserves} | shared


def component_rows(plan: Plan) -> list[tuple[str, str, str]]:
    """Return the name, size and share of each component of the peak."""
    return [
        (
            component_name(name),
            size_text(size),
            f"{share:.1%}" if (share := size / plan.gpu_bytes) >= 0.001 else "< 0.1%",
        )
        for name, size in gpu_components(plan).items()
        if size
    ]


def largest(plan: Plan, count: int) -> list[tuple[str, str, str]]:
    """Return the size, name and shape of each of the largest tensors at the peak."""
    tensors = sorted(plan.peak.alive.items(), key=lambda item: -item[1])[:count]
    return [
        (
            size_text(size),
            tensor_name(tensor),
            f"{[*tensor.shape]} {str(tensor.dtype)[len('torch.') :]}" if tensor.shape else "",
        )
        for tensor, size in tensors
    ]


def time_lines(plan: Plan) -> list[str]:
    """Return lines about the planned time of a step, by what it is spent on, and about its
    collectives.
    """
    time_ = plan.time
    longest = max(time_.waits, key=time_.waits.__getitem__)
    counts = ", ".join(
        f"{kind} {calls} calls, {size_text(size)}"
        for kind, (calls, size) in sorted(plan.collectives.items())
    )
    lines = [
        f"a step: {time_text(time_.seconds)}, MFU {plan.mfu:.1%}",
        f"  one after the other: {_listed(time_.parts, time_text)}",
    ]
    if plan.exchange_inside_node is not None:
        lines.append(
            f"  the exchange across nodes takes {time_text(time_.parts['exchange'])}; inside a "
            f"node it would take {time_text(plan.exchange_inside_node)}"
        )
    if at_once := _listed(time_.hidden, time_text):
        lines.append(f"  at the same time: {at_once}")
    if waits := time_.waits[longest]:
        lines.append(f"  waiting for {longest}: {time_text(waits)}")
    if time_.seconds < _SHORT:
        lines.append(
            "  not planned: the time to launch kernels, which makes short steps longer than this"
        )
    slower = {name: share for name, share in half_as_fast(plan).items() if share >= _WORTH_SAYING}
    if longer := _listed(slower, lambda share: f"{share:+.1%}"):
        lines.append(f"  if one kind of link were half as fast: {longer}")
    return [*lines, f"  collectives of a rank: {counts}"]


def choice_lines(plan: Plan) -> Iterator[str]:
    """Yield lines about what other choices would make of a planned run, each as soon as known."""
    for length, cost in costs_at_lengths(plan):
        if length != plan.seq_len:
            what = cost.sentence() if cost else "does not fit with these settings"
            yield f"  in sequences of {length:,}: {what.removeprefix('the run: ')}"
    for kernel, seconds in other_kernels(plan).items():
        yield f"  with {NAMES[kernel]}: {seconds / plan.time.seconds - 1:+.1%}"
    if change := best_change(plan):
        changes, other = change
        gain = other.seconds_per_token / plan.seconds_per_token - 1
        yield (
            f"  the setting that buys most: {assignments(changes)}: {gain:+.1%} (about "
            f"{size_text(other.gpu_bytes)} a GPU, {size_text(other.host_bytes)} a node)"
        )
    else:
        yield "  no change of one setting is clearly faster and fits"


def closing(plan: Plan, longest_seq_len: int, found: Sequence[SearchResult]) -> str:
    """Return a summary in plain words: whether the plan fits, what limits it, and what helps most.

    found: the results of a search, empty where none was made.
    """
    setup = plan.setup
    what = f"{plan.seq_len:,} tokens on {setup.world_size} x {setup.gpu.name}"
    verdict = "fit" if plan.fits else "do not fit"
    reason = f"Most of a step's time goes to {plan.bottleneck}."
    if not plan.gpu_fits:
        reason = f"A GPU would need {size_text(plan.gpu_bytes)} of {size_text(setup.gpu_memory)}."
    elif not plan.host_fits:
        reason = f"A node would need {size_text(plan.host_bytes)} of host memory."
    elif not plan.disk_fits:
        reason = f"The files of a node would need {size_text(plan.disk_bytes)}."
    longer = _longest_sentence(setup, longest_seq_len, verified=bool(found))
    lengths = {one.plan.seq_len: one for one in reversed(found) if one.plan}
    most = max(lengths, default=0)
    changes = lengths[most].changes if lengths else {}
    helps = f"The longest found is {most:,}: {options(changes)}" if changes else advice(plan)
    return f"[bold]{what} {verdict}.[/] {reason} {longer} {helps}"


def _longest_sentence(setup: Setup, seq_len: int, *, verified: bool) -> str:
    if not seq_len:
        return "No length fits with these settings."
    if is_unlimited(setup, seq_len):
        sentence = (
            f"With these settings at least {seq_len:,} tokens fit: the planner looks no further."
        )
        if not setup.host_memory:
            sentence += " Host memory was not looked at: plan.host_memory_gib is not set."
    else:
        sentence = f"With these settings {'up to' if verified else 'about'} {seq_len:,} tokens fit"
        most = setup.config.plan.max_step_seconds
        sentence += f", in steps of at most {time_text(most)}." if most else "."
    positions = getattr(setup.model_config, "max_position_embeddings", None)
    if positions and seq_len > positions:
        sentence += (
            f" (Beyond {positions:,}, its max_position_embeddings, the model needs "
            "model.rope_scaling.)"
        )
    return sentence


def advice(plan: Plan) -> str:
    """Return a sentence about one more change of settings that lowers the memory that limits most.

    The change is chosen by the size of the component that it removes from the peak. Where the plan
    does not fit, the change is simulated.
    """
    setup, config = plan.setup, plan.setup.config
    alive, on_host = plan.peak.components, plan.bottleneck == "host memory"
    changes: list[tuple[float, dict[str, Any]]] = []
    if on_host:
        every = config.activation_checkpoint.every
        layers = getattr(setup.model_config, "num_hidden_layers", every)
        if every < layers:
            changes.append((1, {"activation_checkpoint.every": min(layers, 2 * every)}))
    else:
        offload = {"activation_checkpoint.offload": "host"}
        changes += [
            (alive.get("checkpoints", 0), offload | {"activation_checkpoint.mode": "full"}),
            (alive.get("MLP", 0), {"memory.mlp_tile_tokens": 0}),
            (alive.get("loss head", 0), {"memory.loss_tile_tokens": 0}),
            (alive.get("optimizer state", 0), {"memory.optimizer_offload": True}),
        ]
        more = 2 * setup.degrees.sequence
        heads = getattr(setup.model_config, "num_attention_heads", 1)
        if more <= min(heads, setup.world_size) and setup.degrees.shard % 2 == 0:
            degree = {"parallelism.sequence_parallel_degree": more}
            changes.append((alive.get("attention", 0), degree))
    possible = [(size, change) for size, change in changes if size and differs(config, change)]
    if not possible:
        return "Only GPUs with more memory, or more GPUs a sequence, would help."
    freed, change = max(possible, key=lambda one: one[0])
    if plan.fits:
        return f"To free up to {size_text(freed)} of a GPU: {assignments(change)}."
    other = estimate_plan(with_settings(setup, change))
    what, size = (
        ("host memory", f"{size_text(other.host_bytes)} a node")
        if on_host
        else ("the GPU's peak", size_text(other.gpu_bytes))
    )
    return f"What lowers {what} most: {assignments(change)} (to {size})."


# --- files ----------------------------------------------------------------------------------------
