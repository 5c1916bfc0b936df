"""How long a sequence can be, with which settings, and what each feature adds to that length.

Peak memory is piecewise affine in the sequence length S: at each moment of the step, memory is a
constant plus a part proportional to S, and the peak is the maximum of these lines. So the lines
through the moments of two simulated lengths predict where the limit is. The search simulates that
length and draws the lines again with it, until a length fits and the next one does not.

With `plan.max_step_seconds`, the time of a step is a limit like the memory. Time is a S + b S^2, so
seconds per token are a line.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf, sqrt
from typing import Any

from titan_ulysses.config.load import config_of
from titan_ulysses.config.schema import Config
from titan_ulysses.config.validate import MeshDegrees
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.sequence import chunk_length
from titan_ulysses.memory.tiled import Tiled
from titan_ulysses.plan.memory import Allocation
from titan_ulysses.plan.planner import Estimate, Plan, Setup, estimate_plan, make_plan, on_host
from titan_ulysses.plan.status_line import LINE

_UNIT = 256
"""Lengths are multiples of this many tokens per rank."""
_TOLERANCE = 0.01
"""With changed settings, the length that is found may be too short by this share of it. This
tolerance saves a simulation for each search.
"""
_MAX_TOKENS = 2**27
"""The tokens at which a search ends: positions and kernels have not been tried beyond."""
_MAX_EXTRAPOLATION = 64
"""How many times longer than the longest simulated length the next one may be. A prediction does
not reach far, because a long sequence may have its peak at another moment than a short one.
"""
_MAX_UNVERIFIED_EXTRAPOLATION = 4
"""The same factor for a length that is only estimated, not simulated."""
_SHARED = 4
"""How many blocks share a checkpoint in the last steps of the ladder."""
_FIXED = ("parameters", "gradients", "optimizer state", "optimizer", "gathered parameters")
"""Components whose size does not depend on the length."""
_CLOSE = 0.02
"""An estimated length is not planned if one was planned that differs by at most this share."""
_MOST_LENGTHS = 8
"""How many lengths an estimate is made from at most."""


def with_settings(setup: Setup, changes: dict[str, Any]) -> Setup:
    """Return setup with changed settings ("section.key" -> value) and the mesh that follows.

    UserError where settings exclude each other, and where the sequence-parallel degree does not
    divide the number of ranks.
    """
    config = config_of(setup.config.model_dump(), changes.items())
    before, degrees, local = setup.degrees, setup.degrees, setup.degrees.local_batch_size
    sequence = changes.get("parallelism.sequence_parallel_degree", before.sequence)
    replicate = changes.get("parallelism.data_parallel_replicate_degree", before.replicate)
    if (sequence, replicate) != (before.sequence, before.replicate):
        shard, rest = divmod(setup.world_size, replicate * sequence)  # all ranks that are left
        if rest:
            raise UserError(
                f"parallelism.sequence_parallel_degree = {sequence} does not divide "
                f"{setup.world_size}"
            )
        accumulation = max(1, config.training.global_batch_size // (local * replicate * shard))
        degrees = MeshDegrees(replicate, shard, sequence, local, accumulation)
    return replace(setup, spec=setup.spec.with_config(config, degrees))


def at_length(setup: Setup, seq_len: int) -> Setup:
    return with_settings(setup, {"training.seq_len": seq_len})


def limit(setup: Setup, a: Estimate, b: Estimate) -> int:
    """Return the length at which the line through a and b reaches the first limit of the hardware
    or of the time of a step, rounded down; 0 where none fits. a is the shorter one.

    Of two plans, there is a line of GPU memory for each kind of moment, in place of one of the
    peak: with the length, the peak can move to another moment.
    """
    unit = _UNIT * setup.degrees.sequence
    lengths: list[float] = []
    of_gpu = [(a.gpu_bytes, b.gpu_bytes)]
    of_host = [(setup.host_memory or inf, a.host_bytes, b.host_bytes)]
    if isinstance(a, Plan) and isinstance(b, Plan):
        lower, higher = _by_moment(a), _by_moment(b)
        of_gpu = [(lower[kind], higher[kind]) for kind in lower.keys() & higher.keys()]
        if limit_of_buffers := _limit_of_buffers(setup, a, b):
            lengths, of_host = [limit_of_buffers], []  # a line through rounded sizes is not as good
    for memory, low, high in (
        *((setup.gpu_memory, *both) for both in of_gpu),
        *of_host,
        (setup.disk or inf, a.disk_bytes, b.disk_bytes),
    ):
        slope = (high - low) / (b.seq_len - a.seq_len)
        if slope > 0:
            lengths.append(b.seq_len + (memory - high) / slope)
        else:  # the length changes nothing: all of them fit, or none
            lengths.append(inf if high <= memory else 0)
    if most := setup.config.plan.max_step_seconds:
        # What x and y are in seconds = x S + y S^2.
        per_token = a.time.seconds / a.seq_len, b.time.seconds / b.seq_len
        y = (per_token[1] - per_token[0]) / (b.seq_len - a.seq_len)
        x = per_token[1] - y * b.seq_len
        longest = most / per_token[1] if y <= 0 else (sqrt(x * x + 4 * y * most) - x) / (2 * y)
        lengths.append(longest)
    return max(0, int(min(*lengths, _MAX_TOKENS)) // unit * unit)


def _by_moment(plan: Plan) -> dict[tuple, float]:
    """Return the highest bytes of a GPU at each kind of moment of a step."""
    memory, beside = plan.simulation.memory, plan.gpu_bytes - plan.peak.bytes
    total, highest = beside, dict[tuple, float]()
    for at, ((one, change), moment) in enumerate(zip(memory.events, memory.moments, strict=True)):
        if one.place == "device":
            total += change
            kind = moment[:3]
            if at >= plan.simulation.start and total > highest.get(kind, 0):
                highest[kind] = total
    return highest


def _limit_of_buffers(
    setup: Setup, a: Plan | None, b: Plan, *, checkpoints: float = 1.0
) -> int | None:
    """Return the length up to which a node's host memory has room for its buffers: the size of each
    is on a line through a and b, and rounded up. None where the two do not have the same ones.

    Without a, sizes are proportional to the length but for those of parameters and their kind.
    checkpoints: how many times as large those of b are taken to be.
    """
    high = {
        x: n * checkpoints if x.component == "checkpoints" else n for x, n in _on_host(b).items()
    }
    low = _on_host(a) if a else {x: n * (x.component in _FIXED) for x, n in high.items()}
    kinds = ([(x.component, x.label, x.made[:3]) for x in alive] for alive in (low, high))
    if next(kinds) != next(kinds) or not setup.host_memory:
        return None
    most, unit = setup.host_memory / setup.ranks_per_node, _UNIT * setup.degrees.sequence
    start = a.seq_len if a else 0

    def is_too_long(units: int) -> bool:
        share = (units * unit - start) / (b.seq_len - start)
        sizes = zip(low.items(), high.values(), strict=True)
        return sum(on_host(x, max(0, round(n + share * (m - n)))) for (x, n), m in sizes) > most

    return unit * bisect_left(range(1, _MAX_TOKENS // unit + 1), True, key=is_too_long)


def _on_host(plan: Plan) -> dict[Allocation, int]:
    return plan.simulation.memory.peak("host", first=plan.simulation.start).alive


def _guess(plan: Plan, *, checkpoints: float = 1.0) -> int:
    """Return about which length fits, from a single one: all memory is taken to grow with it but
    that of parameters and their kind. checkpoints: how many times as large they would be on the
    host.
    """
    setup, peak = plan.setup, plan.peak.components
    fixed = plan.gpu_bytes - sum(n for name, n in peak.items() if name not in _FIXED)
    room = max(0.0, setup.gpu_memory - fixed) / max(1.0, plan.gpu_bytes - fixed)
    of_host = _limit_of_buffers(setup, None, plan, checkpoints=checkpoints) or inf
    unit = _UNIT * setup.degrees.sequence
    return max(unit, int(min(room * plan.seq_len, of_host, _MAX_TOKENS)) // unit * unit)


def is_unlimited(setup: Setup, seq_len: int) -> bool:
    """Return whether seq_len is limited only by where the planner's search ends, not by memory."""
    unit = _UNIT * setup.degrees.sequence
    return seq_len >= _MAX_TOKENS // unit * unit


def what_ends(plan: Estimate) -> str:
    """Return what a longest sequence has most of in use, so that no longer one fits: "GPU", "host",
    "disk" or "time"; "search" where only the search ends it.
    """
    setup, most = plan.setup, plan.setup.config.plan.max_step_seconds
    if is_unlimited(setup, plan.seq_len):
        return "search"
    used = {
        "GPU": plan.gpu_bytes / setup.gpu_memory,
        "host": plan.host_bytes / (setup.host_memory or inf),
        "disk": plan.disk_bytes / (setup.disk or inf),
        "time": plan.time.seconds / (most or inf),
    }
    return max(used, key=used.__getitem__)


def estimate(first: Plan) -> int:
    """Estimate the longest sequence that fits from the plan of one length; 0 where none fits.

    The result itself is not simulated, but a line through other lengths. Memory grows more slowly
    once tiles and chunks are full, so that a line from a shorter length would end too early: it is
    followed up to where it leads. Where that is the length at which a search ends, this is tried at
    once, if a GPU could hold its hidden states.
    """
    setup, own, fits = first.setup, first.seq_len, first.fits_in_time
    unit, full = _UNIT * setup.degrees.sequence, _full_length(first)

    def planned(seq_len: int) -> Estimate:
        return estimate_plan(at_length(setup, seq_len))

    end = _MAX_TOKENS // unit * unit
    if fits and full <= own < end:
        # Beyond full tiles and chunks, so that a longer length is on the same line.
        other = min(_MAX_UNVERIFIED_EXTRAPOLATION * own, end)
    else:
        other = max(unit, own // (2 if fits else 4) // unit * unit)
    known: list[Estimate] = [first, planned(other if other != own else 2 * own)]
    hidden = 2 * setup.degrees.local_batch_size * getattr(setup.model_config, "hidden_size", 0)
    try_end = hidden * _MAX_TOKENS / setup.degrees.sequence < setup.gpu_memory
    while True:
        known.sort(key=_length)
        low, high = _pair(known)
        if low.seq_len <= unit and not low.fits_in_time:
            return 0
        guess, farthest = max(unit, limit(setup, low, high)), known[-1].seq_len
        # Lengths that do not fit say little of shorter ones.
        is_line = low.fits_in_time and (low.seq_len >= full or guess < 2 * (low.seq_len + unit))
        is_known = any(abs(one.seq_len - guess) <= _CLOSE * guess for one in known)
        if is_known or len(known) == _MOST_LENGTHS:
            return guess
        if is_line and guess <= _MAX_UNVERIFIED_EXTRAPOLATION * farthest:
            return guess
        if guess <= farthest:
            known.append(planned(guess))
            continue
        if is_unlimited(setup, guess) and try_end:
            if planned(guess).fits_in_time:
                return guess
            try_end = False
        known.append(planned(min(max(guess, 2 * farthest), _MAX_EXTRAPOLATION * farthest)))


def _full_length(plan: Plan) -> int:
    """Return the sequence length of two full tiles or chunks of each kind on a rank. A longer one
    only has more of them.
    """
    model, degree = plan.simulation.model, plan.setup.degrees.sequence
    tiled = [x.forward.tile_tokens for x in model.modules() if isinstance(x.forward, Tiled)]
    sizes = [*tiled, getattr(model.get_output_embeddings(), "tile_tokens", 0)]
    chunk = chunk_length(model.sharding.stream_chunk_tokens, _MAX_TOKENS, degree) or 0
    return 2 * max(degree * max(sizes), chunk)


def longest(
    setup: Setup,
    first: Plan | None = None,
    *,
    near: int = 0,
    least: int = 0,
    close: float = 0.0,
    simulations: int = 6,
    plan: Callable[[Setup], Plan] = make_plan,
) -> Plan | None:
    """Find the longest sequence that fits, and simulate it; None where none fits.

    first: a plan at any length. near: the length to begin with where there is no such plan. least:
    give up where nothing longer fits. close: the share of its length by which the result may be too
    short. plan: what makes a plan. Where memory does not limit the length, the result is the length
    at which the search ends (see `is_unlimited`).
    """
    unit = _UNIT * setup.degrees.sequence
    if first is None:
        first = plan(at_length(setup, max(unit, near // unit * unit or 64 * unit)))
    own, other = first.seq_len, min(_guess(first), _MAX_EXTRAPOLATION * first.seq_len)
    most_seconds = setup.config.plan.max_step_seconds
    if own <= least and not first.fits_in_time:
        return None
    if close and first.fits_in_time and not most_seconds and other <= own * (1 + close):
        return first
    is_close = abs(other - own) < _CLOSE * own  # no line goes through two lengths that are
    if is_close or most_seconds:
        other = max(unit, own // 2 // unit * unit)
    known = [first, plan(at_length(setup, other if other != own else 2 * own))]
    for _ in range(simulations):
        known.sort(key=_length)
        best = max((one for one in known if one.fits_in_time), key=_length, default=None)
        guess = min(limit(setup, *_pair(known)), _MAX_EXTRAPOLATION * known[-1].seq_len)
        # The peak is convex in S, so no length fits beyond one that does not, whatever a line says.
        failing = (one.seq_len for one in known if not one.fits_in_time)
        guess = min([guess, *(length - unit for length in failing)])
        is_known = guess in map(_length, known)
        is_found = best is not None and guess <= best.seq_len * (1 + close)
        if guess < unit or guess <= least or is_known or is_found:
            return best
        known.append(plan(at_length(setup, guess)))
    return max((one for one in known if one.fits_in_time), key=_length, default=None)


def _length(plan: Estimate) -> int:
    return plan.seq_len


def _pair(known: Sequence[Estimate]) -> tuple[Estimate, Estimate]:
    """Return the two lengths next to the limit, of lengths in increasing order: the last that fits
    and the first that does not, or the nearest two where all lengths are on one side.
    """
    fitting = next((i for i, one in enumerate(known) if not one.fits_in_time), len(known))
    at = min(max(fitting, 1), len(known) - 1)
    return known[at - 1], known[at]


FEATURES: list[tuple[str, dict[str, Any]]] = [
    ("+ checkpoints on the host", {"activation_checkpoint.offload": "host"}),
    ("+ hidden states on the host", {"memory.stream_offload": "host"}),
    ("+ optimizer state on the host", {"memory.optimizer_offload": True}),
    (
        "+ parameters on the host",
        {"memory.parameter_offload": True, "memory.optimizer_offload": False},
    ),
    (
        "bf16 weights, 8-bit state on the GPU",
        {
            "memory.parameter_offload": False,
            "optimizer.name": "adamw8bit",
            "optimizer.stochastic_rounding": True,
        },
    ),
]
"""Features in the order of the time that they cost. The last one is faster, but it changes the
numerics of training.
"""


@dataclass(frozen=True)
class SearchResult:
    """The longest sequence with given settings."""

    what: str
    changes: dict[str, Any]
    plan: Plan | None
    """of the longest sequence; None where no length fits, or where the settings are refused"""
    left_out: str = ""
    """why these settings are not tried: the model cannot have them, or they would gain nothing"""


_NOT_THE_GPU = "memory of a GPU does not end the sequence, and this frees no other"


def search(setup: Setup, first: Plan) -> Iterator[SearchResult]:
    """Find the longest sequence as configured, then with tiles, checkpoints and the largest
    sequence-parallel degree, then with one more of `FEATURES` after the other.

    Where host memory limits a length, more blocks share a checkpoint, as long as that makes the
    sequence longer. The steps after it keep that setting. Where something else than memory of a GPU
    ends a sequence, a feature that frees no other memory is not tried. One that this model cannot
    have, or that is not tried, is left out of the steps after it.
    """
    found = configured = SearchResult("as configured", {}, longest(setup, first))
    yield configured
    world, heads = setup.world_size, getattr(setup.model_config, "num_attention_heads", 1)
    degrees = [p for p in range(1, min(world, heads) + 1) if world % p == 0]
    changes: dict[str, Any] = {
        "activation_checkpoint.mode": "full",
        "activation_checkpoint.every": 1,
        "memory.mlp_tile_tokens": 0,
        "memory.loss_tile_tokens": 0,
        "memory.stream_chunk_tokens": 0,
        "parallelism.sequence_parallel_degree": max(degrees),
    }
    in_bf16 = setup.config.training.param_dtype == "bfloat16"
    for what, more in [("tiles, checkpoints, most ranks", {}), *FEATURES]:
        if "optimizer.stochastic_rounding" in more and not in_bf16:
            continue
        before, together = with_settings(setup, changes).config, changes | more
        if more and not differs(before, more):
            continue  # the feature is on already
        leaves_host = any(value is False and value_of(before, key) for key, value in more.items())
        gpu_ends = found.plan is None or what_ends(found.plan) == "GPU"
        if more and not gpu_ends and not leaves_host:
            yield (one := SearchResult(what, together, None, left_out=_NOT_THE_GPU))
        elif not differs(setup.config, together):
            one = replace(configured, changes=together)
        else:
            yield (one := _longest_with(what, setup, together, near=_tokens(found)))
        if one.left_out:
            continue
        found, changes = one, together
        for longer in _fewer_checkpoints(setup, found):
            yield longer
            found, changes = longer, longer.changes


def _longest_with(
    what: str,
    setup: Setup,
    changes: dict[str, Any],
    *,
    near: int = 0,
    least: int = 0,
) -> SearchResult:
    LINE.about = f"{what.strip()}: "
    try:
        plan = longest(with_settings(setup, changes), near=near, least=least, close=_TOLERANCE)
    except UserError as error:
        return SearchResult(what, changes, None, left_out=str(error))
    finally:
        LINE.about = ""
    return SearchResult(what, changes, plan)


def _tokens(found: SearchResult | None) -> int:
    return found.plan.seq_len if found and found.plan else 0


def _fewer_checkpoints(setup: Setup, found: SearchResult) -> Iterator[SearchResult]:
    layers = getattr(setup.model_config, "num_hidden_layers", 1)
    every = found.changes["activation_checkpoint.every"]
    while found.plan and what_ends(found.plan) == "host" and 2 * every <= layers:
        is_streamed = found.plan.setup.config.memory.stream_offload != "none"
        if is_streamed and 2 * every**2 >= layers:
            return  # as many inputs, of all checkpoints and of the blocks of one: layers / k + k
        fewer = ceil(layers / (2 * every)) / ceil(layers / every)
        every *= 2
        changes = found.changes | {"activation_checkpoint.every": every}
        what, near = f"    {every} blocks a checkpoint", _guess(found.plan, checkpoints=fewer)
        other = _longest_with(what, setup, changes, near=near, least=_tokens(found))
        if other.plan is None or other.plan.seq_len <= found.plan.seq_len:
            return
        yield (found := other)


def ladder(setup: Setup, configured: SearchResult | None = None) -> Iterator[SearchResult]:
    """Find the longest sequence with ALST's features, added one after the other (arXiv 2506.13996,
    section 5.3), and then with those of streaming, on this model and hardware.

    configured: the result for the settings as they are, used again at the step that equals them.
    """
    whole, tiles, chosen = -1, 0, 0
    degree = setup.degrees.sequence if setup.degrees.sequence > 1 else setup.world_size
    shared = min(_SHARED, getattr(setup.model_config, "num_hidden_layers", 1))
    changes: dict[str, Any] = {
        "activation_checkpoint.mode": "full",
        "activation_checkpoint.every": 1,
        "activation_checkpoint.offload": "none",
        "activation_checkpoint.keep_attention": "none",
        "memory.loss_tile_tokens": whole,
        "memory.mlp_tile_tokens": whole,
        "memory.stream_chunk_tokens": whole,
        "memory.stream_offload": "none",
        "parallelism.sequence_parallel_degree": 1,
    }
    steps: list[tuple[str, dict[str, Any]]] = [
        ("FSDP and checkpoints", {}),
        ("+ tiled loss", {"memory.loss_tile_tokens": tiles}),
        ("+ Ulysses", {"parallelism.sequence_parallel_degree": degree}),
        ("+ tiled MLP", {"memory.mlp_tile_tokens": tiles}),
        (
            "+ offload, no tiled MLP",
            {"memory.mlp_tile_tokens": whole, "activation_checkpoint.offload": "host"},
        ),
        ("+ offload and tiled MLP", {"memory.mlp_tile_tokens": tiles}),
        # Streaming has room on the GPU, so that host memory ends a sequence, unless blocks share
        # checkpoints.
        (
            f"+ streaming, {shared} blocks a checkpoint",
            {"memory.stream_chunk_tokens": chosen, "activation_checkpoint.every": shared},
        ),
        ("+ hidden states on the host", {"memory.stream_offload": "host"}),
        (
            "+ files on NVMe",
            {"memory.stream_offload": "disk", "activation_checkpoint.offload": "disk"},
        ),
    ]
    found = None
    for what, more in steps:
        changes = changes | more
        if configured and not differs(setup.config, changes):
            yield replace(configured, what=what, changes=changes)
        else:
            yield (found := _longest_with(what, setup, changes, near=_tokens(found)))


def value_of(config: Config, key: str) -> Any:
    """Return the value of "section.name"."""
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def differs(config: Config, changes: dict[str, Any]) -> bool:
    return any(value_of(config, key) != value for key, value in changes.items())
