"""AdamW: fused, or with 8-bit or 4-bit moments, stochastic rounding, or its state on the host.

The arithmetic is that of PyTorch and torchao. This module adds a step that works on this rank's own
shards, one parameter at a time, so that the state of a parameter can be copied from the host for
its update and back.
"""

from __future__ import annotations

import math
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw
from torch.utils._triton import has_triton

from titan_ulysses.config.schema import Optimizer as OptimizerConfig
from titan_ulysses.distributed.device import forked_rng, pin
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.seeds import seed_of
from titan_ulysses.distributed.tensors import local_box, local_shard, plain_pieces
from titan_ulysses.model.torchao import import_torchao, require_torchao

BITS = {"adamw8bit": 8, "adamw4bit": 4}
# Elements that share a scale, by bits: torchao's defaults.
_BLOCK_SIZES = {8: 256, 4: 128}
# Smaller shards are not quantized, as in torchao and bitsandbytes: they would save no memory.
_SMALLEST_QUANTIZED = 4096
_MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(torch.optim.AdamW):
    """torch's AdamW on this rank's shards, all parameters at once.

    On DTensors its first step works out how each result is sharded, which takes 10 ms a parameter.
    """

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        is_complex = super()._init_group(group, *lists)
        for tensors in lists:  # parameters, gradients, moments, steps
            tensors[:] = map(local_shard, tensors)
        return is_complex


class ShardwiseAdamW(torch.optim.Optimizer):
    """AdamW that updates this rank's shard of one parameter at a time.

    bits: with 32, moments are in fp32, or in the parameter's dtype if that is wider. With 8 (arXiv
    2110.02861) or 4 (arXiv 2309.01507), moments are torchao's block-wise quantized tensors for
    every shard whose number of elements is at least 4096 and a multiple of the block size, and in
    fp32 for other shards. The update is computed in fp32 from the dequantized moments, which are
    then quantized again.

    stochastic_rounding: bf16 parameters are rounded up or down with probabilities that make the
    rounding correct on average, so that updates smaller than half a unit in the last place
    accumulate (arXiv 2010.06192). The random numbers depend only on the step and the shard, so
    replicas of a shard are rounded identically.

    offload: moments are kept in pinned host memory, and copied to the device and back around the
    update of their parameter. A step copies twice their bytes over the bus, and the device holds
    the moments of one shard at a time.

    found_inf: a scalar tensor set by the caller, as with torch's own fused optimizers. A step
    changes nothing if it is 1, which the host need not know.

    steps_before: the number of steps before the next one, those that have changed nothing included,
    set by the caller. Stochastic rounding draws its random numbers for it. None: it is read from
    the state. With found_inf that waits for the device, and counts what was not skipped.
    """

    found_inf: Tensor | None = None
    steps_before: int | None = None

    def __init__(
        self,
        parameters: list[nn.Parameter] | list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        bits: int = 32,
        stochastic_rounding: bool = False,
        offload: bool = False,
    ):
        super().__init__(
            parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self.bits, self.stochastic_rounding, self.offload = bits, stochastic_rounding, offload
        if self.uses_torchao:
            self._torchao_update = import_torchao("optim.adam").single_param_adam

    @property
    def uses_torchao(self) -> bool:
        return self.bits < 32 or self.stochastic_rounding

    @property
    def wants_compiler(self) -> bool:
        """Whether to compile torchao's update, which on a GPU is a long series of small kernels."""
        return self.uses_torchao and any(
            p.device.type != "cpu" for group in self.param_groups for p in group["params"]
        )

    @cached_property
    def compiled(self) -> bool:
        return self.wants_compiler and missing_compiler() is None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        assert closure is None, "the gradients are there already"
        with ExitStack() as stack:
            if self.compiled:
                # Every shape of a shard is compiled, and there may be more shapes than dynamo's
                # limit on recompilations.
                stack.enter_context(torch._dynamo.utils.disable_cache_limit())
                stack.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching")
            if self.stochastic_rounding:
                devices = (p.device for group in self.param_groups for p in group["params"])
                stack.enter_context(forked_rng(devices))
            pairs = ((p, group) for group in self.param_groups for p in group["params"])
            for index, (p, group) in enumerate(pairs):
                if p.grad is not None:
                    self._step_shard(p, group, index)

    def _step_shard(self, p: nn.Parameter, group: dict[str, Any], index: int) -> None:
        state = self.state[p]
        if not state:
            # torchao takes the step count on the host, PyTorch's fused kernel beside the parameter.
            # What the device decides to skip is counted there.
            on_host = self.uses_torchao and self.found_inf is None
            state["step"] = torch.zeros((), device="cpu" if on_host else p.device)
            state.update(
                {name: self._zero_moment(p, signed=name == "exp_avg") for name in _MOMENTS}
            )
        kept = [local_shard(state[name]) for name in _MOMENTS]
        # copy=True makes a copy even if the device is the CPU, as in the tests, so that they
        # exercise the same path.
        moments = (
            [m.to(p.device, non_blocking=True, copy=True) for m in kept] if self.offload else kept
        )
        shard, grad = local_shard(p.detach()), local_shard(p.grad)
        if self.stochastic_rounding:
            number = int(state["step"]) if self.steps_before is None else self.steps_before
            torch.manual_seed(_rounding_seed(p, number, index))
        if self.uses_torchao:
            self._update_by_torchao(shard, grad, state["step"], moments, group)
        else:
            exp_avg, exp_avg_sq = moments
            beta1, beta2 = group["betas"]
            adamw(
                *([shard], [grad], [exp_avg], [exp_avg_sq], [], [state["step"]]),
                fused=True,
                amsgrad=False,
                maximize=False,
                found_inf=self.found_inf,
                beta1=beta1,
                beta2=beta2,
                **{name: group[name] for name in ("lr", "weight_decay", "eps")},
            )
        if self.offload:
            for host, device in zip(kept, moments, strict=True):
                host.copy_(device, non_blocking=True)

    def _update_by_torchao(
        self, p: Tensor, grad: Tensor, step: Tensor, moments: list[Tensor], group: dict[str, Any]
    ) -> None:
        update = self._torchao_update
        if self.compiled:
            update = torch.compile(update, fullgraph=True, dynamic=False)
        with self._unless_skipped(p, step, *moments):
            step += 1
            lr = torch.tensor(group["lr"])  # a Python number would be a constant of compiled code
            constants = (*group["betas"], group["weight_decay"], group["eps"], True)
            update(p, grad, step, *moments, None, lr, *constants, self.stochastic_rounding)

    @contextmanager
    def _unless_skipped(self, *changed: Tensor) -> Iterator[None]:
        """Undo what this context changes if found_inf is 1, which only the device knows."""
        if self.found_inf is None:
            yield
            return
        pieces = [piece for x in changed for piece in plain_pieces(x)]
        before = [piece.clone() for piece in pieces]
        yield
        for piece, old in zip(pieces, before, strict=True):
            piece.copy_(torch.where(self.found_inf.to(piece.device) > 0, old, piece))

    def _zero_moment(self, p: nn.Parameter, *, signed: bool) -> Tensor:
        """Return zeros with the shape and layout of p, quantized if p's shard can be.

        A DTensor if p is one. signed: whether the moment can be negative.
        """
        local = local_shard(p.detach())
        if is_quantized(local.numel(), self.bits):
            module = import_torchao(f"optim.subclass_{self.bits}bit")
            kind = getattr(module, f"OptimState{self.bits}bit")
            zeros = kind.zeros(
                local.shape, signed, _BLOCK_SIZES[self.bits], local.device, dtype=torch.float32
            )
        else:
            zeros = torch.zeros_like(local, dtype=torch.promote_types(local.dtype, torch.float32))
        if isinstance(p, DTensor):
            # The global shape cannot be inferred from uneven shards.
            layout = {"shape": p.shape, "stride": p.stride()}
            zeros = DTensor.from_local(
                zeros, p.device_mesh, p.placements, run_check=False, **layout
            )
        # from_local moves a tensor to the mesh's device, even if p is on the host.
        zeros = zeros.to("cpu" if self.offload else p.device)
        if self.offload and p.device.type != "cpu":
            pin(zeros)
        return zeros


def _rounding_seed(p: nn.Parameter, step: int, index: int) -> int:
    place = ()
    if isinstance(p, DTensor):
        coordinates = zip(p.device_mesh.get_coordinate(), p.placements, strict=True)
        place = tuple(coordinate for coordinate, placement in coordinates if placement.is_shard())
    return seed_of(step, index, place)


def is_quantized(numel: int, bits: int) -> bool:
    """Return whether a shard of numel elements has moments quantized to that many bits."""
    return bits < 32 and numel >= _SMALLEST_QUANTIZED and numel % _BLOCK_SIZES[bits] == 0


def missing_compiler() -> str | None:
    """Return what torch.compile lacks on this machine to generate GPU code, or None."""
    if not has_triton():
        return "triton"
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        return "a C compiler"
    return None


# --- checks ---------------------------------------------------------------------------------------


def check_optimizer(config: OptimizerConfig) -> None:
    """Raise UserError if config needs a package that is missing. Needs no model."""
    if config.name in BITS:
        require_torchao(f'optimizer.name = "{config.name}"')
    if config.stochastic_rounding:
        require_torchao("optimizer.stochastic_rounding = true")


def check_shards(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> None:
    """Raise UserError if a low-bit optimizer would quantize none of the parameters.

    The parameters must be sharded already, and may be on the meta device.
    """
    bits = BITS.get(config.name, 32)
    largest = [_largest_shard(p) for p in parameters if p.requires_grad]
    if bits < 32 and not any(is_quantized(numel, bits) for numel in largest):
        raise UserError(
            f'optimizer.name = "{config.name}" would quantize nothing: no parameter has '
            f"{_SMALLEST_QUANTIZED:,} numbers or more on a rank, and a multiple of "
            f"{_BLOCK_SIZES[bits]} (the largest has {max(largest, default=0):,}). Set "
            'optimizer.name = "adamw", or use fewer ranks or a larger model.'
        )


def _largest_shard(p: nn.Parameter) -> int:
    """Return the number of elements of p's first shard, which no other shard exceeds.

    The result is the same on every rank.
    """
    ways = 1
    if isinstance(p, DTensor):
        sizes = zip(p.device_mesh.shape, p.placements, strict=True)
        ways = math.prod(size for size, placement in sizes if placement.is_shard())
    return -(-p.shape[0] // ways) * math.prod(p.shape[1:]) if p.dim() else 1


# --- state ----------------------------------------------------------------------------------------


def state_format(optimizer: torch.optim.Optimizer) -> str:
    """Return the format of the optimizer's state, as a value of the setting optimizer.name.

    A checkpoint with state of one format cannot be loaded by an optimizer with another.
    """
    bits = getattr(optimizer, "bits", 32)
    if any(map(momentum_of, optimizer.param_groups)):
        return "muon"
    return next((name for name, its_bits in BITS.items() if its_bits == bits), "adamw")


def momentum_of(group: dict[str, Any]) -> bool:
    """Return whether the parameters of a group have one momentum alone: those of muon.py."""
    return group.get("muon", False)


def state_bytes(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Return the bytes of this rank's optimizer state by dtype, the largest first.

    For example {"uint8": 1048576, "float32": 33280}. There is no state before the first step.
    """
    total: Counter[str] = Counter()
    for state in optimizer.state.values():
        for value in state.values():
            for piece in plain_pieces(value):
                total[str(piece.dtype).removeprefix("torch.")] += piece.nbytes
    return dict(total.most_common())


def expected_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Estimate the bytes of state on all ranks after the first step, counting replicas once."""
    bits = getattr(optimizer, "bits", 32)
    total = 0.0
    each_parameter = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    for p, group in each_parameter:
        each = float(torch.promote_types(p.dtype, torch.float32).itemsize)
        if is_quantized(_largest_shard(p), bits):
            each = bits / 8 + 4 / _BLOCK_SIZES[bits]  # each block has a scale in fp32
        moments = 1 if momentum_of(group) else len(_MOMENTS)
        total += moments * each * p.numel()
    return int(total)


@torch.no_grad()
def describe_state(optimizer: torch.optim.Optimizer) -> str:
    """Describe this rank's state in one line: bytes per parameter, bytes by dtype, and where it is.

    Call it after the first step.
    """
    by_dtype = state_bytes(optimizer)
    parameters = sum(
        local_shard(p.detach()).numel() for group in optimizer.param_groups for p in group["params"]
    )
    kinds = ", ".join(f"{count / 2**20:,.1f} MiB {dtype}" for dtype, count in by_dtype.items())
    kept = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    places = {plain_pieces(value)[0].device.type for value in kept}
    where = " and ".join(sorted("host" if place == "cpu" else "device" for place in places))
    return (
        f"{state_format(optimizer)}: {sum(by_dtype.values()) / max(1, parameters):.2f} bytes of "
        f"state a parameter, on a rank {kinds}, in {where} memory"
    )


def unaligned_blocks(state: Tensor, saved: list[tuple[torch.Size, torch.Size]], bits: int) -> bool:
    """Return whether this rank's shard of a quantized moment cannot be assembled from saved shards.

    saved holds the offsets and sizes of the shards in a checkpoint. Elements that share a scale
    must stay together: if either of the two shards is quantized, the part that both have in common
    must start and end at a border of that shard's blocks. Quantized shards usually start at a
    multiple of the block size, so the usual cause is a shard, here or in the checkpoint, that is
    too small or of the wrong size to be quantized.
    """
    here = local_box(state)
    row, block = math.prod(state.shape[1:]), _BLOCK_SIZES[bits]

    # Shards are compared as ranges of rows: the first one, the one after the last, and whether the
    # shard is quantized.
    def rows(sizes: Sequence[int], offsets: Sequence[int]) -> tuple[int, int, bool]:
        return offsets[0], offsets[0] + sizes[0], is_quantized(math.prod(sizes), bits)

    mine = rows(*here)
    for offsets, sizes in saved:
        theirs = rows(sizes, offsets)
        first, last = max(mine[0], theirs[0]), min(mine[1], theirs[1])
        for start, _, quantized in (mine, theirs) if first < last else ():
            if quantized and ((first - start) * row % block or (last - start) * row % block):
                return True
    return False
