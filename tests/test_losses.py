"""Losses beside cross-entropy, and tiled compute for any function: against full logits on every
mesh, their memory, and what is not a sum over tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from helpers.meshes import DP2, DP2_SP2, ONE, SP2, SP4, Degrees, mesh_of
from helpers.models import STARCODER2
from helpers.ranks import run_on_ranks
from test_library import real_model
from titan_ulysses import local_slice, parallelize, shard
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.memory.loss_head import LossHead
from titan_ulysses.memory.losses import (
    TokenStatistics,
    clipped_policy_loss,
    cross_entropies,
    distillation_loss,
    dpo_loss,
    token_statistics,
)
from titan_ulysses.memory.tiled import tiled
from titan_ulysses.model import hf
from titan_ulysses.train.evaluation import log_probs

ROWS, TOKENS = 4, 22  # a multiple of no mesh's P but 1 and 2
VOCABULARY = STARCODER2["vocab_size"]
Named = dict[str, Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")


def entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return -token_statistics(logits, labels, temperature=0.7).entropy.sum()


def inputs_of_losses() -> Named:
    """What the losses need besides the model: [B, S, ...]."""
    torch.manual_seed(2)
    size = (ROWS, TOKENS)
    ids = torch.randint(0, VOCABULARY, size)
    order = torch.rand(*size, VOCABULARY).argsort(dim=-1)
    return {
        "ids": ids,
        "labels": ids.masked_fill(torch.rand(size) < 0.3, -100),
        "old_log_probs": torch.randn(size, dtype=torch.float64) - 4,
        "reference_log_probs": torch.randn(size, dtype=torch.float64) - 4,
        "advantages": torch.randn(size, dtype=torch.float64),
        "teacher_hidden": torch.randn(*size, 5, dtype=torch.float64),
        "teacher_logits": torch.randn(*size, 4, dtype=torch.float64),
        "teacher_ids": order[..., :4],
    }


def losses() -> dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]]:
    """Each loss function, and the names of its inputs."""
    generator = torch.Generator().manual_seed(4)
    head = torch.randn(VOCABULARY, 5, dtype=torch.float64, generator=generator)
    policy = ("old_log_probs", "advantages", "reference_log_probs")
    return {
        "own": (cross_entropy, ()),
        "entropy": (entropy, ()),
        "policy": (partial(clipped_policy_loss, clip=(0.2, 0.3), kl=0.1, temperature=0.9), policy),
        "distill": (
            partial(distillation_loss, teacher_weight=head, temperature=2.0),
            ("teacher_hidden",),
        ),
        "distill_top_k": (distillation_loss, ("teacher_logits", "teacher_ids")),
    }


def dpo_of(of_labels: Tensor, reference: Tensor) -> Tensor:
    """The summed DPO loss of rows [chosen, rejected, chosen, ...], from log-probs [B, S]."""
    policy, other = of_labels.sum(1), reference.sum(1)
    return dpo_loss(policy[::2], policy[1::2], other[::2], other[1::2], beta=0.5).sum()


def gradients(model: nn.Module, loss: Tensor) -> Named:
    model.zero_grad()
    loss.backward()
    named = hf.named_parameters(model)
    return {
        name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone()
        for name, p in named
    }


def of_full_logits() -> dict[str, tuple[Tensor, Named]]:
    """Loss and gradients of each loss with an unmodified model and all of its logits."""
    model, given = real_model(), inputs_of_losses()
    labels = F.pad(given["labels"][:, 1:], (0, 1), value=-100)
    count = (labels != -100).sum()
    found = {}
    for name, (function, names) in losses().items():
        logits = model(given["ids"], use_cache=False).logits.flatten(0, 1)
        tokens = {key: given[key].flatten(0, 1) for key in names}
        loss = function(logits, labels.flatten(), **tokens) / count
        found[name] = loss.detach(), gradients(model, loss)
    statistics = token_statistics(model(given["ids"], use_cache=False).logits, labels)
    loss = dpo_of(statistics.log_probs, given["reference_log_probs"]) / (ROWS // 2)
    found["dpo"] = loss.detach(), gradients(model, loss)
    return found


def sharded(degrees: Degrees) -> dict[str, tuple[Tensor, Named]]:
    """The same with a sharded model, its batch cut into tiles of 3 tokens."""
    mesh, given = mesh_of(*degrees), inputs_of_losses()
    model = parallelize(real_model(), mesh, memory={"loss_tile_tokens": 3})
    mine = ROWS // mesh.batch.size()
    first = mesh.batch.get_local_rank() * mine
    given = {key: values[first : first + mine] for key, values in given.items()}
    loader = [{"input_ids": given["ids"], "labels": given["labels"]}]
    found = {}
    for name, (function, names) in losses().items():
        (batch,) = shard(loader, model)
        own = {key: local_slice(given[key], model) for key in names}
        loss = model(**batch, loss_function=function, loss_inputs=own).loss
        found[name] = loss.detach(), gradients(model, loss)
    (batch,) = shard(loader, model)
    whole = log_probs(model, batch).log_probs[:, :TOKENS]
    loss = dpo_of(whole, given["reference_log_probs"]) / (ROWS // 2)
    grads = gradients(model, loss)
    total = loss.detach()
    dist.all_reduce(total, group=mesh.batch.get_group())
    found["dpo"] = total, grads
    return found


@pytest.mark.parametrize(
    "degrees",
    [
        pytest.param(ONE, id="one"),
        pytest.param(SP2, id="sp2"),
        pytest.param(DP2, id="dp2"),
        pytest.param(SP4, id="sp4", marks=pytest.mark.slow),
        pytest.param(DP2_SP2, id="dp2-sp2", marks=pytest.mark.slow),
    ],
)
def test_every_loss_is_that_of_full_logits(degrees: Degrees) -> None:
    expected = run_on_ranks(1, of_full_logits)[0]
    for found in run_on_ranks(degrees[0] * degrees[1] * degrees[2], sharded, degrees):
        assert found.keys() == expected.keys()
        for loss, (value, grads) in expected.items():
            assert found[loss][0].item() == pytest.approx(value.item(), rel=1e-12), loss
            largest = max(grad.abs().max() for grad in grads.values())
            for name, grad in grads.items():
                difference = (found[loss][1][name] - grad).abs().max() / largest
                assert difference < 1e-12, (loss, name, difference)


# --- the head alone -------------------------------------------------------------------------------


def a_head(*, tokens: int = 12, tile: int = 4, width: int = 16, vocabulary: int = 64) -> Any:
    torch.manual_seed(1)
    head = LossHead(nn.Linear(width, vocabulary, bias=False), tile_tokens=tile)
    hidden = torch.randn(1, tokens, width, requires_grad=True)
    labels = torch.randint(0, vocabulary, (1, tokens))
    return head, hidden, labels, torch.tensor(tokens)


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes that are allocated while run runs, beyond those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = run()
    events = profiled.profiler.kineto_results.events()
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    del kept
    return most


def test_memory_grows_as_that_of_the_cross_entropy_head() -> None:
    def grows(tokens: int, **own: Any) -> int:
        head, hidden, labels, count = a_head(tokens=tokens, tile=64, vocabulary=512)
        return peak_bytes(lambda: head(hidden, labels, count, **own).backward())

    built_in = (grows(4096) - grows(1024)) / 3072
    own = (
        grows(4096, loss_function=cross_entropy) - grows(1024, loss_function=cross_entropy)
    ) / 3072
    assert 64 <= built_in < 512 * 4, "bytes a token: the gradient of hidden, and no logits"
    assert own <= 1.05 * built_in


def test_a_mean_is_found() -> None:
    def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    head, hidden, labels, count = a_head()
    with pytest.raises(UserError, match="loss_function mean_loss is not a sum over tokens"):
        head(hidden, labels, count, loss_function=mean_loss)
    with pytest.raises(UserError, match=r"of shape \[64\] for 12 tokens: return the sum"):
        head(hidden, labels, count, loss_function=lambda logits, _: logits.sum(0))


def mean_of_labels(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels)


@pytest.mark.parametrize("labelled", [1, 2, 40])
def test_a_mean_is_found_behind_a_masked_prompt(labelled: int) -> None:
    head, hidden, labels, count = a_head(tokens=340)
    some, none = labels.clone(), torch.full_like(labels, -100)
    some[:, :-labelled] = -100
    with pytest.raises(UserError, match="loss_function mean_of_labels is not a sum over tokens"):
        head(hidden, some, count, loss_function=mean_of_labels)
    head(hidden, none, count, loss_function=mean_of_labels)  # nothing tells yet
    with pytest.raises(UserError, match="loss_function mean_of_labels is not a sum over tokens"):
        head(hidden, labels, count, loss_function=mean_of_labels)
    head(hidden, labels, count, loss_function=cross_entropy)
    assert head.checked is cross_entropy


def test_a_loss_that_is_no_number_is_found() -> None:
    head, hidden, labels, count = a_head()
    with pytest.raises(UserError, match="gives nan for 12 tokens that have labels and finite"):
        head(hidden, labels, count, loss_function=lambda logits, _: logits.sum() * float("nan"))
    with torch.no_grad():  # no fault of the function's
        head.weight.fill_(float("nan"))
    assert head(hidden, labels, count, loss_function=cross_entropy).isnan()


def first_rank_without_labels() -> list[str]:
    """What this rank is told of a mean, and of a function that raises, in a loop of one's own."""

    def raises(logits: Tensor, labels: Tensor) -> Tensor:
        raise TypeError("of the user's own")

    mesh, told = mesh_of(*SP2), []
    model = parallelize(real_model(), mesh)
    ids = torch.arange(24).view(1, 24)
    loader = [{"input_ids": ids, "labels": ids.masked_fill(ids < 16, -100)}]
    for function in (mean_of_labels, raises):
        (batch,) = shard(loader, model)
        try:
            model(**batch, loss_function=function)
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")
    return told


def test_ranks_agree_on_what_is_a_sum() -> None:
    first, second = run_on_ranks(2, first_rank_without_labels)
    assert first[0] == second[0] and "mean_of_labels is not a sum over tokens" in first[0]
    assert second[1] == "TypeError: of the user's own"
    assert first[1] == "UserError: loss_function: TypeError: of the user's own"


def test_the_loss_of_each_token_is_summed_by_rows() -> None:
    head, hidden, labels, count = a_head()
    hidden, labels = hidden.view(3, 4, -1), labels.view(3, 4).clone()
    labels[1, 2] = -100
    whole = head(hidden, labels, count, loss_function=cross_entropy)
    assert head.row_losses is None
    by_token = head(hidden, labels, count, loss_function=cross_entropies)
    torch.testing.assert_close(by_token, whole)
    with pytest.raises(
        UserError, match=r"cross_entropy returned .* shape \[\].*loss of each token"
    ):
        head(hidden, labels, reduction="none", loss_function=cross_entropy)
    rows = [cross_entropy(head(hidden[i]), labels[i]) for i in range(3)]
    torch.testing.assert_close(head.row_losses, torch.stack(rows).double())


def test_losses_say_what_they_need() -> None:
    logits, labels = torch.randn(3, 8), torch.tensor([1, 2, 3])
    with pytest.raises(UserError, match="teacher_ids"):
        distillation_loss(logits, labels, teacher_logits=logits)
    with pytest.raises(UserError, match=r"kl = 0.1: the penalty needs reference_log_probs"):
        clipped_policy_loss(
            logits, labels, old_log_probs=logits[:, 0], advantages=logits[:, 0], kl=0.1
        )


# --- any function ---------------------------------------------------------------------------------


class Several(nn.Module):
    """Outputs of every kind: for each token, of another width, a sum, and without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 9), nn.Linear(9, 2)

    def forward(self, x: Tensor, weight: Tensor, flag: Tensor) -> tuple[Tensor, ...]:
        y = F.dropout(torch.tanh(self.one(x)) * weight.unsqueeze(-1), 0.0)
        best = y.argmax(dim=-1)
        return self.two(y), y.square().sum(), (y.sum(-1) * flag).detach(), best


@pytest.mark.parametrize("tile", [1, 5, 14, 100])
def test_a_function_by_tiles_is_the_function(tile: int) -> None:
    torch.manual_seed(0)
    function = Several().double()
    x = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    flag = torch.randint(0, 2, (2, 7))
    parameters = [x, weight, *function.parameters()]
    found = []
    for by_tiles in (False, True):
        tokens = {"weight": weight, "flag": flag}
        if by_tiles:
            out = tiled(function, x, tile_tokens=tile, parameters=function, **tokens)
        else:
            out = function(x, **tokens)
        assert [y.requires_grad for y in out] == [True, True, False, False]
        loss = out[0].sin().sum() + 0.3 * out[1]
        found.append([*out, *torch.autograd.grad(loss, parameters)])
    for one, other in zip(*found, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_random_numbers_are_the_same_in_backward() -> None:
    x = torch.ones(8, 64, dtype=torch.float64, requires_grad=True)
    dropped = tiled(partial(F.dropout, p=0.5), x, tile_tokens=3)
    (gradient,) = torch.autograd.grad(dropped.sum(), x)
    assert 0 < (dropped == 0).double().mean() < 1 and torch.equal(gradient, dropped)


def test_a_named_tuple_comes_back_as_one_also_of_no_tokens() -> None:
    for tokens in (0, 5):
        labels = torch.zeros(tokens, dtype=torch.long)
        out = tiled(token_statistics, torch.randn(tokens, 9), tile_tokens=2, labels=labels)
        assert isinstance(out, TokenStatistics) and out.log_probs.shape == (tokens,)


def test_what_cannot_be_tiled_is_named() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"labels is \[3\], and hidden is \[4, 3\]"):
        tiled(torch.add, x, tile_tokens=2, labels=torch.zeros(3))
    with pytest.raises(ValueError, match=r"output 0 of the function is \[3\] for a tile of 2"):
        tiled(lambda rows: rows.sum(0), x, tile_tokens=2)
