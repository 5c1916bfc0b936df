"""The loss head against the plain cross-entropy on all logits: the same loss and gradients, by
tiles.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from titan_ulysses.memory import loss_head as loss_module
from titan_ulysses.memory.loss_head import LossHead

HIDDEN, VOCABULARY = 6, 11
EXACT = {"rtol": 0.0, "atol": 0.0}
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


class Watch(TorchDispatchMode):
    """Counts matrix products and remembers the size of the largest tensor that any operator
    returned.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm", "linear")
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel())
        return out


def make(
    shape: tuple[int, ...], *, bias: bool = False, valid: float = 0.7
) -> tuple[nn.Linear, Tensor, Tensor]:
    """A linear head, hidden states [*shape, h] and labels [*shape], of which about the part `valid`
    is not masked.
    """
    torch.manual_seed(0)
    linear = nn.Linear(HIDDEN, VOCABULARY, bias=bias, dtype=torch.float64)
    hidden = torch.randn(*shape, HIDDEN, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(VOCABULARY, shape).where(torch.rand(shape) < valid, -100)
    return linear, hidden, labels


def plain_loss(linear: nn.Linear, hidden: Tensor, labels: Tensor, num_items: int) -> Tensor:
    logits = F.linear(hidden, linear.weight, linear.bias).flatten(0, -2)
    return F.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum") / num_items


def gradients(loss: Tensor, linear: nn.Linear, hidden: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [hidden, *linear.parameters()]))


def assert_equal_to_plain(
    linear: nn.Linear, hidden: Tensor, labels: Tensor, tile_tokens: int, upstream: float
) -> None:
    num_items = 17  # the whole step's, which no single call can know from its labels
    expected = plain_loss(linear, hidden, labels, num_items)
    loss = LossHead(linear, tile_tokens=tile_tokens)(hidden, labels, torch.tensor(num_items))
    torch.testing.assert_close(loss, expected, **CLOSE)
    expected_gradients = gradients(upstream * expected, linear, hidden)
    torch.testing.assert_close(
        gradients(upstream * loss, linear, hidden), expected_gradients, **CLOSE
    )


@pytest.mark.parametrize("shape", [(1, 14), (2, 7), (7, 2), (14,), (1, 1)])
@pytest.mark.parametrize("tile_tokens", [1, 3, 14, 100, 0])
def test_loss_and_gradients_equal_plain_cross_entropy(
    shape: tuple[int, ...], tile_tokens: int
) -> None:
    assert_equal_to_plain(
        *make(shape, valid=1.0 if shape == (1, 1) else 0.7), tile_tokens, upstream=1.0
    )


@pytest.mark.parametrize("tile_tokens", [1, 4, 0])
def test_bias(tile_tokens: int) -> None:
    assert_equal_to_plain(*make((2, 7), bias=True), tile_tokens, upstream=1.0)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("tile_tokens", [1, 4, 0])
def test_z_loss_and_label_smoothing(
    tile_tokens: int, softcap: float | None, smoothing: float
) -> None:
    """The squared log-normalizer is added for each label; without gradients, as in validation, it
    is not, and nothing is smoothed.
    """
    linear, hidden, labels = make((2, 7), bias=True)
    logits = linear(hidden).flatten(0, -2)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    squares = logits.logsumexp(dim=1)[labels.flatten() != -100] ** 2
    like = {"ignore_index": -100, "reduction": "sum"}
    cross_entropy = F.cross_entropy(logits, labels.flatten(), **like)
    smoothed = F.cross_entropy(logits, labels.flatten(), label_smoothing=smoothing, **like)
    expected = (smoothed + 0.3 * squares.sum()) / 17
    options = {"softcap": softcap, "z_loss": 0.3, "label_smoothing": smoothing}
    head = LossHead(linear, tile_tokens=tile_tokens, **options)
    loss = head(hidden, labels, torch.tensor(17))
    torch.testing.assert_close(loss, expected, **CLOSE)
    torch.testing.assert_close(
        gradients(loss, linear, hidden), gradients(expected, linear, hidden), **CLOSE
    )
    with torch.no_grad():
        torch.testing.assert_close(
            head(hidden, labels, torch.tensor(17)), cross_entropy / 17, **CLOSE
        )


@pytest.mark.parametrize("upstream", [-2.5, 0.125, 0.0])
def test_upstream_gradient_scales_every_gradient(upstream: float) -> None:
    assert_equal_to_plain(*make((2, 7), bias=True), 3, upstream=upstream)


def test_hidden_states_of_any_memory_layout() -> None:
    linear, hidden, labels = make((2, 7))
    for strided in (hidden[:, ::2], hidden.transpose(0, 1), hidden[:1].expand(3, -1, -1)):
        strided = strided.detach().requires_grad_()
        assert_equal_to_plain(
            linear, strided, labels.flatten()[0].expand(strided.shape[:-1]), 3, upstream=1.0
        )


def test_a_tile_without_a_label_adds_nothing() -> None:
    linear, hidden, labels = make((1, 12), bias=True, valid=1.0)
    labels[:, 4:8] = -100
    assert_equal_to_plain(linear, hidden, labels, 4, upstream=1.0)


@pytest.mark.parametrize("tile_tokens", [1, 5, 0])
@pytest.mark.parametrize("num_items", [0, 9])
def test_without_labels_loss_and_gradients_are_exactly_zero(
    tile_tokens: int, num_items: int
) -> None:
    linear, hidden, labels = make((2, 7), bias=True, valid=0.0)
    loss = LossHead(linear, tile_tokens=tile_tokens)(hidden, labels, torch.tensor(num_items))
    assert loss.item() == 0.0
    # A gradient of zeros and not None: this rank takes part in the reduction of the others.
    for gradient, of in zip(
        gradients(loss, linear, hidden), (hidden, linear.weight, linear.bias), strict=True
    ):
        torch.testing.assert_close(gradient, torch.zeros_like(of), **EXACT)


def test_a_masked_token_may_have_logits_that_are_not_finite() -> None:
    linear, hidden, labels = make((1, 6), valid=1.0)
    labels[0, 2:4] = -100
    spoilt = hidden.detach().clone()
    spoilt[0, 2], spoilt[0, 3] = float("nan"), 1e308
    spoilt.requires_grad_()
    num_items = torch.tensor(4)
    loss, expected = (
        LossHead(linear, tile_tokens=3)(x, labels, num_items) for x in (spoilt, hidden)
    )
    torch.testing.assert_close(loss, expected, **EXACT)
    gradients_of = [
        torch.autograd.grad(part, x)[0] for part, x in ((loss, spoilt), (expected, hidden))
    ]
    torch.testing.assert_close(*gradients_of, **EXACT)


def products(linear: nn.Linear, hidden: Tensor, labels: Tensor, *, backward: bool = True) -> int:
    """Matrix products of a step with 5 tiles."""
    with Watch() as watch:
        loss = LossHead(linear, tile_tokens=3)(hidden, labels, torch.tensor(14))
        if backward:
            loss.backward()
    return watch.products


def test_only_needed_gradients_are_computed() -> None:
    tiles = 5
    linear, hidden, labels = make((2, 7))
    # The logits, the hidden gradient, the weight gradient.
    assert products(linear, hidden, labels) == 3 * tiles

    expected_hidden, expected_weight = hidden.grad, linear.weight.grad
    hidden.grad = linear.weight.grad = None
    linear.weight.requires_grad_(False)
    assert products(linear, hidden, labels) == 2 * tiles
    assert linear.weight.grad is None
    torch.testing.assert_close(hidden.grad, expected_hidden, **EXACT)

    linear.weight.requires_grad_(True)
    assert products(linear, hidden.detach(), labels) == 2 * tiles
    torch.testing.assert_close(linear.weight.grad, expected_weight, **EXACT)


def test_without_grad_only_the_logits_are_computed() -> None:
    linear, hidden, labels = make((2, 7))
    expected = LossHead(linear, tile_tokens=3)(hidden, labels, torch.tensor(14))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert products(linear, hidden, labels, backward=False) == 5
            loss = LossHead(linear, tile_tokens=3)(hidden, labels, torch.tensor(14))
        assert not loss.requires_grad
        assert loss.item() == expected.item()


def test_never_all_logits() -> None:
    tokens, tile_tokens, vocabulary = 96, 4, 50
    torch.manual_seed(0)
    linear = nn.Linear(2, vocabulary)
    hidden = torch.randn(1, tokens, 2, requires_grad=True)
    labels = torch.randint(vocabulary, (1, tokens))
    with Watch() as plain:
        plain_loss(linear, hidden, labels, tokens).backward()
    with Watch() as tiled:
        LossHead(linear, tile_tokens=tile_tokens)(hidden, labels, torch.tensor(tokens)).backward()
    assert plain.largest == tokens * vocabulary
    assert tiled.largest == max(tile_tokens * vocabulary, tokens * 2)


def test_automatic_tiles_hold_64_mib_of_logits() -> None:
    for vocabulary, tile_tokens in ((128 * 1024, 128), (32 * 1024, 512), (2**25, 1)):
        assert (
            LossHead(nn.Linear(1, vocabulary, bias=False, device="meta")).tile_tokens == tile_tokens
        )


def weight_gradient_error(tile_tokens: int) -> float:
    """Relative error of the bf16 head's weight gradient, against fp64 on the same values."""
    torch.manual_seed(0)
    tokens, hidden_size, vocabulary = 512, 48, 96
    linear = nn.Linear(hidden_size, vocabulary, bias=False, dtype=torch.bfloat16)
    # Not centred: real hidden states and softmax probabilities are not, and sums that grow are
    # where bf16 fails.
    hidden = (torch.randn(1, tokens, hidden_size) + 1).bfloat16()
    labels = torch.randint(vocabulary, (1, tokens))
    LossHead(linear, tile_tokens=tile_tokens)(hidden, labels, torch.tensor(tokens)).backward()
    wide = nn.Linear(hidden_size, vocabulary, bias=False, dtype=torch.float64)
    wide.weight.data.copy_(linear.weight.data)
    plain_loss(wide, hidden.double(), labels, tokens).backward()
    return ((linear.weight.grad - wide.weight.grad).norm() / wide.weight.grad.norm()).item()


def test_weight_gradient_does_not_lose_precision_with_tiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, tiled = weight_gradient_error(512), weight_gradient_error(8)

    def add_in_bf16(total: Tensor, left: Tensor, right: Tensor, **_: bool) -> None:
        total.copy_(total.bfloat16() + left @ right)

    monkeypatch.setattr(loss_module, "add_product", add_in_bf16)
    bad = weight_gradient_error(8)
    assert tiled <= 1.25 * whole
    assert bad > 3 * whole, "the check above could not fail"


@pytest.mark.parametrize("tile_tokens", [1, 4096], ids=["between tiles", "in a tile"])
@pytest.mark.parametrize("differentiate", [True, False])
def test_thousands_of_cross_entropies_add_up_without_an_error(
    tile_tokens: int, differentiate: bool
) -> None:
    """In fp32 one after the other they are off by 1e-6, and by another amount for each number of
    tiles.
    """
    linear, hidden, labels = make((1, 2048))
    head, hidden = LossHead(linear.float(), tile_tokens=tile_tokens), hidden.detach().float()
    with torch.no_grad():
        each = head(hidden, labels, reduction="none").double()
    with torch.set_grad_enabled(differentiate):
        loss = head(hidden, labels, torch.tensor(2048))
    torch.testing.assert_close(loss.detach(), each.sum() / 2048, rtol=1e-14, atol=0.0)


def test_loss_is_fp64_and_gradients_have_the_parameters_dtype() -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        linear, hidden, labels = make((2, 7), bias=True)
        linear, hidden = linear.to(dtype), hidden.detach().to(dtype).requires_grad_()
        loss = LossHead(linear, tile_tokens=3)(hidden, labels, torch.tensor(14))
        assert loss.dtype == torch.float64  # what ranks add up
        assert {gradient.dtype for gradient in gradients(loss, linear, hidden)} == {dtype}


def test_second_backward_raises() -> None:
    linear, hidden, labels = make((2, 7))
    loss = LossHead(linear)(hidden, labels, torch.tensor(14))
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="cannot run twice"):
        loss.backward()


def test_without_labels_it_is_the_linear_layer() -> None:
    linear, hidden, _ = make((2, 7), bias=True)
    torch.testing.assert_close(LossHead(linear)(hidden), linear(hidden), **EXACT)


@pytest.mark.parametrize("bias", [False, True])
def test_parameters_keep_identity_and_names(bias: bool) -> None:
    linear = nn.Linear(HIDDEN, VOCABULARY, bias=bias)
    head = LossHead(linear, tile_tokens=3)
    assert list(head.state_dict()) == (["weight", "bias"] if bias else ["weight"])
    assert head.weight is linear.weight  # a tied embedding stays tied
    assert head.bias is linear.bias


# --- as on CUDA, with a stand-in for its products -------------------------------------------------


@pytest.mark.parametrize(
    ("vocabulary", "on_cuda", "on_cpu"),
    [(128_256, 2048, 130), (32_000, 8192, 524), (257, 1_044_480, 65_280), (2**24, 256, 1)],
)
def test_automatic_tiles(vocabulary: int, on_cuda: int, on_cpu: int) -> None:
    """1 GiB of fp32 logits in whole blocks of rows; 64 MiB on a CPU."""
    assert loss_module.automatic_tile(vocabulary, "cuda") == on_cuda
    assert loss_module.automatic_tile(vocabulary, "cpu") == on_cpu
    linear = nn.Linear(1, vocabulary, bias=False, device="meta")
    assert LossHead(linear, device_type="cuda").tile_tokens == on_cuda


def test_products_add_to_a_wider_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one kernel, as CUDA's addmm does: no product of the weight's size in between."""
    torch.manual_seed(0)
    linear = nn.Linear(8, 32, bias=False, dtype=torch.bfloat16)
    hidden = torch.randn(1, 20, 8).bfloat16().requires_grad_()
    labels = torch.randint(32, (1, 20))
    calls = []

    def addmm(total: Tensor, left: Tensor, right: Tensor, *, out_dtype, out: Tensor) -> Tensor:
        assert out is total and out_dtype == total.dtype == torch.float32
        assert left.dtype == right.dtype == torch.bfloat16
        calls.append(len(right))
        return out.addmm_(left.float(), right.float())

    exact = nn.Linear(8, 32, bias=False, dtype=torch.float64)
    exact.weight.data = linear.weight.data.double()
    expected = torch.autograd.grad(plain_loss(exact, hidden.double(), labels, 20), [exact.weight])[
        0
    ]
    monkeypatch.setattr(torch, "addmm", addmm)
    head = LossHead(linear, tile_tokens=8, device_type="cuda")
    loss = head(hidden, labels, torch.tensor(20))
    (found,) = torch.autograd.grad(loss, [head.weight])
    assert calls == [8, 8, 4]
    assert (found.double() - expected).norm() < 4e-3 * expected.norm()


def test_an_addmm_that_cannot_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Older versions of torch refuse an fp32 summand; a GPU is asked once."""

    def refuse(*_, **__) -> None:
        raise RuntimeError("self and mat2 must have the same dtype")

    plain = torch.zeros, torch.ones
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: plain[0](*size))
    monkeypatch.setattr(torch, "ones", lambda *size, device: plain[1](*size))
    monkeypatch.setattr(torch, "addmm", refuse)
    loss_module.can_add_wide.cache_clear()
    assert not loss_module.can_add_wide()
    loss_module.can_add_wide.cache_clear()
    monkeypatch.setattr(torch, "addmm", lambda total, *_, out, **__: out)  # a wrong result
    assert not loss_module.can_add_wide()
    loss_module.can_add_wide.cache_clear()
