"""QLoRA (arXiv 2305.14314): the frozen weights of a model with adapters in 4 bits, NF4; or in the 8
or 4 bits of their release (released.py).

A weight in NF4 is stored row by row. A row of n numbers has n / 64 blocks, each with a scale, its
largest magnitude. A number is a code of 4 bits, for one of 16 levels between -1 and 1, times the
scale of its block. The scales of a row are quantized too ("double quantization"): their distance
from the row's mean in 8 bits. Codes, scales, and two fp32 numbers for the scales are the bytes of
the row, n / 2 + n / 64 + 8 of them: 0.52 bytes a number for n = 4,096.

These are the codes and scales that torchao's `to_nf4(row, 64, n // 64)` makes of each row
(tests/test_nf4.py). torchao's own tensor takes one mean over a whole weight, and blocks of 256
scales that go across rows, so that its numbers depend on more than a rank reads. Here a rank
quantizes the rows that it reads, and no block lies on two ranks, whatever the mesh is. FSDP gathers
the bytes, and `fsdp_post_all_gather` makes of them a plain tensor in the dtype of the computation.
So the layers, their tiles and their chunks compute as with any other weight, and only the weights
of gathered blocks are not in 4 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.parts import visited
from titan_ulysses.distributed.tensors import local_shard
from titan_ulysses.model.parameter_names import is_router, plain
from titan_ulysses.model.released import Form, Release

BLOCK = 64
"""Numbers of a row with a scale of their own."""
_SCALES = 8
"""Bytes of the two numbers that turn the 8 bits of the scales of a row into numbers."""
_AT_ONCE = 2**24
"""Numbers that are made from bytes at once, in fp32."""
_QUANTIZED_AT_ONCE = 2**22
"""Numbers that are turned into bytes at once: fewer, because each takes several tensors."""
# Appendix E of the paper, as torchao rounds them.
_LEVELS = (-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0) + (
    (0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0)
)

# --- rows of numbers <-> rows of bytes ------------------------------------------------------------


@torch.no_grad()
def quantize(numbers: Tensor, packed: Tensor | None = None) -> Tensor:
    """Return the bytes of rows: [..., n] of any float dtype -> uint8 [..., n / 2 + n / 64 + 8].

    n must be a multiple of 64. The result depends on nothing but the row, on no device. With
    `packed`, fill it, on its own device, some rows at a time: no more of them is ever in fp32.
    """
    columns = numbers.shape[-1]
    if packed is None:
        shape = (*numbers.shape[:-1], row_bytes(columns))
        packed = torch.empty(shape, dtype=torch.uint8, device=numbers.device)
    some = max(1, _QUANTIZED_AT_ONCE // columns)
    parts = packed.view(-1, row_bytes(columns)).split(some)
    for made, rows in zip(parts, numbers.reshape(-1, columns).split(some), strict=True):
        made.copy_(_quantize_rows(rows.to(packed.device)))
    return packed


def row_bytes(columns: int) -> int:
    """Return the bytes of a row of so many numbers."""
    return columns // 2 + columns // BLOCK + _SCALES


def _quantize_rows(rows: Tensor) -> Tensor:
    blocks = rows.float().unflatten(-1, (-1, BLOCK))
    scales = blocks.abs().amax(-1)
    levels = torch.tensor(_LEVELS, device=rows.device)
    divisors = torch.where(scales > 0, scales, 1)  # a block of zeros has the code of 0
    nearest = torch.bucketize(
        blocks / divisors[..., None], (levels[1:] + levels[:-1]) / 2, out_int32=True
    )
    codes = nearest.to(torch.uint8).flatten(-2)
    # In fp64 the sum of a row is exact, so that it does not depend on the order of summation.
    mean = scales.double().mean(-1, keepdim=True).float()
    distances = scales - mean
    factor = 128 / distances.abs().amax(-1, keepdim=True)
    factor = torch.where(factor.isinf(), 1, factor)  # all scales of the row are the same
    steps = (distances * factor).round().clamp(-128, 127).to(torch.int8)
    parts = [codes[:, ::2] << 4 | codes[:, 1::2], steps, torch.cat([factor, mean], -1)]
    return torch.cat([part.view(torch.uint8) for part in parts], -1)


@torch.no_grad()
def dequantize(packed: Tensor, out: Tensor) -> Tensor:
    """Fill `out` [..., n] with the numbers that rows of bytes stand for, and return it.

    They are computed in fp32 and then cast to the dtype of `out`.
    """
    columns = out.shape[-1]
    some = max(1, _AT_ONCE // columns)
    parts = zip(packed.flatten(0, -2).split(some), out.view(-1, columns).split(some), strict=True)
    for rows, numbers in visited([*parts]):
        numbers.copy_(_numbers(rows, columns))
    return out


def _numbers(rows: Tensor, columns: int) -> Tensor:
    """Return the numbers of rows of bytes, [rows, columns] in fp32."""
    codes, steps, ends = rows.split([columns // 2, columns // BLOCK, _SCALES], dim=-1)
    # A copy, because fp32 cannot begin at any byte.
    ends = ends.clone(memory_format=torch.contiguous_format)
    factor, mean = ends.view(torch.float32).unbind(-1)
    scales = steps.view(torch.int8) / factor[:, None] + mean[:, None]
    blocks = F.embedding(codes.int(), _pairs(rows)).view(len(rows), -1, BLOCK)
    return blocks.mul_(scales[..., None]).flatten(1)


def _pairs(like: Tensor) -> Tensor:
    """Return the two levels of each byte of codes, [256, 2], on the device of `like`.

    Kept on each device, because a copy from the host would wait for it. The planner's tensors,
    which have no data, must not be kept.
    """
    return (_make_pairs if type(like) is Tensor else _make_pairs.__wrapped__)(like.device)


@cache
def _make_pairs(device: torch.device) -> Tensor:
    levels = torch.tensor(_LEVELS, device=device)
    return torch.stack([levels.repeat_interleave(16), levels.repeat(16)], -1)


# --- a weight of a model --------------------------------------------------------------------------


@dataclass(frozen=True)
class NF4:
    """The form of weights as NF4Weight stores them: see `Form` in released.py."""

    name = "nf4"

    def packed_shape(self, shape: Sequence[int]) -> list[int]:
        return [*shape[:-1], row_bytes(shape[-1])]

    def dequantize(self, packed: Tensor, out: Tensor) -> Tensor:
        return dequantize(packed, out)


class NF4Weight(Tensor):
    """A frozen weight [..., n] that is stored as rows of bytes, and cut by its first dimension.

    It has the shape of the weight, and the dtype of the computation. The bytes are NF4 or another
    form, of a release. `copy_` quantizes what it is given to NF4; another form takes over bytes of
    its own alone. All else that it can do is what FSDP and DTensor need to shard, move and gather
    it; other operations raise NotImplementedError. See `dequantized` for its numbers.

    torch has no public way to make a tensor that has a shape and dtype without their memory, nor to
    fill one again that autograd has saved: what is used of its private parts is in this class.
    """

    _padded: Tensor
    """The bytes of its rows, and after them those with which FSDP makes all shards of one size."""
    form: Form

    @staticmethod
    def __new__(
        cls, packed: Tensor, shape: torch.Size, dtype: torch.dtype, form: Form | None = None
    ) -> NF4Weight:
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=packed.device)
        made._padded = packed
        made.form = form or NF4()
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def packed(self) -> Tensor:
        """The bytes of its rows, [..., row_bytes(n)]."""
        return self._padded[: self.shape[0]]

    def dequantized(self) -> Tensor:
        """Return the numbers that it stands for, in its dtype."""
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return self.form.dequantize(self.packed, out)

    def __repr__(self) -> str:
        return f"NF4Weight({tuple(self.shape)}, {self.dtype}, device={self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["packed"], (self.dtype, self.form)

    @staticmethod
    def __tensor_unflatten__(inner, about, shape, stride) -> NF4Weight:
        return NF4Weight(inner["packed"], shape, *about)

    def _like(self, packed: Tensor, rows: int | None = None) -> NF4Weight:
        rows = self.shape[0] if rows is None else rows
        return NF4Weight(packed, torch.Size([rows, *self.shape[1:]]), self.dtype, self.form)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        operation = _OPERATIONS.get(func) if isinstance(args[0], NF4Weight) else None
        result = operation(func, *args, **kwargs or {}) if operation else None
        if result is None:
            weight = next((x for x in args if isinstance(x, NF4Weight)), "")
            raise NotImplementedError(f"{func} of a weight in NF4, {weight!r}")
        return result

    def fsdp_pre_all_gather(self, mesh) -> tuple[tuple[Tensor, ...], Any]:
        """Return what FSDP gathers: the bytes of a shard, as many on each rank."""
        return (self._padded,), None

    def fsdp_post_all_gather(
        self,
        gathered: tuple[Tensor, ...],
        metadata: Any,
        param_dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """Return the whole weight in param_dtype, and the memory that FSDP frees afterwards.

        With `out`, which is what was returned the first time, fill it again.
        """
        (packed,) = gathered
        if out is None:
            shape = (packed.shape[0], *self.shape[1:])  # with the padding, which FSDP cuts off
            out = torch.empty(shape, dtype=param_dtype, device=packed.device)
            return self.form.dequantize(packed, out), (out,)
        # Autograd has saved it for backward, with the same numbers.
        with torch.autograd._unsafe_preserve_version_counter(out):
            self.form.dequantize(packed[: len(out)], out)
        return None


def _on_bytes(func, weight: NF4Weight, *args, dtype=None, **kwargs) -> Any:
    """Do to its bytes what does not change its dtype: copy them, ask where they are."""
    if dtype not in (None, weight.dtype):
        return None
    made = func(weight._padded, *args, **kwargs)
    return weight._like(made) if isinstance(made, Tensor) else made


def _new(func, weight: NF4Weight, size: list[int], *, dtype=None, **kwargs) -> Tensor | None:
    if dtype not in (None, weight.dtype):
        return None
    if tuple(size[1:]) == weight.shape[1:]:
        return weight._like(func(weight._padded, [size[0], *weight._padded.shape[1:]]), size[0])
    # What FSDP takes for the shard of a rank without a row.
    return weight._padded.new_empty(0) if list(size) == [0] else None


def _split(func, weight: NF4Weight, size: int, dim: int = 0) -> list[NF4Weight] | None:
    if dim:
        return None
    return [weight._like(part, len(part)) for part in func(weight.packed, size)]


def _slice(func, weight: NF4Weight, dim=0, start=0, end=None) -> NF4Weight | None:
    if dim:
        return None
    start, end, _ = slice(start, end).indices(weight.shape[0])
    rows = max(0, end - start)
    # The first rows keep their padding, which is a part of what FSDP gathers.
    return weight._like(weight._padded if not start else weight.packed[start:end], rows)


def _view(func, weight: NF4Weight, size: list[int]) -> NF4Weight | None:
    if list(size) == [-1]:
        # FSDP keeps such a view of each weight, and reads it where there are no hooks.
        return NF4Weight(weight._padded, torch.Size([weight.numel()]), weight.dtype, weight.form)
    return weight._like(weight._padded) if tuple(size) == weight.shape else None


def _copy(func, weight: NF4Weight, source: Tensor, non_blocking: bool = False) -> NF4Weight | None:
    if isinstance(source, NF4Weight):
        assert source.form == weight.form and source.shape == weight.shape, (source, weight)
        weight.packed.copy_(source.packed, non_blocking=non_blocking)
        return weight
    assert source.shape == weight.shape, (source.shape, weight.shape)
    if not isinstance(weight.form, NF4):
        return None
    quantize(source, weight.packed)
    return weight


_ATEN = torch.ops.aten
_OPERATIONS: dict[Any, Callable[..., Any]] = {
    _ATEN.detach.default: _on_bytes,
    _ATEN.clone.default: _on_bytes,
    _ATEN._pin_memory.default: _on_bytes,
    _ATEN.is_pinned.default: _on_bytes,
    _ATEN._to_copy.default: _on_bytes,
    _ATEN.empty_like.default: _on_bytes,
    _ATEN.new_zeros.default: _new,
    _ATEN.new_empty.default: _new,
    _ATEN.split.Tensor: _split,
    _ATEN.slice.Tensor: _slice,
    _ATEN.view.default: _view,
    _ATEN.copy_.default: _copy,
}

# --- the weights of a model -----------------------------------------------------------------------


def quantize_base(blocks: Iterable[nn.Module], release: Release | None = None) -> int:
    """Make the frozen matrices of blocks weights in NF4, in place and before sharding.

    These are the weights of linear layers except routers, and those of experts, if their rows have
    a multiple of 64 numbers; all others stay as they are. Those that `release` says keep the form
    that they were released in instead. Returns how many there are. The blocks may be on meta.
    UserError if there is none.
    """
    count, others = 0, set()
    for block in blocks:
        for owner, name, weight in _matrices(block):
            form: Form | None = release.form_of(owner, name) if release else NF4()
            if form is None:
                continue
            if isinstance(form, NF4) and weight.shape[-1] % BLOCK:
                others.add(weight.shape[-1])
                continue
            packed = weight.new_empty(form.packed_shape(weight.shape), dtype=torch.uint8)
            quantized = NF4Weight(packed, weight.shape, weight.dtype, form)
            if not weight.is_meta:
                quantized.copy_(weight.detach())
            setattr(owner, name, nn.Parameter(quantized, requires_grad=False))
            count += 1
    if not count and release and release.only:
        raise UserError(
            'lora.quantize_base = "released": no frozen matrix of the blocks is quantized in the '
            'release. Set it to "none" or "nf4".'
        )
    if not count:
        raise UserError(
            'lora.quantize_base = "nf4": no frozen matrix of the blocks has rows of a multiple of '
            f"{BLOCK} numbers ({', '.join(map(str, sorted(others))) or 'there is none'}). Set it "
            'to "none".'
        )
    return count


def _matrices(block: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Yield each frozen matrix, with the module that has it and its name there."""
    for path, module in list(block.named_modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            linear = isinstance(module, nn.Linear) and name == "weight"
            experts = parameter.ndim == 3 and plain(path).endswith("experts")
            frozen = not parameter.requires_grad and not is_router(plain(path))
            if frozen and (linear or experts):
                yield module, name, parameter


def _form_of(parameter: Tensor) -> Form | None:
    with torch.no_grad():
        shard = local_shard(parameter)
    return shard.form if isinstance(shard, NF4Weight) else None


def is_nf4(parameter: Tensor) -> bool:
    """Return whether this is a weight in NF4 or the form of a release, sharded or not."""
    return _form_of(parameter) is not None


def form_kept(parameter: Tensor) -> Form | None:
    """Return the form of its release in which a weight is stored, sharded or not; None: in none."""
    form = _form_of(parameter)
    return None if isinstance(form, NF4) else form


def describe_quantized(model: nn.Module) -> str:
    """Return a line about the frozen weights of a sharded model that are quantized; empty if none
    is.
    """
    found: dict[str, list[tuple[Tensor, Form]]] = {}
    rest = 0
    for parameter in model.parameters():
        if form := _form_of(parameter):
            found.setdefault(form.name.upper(), []).append((parameter, form))
        elif not parameter.requires_grad:
            rest += parameter.numel()
    parts = []
    for name, weights in found.items():
        numbers = sum(p.numel() for p, _ in weights)
        size = sum(math.prod(form.packed_shape(p.shape)) for p, form in weights)
        parts.append(
            f"{len(weights)} weights of {numbers:,} parameters in {name}, "
            f"{size / numbers:.3f} bytes each"
        )
        dtype = str(weights[0][0].dtype).removeprefix("torch.")
    if not parts:
        return ""
    return f"lora.quantize_base: {'; '.join(parts)}; {rest:,} frozen parameters stay in {dtype}"


@torch.no_grad()
def full_tensor(parameter: Tensor) -> Tensor:
    """Return the whole tensor, as numbers if it is in NF4. Collective if it is sharded."""
    if not isinstance(parameter, DTensor):
        return parameter.dequantized() if isinstance(parameter, NF4Weight) else parameter
    if not is_nf4(parameter):
        return parameter.full_tensor()
    packed = local_shard(parameter).packed
    shape = torch.Size([parameter.shape[0], *packed.shape[1:]])
    gathered = DTensor.from_local(
        packed,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    ).full_tensor()
    form = local_shard(parameter).form
    return NF4Weight(gathered, parameter.shape, parameter.dtype, form).dequantized()
