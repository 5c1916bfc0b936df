"""Frozen parameters: what they leave untouched, on every mesh; which patterns are refused."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from helpers import training
from helpers.models import LLAMA, STARCODER2
from helpers.ranks import run_on_ranks
from helpers.rows import make_rows
from helpers.training import Record, largest_difference, train_plain, train_sharded
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.memory import loss_head
from titan_ulysses.model import hf
from titan_ulysses.model.freezing import cast_frozen_params, fingerprint, freeze

STEPS = [
    [make_rows([(10, 13, 1), (6, 6, 12)], masked="uneven", vocab_size=61, seed=seed)]
    for seed in range(3)
]
TIED = {**STARCODER2, "tie_word_embeddings": True}
UNTIED = {**STARCODER2, "tie_word_embeddings": False}
# What is frozen at the beginning, so that nothing flows back into it, at the end, and in between.
CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "the embedding and a layer": (UNTIED, ["model.embed_tokens.*", "model.layers.0.*"]),
    "the head and MLPs": (UNTIED, ["lm_head.weight", "model.norm.*", "*.mlp.c_fc.*"]),
    "tied, by the second name": (TIED, ["lm_head.*"]),
}


def train_all(degrees: tuple[int, int, int]) -> dict[str, Record]:
    options = {"mlp_tile_tokens": 5, "offload": "host"}
    return {
        name: train_sharded(
            degrees,
            model,
            STEPS,
            torch.float64,
            prepare=partial(freeze, patterns=patterns),
            **options,
        )
        for name, (model, patterns) in CASES.items()
    }


@pytest.fixture(scope="module")
def expected() -> dict[str, Record]:
    return {
        name: train_plain(model, STEPS, torch.float64, prepare=partial(freeze, patterns=patterns))
        for name, (model, patterns) in CASES.items()
    }


@pytest.mark.parametrize("degrees", [(1, 1, 2), (1, 2, 1)], ids=str)
def test_the_rest_trains_as_in_plain_transformers(
    degrees: tuple, expected: dict[str, Record]
) -> None:
    found = run_on_ranks(2, train_all, degrees)[0]
    for case, record in found.items():
        worst = largest_difference(record, expected[case])
        assert max(worst.values()) < 1e-12, (case, {k: v for k, v in worst.items() if v >= 1e-12})
        trained = {name for gradients in record.gradients for name in gradients}
        frozen = record.parameters.keys() - trained
        untouched = hf_initialized(CASES[case][0])
        assert frozen and trained, case
        assert all(torch.equal(record.parameters[name], untouched[name]) for name in frozen), case
        assert not any(torch.equal(record.parameters[name], untouched[name]) for name in trained), (
            case
        )
    tied = found["tied, by the second name"]
    assert (
        "model.embed_tokens.weight" not in tied.gradients[0]
        and "model.embed_tokens.weight" in tied.parameters
    )


def hf_initialized(table: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The numbers that `train_sharded` and `train_plain` begin with."""
    return train_plain(table, [], torch.float64).parameters


def test_a_frozen_head_makes_no_gradient_of_its_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_head, "add_product", None)
    head = loss_head.LossHead(nn.Linear(8, 11, bias=False), tile_tokens=2)
    head.weight.requires_grad_(False)
    hidden, labels = torch.randn(1, 5, 8, requires_grad=True), torch.arange(5)[None]
    head(hidden, labels, torch.tensor(5)).backward()
    assert hidden.grad.abs().min() > 0


def build(**changes: Any) -> nn.Module:
    return hf.build_on_meta(hf.load_model_config("", LLAMA | changes), torch.float32)


FROZEN = ["model.embed_tokens.*", "*.mlp.*"]


def fingerprint_of(degrees: tuple[int, int, int]) -> int:
    return fingerprint(
        training.Run(degrees, LLAMA, STEPS[0][0], prepare=partial(freeze, patterns=FROZEN)).model
    )


def test_the_fingerprint_is_that_of_the_frozen_numbers_on_any_mesh() -> None:
    model = hf.build_on_meta(hf.load_model_config("", LLAMA), torch.float64)
    hf.allocate(model, torch.device("cpu"))
    hf.initialize(model, seed=0)
    assert fingerprint(model) == 0
    freeze(model, FROZEN)
    expected = fingerprint(model)
    for degrees in [(1, 2, 1), (2, 1, 1)]:
        assert run_on_ranks(2, fingerprint_of, degrees) == [expected, expected]
    with torch.no_grad():
        model.lm_head.weight.add_(1)
        assert fingerprint(model) == expected
        model.model.layers[1].mlp.up_proj.weight[0, 0] *= 1 + 1e-15
        assert fingerprint(model) != expected


def test_frozen_parameters_are_stored_in_the_dtype_of_the_computation() -> None:
    model = build(tie_word_embeddings=True)
    freeze(model, ["model.embed_tokens.*"])
    cast_frozen_params(model, torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16} == {
        "model.embed_tokens.weight"
    }


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ["model.embed_tokens.*", "model.embed_token.*"],
            'model.freeze = ["model.embed_tokens.*", "model.embed_token.*"]: "model.embed_token.*" '
            "matches no parameter. Did you mean model.embed_tokens.weight?",
        ),
        (
            ["model.layers.9.mlp.up_proj.weight"],
            "Did you mean model.layers.*.mlp.up_proj.weight or ",
        ),
        (
            ["zzz"],
            "matches no parameter. There are model.embed_tokens.weight, "
            "model.layers.*.self_attn.q_proj.weight, ",
        ),
        (["*"], 'model.freeze = ["*"] freezes every parameter: leave some to train.'),
    ],
    ids=["misspelt", "no such layer", "nothing like it", "everything"],
)
def test_patterns_that_are_refused(patterns: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        freeze(build(), patterns)
    assert message in str(caught.value)
