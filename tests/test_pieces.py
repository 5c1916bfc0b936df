"""Attention of pieces of a sequence against plain attention with a full mask, in fp64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from helpers.tensors import Largest
from titan_ulysses.ulysses import flash_cuda, pieces, tiles
from titan_ulysses.ulysses.cores import flash, flex, sdpa, varlen
from titan_ulysses.ulysses.flash_cuda import CUDA_FLASH
from titan_ulysses.ulysses.pieces import pieces_of
from titan_ulysses.ulysses.scores import PieceKernels, Scores
from titan_ulysses.ulysses.tiles import CPU_FLASH, EXPLICIT

HEADS = (6, 2)
# (query_lengths, key_lengths)
SQUARE = (10, 14, 1, 5), (10, 14, 1, 5)
PIECES = {
    "square": SQUARE,
    "a later piece": ((9,), (31,)),
    "one query": ((1,), (23,)),
    "documents": ((7, 0, 4, 1), (19, 3, 4, 8)),
}


def plain(
    q,
    k,
    v,
    *,
    query_lengths,
    key_lengths,
    scale,
    window=None,
    softcap=None,
    ahead=0,
    sinks=None,
    sides=None,
) -> tuple[Tensor, Tensor]:
    """Scores of all pairs and one mask: output [N, Hq, Dv] and lse [Hq, N].

    sides: the keys left and right of a query's place that it sees, -1 for all, where these say what
    is masked (see `flash_forward`).
    """
    seen = torch.zeros(len(q), len(k), dtype=torch.bool)
    row = column = 0
    for queries, keys in zip(query_lengths, key_lengths, strict=True):
        places = torch.arange(queries)[:, None] + keys - queries + ahead
        distance = places - torch.arange(keys)
        inside = (distance >= 0) & (distance < (window or keys + ahead))
        if sides is not None:
            left, right = (keys + queries if side < 0 else side for side in sides)
            inside = (distance <= left) & (distance >= -right)
        seen[row : row + queries, column : column + keys] = inside
        row, column = row + queries, column + keys
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, len(q), 1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., : len(k)]
    return torch.einsum("hqk,khd->qhd", weights, v), scores.logsumexp(dim=-1)


def inputs(lengths, *, value_size: int = 8, heads=HEADS) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = map(sum, lengths)
    shapes = (
        (queries, heads[0], 8),
        (keys, heads[1], 8),
        (keys, heads[1], value_size),
        (queries, heads[0], value_size),
    )
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def compare(
    found: PieceKernels, lengths, *, value_size=8, heads=HEADS, with_sinks=False, **options
):
    q, k, v, grad = inputs(lengths, value_size=value_size, heads=heads)
    scores = Scores(*lengths, scale=0.3, **options)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    sinks = torch.linspace(-1, 2, heads[0], dtype=torch.float64).requires_grad_()
    more = {"sinks": sinks} if with_sinks else {}
    own = {name: x for name, x in vars(scores).items() if name != "chosen"}  # in test_sparse.py
    expected, expected_lse = plain(*leaves, **own, **more)
    output, lse = found.forward(q, k, v, scores)
    if with_sinks:
        output, lse = pieces.with_sinks(output, lse, sinks.detach())
        gradient = pieces.sinks_gradient(grad, output, lse, sinks.detach())
        (theirs,) = torch.autograd.grad(expected, sinks, grad, retain_graph=True)
        assert (gradient - theirs).abs().max() < 1e-12
    assert output.shape == expected.shape and (output - expected).abs().max() < 1e-12
    assert lse.shape == expected_lse.shape and (lse - expected_lse).abs().max() < 1e-12
    dk, dv = torch.full_like(k, 3.0), torch.full_like(v, 5.0)  # they are added to
    dq = found.backward(grad, q, k, v, output, lse, scores, dk=dk, dv=dv)
    theirs = torch.autograd.grad(expected, leaves, grad)
    for ours, expected_ in zip((dq, dk - 3, dv - 5), theirs, strict=True):
        assert (ours - expected_).abs().max() < 1e-12


@pytest.fixture(params=["explicit", "cpu", "fa2", "fa3"])
def kernel(request, monkeypatch) -> PieceKernels:
    """The pieces to test, with tiles of a few tokens."""
    monkeypatch.setattr(tiles, "BLOCK", 4)
    monkeypatch.setattr(tiles, "SMALLEST_BLOCK", 2)
    if request.param in SIDES:
        use_operators(request.param, monkeypatch.setattr)
        return CUDA_FLASH
    return {"explicit": EXPLICIT, "cpu": CPU_FLASH}[request.param]


@pytest.mark.parametrize("with_sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("window", [None, 1, 2, 3, 4, 7, 12, 100])
@pytest.mark.parametrize("lengths", PIECES.values(), ids=PIECES.keys())
def test_equals_plain_attention(kernel, lengths, window, with_sinks):
    compare(kernel, lengths, window=window, with_sinks=with_sinks)


@pytest.mark.parametrize("window", [None, 14, 19, 26, 100])
@pytest.mark.parametrize(("queries", "keys", "ahead"), [(7, 9, 7), (9, 5, 10), (1, 3, 1)])
def test_a_block_of_keys_before_all_queries(kernel, queries, keys, ahead, window):
    if window is not None:  # those that see none of the keys are not there
        queries = min(queries, keys - 1 + window - (keys - queries + ahead))
    compare(kernel, ((queries,), (keys,)), window=window, ahead=ahead)


@pytest.mark.parametrize(
    ("heads", "value_size"), [((6, 2), 5), ((3, 3), 4), ((5, 1), 13), ((4, 4), 8)], ids=str
)
@pytest.mark.parametrize("window", [None, 6])
def test_heads_and_values_of_all_sizes(kernel, heads, value_size, window):
    compare(kernel, PIECES["documents"], heads=heads, value_size=value_size, window=window)


@pytest.mark.parametrize("lengths", PIECES.values(), ids=PIECES.keys())
@pytest.mark.parametrize("window", [None, 6])
def test_softcap(monkeypatch, lengths, window):
    monkeypatch.setattr(tiles, "BLOCK", 4)
    compare(EXPLICIT, lengths, window=window, softcap=1.5)
    compare(pieces.KERNELS, lengths, window=window, softcap=1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("found", [EXPLICIT, CPU_FLASH], ids=["explicit", "cpu"])
def test_narrow_dtypes(monkeypatch, found, dtype):
    monkeypatch.setattr(tiles, "BLOCK", 4)
    lengths = PIECES["documents"]
    scores = Scores(*lengths, scale=0.3)
    narrow = [x.to(dtype) for x in inputs(lengths)]
    exact = [x.double() for x in narrow]
    results = []
    for q, k, v, grad in (narrow, exact):
        output, lse = found.forward(q, k, v, scores)
        assert output.dtype == q.dtype
        dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (k, v))
        dq = found.backward(grad, q, k, v, output, lse, scores, dk=dk, dv=dv)
        assert dq.dtype == q.dtype
        results.append([output, lse, dq, dk, dv])
    assert results[0][1].dtype == torch.float32
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    for ours, theirs in zip(*results, strict=True):
        assert (ours.double() - theirs).abs().max() < tolerance * max(1, theirs.abs().max())


def test_which_cores_have_pieces():
    assert all(pieces_of(core) for core in (sdpa, varlen, flash, flex))
    assert pieces_of(plain) is None


@pytest.mark.parametrize("window", [None, 700])
def test_tiles_of_the_real_size(window):
    """Two kernels with other tiles agree, on more tokens than a tile has."""
    lengths = (100, 2200), (2300, 2500)
    q, k, v, grad = inputs(lengths, heads=(2, 1))
    scores = Scores(*lengths, scale=0.3, window=window)
    results = []
    for found in (EXPLICIT, CPU_FLASH):
        output, lse = found.forward(q, k, v, scores)
        sums = {"dk": torch.zeros_like(k), "dv": torch.zeros_like(v)}
        dq = found.backward(grad, q, k, v, output, lse, scores, **sums)
        results.append([output, lse, dq, *sums.values()])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() < 1e-12


@pytest.mark.parametrize("found", [EXPLICIT, CPU_FLASH], ids=["explicit", "cpu"])
@pytest.mark.parametrize("window", [None, 64])
def test_no_tensor_has_all_keys_and_all_query_heads(found, window):
    queries, keys, heads, size = 16, 2**14, 16, 8
    lengths = (queries,), (keys,)
    q, k, v, grad = (
        torch.randn(n, h, size)
        for n, h in ((queries, heads), (keys, 1), (keys, 1), (queries, heads))
    )
    scores = Scores(*lengths, scale=0.3, window=window)
    sums = {"dk": torch.zeros_like(k), "dv": torch.zeros_like(v)}
    with Largest() as largest:
        output, lse = found.forward(q, k, v, scores)
        found.backward(grad, q, k, v, output, lse, scores, **sums)
    assert largest.elements <= max(k.numel(), heads * queries * tiles.BLOCK) < keys * heads * size


# --- the operators of CUDA (a windowed model by these: test_streaming.py) -------------------------

SCHEMAS_2_11 = {
    "_flash_attention_forward": "(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, "
    "Tensor? cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, bool "
    "return_debug_mask, *, float? scale=None, SymInt? window_size_left=None, SymInt? "
    "window_size_right=None, Tensor? seqused_k=None, Tensor? alibi_slopes=None) -> (Tensor output, "
    "Tensor softmax_logsumexp, Tensor rng_state, Tensor unused, Tensor debug_attn_mask)",
    "_flash_attention_backward": "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor "
    "out, Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, float "
    "dropout_p, bool is_causal, Tensor rng_state, Tensor unused, *, float? scale=None, SymInt? "
    "window_size_left=None, SymInt? window_size_right=None) -> (Tensor, Tensor, Tensor)",
}
"""As torch 2.11 publishes them (native_functions.yaml)."""


@pytest.mark.parametrize("value_size", [64, 50])
@pytest.mark.parametrize("window", [None, 128])
def test_torch_accepts_the_calls(monkeypatch, window, value_size):
    """The operators' own fake implementations, of this torch and by the schemas of torch 2.11."""
    calls = []
    for name, published in SCHEMAS_2_11.items():
        operator = getattr(torch.ops.aten, name)
        schema = torch._C.parse_schema(f"aten::{name}{published}")

        def call(*args, operator=operator, schema=schema, **kwargs):
            positional = [x.name for x in schema.arguments if not x.kwarg_only]
            by_keyword = [x.name for x in schema.arguments if x.kwarg_only]
            assert len(args) == len(positional) and set(kwargs) <= set(by_keyword)
            calls.append(schema.name)
            return operator(*args, **kwargs)

        monkeypatch.setattr(torch.ops.aten, name, call)
    for query_lengths, key_lengths in (((100, 28), (100, 28)), ((100, 28), (700, 40))):
        shapes = [(128, 8, 64), (sum(key_lengths), 2, 64), (sum(key_lengths), 2, value_size)]
        q, k, v = (torch.empty(x, dtype=torch.bfloat16, device="meta") for x in shapes)
        scores = Scores(query_lengths, key_lengths, scale=0.1, window=window)
        output, lse = CUDA_FLASH.forward(q, k, v, scores)
        assert output.shape == (128, 8, value_size) and lse.shape == (8, 128)
        assert output.dtype == torch.bfloat16 and lse.dtype == torch.float32
        dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
        dq = CUDA_FLASH.backward(output, q, k, v, output, lse, scores, dk=dk, dv=dv)
        assert dq.shape == q.shape and dq.dtype == q.dtype
    assert set(calls) == {f"aten::{name}" for name in SCHEMAS_2_11} and len(calls) > 4


def test_varlen_calls_the_operators_of_cuda(monkeypatch):
    """Grouped heads, a window, packed documents and two rows: one call forward, one backward."""
    calls = []

    def forward(*args, **kwargs):
        calls.append(args[3].tolist())
        return flash_forward(*args, **kwargs)

    def backward(*args, **kwargs):
        calls.append(args[6].tolist())
        return flash_backward(*args, **kwargs)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)
    monkeypatch.setattr(pieces, "_best", lambda q, softcap: CUDA_FLASH)
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(2, 15, h, 8, generator=generator, dtype=torch.float64).requires_grad_()
        for h in (6, 2, 2)
    ]
    sinks = torch.linspace(-1, 2, 6, dtype=torch.float64).requires_grad_()
    options = {"scale": 0.3, "window": 4, "sinks": sinks}
    lengths = (10, 5, 15)
    flat = (x.flatten(0, 1) for x in leaves)
    expected, _ = plain(*flat, query_lengths=lengths, key_lengths=lengths, **options)
    found = varlen(*leaves, documents=((10, 5), (15,)), **options)
    results = []
    for output in (found, expected.view_as(found)):
        gradients = torch.autograd.grad(output.square().sum(), [*leaves, sinks])
        results.append([output, *gradients])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() < 1e-12
    assert calls == [[0, 10, 15, 30]] * 2


# --- what stands for the operators of CUDA --------------------------------------------------------


def sides_of_fa2(left: int, right: int, max_q: int, max_k: int) -> tuple[int, int]:
    """FlashAttention 2's rule: csrc/flash_attn/flash_api.cpp, mha_varlen_fwd, mha_varlen_bwd and
    set_params_fprop, and torch's file of that name.

    By apply_mask_local of csrc/flash_attn/src/mask.h, a row then sees column < row + 1 + keys -
    queries + right, and column >= row + keys - queries - left.
    """
    left, right = (-1 if side >= max_k else side for side in (left, right))
    if left < 0 and right >= 0:
        left = max_k
    if left >= 0 and right < 0:
        right = max_k
    return left, right


def sides_of_fa3(left: int, right: int, max_q: int, max_k: int) -> tuple[int, int]:
    """FlashAttention 3's rule: hopper/flash_api.cpp, mha_fwd, mha_bwd and set_params_fprop. The
    mask of hopper/mask.h is that of FlashAttention 2.
    """
    left = -1 if left >= max_k - 1 else left
    right = -1 if right >= max_q - 1 else right
    if left < 0 and right < 0:
        return left, right
    return (max_k - 1 if left < 0 else left), (max_q - 1 if right < 0 else right)


SIDES = {"fa2": sides_of_fa2, "fa3": sides_of_fa3}


def use_operators(flash: str, set_attribute: Callable[..., None]) -> None:
    """Put the stand-ins in place, with the rule of one FlashAttention and blocks of a few keys."""
    set_attribute(flash_cuda, "CUDA_BLOCK", 5)
    for name, operator in (("forward", flash_forward), ("backward", flash_backward)):
        operator = partial(operator, sides=SIDES[flash])
        set_attribute(torch.ops.aten, f"_flash_attention_{name}", operator)


def flash_forward(
    q, k, v, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *,
    scale=None, window_size_left=None, window_size_right=None, sides=sides_of_fa2,
):  # fmt: skip
    """aten::_flash_attention_forward as it is in torch 2.11, for what this project asks of it.

    sides: which keys are seen, by the rule of a FlashAttention. A query that sees none gets NaN,
    where the kernels give 0.
    """
    assert not dropout_p and not return_debug_mask and q.shape[-1] % 8 == 0
    assert q.shape[-1] == k.shape[-1] == v.shape[-1]
    return (*plain(q, k, v, **_said(**{**locals()})), None, None, None)


def flash_backward(
    grad_out, q, k, v, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
    rng_state, unused, *, scale=None, window_size_left=None, window_size_right=None,
    sides=sides_of_fa2,
):  # fmt: skip
    """aten::_flash_attention_backward, from the output and log-sum-exp that it is given."""
    assert not dropout_p and q.shape[-1] == grad_out.shape[-1] == out.shape[-1]
    options = _said(**{**locals()})
    group = q.shape[1] // k.shape[1]
    _, own = plain(q, k, v, **options)
    # The gradient with weights p of this call is that of the rows' weights, p exp(own - lse).
    share = (own - logsumexp).exp().t()[..., None]
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        output, _ = plain(*leaves, **options)
        # ds = p (do v - do out): autograd gives do v - do output, and the lse's gradient the rest.
        dq, dk, dv = torch.autograd.grad(output, leaves, grad_out * share)
        _, lse = plain(*leaves, **options)
        rest = (grad_out * (output - out) * share).sum(dim=-1).t().detach()
        more = torch.autograd.grad(lse, leaves[:2], rest)
    assert group * k.shape[1] == q.shape[1]
    return dq + more[0], dk + more[1], dv


def _said(
    *, q, k, cum_seq_q, cum_seq_k, max_q, max_k, is_causal, scale, window_size_left,
    window_size_right, sides, **_,
) -> dict:  # fmt: skip
    """What the arguments of an operator say, in the words of `plain`."""
    assert cum_seq_q.dtype == cum_seq_k.dtype == torch.int32
    lengths = [tuple(x.diff().tolist()) for x in (cum_seq_q, cum_seq_k)]
    # The kernels look for no more than so many, and may be told of more.
    assert max_q == max(lengths[0]) and max_k >= max(lengths[1])
    assert (cum_seq_q[-1], cum_seq_k[-1]) == (len(q), len(k))
    right = 0 if is_causal else window_size_right
    return {
        "query_lengths": lengths[0],
        "key_lengths": lengths[1],
        "scale": scale,
        "sides": sides(window_size_left, right, max_q, max_k),
    }
