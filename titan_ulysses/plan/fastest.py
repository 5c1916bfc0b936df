"""The settings with which sequences of a given length are trained fastest.

Settings are compared by the planned seconds of a token: another mesh may train more sequences in a
step. The search estimates each candidate (`make_plan`). It begins with settings that need
little memory, for every mesh whose sequences stay inside a node, or for all if none of these fits.
It takes the best mesh, and changes one setting at a time, as long as that makes a token clearly
faster. So it ends where no such change does. What cannot make it clearly faster (`_most_gained`),
or cannot fit, is not estimated. Of the best, all that a plan says is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

import torch

from titan_ulysses.distributed.errors import UserError
from titan_ulysses.plan.attribution import SPARSE
from titan_ulysses.plan.cost import Time
from titan_ulysses.plan.planner import Estimate, Plan, Setup, make_plan, summary
from titan_ulysses.plan.search import value_of, with_settings
from titan_ulysses.plan.status_line import LINE

CLEARLY = 5e-3
"""The share of its time by which a change must make a token faster to be taken."""
_RECOMPUTED_ATTENTION = 2 / 9
"""The part of attention's products that recomputation has: forward has 2, backward 5."""
_RECOMPUTED_PRODUCTS = 2 / 8
"""The same of other matrix products: forward has 2 FLOPs a weight and token, backward 4."""
_AUTO_CHUNK = 4096
"""The tokens of a rank in a chunk that memory.stream_chunk_tokens = "auto" takes on a GPU."""
_BEST = 5

Changes = dict[str, Any]
_SEQUENCE, _REPLICATE, _SHARD = (
    "parallelism.sequence_parallel_degree",
    "parallelism.data_parallel_replicate_degree",
    "parallelism.data_parallel_shard_degree",
)
_MODE, _EVERY = "activation_checkpoint.mode", "activation_checkpoint.every"
_OFFLOAD, _KEEP = "activation_checkpoint.offload", "activation_checkpoint.keep_attention"
_STATE, _PARAMETERS = "memory.optimizer_offload", "memory.parameter_offload"
_CHUNK, _HIDDEN = "memory.stream_chunk_tokens", "memory.stream_offload"

LEAN: Changes = {
    _KEEP: "none",
    _STATE: True,
    _PARAMETERS: False,
    _MODE: "full",
    _EVERY: 1,
    _OFFLOAD: "host",
    _HIDDEN: "host",
    _CHUNK: 0,
    "memory.mlp_tile_tokens": 0,
    "memory.loss_tile_tokens": 0,
}
"""The settings that a search begins with, those first that matter most."""
_WHOLE: Changes = {_KEEP: "none", _HIDDEN: "none"}
_EXCLUDES: dict[tuple[str, Any], Changes] = {
    (_CHUNK, -1): _WHOLE,
    (_MODE, "none"): _WHOLE | {_EVERY: 1, _OFFLOAD: "none", _CHUNK: 0},
    (_STATE, True): {_PARAMETERS: False},
    (_PARAMETERS, True): {_STATE: False},
}
"""What changes together with a setting, because the two exclude each other."""
_VALUES: dict[str, list[Any]] = {
    _MODE: ["none", "full"],
    _STATE: [False, True],
    _PARAMETERS: [False, True],
    _OFFLOAD: ["none", "host"],
    _HIDDEN: ["none", "host"],
    _KEEP: ["all", "none"],
    "memory.mlp_tile_tokens": [-1, 0],
    "memory.loss_tile_tokens": [-1, 0],
}
"""The two values that a search tries. The first needs more memory of a GPU, whatever the other
settings are, except for the first and third key.
"""


@dataclass(frozen=True)
class Candidate:
    """Settings, and what their step is estimated or, once simulated whole, planned to need."""

    changes: Changes
    """Settings that differ from the config, with all that make up the mesh."""
    estimate: Estimate
    plan: Plan | None = None

    @property
    def planned(self) -> Estimate:
        return self.plan or self.estimate

    @property
    def is_simulated(self) -> bool:
        return self.plan is not None


@dataclass
class Search:
    """A search for the fastest settings of setup's model, length and GPUs."""

    setup: Setup
    estimate: Callable[[Setup], Estimate] = make_plan
    tried: dict[tuple, Candidate | None] = field(default_factory=dict)
    """what is known of settings; None: this model or mesh cannot have them"""
    refusal: str = ""
    """why the last settings that were refused cannot be"""
    is_interrupted: bool = False
    """by Ctrl-C, so that what was found until then is not simulated whole"""
    _best: Candidate | None = None
    """the best until now that fits, with its plan"""

    def run(self) -> list[Candidate]:
        """Return the best candidates that fit, at most five, the fastest first.

        The first one is simulated whole. Empty if none was found that fits. Ctrl-C ends the search
        with what is known.
        """
        try:
            self._look()
            return self._verified()
        except KeyboardInterrupt:
            LINE.clear()
            self.is_interrupted = True
            return self._fitting()[:_BEST]

    def _look(self) -> None:
        sharded = [mesh for mesh in meshes(self.setup) if mesh[_REPLICATE] == 1]
        begun: list[Candidate] = []
        for spans_nodes in (False, True):
            # Ranks of other nodes compute no less, and exchange over the network.
            if not any(one.estimate.fits for one in begun):
                some = [m for m in sharded if (m[_SEQUENCE] > self._per_node) == spans_nodes]
                begun += filter(None, (self._lean(mesh) for mesh in some))
        if start := min(begun, key=_rank, default=None):
            self._descend(start)

    @property
    def _per_node(self) -> int:
        return self.setup.config.plan.gpus_per_node

    def _lean(self, mesh: Changes) -> Candidate | None:
        """Estimate settings that need little memory, on a mesh; None where all are refused.

        Not every loss and model can have its hidden states off the device.
        """
        return self.try_(LEAN | mesh) or self.try_(LEAN | {_HIDDEN: "none"} | mesh)

    def try_(self, settings: Changes) -> Candidate | None:
        """Estimate settings; None where they are refused."""
        key = _key(settings)
        if key not in self.tried:
            LINE.about = f"settings {len(self.tried) + 1}: "
            try:
                setup = with_settings(self.setup, settings)
                same = self.tried.get(_key(_as_it_runs(settings)))
                found = replace(same.estimate, setup=setup) if same else self.estimate(setup)
                self.tried[key] = one = Candidate(settings, summary(found))
                is_best = self._best is None or _order(one) < _order(self._best)
                if isinstance(found, Plan) and found.fits and is_best:
                    self._best = replace(one, plan=found)
            except UserError as error:
                self.tried[key], self.refusal = None, str(error)
        return self.tried[key]

    def _descend(self, start: Candidate) -> Candidate:
        """Change one setting after the other until no change is clearly better."""
        best, before = start, None
        while best is not before:
            before = best
            for name in (*LEAN, "mesh"):
                for changed in neighbours(self.setup, best.changes, name):
                    if best.estimate.fits and not self._may_gain(best, changed, name):
                        continue
                    if best.estimate.fits and self._is_too_large(changed):
                        continue
                    other = self.try_(changed)
                    if other and _is_better(other, best):
                        best = other
        return best

    def _may_gain(self, best: Candidate, changed: Changes, name: str) -> bool:
        """Return whether changed settings can be clearly faster than the best."""
        time = best.estimate.time
        enough = CLEARLY * time.seconds
        if name == "mesh":
            return self._gained_by_mesh(best, changed) >= enough
        is_simpler = _offloads(changed) < _offloads(best.changes)
        return is_simpler or _most_gained(best.changes, changed, time) >= enough

    def _gained_by_mesh(self, best: Candidate, changed: Changes) -> float:
        """Return a bound of the seconds that a step of the best gets shorter on another mesh.

        At most it neither exchanges nor waits. And what it computes less with lean settings, it
        computes less with all. Replicas save what is waited for, and nothing else. More ranks of a
        sequence, on more nodes, save nothing.
        """
        time, tokens = best.estimate.time, best.estimate.setup.tokens_per_step
        wait = max(time.waits.values())
        if changed[_SEQUENCE] == best.changes[_SEQUENCE]:
            return wait
        if changed[_SEQUENCE] > max(self._per_node, best.changes[_SEQUENCE]):
            return 0.0
        degrees = (best.changes[_SEQUENCE], changed[_SEQUENCE])
        own, other = (
            self._lean({_SEQUENCE: degree, _REPLICATE: 1, _SHARD: -1}) for degree in degrees
        )
        if own is None or other is None:
            return inf
        computed = [c.estimate.time.parts | {"exchange": 0.0} for c in (own, other)]
        per_token = [
            sum(parts.values()) / c.estimate.setup.tokens_per_step
            for parts, c in zip(computed, (own, other), strict=True)
        ]
        return time.parts["exchange"] + wait + tokens * max(0.0, per_token[0] - per_token[1])

    def _is_too_large(self, changed: Changes) -> bool:
        """Return whether changed settings need more than a GPU has.

        They do if the logits of all tokens alone do, or if other settings do that differ only in
        what needs less memory.
        """
        setup = self.setup
        if changed["memory.loss_tile_tokens"] == -1:
            training = setup.config.training
            tokens = training.local_batch_size * training.seq_len // changed[_SEQUENCE]
            size = getattr(torch, training.param_dtype).itemsize
            size = size if size >= 4 else size + 4  # as the product gives them, and in fp32
            if size * tokens * setup.model_config.vocab_size > setup.gpu_memory:
                return True
        return any(
            one is not None
            and one.estimate.gpu_bytes > setup.gpu_memory
            and _needs_no_less(changed, one.changes)
            for one in self.tried.values()
        )

    def _fitting(self) -> list[Candidate]:
        """Return what fits as estimated, each step once, the best first."""
        fitting = [c for c in self.tried.values() if c and c.estimate.fits]
        fitting.sort(key=_order)
        steps: dict[tuple, Candidate] = {}
        for candidate in fitting:
            steps.setdefault(_key(_as_it_runs(candidate.changes)), candidate)
        return [*steps.values()]

    def _verified(self) -> list[Candidate]:
        """Return the best that fit, the first one simulated whole."""
        order, LINE.about = self._fitting(), "the fastest: "
        for at, candidate in enumerate(order):
            plan: Plan | None = None
            setup, best = candidate.estimate.setup, self._best
            if best and _as_it_runs(best.changes) == _as_it_runs(candidate.changes):
                plan = best.plan and replace(best.plan, setup=setup)
            plan = plan or make_plan(setup)
            if plan.fits:
                return [replace(candidate, plan=plan), *order[at + 1 : at + _BEST]]
        return []

    def nearest(self) -> Candidate | None:
        """Return what was tried and needs the least memory; None where all was refused."""
        known = [c for c in self.tried.values() if c]
        return min(known, key=lambda c: _excess(c.estimate), default=None)


def _key(settings: Changes) -> tuple:
    return tuple(sorted(settings.items()))


def _as_it_runs(settings: Changes) -> Changes:
    """Return the settings tried before that mean the same step.

    Where hidden states are off the device, the inputs of checkpoints are too.
    """
    hidden = settings[_HIDDEN]
    return settings if hidden == "none" else settings | {_OFFLOAD: hidden}


def _needs_no_less(changed: Changes, other: Changes) -> bool:
    """Return whether changed settings need as much memory of a GPU as others, or more."""
    for key in changed:
        if key == _CHUNK:
            if _chunk_tokens(changed) < _chunk_tokens(other):
                return False
        elif changed[key] != other[key] and (
            key in (_MODE, _PARAMETERS) or changed[key] != _VALUES.get(key, [None])[0]
        ):
            return False
    return True


def meshes(setup: Setup) -> list[Changes]:
    """Return the meshes that setup's GPUs, model and batch allow.

    Parameters are sharded over all ranks, or inside a node and replicated over the nodes.
    """
    world, per_node = setup.world_size, setup.config.plan.gpus_per_node
    training, model = setup.config.training, setup.model_config
    heads = getattr(model, "num_attention_heads", 1)
    nodes = world // per_node if world % per_node == 0 else 1
    found = []
    for sequence in range(1, min(world, heads) + 1):
        if world % sequence or training.seq_len % sequence:
            continue
        data = world // sequence
        batch = training.local_batch_size * data
        if training.global_batch_size > 0 and training.global_batch_size % batch:
            continue
        for replicate in sorted({1, nodes}):
            if data % replicate == 0:
                found.append({_SEQUENCE: sequence, _REPLICATE: replicate, _SHARD: -1})
    return found


def neighbours(setup: Setup, settings: Changes, name: str) -> list[Changes]:
    """Return settings with other values of one setting, or with other meshes (name "mesh")."""
    if name == "mesh":
        changed = [settings | mesh for mesh in meshes(setup)]
    else:
        changed = [
            settings | {name: value} | _EXCLUDES.get((name, value), {})
            for value in _values(setup, settings, name)
        ]
    return [one for one in changed if one != settings and _is_allowed(one)]


def _values(setup: Setup, settings: Changes, name: str) -> list[Any]:
    now = settings[name]
    if name == _EVERY:
        layers = getattr(setup.model_config, "num_hidden_layers", 1)
        return [k for k in (now // 2, 2 * now) if 1 <= k <= layers]
    if name == _CHUNK:
        # The largest first: where it is better, smaller ones need no estimate.
        per_rank = (4 * _AUTO_CHUNK, 2 * _AUTO_CHUNK, _AUTO_CHUNK // 2)
        chunks = [tokens * settings[_SEQUENCE] for tokens in per_rank]
        return [-1, *(c for c in chunks if c < setup.config.training.seq_len), 0]
    return _VALUES[name]


def _is_allowed(settings: Changes) -> bool:
    """Return whether these settings can be together (see `validate.check`)."""
    checkpoints = settings[_MODE] == "full"
    streams = checkpoints and settings[_CHUNK] != -1
    return (
        (checkpoints or settings[_OFFLOAD] == "none")
        and (checkpoints or settings[_EVERY] == 1)
        and (checkpoints or settings[_CHUNK] <= 0)
        and (streams or settings[_HIDDEN] == settings[_KEEP] == "none")
        and not (settings[_STATE] and settings[_PARAMETERS])
    )


def _most_gained(settings: Changes, changed: Changes, time: Time) -> float:
    """Return a bound of the seconds that a step of `time` gets shorter by a change of settings.

    Copies that are hidden gain only the kernels that copy. Tiles and chunks change what kernels
    read and write, and what is exchanged again. More copies gain nothing, nor do smaller chunks.
    """
    parts, wait = time.parts, max(time.waits.values())
    moved = wait + sum(parts.get(name, 0.0) for name in ("other kernels", "exchange", *SPARSE))
    attention = _RECOMPUTED_ATTENTION * parts["attention"]
    kept = settings[_KEEP] == "all"
    recomputed = 0.0 if kept else attention
    lost = attention if kept and changed[_KEEP] == "none" else 0.0
    gains = {
        _KEEP: wait if kept else recomputed + moved,
        _STATE: moved + parts["offloaded optimizer"],
        _PARAMETERS: moved + parts["offloaded optimizer"] + parts["parameters to the GPU"],
        _MODE: moved + _RECOMPUTED_PRODUCTS * parts["matmul"] + recomputed,
        _EVERY: moved + parts["matmul"] / 2 + parts["attention"] / 2,
        _OFFLOAD: moved,
        _HIDDEN: moved,
        _CHUNK: moved - lost / 2,
        "memory.mlp_tile_tokens": moved,
        "memory.loss_tile_tokens": moved,
    }
    offloads = settings[_STATE] or settings[_PARAMETERS]
    offloads_more = (changed[_STATE] or changed[_PARAMETERS]) and not offloads
    more_copies = any(changed[key] != "none" == settings[key] for key in (_OFFLOAD, _HIDDEN))
    smaller = _chunk_tokens(changed) < _chunk_tokens(settings)
    if offloads_more or more_copies or smaller or changed[_EVERY] > settings[_EVERY]:
        return 0.0
    return max(gains[key] for key in gains if changed[key] != settings[key])


def faster_settings(plan: Plan) -> list[Changes]:
    """Return changes of one setting of a plan, with what changes along, that may make its step
    clearly faster, those first that may gain most.
    """
    setup, config, degrees = plan.setup, plan.setup.config, plan.setup.degrees
    own = {name: value_of(config, name) for name in LEAN} | {_SEQUENCE: degrees.sequence}
    gains = []
    for name in LEAN:
        for changed in neighbours(setup, own, name):
            gain = _most_gained(own, changed, plan.time)
            if gain >= CLEARLY * plan.time.seconds:
                gains.append((gain, {key: v for key, v in changed.items() if own[key] != v}))
    return [changes for _, changes in sorted(gains, key=lambda one: -one[0])]


def _chunk_tokens(settings: Changes) -> float:
    """Return the tokens of a chunk. Off is one chunk of all tokens."""
    chunk = settings[_CHUNK]
    return _AUTO_CHUNK * settings[_SEQUENCE] if chunk == 0 else inf if chunk == -1 else chunk


def _offloads(settings: Changes) -> int:
    """Return how many things settings keep off the GPU."""
    names = (_STATE, _PARAMETERS, _OFFLOAD, _HIDDEN)
    return sum(settings[name] not in (False, "none") for name in names)


def _is_better(one: Candidate, other: Candidate) -> bool:
    """Return whether one is clearly faster than the other, or as fast with less off the GPU."""
    if one.estimate.fits and other.estimate.fits:
        enough = 1.0 if _offloads(one.changes) < _offloads(other.changes) else 1 - CLEARLY
        return one.estimate.seconds_per_token <= enough * other.estimate.seconds_per_token
    return _rank(one) < _rank(other)


def _rank(candidate: Candidate) -> tuple[float, float]:
    """Return a key to sort by: what fits comes first, then what needs less memory."""
    estimate = candidate.estimate
    return 1.0 if estimate.fits else _excess(estimate), estimate.seconds_per_token


def _order(candidate: Candidate) -> tuple:
    """Return a key to sort what fits by."""
    return _rank(candidate), _offloads(candidate.changes)


def _excess(estimate: Estimate) -> float:
    """Return how many times the memory that there is would be needed, of a GPU or of a node."""
    setup = estimate.setup
    host = estimate.host_bytes / setup.host_memory if setup.host_memory else 0.0
    return max(estimate.gpu_bytes / setup.gpu_memory, host)
