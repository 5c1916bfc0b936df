"""Models that score documents, in a loop of one's own: against transformers on each document."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from helpers.meshes import mesh_of
from helpers.models import STARCODER2
from helpers.options import sections
from helpers.ranks import run_on_ranks
from titan_ulysses import parallelize, save_pretrained, shard
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.model import hf

LENGTHS = [(10, 13, 1), (6, 6, 12), (24,), (8, 16)]
"""The documents of the rows of a step: two for each of the data-parallel ranks, or four for one."""
LEFT = 3
"""Tokens of padding at the left of the last row."""
Found = tuple[list[Tensor], float, dict[str, Tensor]]


def classifier_of(table: dict[str, Any], dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A classifier of that config with weights that are the same everywhere."""
    table = dict(table)
    config = AutoConfig.for_model(table.pop("model_type"), **table)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def loss_of(scores: Tensor, kind: str, labels: Tensor) -> Tensor:
    """The loss of all documents, as transformers and TRL compute it of their scores."""
    if kind == "classes":
        return F.cross_entropy(scores, labels)
    if kind == "values":
        return F.mse_loss(scores[:, 0], labels)
    pairs = scores[: len(scores) // 2 * 2, 0].view(-1, 2)  # a reward model's
    return -F.logsigmoid(pairs[:, 0] - pairs[:, 1]).sum() / 4 + scores.square().sum() / 90


def labels_of(kind: str) -> Tensor:
    count = sum(map(len, LENGTHS))
    numbers = torch.arange(count)
    return numbers % 3 if kind == "classes" else numbers.double() / count


def ids_of(row: int) -> Tensor:
    generator = torch.Generator().manual_seed(row)
    return torch.randint(3, 61, (24,), generator=generator)


def model_for(kind: str) -> PreTrainedModel:
    more = {"num_labels": 3 if kind == "classes" else 1, "pad_token_id": 0}
    return classifier_of(STARCODER2 | more)


def plainly(kind: str) -> Found:
    """Unmodified transformers: each document is a batch of its own."""
    model, labels = model_for(kind), labels_of(kind)
    documents = [
        document[None]
        for row, lengths in enumerate(LENGTHS)
        for document in ids_of(row).split(lengths)
    ]
    documents[-2] = documents[-2][:, LEFT:]
    scores = torch.cat([model(input_ids=document).logits for document in documents])
    # The pairs of a row are in one micro-batch.
    parts = scores.split(list(map(len, LENGTHS))) if kind == "pairs" else [scores]
    loss = torch.stack([loss_of(part, kind, labels) for part in parts]).sum()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return [scores.detach()], loss.item(), gradients


def sharded(degrees: tuple[int, int, int], kind: str, options: dict[str, Any]) -> Found:
    """The same in two micro-batches, packed and cut."""
    mesh, model, labels = mesh_of(*degrees), model_for(kind), labels_of(kind)
    dtypes = {"param_dtype": torch.float64, "reduce_dtype": torch.float64}
    parallelize(model, mesh, **sections(**dtypes, **options))
    batches, first = [], 0
    for row, lengths in enumerate(LENGTHS):
        positions = torch.cat([torch.arange(n) for n in lengths])
        mask = torch.ones(24, dtype=torch.int64)
        if row == len(LENGTHS) - 1:
            mask[:LEFT] = 0
            positions[: lengths[0]] = (torch.arange(lengths[0]) - LEFT).clamp(min=0)
        own = labels[first : (first := first + len(lengths))]
        batch = {"input_ids": ids_of(row)[None], "position_ids": positions[None]}
        batch |= {"attention_mask": mask[None]} if row == len(LENGTHS) - 1 else {}
        batches.append(batch | ({} if kind == "pairs" else {"labels": own}))
    dp = mesh.batch.size()
    mine = batches[mesh.batch.get_local_rank() :: dp]
    found, total = [], 0.0
    for batch in shard(mine, model, accumulate=len(mine)):
        output = model(**batch)
        found.append(output.logits.detach())
        loss = output.loss
        if kind == "pairs":  # each rank that shares the rows computes the same loss
            loss = loss_of(output.logits, kind, labels)
        loss.backward()
        total += loss.item()
    gradients = {n: p.grad.full_tensor().cpu() for n, p in hf.named_parameters(model)}
    return found, total, gradients


CASES = [
    ((1, 1, 2), {"mlp_tile_tokens": 5}),
    ((1, 2, 1), {}),
    ((2, 1, 2), {}),
    ((1, 1, 4), {"stream_chunk_tokens": 12}),
]


@pytest.mark.parametrize("kind", ["classes", "values", "pairs"])
@pytest.mark.parametrize(
    "ranks", [2, pytest.param(4, marks=pytest.mark.slow)]
)  # the streamed case of 4 is that of every loss
def test_against_transformers(kind: str, ranks: int) -> None:
    """Scores, loss and every gradient, of documents whose last token is on any rank."""
    scores, loss, gradients = plainly(kind)
    for degrees, options in CASES:
        if degrees[0] * degrees[1] * degrees[2] != ranks:
            continue
        results = run_on_ranks(ranks, sharded, degrees, kind, options)
        for rank, (found, total, found_gradients) in enumerate(results):
            dp = degrees[0] * degrees[1]
            mine = [len(lengths) for lengths in LENGTHS]
            starts = [sum(mine[:row]) for row in range(len(mine))]
            own = range(rank // degrees[2], len(mine), dp)
            for row, part in zip(own, found, strict=True):
                expected = scores[0][starts[row] : starts[row] + mine[row]]
                assert torch.allclose(part, expected, rtol=0, atol=1e-12), (degrees, row)
            if kind != "pairs":
                assert total == pytest.approx(loss, rel=1e-12)
            for name, expected in gradients.items():
                off = (found_gradients[name] - expected).abs().max() / expected.abs().max()
                assert off < 1e-12, (degrees, name, off)


def save_and_refuse(folder: str) -> list[str]:
    model = model_for("classes")
    parallelize(model, mesh_of(1, 1, 2), param_dtype=torch.float64)
    save_pretrained(model, folder)
    said = []
    for batch in (
        {"input_ids": torch.ones(1, 8, dtype=torch.int64), "labels": torch.zeros(2)},
        {"input_ids": torch.ones(1, 8), "attention_mask": torch.zeros(1, 8)},
    ):
        with pytest.raises(UserError) as refused:
            next(shard([batch], model))
        said.append(str(refused.value))
    with pytest.raises(UserError) as refused:
        parallelize(model_for("classes"), mesh_of(1, 1, 2), memory={"stream_offload": "host"})
    return [*said, str(refused.value)]


def test_what_is_saved_and_refused(tmp_path: Any) -> None:
    labels, empty, offload = run_on_ranks(2, save_and_refuse, str(tmp_path))[0]
    assert "is [2], and its rows have 1 documents" in labels
    assert "have 0 documents" in empty
    assert "scores of a classifier" in offload
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64)
    expected = dict(model_for("classes").named_parameters())
    differ = [n for n, p in opened.named_parameters() if not torch.equal(p, expected[n])]
    assert not differ and expected.keys() == dict(opened.named_parameters()).keys()
