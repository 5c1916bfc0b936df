"""AdamW: fused; or with moments of 8 or 4 bits, with stochastic rounding, with its state in host
memory.

The arithmetic is PyTorch's and torchao's. What is ours is that each step works on this rank's own
shard of a parameter, a parameter at a time, so that its state can come from the host for its step
and go back.
"""

from __future__ import annotations

import math
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim.adamw import adamw
from torch.utils._triton import has_triton

from titan_ulysses.config.schema import Optimizer as OptimizerConfig
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.seeds import seed_of
from titan_ulysses.distributed.tensors import local_shard, plain_pieces
from titan_ulysses.model.torchao import import_torchao, require_torchao

_BITS = {"adamw8bit": 8, "adamw4bit": 4}
_BLOCK_SIZES = {8: 256, 4: 128}  # numbers that share a scale: torchao's defaults
_SMALLEST_QUANTIZED = 4096  # as torchao and bitsandbytes have it: below it there is nothing to save
_MOMENTS = ("exp_avg", "exp_avg_sq")


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    config: OptimizerConfig,
    *,
    offload: bool = False,
    device_type: str | None = None,
) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) over all parameters that are trained; sharded parameters get sharded
    state.

    offload: the state lives in host memory, and visits the device a parameter at a time. Parameters
    that are on the host themselves (FSDP2's CPUOffloadPolicy, or a CPU mesh) have their state and
    their step there in any case. device_type: where they are to be taken to be, by who only plans
    (None: where they are).
    """
    trained = [p for p in parameters if p.requires_grad]
    offload = offload and any((device_type or p.device.type) != "cpu" for p in trained)
    options: dict[str, Any] = {
        "lr": config.lr,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.name == "adamw" and not config.stochastic_rounding and not offload:
        return torch.optim.AdamW(trained, **options, fused=True)
    bits, stochastic = _BITS.get(config.name, 32), config.stochastic_rounding
    return ShardwiseAdamW(
        trained, **options, bits=bits, stochastic_rounding=stochastic, offload=offload
    )


class ShardwiseAdamW(torch.optim.Optimizer):
    """AdamW whose step takes each rank's shard of each parameter by itself.

    bits = 32: moments in fp32, or wider as the parameter is. bits = 8 (arXiv 2110.02861) or 4
    (arXiv 2309.01507): torchao's block-wise quantized moments wherever a shard has at least 4096
    numbers and a multiple of the block size; fp32 elsewhere. The update is computed in fp32 from
    what the moments say, and they are quantized again.

    stochastic_rounding: bf16 parameters are rounded up or down with probabilities that make the
    rounding right on average, so that updates smaller than half a unit in the last place add up
    (arXiv 2010.06192). The random numbers depend on the step and on the shard: replicas of a shard
    round alike.

    offload: moments are kept in pinned host memory and copied to the device and back around the
    step of their parameter: twice their bytes over the bus a step, and no more than the largest
    shard's on the device at a time.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        bits: int,
        stochastic_rounding: bool,
        offload: bool,
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
        """Whether torchao's update is worth compiling: it is a long list of small kernels on a
        GPU.
        """
        return self.uses_torchao and any(
            p.is_cuda for group in self.param_groups for p in group["params"]
        )

    @cached_property
    def compiled(self) -> bool:
        return self.wants_compiler and missing_compiler() is None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        assert closure is None, "the gradients are there already"
        with ExitStack() as stack:
            if self.compiled:
                # A shape is a compilation, and there may be more shapes than dynamo's limit on
                # recompilations.
                stack.enter_context(torch._dynamo.utils.disable_cache_limit())
                stack.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching")
            if self.stochastic_rounding:
                devices = {
                    p.device.index
                    for group in self.param_groups
                    for p in group["params"]
                    if p.is_cuda
                }
                stack.enter_context(torch.random.fork_rng(devices=devices))
            for group in self.param_groups:
                for index, p in enumerate(group["params"]):
                    if p.grad is not None:
                        self._step_shard(p, group, index)

    def _step_shard(self, p: nn.Parameter, group: dict[str, Any], index: int) -> None:
        state = self.state[p]
        if not state:
            # torchao counts on the host, PyTorch's fused kernel where the parameter is.
            state["step"] = torch.zeros((), device="cpu" if self.uses_torchao else p.device)
            state.update(
                {name: self._zero_moment(p, signed=name == "exp_avg") for name in _MOMENTS}
            )
        kept = [local_shard(state[name]) for name in _MOMENTS]
        # copy=True: the way there and back is the same where the device is the CPU, as it is in the
        # tests.
        moments = (
            [m.to(p.device, non_blocking=True, copy=True) for m in kept] if self.offload else kept
        )
        shard, grad = local_shard(p.detach()), local_shard(p.grad)
        exp_avg, exp_avg_sq = moments
        if self.uses_torchao:
            if self.stochastic_rounding:
                torch.manual_seed(_rounding_seed(p, int(state["step"]), index))
            self._update_by_torchao(shard, grad, state["step"], exp_avg, exp_avg_sq, group)
        else:
            _update_fused(shard, grad, state["step"], exp_avg, exp_avg_sq, group)
        if self.offload:
            for host, device in zip(kept, moments, strict=True):
                host.copy_(device, non_blocking=True)

    def _update_by_torchao(
        self,
        p: Tensor,
        grad: Tensor,
        step: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        group: dict[str, Any],
    ) -> None:
        update = self._torchao_update
        if self.compiled:
            update = torch.compile(update, fullgraph=True, dynamic=False)
        step += 1
        lr = torch.tensor(group["lr"])  # as a number it would be compiled in
        beta1, beta2 = group["betas"]
        constants = (beta1, beta2, group["weight_decay"], group["eps"])
        update(
            p, grad, step, exp_avg, exp_avg_sq, None, lr, *constants, True, self.stochastic_rounding
        )

    def _zero_moment(self, p: nn.Parameter, *, signed: bool) -> Tensor:
        """Zeros in the shape and layout of p: a DTensor where p is one, quantized where p's shard
        can be.
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
            layout = {"shape": p.shape, "stride": p.stride()}  # uneven shards do not tell the whole
            zeros = DTensor.from_local(
                zeros, p.device_mesh, p.placements, run_check=False, **layout
            )
        # from_local has moved what belongs to a parameter on the host to the mesh's device.
        zeros = zeros.to("cpu" if self.offload else p.device)
        if self.offload and p.is_cuda:
            _pin(zeros)
        return zeros


def _update_fused(
    p: Tensor,
    grad: Tensor,
    step: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    group: dict[str, Any],
) -> None:
    beta1, beta2 = group["betas"]
    constants = {"lr": group["lr"], "weight_decay": group["weight_decay"], "eps": group["eps"]}
    tensors = ([p], [grad], [exp_avg], [exp_avg_sq], [], [step])
    switches = {"fused": True, "amsgrad": False, "maximize": False}
    adamw(*tensors, beta1=beta1, beta2=beta2, **constants, **switches)


def _pin(x: Tensor) -> None:
    """Move x's host memory to where the device reads it without the CPU."""
    for piece in plain_pieces(x):
        piece.set_(piece.pin_memory())


def _rounding_seed(p: nn.Parameter, step: int, index: int) -> int:
    place = ()
    if isinstance(p, DTensor):
        coordinates = zip(p.device_mesh.get_coordinate(), p.placements, strict=True)
        place = tuple(coordinate for coordinate, placement in coordinates if placement.is_shard())
    return seed_of(step, index, place)


def is_quantized(numel: int, bits: int) -> bool:
    """Whether the moments of a shard of numel numbers are kept in so many bits."""
    return bits < 32 and numel >= _SMALLEST_QUANTIZED and numel % _BLOCK_SIZES[bits] == 0


def missing_compiler() -> str | None:
    """What torch.compile lacks on this machine to write GPU code, or None."""
    if not has_triton():
        return "triton"
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        return "a C compiler"
    return None


# --- what is refused ------------------------------------------------------------------------------


def check_optimizer(config: OptimizerConfig) -> None:
    """UserError where a package is missing. Needs no model."""
    if config.name in _BITS:
        require_torchao(f'optimizer.name = "{config.name}"')
    if config.stochastic_rounding:
        require_torchao("optimizer.stochastic_rounding = true")


def check_shards(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> None:
    """UserError where a low-bit optimizer would quantize nothing. Parameters are sharded already
    and may be on meta.
    """
    bits = _BITS.get(config.name, 32)
    largest = [_largest_shard(p) for p in parameters if p.requires_grad]
    if bits < 32 and not any(is_quantized(numel, bits) for numel in largest):
        raise UserError(
            f'optimizer.name = "{config.name}" would quantize nothing: no parameter has '
            f"{_SMALLEST_QUANTIZED:,} numbers or more on a rank, and a multiple of "
            f"{_BLOCK_SIZES[bits]} (the largest has {max(largest, default=0):,}). Set "
            'optimizer.name = "adamw", or use fewer ranks or a larger model.'
        )


def _largest_shard(p: nn.Parameter) -> int:
    """Numbers in the first shard of p, which is never the smallest; the same on every rank."""
    ways = 1
    if isinstance(p, DTensor):
        sizes = zip(p.device_mesh.shape, p.placements, strict=True)
        ways = math.prod(size for size, placement in sizes if placement.is_shard())
    return -(-p.shape[0] // ways) * math.prod(p.shape[1:]) if p.dim() else 1


# --- what it keeps --------------------------------------------------------------------------------


def state_format(optimizer: torch.optim.Optimizer) -> str:
    """Whose state this is, by the name of the setting: checkpoints of one are of no use to
    another.
    """
    bits = getattr(optimizer, "bits", 32)
    return next((name for name, its_bits in _BITS.items() if its_bits == bits), "adamw")


def state_bytes(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of this rank's optimizer state by dtype, as in {"uint8": 1048576, "float32": 33280}.

    State comes with the first step: before it there is none.
    """
    total: Counter[str] = Counter()
    for state in optimizer.state.values():
        for value in state.values():
            for piece in plain_pieces(value):
                total[str(piece.dtype).removeprefix("torch.")] += (
                    piece.numel() * piece.element_size()
                )
    return dict(total.most_common())


def expected_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the state of all ranks together, replicas counted once, that there will be after the
    first step.
    """
    bits = getattr(optimizer, "bits", 32)
    total = 0.0
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        each = float(torch.promote_types(p.dtype, torch.float32).itemsize)
        if is_quantized(_largest_shard(p), bits):
            each = bits / 8 + 4 / _BLOCK_SIZES[bits]  # and a scale in fp32 for each block
        total += len(_MOMENTS) * each * p.numel()
    return int(total)


@torch.no_grad()
def describe_state(optimizer: torch.optim.Optimizer) -> str:
    """A line on the state of this rank: bytes a parameter, by dtype, where. After the first
    step.
    """
    by_dtype = state_bytes(optimizer)
    parameters = sum(
        local_shard(p.detach()).numel() for group in optimizer.param_groups for p in group["params"]
    )
    kinds = ", ".join(f"{count / 2**20:,.1f} MiB {dtype}" for dtype, count in by_dtype.items())
    places = {plain_pieces(state["exp_avg"])[0].device.type for state in optimizer.state.values()}
    where = " and ".join(sorted("host" if place == "cpu" else "device" for place in places))
    return (
        f"{state_format(optimizer)}: {sum(by_dtype.values()) / max(1, parameters):.2f} bytes of "
        f"state a parameter, on a rank {kinds}, in {where} memory"
    )


def unaligned_blocks(state: Tensor, saved: list[tuple[torch.Size, torch.Size]], bits: int) -> bool:
    """Whether this rank's shard of a quantized moment cannot be put together from the saved ones.

    saved: offsets and sizes of the shards in a checkpoint. Numbers that share a scale must stay
    together: where a shard is quantized, here or there, what is copied from or to it begins and
    ends with a block. Shards that are quantized begin with one, so this is about those too small or
    too odd to be, on either side.
    """
    here = compute_local_shape_and_global_offset(state.shape, state.device_mesh, state.placements)
    row, block = math.prod(state.shape[1:]), _BLOCK_SIZES[bits]

    def rows(sizes: tuple[int, ...], offsets: tuple[int, ...]) -> tuple[int, int, bool]:
        return offsets[0], offsets[0] + sizes[0], is_quantized(math.prod(sizes), bits)

    mine = rows(*here)
    for offsets, sizes in saved:
        theirs = rows(sizes, offsets)
        first, last = max(mine[0], theirs[0]), min(mine[1], theirs[1])
        for start, _, quantized in (mine, theirs) if first < last else ():
            if quantized and ((first - start) * row % block or (last - start) * row % block):
                return True
    return False
