"""Quantized releases: weights in 8 or 4 bits, read as the numbers that they stand for.

Such a weight is several tensors in the files: its codes, their scales, and what else the form has.
To checkpoint/ it is one tensor, of which a rank reads its own rows (`Quantized`). The numbers are
those of transformers' own operations where it has them without another package.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from titan_ulysses.distributed.errors import UserError
from titan_ulysses.model.parameter_names import plain

Slices = dict[str, Any]
"""The stored tensors of a weight by what they are, as safetensors' lazy slices."""


class Quantized:
    """A weight that several stored tensors make. It is read as safetensors' lazy slices are.

    ValueError if the shapes of the stored tensors contradict each other.
    """

    form = ""
    """What it is called in messages."""
    ends: dict[str, tuple[str, str]] = {}
    """For each ending of a stored tensor's name: what it is, and what ends the weight's name in its
    place. Longer endings come first."""
    needs: tuple[str, ...] = ("codes", "scales")

    def __init__(self, parts: Slices, settings: dict[str, Any]):
        """settings: quantization_config of config.json."""
        self.parts, self.settings = parts, settings
        self.shape = self._shape()

    def _shape(self) -> list[int]:
        return self._shape_of("codes")

    def _shape_of(self, part: str) -> list[int]:
        return list(self.parts[part].get_shape())

    def get_shape(self) -> list[int]:
        return self.shape

    def __getitem__(self, index: Any) -> Tensor:
        """Return numbers in fp32. Only the rows (of the first dimension) are cut before they are
        computed.
        """
        first, *others = index if isinstance(index, tuple) else (index,)
        start, stop, _ = (slice(None) if first is ... else first).indices(self.shape[0])
        rows = self.rows(start, stop) if start < stop else torch.empty(0, *self.shape[1:])
        rest = (slice(None), *others)
        return rows[rest]

    def rows(self, start: int, stop: int) -> Tensor:
        raise NotImplementedError

    @property
    def packed_form(self) -> Form | None:
        """How a frozen weight keeps these codes and scales in memory; None: it does not."""
        return None

    def packed(self, start: int, stop: int) -> Tensor:
        raise NotImplementedError


class FP8(Quantized):
    """Codes in float8 [..., rows, columns], and scales for blocks of them, for rows or for all.

    A code times the scale of its block, in fp32 (arXiv 2412.19437, section 3.3.2; its blocks are
    128 x 128). The last blocks of rows and columns may be cut, which transformers refuses or, where
    the blocks divide the weight evenly by chance, takes for smaller blocks.
    """

    form = "fp8"
    ends = {
        "_activation_scale": ("unused", ""),
        ".activation_scale": ("unused", ".weight"),
        ".qscale_act": ("unused", ".weight"),
        ".input_scale": ("unused", ".weight"),
        ".qscale_weight": ("scales", ".weight"),
        "_scale_inv": ("scales", ""),
        ".scale": ("scales", ".weight"),
    }

    def _shape(self) -> list[int]:
        shape, scales = self._shape_of("codes"), self._shape_of("scales")
        if not self.parts["codes"].get_dtype().startswith("F8"):
            raise ValueError("its codes are not in float8")
        *lead, rows, columns = shape
        grid = scales if len(scales) > 1 else [*scales, 1, 1][:2]
        if len(shape) not in (2, 3) or grid[:-2] != lead:
            raise ValueError(f"scales of shape {scales} for a weight of {shape}")
        given = self.settings.get("weight_block_size") or (0, 0)
        self.grid = grid[-2:]
        self.block = [
            size if size and -(-length // size) == count else _divide(length, count)
            for length, count, size in zip((rows, columns), self.grid, given, strict=True)
        ]
        return shape

    def rows(self, start: int, stop: int) -> Tensor:
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize

        codes, scales = self.rows_as_stored(start, stop)
        size, columns = codes.shape[-2:]
        block_rows, block_columns = self.block
        # A scale is that of whole blocks.
        below = -size % block_rows if self.grid[0] > 1 else 0
        codes = F.pad(codes.float(), (0, -columns % block_columns, 0, below))
        # The names let the operation of any version know which are the codes' scales.
        made = Fp8Dequantize(None).convert({"x.weight": codes, "x.weight_scale_inv": scales})
        numbers = made["x.weight"][0][..., :size, :columns].float()
        skipped = self._skipped(start)
        return numbers[skipped : skipped + stop - start] if skipped is not None else numbers

    def rows_as_stored(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return the codes of these rows and the blocks around them, and their scales [..., blocks
        of rows, blocks of columns].
        """
        codes, scales = self.parts["codes"], self.parts["scales"]
        if self._skipped(start) is None:
            found = scales[start:stop] if len(self.shape) == 3 else scales[...]
            return codes[start:stop], _wide(found.reshape(*found.shape[:-2], *self.grid))
        size = self.block[0]
        first, last = start // size, -(-stop // size)
        found = scales[first:last].reshape(last - first, self.grid[1])
        return codes[first * size : last * size], _wide(found)

    def packed(self, start: int, stop: int) -> Tensor:
        """Return the bytes of these rows as `FP8Rows` has them."""
        codes, scales = self.rows_as_stored(start, stop)
        each = 1 if self.grid[0] == 1 and len(self.shape) == 2 else self.block[0]
        scales = scales.repeat_interleave(each, -2) if each > 1 else scales
        scales = scales.expand(*codes.shape[:-1], -1) if self.grid[0] == 1 else scales
        scales = scales[..., : codes.shape[-2], :].contiguous()
        rows = torch.cat([codes.view(torch.uint8), scales.view(torch.uint8)], -1)
        skipped = self._skipped(start)
        return rows if skipped is None else rows[skipped : skipped + stop - start]

    @property
    def packed_form(self) -> Form:
        return FP8Rows(self.block[1] if self.settings.get("weight_block_size") else 0)

    def _skipped(self, start: int) -> int | None:
        """Return how many rows of its block are before a row; None if a block has all rows."""
        one = len(self.shape) == 3 or self.grid[0] == 1
        return None if one else start % self.block[0]


def _wide(scales: Tensor) -> Tensor:
    """Return scales in fp32. Bytes are exponents of 2, plus 127 (MXFP8)."""
    return scales.float() if scales.dtype != torch.uint8 else (scales.float() - 127).exp2()


def _divide(length: int, count: int) -> int:
    if count == 0 or length % count:
        raise ValueError(f"{count} scales for {length} rows or columns")
    return length // count


class CompressedFP8(FP8):
    """FP8 of compressed-tensors, whose product is in the dtype of the scales."""

    ends = {".input_scale": ("unused", ".weight"), ".weight_scale": ("scales", ".weight")}

    def rows(self, start: int, stop: int) -> Tensor:
        return super().rows(start, stop).to(_dtype(self.parts["scales"])).float()


class PackedInt(Quantized):
    """Whole numbers of 4 or 8 bits with a scale for a group of a row (compressed-tensors).

    32 / bits of them are in an int32 [rows, columns x bits / 32], the first in the lowest bits.
    They are stored plus 2^(bits - 1), zero points too, which are packed along the rows.
    """

    form = "int"
    ends = {
        ".weight_packed": ("codes", ".weight"),
        ".weight_scale": ("scales", ".weight"),
        ".weight_shape": ("shape", ".weight"),
        ".weight_zero_point": ("zeros", ".weight"),
        ".weight_g_idx": ("groups", ".weight"),
        ".input_scale": ("unused", ".weight"),
    }
    needs = ("codes", "scales", "shape")

    def _shape(self) -> list[int]:
        shape = self.parts["shape"][...].tolist()
        (rows, words), (_, groups) = self._shape_of("codes"), self._shape_of("scales")
        bits = [bits for bits in (4, 8) if -(-shape[-1] * bits // 32) == words]
        if len(shape) != 2 or rows != shape[0] or not bits or "groups" in self.parts:
            raise ValueError("groups in another order, or numbers of neither 4 nor 8 bits")
        self.bits, self.group = bits[0], _divide(shape[1], groups)
        return shape

    def rows(self, start: int, stop: int) -> Tensor:
        codes = self._unpack(self.parts["codes"][start:stop])[:, : self.shape[1]]
        scales = self.parts["scales"][start:stop]
        if "zeros" in self.parts:
            packed = 32 // self.bits
            first = start // packed
            zeros = self._unpack(self.parts["zeros"][first : -(-stop // packed)].t()).t()
            zeros = zeros[start - first * packed :][: stop - start]
            codes = codes - zeros.repeat_interleave(self.group, -1)
        wide = scales.float().repeat_interleave(self.group, -1)
        return (codes * wide).to(scales.dtype).float()

    def _unpack(self, words: Tensor) -> Tensor:
        shifts = torch.arange(0, 32, self.bits, dtype=torch.int32)
        codes = (words[..., None] >> shifts) & (2**self.bits - 1)
        return codes.flatten(-2) - 2 ** (self.bits - 1)


class MXFP4(Quantized):
    """Blocks of 32 numbers of 4 bits (E2M1), two a byte, and a power of two for each block.

    OCP Microscaling Formats (MX) 1.0, section 5. gpt_oss stores [experts, rows, columns / 32, 16]
    bytes of its weights [experts, columns, rows].
    """

    form = "mxfp4"
    ends = {"_blocks": ("codes", ""), "_scales": ("scales", "")}

    def _shape(self) -> list[int]:
        *lead, blocks, size = self._shape_of("codes")
        if self._shape_of("scales") != [*lead, blocks] or len(lead) != 2:
            raise ValueError("the scales do not fit the blocks")
        return [lead[0], blocks * 2 * size, lead[1]]

    def rows(self, start: int, stop: int) -> Tensor:
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        return convert_moe_packed_tensors(*self.rows_as_stored(start, stop)).float()

    def rows_as_stored(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return self.parts["codes"][start:stop], self.parts["scales"][start:stop]

    def packed(self, start: int, stop: int) -> Tensor:
        """Return the bytes of these rows as `MXFP4Experts` has them."""
        codes, scales = self.rows_as_stored(start, stop)
        return torch.cat([codes.flatten(-2), scales], -1)

    @property
    def packed_form(self) -> Form:
        return MXFP4Experts()


class BitsAndBytes(Quantized):
    """4 bits of bitsandbytes: codes of 16 levels, two a byte, the first in the higher bits.

    Each block of the weight, row after row, has a scale. The scales may be codes of 8 bits
    themselves, with a scale for 256 of them and a mean ("double quantization", arXiv 2305.14314).
    """

    form = "bitsandbytes"
    ends = {
        ".weight.nested_absmax": ("outer", ".weight"),
        ".weight.nested_quant_map": ("outer_levels", ".weight"),
        ".weight.absmax": ("scales", ".weight"),
        ".weight.quant_map": ("levels", ".weight"),
        ".weight.quant_state.bitsandbytes__nf4": ("state", ".weight"),
        ".weight.quant_state.bitsandbytes__fp4": ("state", ".weight"),
    }
    needs = ("codes", "scales", "levels", "state")

    @cached_property
    def state(self) -> dict[str, Any]:
        return json.loads(bytes(self.parts["state"][...].tolist()))

    def _shape(self) -> list[int]:
        shape = [int(size) for size in self.state["shape"]]
        if len(shape) != 2 or self._shape_of("codes")[0] * 2 != shape[0] * shape[1]:
            raise ValueError("the codes are not as many as the weight has numbers")
        return shape

    def rows(self, start: int, stop: int) -> Tensor:
        columns, block = self.shape[1], int(self.state["blocksize"])
        first, last = start * columns // block, -(-stop * columns // block)
        codes = self.parts["codes"][first * block // 2 : last * block // 2].flatten()
        levels = self.parts["levels"][...]
        numbers = levels[torch.stack([codes >> 4, codes & 15], -1).flatten().int()]
        scales = self._scales(first, last).repeat_interleave(block)[: len(numbers)]
        before = start * columns - first * block
        made = (numbers * scales)[before : before + (stop - start) * columns]
        return made.to(getattr(torch, self.state["dtype"])).float().view(-1, columns)

    def _scales(self, first: int, last: int) -> Tensor:
        scales = self.parts["scales"][first:last]
        if "outer" not in self.parts:
            return scales
        size = int(self.state["nested_blocksize"])
        outer = self.parts["outer"][...].repeat_interleave(size)[first:last]
        levels = self.parts["outer_levels"][...]
        return levels[scales.int()] * outer + self.state["nested_offset"]


# --- weights that keep the form of their release --------------------------------------------------


class Form(Protocol):
    """How a frozen weight is stored as bytes, of which those of a row are the row's alone."""

    name: str

    def packed_shape(self, shape: Sequence[int]) -> list[int]:
        """Return the shape of the bytes of a weight. The first dimension is the weight's."""

    def dequantize(self, packed: Tensor, out: Tensor) -> Tensor:
        """Fill `out`, some or all rows of a weight, with the numbers of its bytes; return it."""


@dataclass(frozen=True)
class FP8Rows:
    """A row's codes in E4M3, and after them its scales in fp32: one for `block` columns (0: one for
    all). Blocks of several rows have their scale in each row, so that no block is on two ranks.
    """

    block: int
    name = "fp8"

    def packed_shape(self, shape: Sequence[int]) -> list[int]:
        scales = -(-shape[-1] // self.block) if self.block else 1
        return [*shape[:-1], shape[-1] + 4 * scales]

    def dequantize(self, packed: Tensor, out: Tensor) -> Tensor:
        columns = out.shape[-1]
        some = max(1, _AT_ONCE // columns)
        flat = packed.flatten(0, -2).split(some)
        for rows, numbers in zip(flat, out.view(-1, columns).split(some), strict=True):
            codes = rows[:, :columns].view(torch.float8_e4m3fn).float()
            # A copy, because fp32 cannot begin at any byte.
            scales = rows[:, columns:].clone(memory_format=torch.contiguous_format)
            scales = scales.view(torch.float32)
            if self.block:
                scales = scales.repeat_interleave(self.block, -1)[:, :columns]
            numbers.copy_(codes.mul_(scales))
        return out


@dataclass(frozen=True)
class MXFP4Experts:
    """The blocks of gpt_oss: [experts, rows, columns / 2 + columns / 32] bytes, codes and then
    exponents, of a weight [experts, columns, rows].
    """

    name = "mxfp4"

    def packed_shape(self, shape: Sequence[int]) -> list[int]:
        experts, columns, rows = shape
        return [experts, rows, columns // 2 + columns // 32]

    def dequantize(self, packed: Tensor, out: Tensor) -> Tensor:
        columns = out.shape[1]
        levels = torch.tensor(_E2M1, device=packed.device)
        pairs = torch.stack([levels.repeat(16), levels.repeat_interleave(16)], -1)
        for rows, numbers in zip(packed.unbind(), out.unbind(), strict=True):
            codes, exponents = rows.split([columns // 2, columns // 32], dim=-1)
            blocks = F.embedding(codes.int(), pairs).view(len(rows), -1, 32)
            blocks = torch.ldexp(blocks, exponents.int()[..., None] - 127)
            numbers.copy_(blocks.flatten(1).t())
        return out


_AT_ONCE = 2**24
"""Numbers that are made from bytes at once, in fp32."""
_E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
_E2M1 += [-level for level in _E2M1]


class Release:
    """Which frozen weights of a model keep the form that they were released in."""

    def __init__(self, model: nn.Module, settings: Any, otherwise: Form | None):
        """settings: quantization_config. otherwise: the form of other weights; None: numbers.

        UserError if there is no `otherwise`, and the release is in no form that is kept.
        """
        self.names = {module: plain(name) for name, module in model.named_modules()}
        self.otherwise, self.only, form = otherwise, otherwise is None, form_of(settings)
        self.kept: Form | None = None
        if form is MXFP4:
            self.kept = MXFP4Experts()
        elif form is FP8 and self.only:  # NF4 is half of it
            block = settings.get("weight_block_size") or (0, 0)
            self.kept = FP8Rows(int(block[1]))
        if self.only and self.kept is None:
            what = f'is "{settings.get("quant_method")}"' if form else "is not quantized"
            raise UserError(
                'lora.quantize_base = "released" keeps fp8 and mxfp4, and the folder of '
                f'model.path {what}. Set it to "nf4" or "none".'
            )
        self.skipped = (settings.get("modules_to_not_convert") if self.kept else None) or []

    def form_of(self, owner: nn.Module, name: str) -> Form | None:
        from transformers.quantizers.quantizers_utils import should_convert_module

        experts = getattr(owner, name).ndim == 3
        is_quantized = experts or not isinstance(self.kept, MXFP4Experts)
        if not is_quantized or not should_convert_module(self.names[owner], self.skipped):
            return self.otherwise
        return self.kept or self.otherwise


def _dtype(stored: Any) -> torch.dtype:
    return stored[tuple(slice(0, 0) for _ in stored.get_shape()) or ...].dtype


# --- the weights of a folder ----------------------------------------------------------------------


def form_of(settings: Any) -> type[Quantized] | None:
    """Return the form of a folder with these settings (quantization_config); None: not known."""
    if not isinstance(settings, dict):
        return None
    method = settings.get("quant_method")
    if method == "compressed-tensors":
        groups = (settings.get("config_groups") or {"": {}}).values()
        formats = {group.get("format") or settings.get("format") for group in groups}
        return {
            "float-quantized": CompressedFP8,
            "naive-quantized": CompressedFP8,
            "pack-quantized": PackedInt,
        }.get(*formats if len(formats) == 1 else [""])
    if method == "bitsandbytes":
        return BitsAndBytes if settings.get("load_in_4bit") else None
    return {"fp8": FP8, "mxfp8": FP8, "mxfp4": MXFP4}.get(str(method))


def check_form(config: PreTrainedConfig) -> None:
    """Raise UserError for a model whose weights are quantized in a form that is not read."""
    settings = getattr(config, "quantization_config", None)
    if not isinstance(settings, dict) and hasattr(settings, "to_dict"):
        settings = settings.to_dict()
    if not settings or form_of(settings):
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    raise UserError(
        f'model: the weights are quantized ("{getattr(method, "value", method)}", by '
        "quantization_config of config.json) in a form that this version does not read. It reads "
        "fp8, mxfp4, float-quantized and pack-quantized ones of compressed-tensors, and 4 bits of "
        "bitsandbytes. Take the model in bf16, or save it dequantized by transformers."
    )


def weights_in(
    names: set[str], form: type[Quantized]
) -> tuple[dict[str, dict[str, str]], set[str]]:
    """Return the stored names of each quantized weight's parts, by the weight's name; and the
    stored names that are no tensors of their own.
    """
    found: dict[str, dict[str, str]] = {}
    for name in names:
        for end, (part, instead) in form.ends.items():
            if name.endswith(end):
                found.setdefault(name.removesuffix(end) + instead, {})[part] = name
                break
    for weight, parts in found.items():
        if weight in names:
            parts.setdefault("codes", weight)
    whole = {w: parts for w, parts in found.items() if all(x in parts for x in form.needs)}
    used = {name for parts in whole.values() for name in parts.values()} - set(whole)
    return whole, used
