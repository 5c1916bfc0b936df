"""QLoRA: what a weight in NF4 is, training beside it on every mesh, its runs and its plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.models import STARCODER2
from helpers.ranks import run_on_ranks
from helpers.rows import make_rows
from helpers.training import Record, largest_difference, train_plain, train_sharded
from test_lora import STEPS, fill
from titan_ulysses.config.schema import LoRA
from titan_ulysses.model import hf
from titan_ulysses.model.freezing import fingerprint
from titan_ulysses.model.lora import add_adapters
from titan_ulysses.model.names import is_adapter
from titan_ulysses.model.nf4 import (
    NF4Weight,
    dequantize,
    full_tensor,
    is_nf4,
    quantize,
    quantize_base,
    row_bytes,
)
from titan_ulysses.setup.blocks import find_blocks

# Rows of 128 numbers; 130 rows of the first product of the MLP, which 4 ranks do not share evenly,
# and whose second product has rows of 130 numbers, which stay as they are.
MODEL = STARCODER2 | {
    "hidden_size": 128,
    "intermediate_size": 130,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}


def numbers_of(packed: Tensor, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return dequantize(packed, torch.empty(*packed.shape[:-1], columns, dtype=dtype))


# --- rows of bytes --------------------------------------------------------------------------------


def test_each_row_is_what_torchao_makes_of_it() -> None:
    to_nf4 = pytest.importorskip("torchao.quantization").to_nf4
    torch.manual_seed(0)
    weight = torch.randn(96, 512) * torch.rand(96, 512).exp()
    packed = quantize(weight)
    assert packed.shape == (96, 256 + 8 + 8) and row_bytes(512) == 272
    for row, found, numbers in zip(weight, packed, numbers_of(packed, 512), strict=True):
        theirs = to_nf4(row, block_size=64, scaler_block_size=512 // 64)
        assert torch.equal(found[:256], theirs.quantized_data)
        assert torch.equal(found[256:264].view(torch.int8), theirs.quantized_scalers)
        expected = theirs.get_original_weight()
        assert torch.allclose(numbers, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_a_row_depends_on_nothing_but_itself() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 5, 192, dtype=torch.float64)
    packed = quantize(weight)
    assert torch.equal(packed[4], quantize(weight[4]))
    assert torch.equal(packed[4, 2], quantize(weight[4, 2:3])[0])
    assert torch.equal(quantize(weight.float()), packed)


def test_rows_without_range() -> None:
    """One block a row, blocks that are alike, zeros: no number is divided by zero."""
    one = torch.randn(3, 64)
    zeros = torch.zeros(2, 128)
    alike = torch.ones(1, 256)
    assert not numbers_of(quantize(zeros), 128).any()
    assert torch.equal(numbers_of(quantize(alike), 256), alike)
    found = numbers_of(quantize(one), 64)
    assert torch.equal(found.abs().amax(-1), one.abs().amax(-1)), "the scale itself"
    half = torch.cat([torch.zeros(1, 64), torch.randn(1, 64)], -1)
    assert not numbers_of(quantize(half), 128)[0, :64].any()


def test_how_far_it_is_from_the_weight() -> None:
    """Half of the widest distance of two levels, of a block's largest number; in any dtype."""
    torch.manual_seed(0)
    weight = torch.randn(300, 1024)
    found = numbers_of(quantize(weight), 1024)
    scale = weight.unflatten(-1, (-1, 64)).abs().amax(-1).repeat_interleave(64, -1)
    off = (found - weight).abs() / scale
    assert 0.13 < off.max() < 0.16
    assert off.mean() < 0.05
    assert torch.equal(numbers_of(quantize(weight), 1024, torch.bfloat16), found.bfloat16())


# --- a sharded weight -----------------------------------------------------------------------------


def prepare(model: nn.Module) -> None:
    add_adapters(model, LoRA(rank=3, alpha=6))
    assert quantize_base(find_blocks(model)[1]) == 2 * 5


@torch.no_grad()
def round_base(model: nn.Module) -> None:
    """The weights of a plain model become the numbers that their bytes stand for."""
    rounded = 0
    for name, p in model.named_parameters():
        if ".layers." in name and "base_layer.weight" in name and p.shape[-1] % 64 == 0:
            p.copy_(numbers_of(quantize(p), p.shape[-1], p.dtype))
            rounded += 1
    assert rounded == 2 * 5


def fill_plain(model: nn.Module) -> None:
    round_base(model)
    fill(model)


def sharded_base(degrees: tuple[int, int, int]) -> tuple[dict[str, Tensor], int, list[int]]:
    """The whole weights, the checksum, and this rank's bytes of the weights in NF4."""
    from helpers.training import Run

    run = Run(
        degrees,
        MODEL,
        make_rows([(12,), (12,)], masked="none", vocab_size=61, seed=0),
        seed=3,
        prepare=prepare,
    )
    before = fingerprint(run.model)
    run.train(1)
    assert fingerprint(run.model) == before, "another one once FSDP has padded the shards"
    found = {name: full_tensor(p) for name, p in hf.named_parameters(run.model)}
    held = [p._local_tensor._padded.numel() for p in run.model.parameters() if is_nf4(p)]
    return found, before, held


def test_the_same_bytes_on_every_mesh() -> None:
    """Shards of 1, 2 and 4 ranks, also such as are not even, and with replicas."""
    plain = hf.build_on_meta(hf.load_model_config("", MODEL), torch.float64)
    add_adapters(plain, LoRA(rank=3, alpha=6))
    hf.allocate(plain, torch.device("cpu"))
    hf.initialize(plain, seed=3)
    round_base(plain)
    expected = {n: p for n, p in hf.named_parameters(plain) if not p.requires_grad}
    checksums = set()
    for degrees in [(1, 1, 1), (1, 2, 1), (2, 1, 2), (1, 2, 2)]:
        ranks = degrees[0] * degrees[1] * degrees[2]
        for found, checksum, held in run_on_ranks(ranks, sharded_base, degrees):
            assert all(torch.equal(found[name], values) for name, values in expected.items())
            checksums.add(checksum)
            shards = degrees[1] * degrees[2]
            rows = [128, 32, 32, 128, 130]
            assert sum(held) == 2 * sum(-(-r // shards) for r in rows) * row_bytes(128)
    assert len(checksums) == 1


def test_what_it_refuses() -> None:
    weight = NF4Weight(
        torch.zeros(4, row_bytes(64), dtype=torch.uint8), torch.Size([4, 64]), torch.bfloat16
    )
    for operation in (
        lambda: weight + 1,
        lambda: weight.t(),
        lambda: weight.float(),
        lambda: weight.view(64, 4),
        lambda: weight[:, :2],
    ):
        with pytest.raises(NotImplementedError, match="of a weight in NF4, NF4Weight"):
            operation()
    assert weight[1:3].shape == (2, 64) and weight.cpu().dtype == torch.bfloat16
    assert weight.dequantized().dtype == torch.bfloat16


# --- training -------------------------------------------------------------------------------------


def train_quantized(degrees: tuple[int, int, int], options: dict[str, Any]) -> Record:
    return train_sharded(
        degrees, MODEL, STEPS, torch.float64, prepare=prepare, fill=fill, **options
    )


@pytest.fixture(scope="module")
def plain() -> Record:
    def add(model: nn.Module) -> None:
        add_adapters(model, LoRA(rank=3, alpha=6))

    return train_plain(MODEL, STEPS, torch.float64, prepare=add, fill=fill_plain)


STREAMED = {"stream_chunk_tokens": 8}
TILED = {"mlp_tile_tokens": 5, "offload": "host"}


@pytest.mark.parametrize(
    ("degrees", "options"),
    [
        ((1, 1, 1), {"stream_chunk_tokens": -1, "checkpoint_every": 0}),
        ((1, 1, 2), TILED),
        ((1, 1, 2), STREAMED),
        ((1, 2, 2), TILED),
        ((2, 1, 2), STREAMED),
    ],
    ids=str,
)
def test_parity_with_a_plain_process(
    degrees: tuple[int, int, int], options: dict[str, Any], plain: Record
) -> None:
    """Loss, each adapter's gradient, norms and all parameters over three AdamW steps of two batches
    of packed documents with masked labels, beside the same rounded weights.
    """
    ranks = degrees[0] * degrees[1] * degrees[2]
    found = run_on_ranks(ranks, train_quantized, degrees, options)[0]
    worst = largest_difference(found, plain)
    assert max(worst.values()) < 1e-12, {k: v for k, v in worst.items() if v >= 1e-12}
    assert len(found.losses) == 3 and all(map(is_adapter, found.gradients[0]))
    assert len(found.gradients[0]) == 2 * 2 * 6
    assert min(gradient.abs().max() for gradient in found.gradients[0].values()) > 0
