"""Core attention against plain attention with a full mask: documents, windows, soft-caps, sinks,
grouped heads.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from helpers.tensors import Largest
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.ulysses import cores, tiles
from titan_ulysses.ulysses.cores import CoreRequirements, choose_core, flash, flex, sdpa, varlen

DOCUMENTS = ((10, 14, 1, 5), (30,))


def reference(q, k, v, *, documents, scale, window=None, softcap=None, sinks=None) -> Tensor:
    """Scores of all pairs and one mask, as no core ever does it."""
    rows, length, heads, _ = q.shape
    k, v = (x.repeat_interleave(heads // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = torch.zeros(rows, length, length, dtype=torch.bool)
    for row, lengths in enumerate(documents):
        start = 0
        for size in lengths:
            distance = torch.arange(size)[:, None] - torch.arange(size)
            inside = (distance >= 0) & (distance < (window or size))
            seen[row, start : start + size, start : start + size] = inside
            start += size
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., :length]
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def inputs(
    *, with_sinks: bool, heads=(6, 2), value_size: int = 8, dtype=torch.float64
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(2, 30, count, size, generator=generator, dtype=dtype).requires_grad_()
        for name, count, size in (
            ("q", heads[0], 8),
            ("k", heads[1], 8),
            ("v", heads[1], value_size),
        )
    }
    if with_sinks:
        tensors["sinks"] = torch.randn(heads[0], generator=generator, dtype=dtype).requires_grad_()
    return tensors


@pytest.mark.parametrize(
    ("heads", "value_size"), [((6, 2), 8), ((6, 2), 5), ((3, 3), 4), ((5, 1), 13)], ids=str
)
@pytest.mark.parametrize("with_sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("window", [None, 1, 4, 9, 100])
@pytest.mark.parametrize(("core", "softcap"), [(sdpa, None), (sdpa, 2.0), (varlen, None)])
def test_equals_plain_attention(monkeypatch, core, softcap, window, with_sinks, heads, value_size):
    # Several blocks of queries in 30 tokens, the last one cut.
    monkeypatch.setattr(tiles, "BLOCK", 7)
    tensors = inputs(with_sinks=with_sinks, heads=heads, value_size=value_size)
    options = {"window": window, "softcap": softcap}
    options = {name: value for name, value in options.items() if value is not None}
    found = core(**tensors, documents=DOCUMENTS, scale=0.3, **options)
    expected = reference(**tensors, documents=DOCUMENTS, scale=0.3, **options)
    upstream = torch.randn(
        found.shape, dtype=found.dtype, generator=torch.Generator().manual_seed(1)
    )
    assert (found - expected).abs().max() < 1e-13
    gradients = zip(
        torch.autograd.grad(found, [*tensors.values()], upstream),
        torch.autograd.grad(expected, [*tensors.values()], upstream),
        strict=True,
    )
    assert max((ours - theirs).abs().max() for ours, theirs in gradients) < 1e-12


@pytest.mark.parametrize("core", [sdpa, varlen])
@pytest.mark.parametrize("window", [None, 4])
def test_a_document_is_alone(core, window):
    """Changing one document changes no bit of another one's output or gradients."""
    sizes = {"documents": DOCUMENTS, "scale": 0.3} | ({"window": window} if window else {})

    def run(changed: bool) -> list[Tensor]:
        tensors = inputs(with_sinks=False)
        if changed:
            with torch.no_grad():
                for tensor in tensors.values():
                    tensor[0, 10:24] += 1  # the second document of the first row
        output = core(**tensors, **sizes)
        return [output, *torch.autograd.grad(output.square().sum(), [*tensors.values()])]

    for before, after in zip(run(False), run(True), strict=True):
        assert torch.equal(before[0, :10], after[0, :10])
        assert torch.equal(before[0, 24:], after[0, 24:])
        assert torch.equal(before[1], after[1])
        assert not torch.equal(before[0, 10:24], after[0, 10:24])


@pytest.mark.parametrize("core", [sdpa, varlen])
def test_no_square_of_the_length(core):
    """The largest tensor grows with S * window, not with S * S."""
    length, window = 8192, 64
    q = torch.randn(1, length, 1, 8, requires_grad=True)
    with Largest() as largest:
        core(q, q, q, documents=((length,),), scale=0.3, window=window).sum().backward()
    block = tiles.SMALLEST_BLOCK
    assert largest.elements <= max(q.numel(), block * (block + window)) < length * length / 16


@pytest.mark.parametrize("with_sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize(("size", "value_size"), [(24, 16), (16, 24)])
def test_values_of_another_size_stay_on_the_flash_kernel(size, value_size, with_sinks):
    """Given unequal sizes SDPA would hold all scores, S x S, on a CPU; the flash kernel holds
    none.
    """
    length = 1024
    q = torch.randn(1, length, 2, size, requires_grad=True)
    k, v = (torch.randn(1, length, 1, n, requires_grad=True) for n in (size, value_size))
    options = {"sinks": torch.zeros(2)} if with_sinks else {}
    with Largest() as largest:
        sdpa(q, k, v, documents=((length,),), scale=0.3, **options).sum().backward()
    assert largest.elements <= 2 * length * 24 < length * length / 8


def test_flash_is_given_equal_sizes(monkeypatch):
    """flash-attn takes no others; what stands for it here refuses them, as it does."""
    asked = []

    def varlen(q, k, v, borders, *_, softmax_scale, **options) -> Tensor:
        assert q.shape[-1] == k.shape[-1] == v.shape[-1]
        asked.append(options | {"borders": borders.tolist()})
        whole = (x[None] for x in (q, k, v))
        return reference(*whole, documents=((10, 14, 1, 5, 30),), scale=softmax_scale)[0]

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=varlen))
    for value_size in (8, 5, 13):
        tensors = inputs(with_sinks=False, value_size=value_size)
        found = flash(**tensors, documents=DOCUMENTS, scale=0.3)
        expected = reference(**tensors, documents=DOCUMENTS, scale=0.3)
        assert found.shape == expected.shape and (found - expected).abs().max() < 1e-13
        gradients = [
            torch.autograd.grad(x.square().sum(), [*tensors.values()]) for x in (found, expected)
        ]
        assert max((a - b).abs().max() for a, b in zip(*gradients, strict=True)) < 1e-12
    assert asked[0]["borders"] == [0, 10, 24, 25, 30, 60] and asked[0]["causal"]
    assert not asked[0]["deterministic"]
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    flash(**tensors, documents=DOCUMENTS, scale=0.3)
    assert asked[-1]["deterministic"]


# --- choosing -------------------------------------------------------------------------------------


def block_sparse(
    q: Tensor, k: Tensor, v: Tensor, *, documents, scale: float, block: int = 8
) -> Tensor:
    """A user's core: a token sees its own block and the first token of its document, nothing
    else.
    """
    rows, length = q.shape[:2]
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    outputs = torch.empty_like(q)
    for row, lengths in enumerate(documents):
        start = 0
        for size in lengths:
            for first in range(start, start + size, block):
                last = min(first + block, start + size)
                keys = [start, *range(max(first, start + 1), last)]
                scores = torch.einsum("qhd,khd->hqk", q[row, first:last], k[row, keys]) * scale
                hidden = torch.tensor(keys) > torch.arange(first, last)[:, None]
                weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
                outputs[row, first:last] = torch.einsum("hqk,khd->qhd", weights, v[row, keys])
            start += size
    return outputs


def choose(
    name: str,
    needs: set[str] | None = None,
    device_type: str = "cpu",
    dtype=torch.float32,
    **more: int,
):
    return choose_core(name, CoreRequirements(frozenset(needs or ()), device_type, dtype, **more))


CUDA = {"device_type": "cuda", "dtype": torch.bfloat16}


def test_auto_takes_the_fastest_that_is_exact_and_says_why():
    core, why = choose("auto")
    assert core is sdpa and "varlen needs a CUDA device" in why
    core, why = choose("auto", {"softcap"})
    assert core is sdpa and "flex needs a CUDA device" in why
    assert choose("auto", {"window", "sinks"})[0] is sdpa
    assert choose("auto", {"sinks", "softcap"})[0] is sdpa
    core, why = choose("auto", device_type="cuda")
    assert core is sdpa and "flex is only faster for soft-caps" in why
    assert choose("flex", device_type="cuda")[0] is flex


@pytest.fixture
def no_package(monkeypatch):
    """A machine without flash-attn."""
    monkeypatch.setitem(sys.modules, "flash_attn", None)


def test_auto_on_cuda_takes_varlen_without_any_package(monkeypatch, no_package):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for needs in (set(), {"window"}, {"sinks"}, {"window", "sinks"}):
        for dtype in (torch.bfloat16, torch.float16):
            core, why = choose("auto", needs, "cuda", dtype, seq_len=4_000_000, head_size=128)
            assert core is varlen and why == "attention: varlen"
    # fp32: no flash kernel; SDPA by document, also where flex could.
    core, why = choose("auto", {"window"}, "cuda", torch.float32)
    assert core is sdpa and "varlen needs bfloat16" in why
    assert choose("auto", head_size=512, **CUDA)[0] is sdpa
    # An old GPU: no flash kernel.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    core, why = choose("auto", **CUDA)
    assert core is sdpa and "varlen needs an Ampere GPU or newer (this is Tesla T4)" in why


def test_softcaps_on_cuda(monkeypatch, no_package):
    """flash-attn, where it loads; flex, where its mask is small; else the slow core."""
    core, why = choose("auto", {"softcap"}, **CUDA, seq_len=65_536)
    assert core is flex and "flash needs the package flash-attn" in why
    core, why = choose("auto", {"softcap"}, **CUDA, seq_len=1_048_576)
    assert core is sdpa and "flex its block mask would take 1 GiB a row" in why
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())
    assert choose("auto", {"softcap"}, **CUDA)[0] is flash


def test_a_package_that_does_not_load(monkeypatch, tmp_path):
    """An install for another torch is found, but fails when it is imported."""
    broken = tmp_path / "flash_attn.py"
    broken.write_text("raise ImportError('flash_attn_2_cuda.so: undefined symbol')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    core, why = choose("auto", {"softcap"}, **CUDA)
    assert core is flex and "does not load here (flash_attn_2_cuda.so: undefined symbol)" in why


def test_flex_beyond_its_length():
    with pytest.raises(
        UserError, match=r"12\.5 GiB a row of 3,700,000 .*this model here: .*varlen"
    ):
        choose("flex", **CUDA, seq_len=3_700_000)
    q = torch.empty(1, cores.FLEX_TOKENS + 1, 1, 8, device="meta")
    with pytest.raises(UserError, match="its block mask would take"):
        flex(q, q, q, documents=((q.shape[1],),), scale=1.0)


def test_sdpa_on_cuda_is_not_given_groups_that_cost_all_scores():
    assert not cores._sdpa_takes_groups("cuda", torch.float32)
    assert cores._sdpa_takes_groups("cuda", torch.bfloat16)
    assert cores._sdpa_takes_groups("cpu", torch.float32)


@pytest.mark.parametrize(
    ("name", "needs", "device_type", "dtype", "message"),
    [
        ("flash", set(), "cpu", torch.bfloat16, "needs a CUDA device"),
        ("varlen", set(), "cpu", torch.bfloat16, "needs a CUDA device"),
        (
            "varlen",
            {"softcap"},
            "cuda",
            torch.bfloat16,
            r'model\.attention = "varlen": cannot do softcap\. Set .*"auto".*: .*sdpa\.',
        ),
        ("varlen", set(), "cuda", torch.float32, "needs bfloat16"),
        ("flash", set(), "cuda", torch.float32, "needs bfloat16"),
        ("flash", {"sinks"}, "cuda", torch.bfloat16, "cannot do sinks"),
        ("flex", set(), "cpu", torch.float32, "needs a CUDA device"),
        (
            "ring",
            set(),
            "cpu",
            torch.float32,
            r'model\.attention = "ring": no such core; choose auto, varlen',
        ),
        ("nowhere:core", set(), "cpu", torch.float32, "cannot be imported"),
        (f"{__name__}:gone", set(), "cpu", torch.float32, "cannot be imported"),
        (f"{__name__}:block_sparse", {"window"}, "cpu", torch.float32, "cannot do window"),
    ],
)
def test_a_core_that_cannot_is_refused(name, needs, device_type, dtype, message):
    with pytest.raises(UserError, match=message):
        choose(name, needs, device_type, dtype)


def test_a_core_of_the_users_own():
    core, why = choose(f"{__name__}:block_sparse")
    assert core is sys.modules[__name__].block_sparse and __name__ in why
    tensors = inputs(with_sinks=False)
    # One block is plain attention.
    found = core(**tensors, documents=DOCUMENTS, scale=0.3, block=1000)
    assert (found - reference(**tensors, documents=DOCUMENTS, scale=0.3)).abs().max() < 1e-13


@pytest.mark.gpu
@pytest.mark.parametrize("value_size", [8, 24])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(
    "core", [varlen, flash, pytest.param(flex, marks=pytest.mark.card("Triton")), sdpa]
)
def test_cuda_cores(core, window, softcap, value_size):
    needs = {
        name for name, value in (("window", window), ("softcap", softcap)) if value is not None
    }
    try:
        choose(core.__name__, needs, **CUDA)
    except UserError as error:
        pytest.skip(str(error))
    tensors = inputs(with_sinks=False, heads=(4, 2), value_size=value_size)
    tensors = {k: v.detach().to("cuda", torch.bfloat16) for k, v in tensors.items()}
    tensors = {k: torch.nn.functional.pad(v, (0, 8)).requires_grad_() for k, v in tensors.items()}
    options = {"window": window, "softcap": softcap}
    options = {name: value for name, value in options.items() if value is not None}
    found = core(**tensors, documents=DOCUMENTS, scale=0.3, **options)
    exact = {k: v.detach().double().cpu().requires_grad_() for k, v in tensors.items()}
    expected = reference(**exact, documents=DOCUMENTS, scale=0.3, **options)
    assert (found.double().cpu() - expected).abs().max() < 0.03
    gradients = zip(
        torch.autograd.grad(found.float().square().sum(), [*tensors.values()]),
        torch.autograd.grad(expected.square().sum(), [*exact.values()]),
        strict=True,
    )
    for ours, theirs in gradients:
        assert (ours.double().cpu() - theirs).abs().max() < 0.03 * theirs.abs().max()


def test_the_block_sparse_example(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "scripts" / "examples"))
    core, _ = choose("block_sparse:block_sparse")
    tensors = inputs(with_sinks=False)
    # Documents are shorter than a block: plain attention.
    found = core(**tensors, documents=DOCUMENTS, scale=0.3)
    assert (found - reference(**tensors, documents=DOCUMENTS, scale=0.3)).abs().max() < 1e-13
    monkeypatch.setattr(sys.modules["block_sparse"], "BLOCK", 8)
    sparse = core(**tensors, documents=DOCUMENTS, scale=0.3)
    assert (sparse[1, :16] - found[1, :16]).abs().max() < 1e-13  # two blocks: all is seen
    assert (sparse[1, 24:] - found[1, 24:]).abs().min() > 0
