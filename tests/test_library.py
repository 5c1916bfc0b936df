"""A training loop of one's own: what any loader yields against plain transformers, and against the
trainer's step.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    PreTrainedModel,
)

from helpers.families import model_of
from helpers.meshes import DP2, SP2, mesh_of
from helpers.models import LLAMA, STARCODER2
from helpers.precision import kept_in_fp64
from helpers.ranks import RankFailure, run_on_ranks
from helpers.rows import Row, local_batch, make_rows
from helpers.training import OPTIMIZER, Record, largest_difference, train_plain
from titan_ulysses import build_mesh, parallelize, score, shard, whole_sequences
from titan_ulysses.data.adapter import read_rows
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.mesh import Mesh
from titan_ulysses.model import hf
from titan_ulysses.optim.optimizer import build_optimizer
from titan_ulysses.setup.checks import check_group
from titan_ulysses.train.step import clip_gradients, train_step

ROOT = Path(__file__).resolve().parent.parent
STEPS = 2
Loaded = dict[str, Any]


def real_model(
    table: dict[str, Any] = STARCODER2, *, seed: int = 3, dtype: torch.dtype = torch.float64
):
    """A model with memory and weights, as from_pretrained returns it."""
    model = AutoModelForCausalLM.from_config(
        hf.load_model_config("", table), dtype=dtype, experts_implementation=hf.experts_path(dtype)
    )
    hf.initialize(model, seed)
    return model


def whole_parameters(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.detach().full_tensor() for name, p in hf.named_parameters(model)}


# --- what loaders yield: rows of documents, as transformers users have them -----------------------


def unshifted(row: Row) -> tuple[Tensor, Tensor]:
    """(ids, labels) [S] of a row. A document's first label is its first token: across the border,
    it must not count.
    """
    ids = [d.tokens[:-1] for d in row]
    labels = [torch.cat([d.tokens[:1], d.labels[:-1]]) for d in row]
    return torch.cat(ids), torch.cat(labels)


def plain_rows(rows: list[Row]) -> Loaded:
    ids, labels = zip(*map(unshifted, rows), strict=True)
    return {"input_ids": torch.stack(ids), "labels": torch.stack(labels)}


def padded(rows: list[Row], *, left: bool = False) -> Loaded:
    """Rows of different lengths, padded as a tokenizer pads; the padding has ids and labels that
    must not count.
    """
    pairs = [unshifted(row) for row in rows]
    size = max(len(ids) for ids, _ in pairs)
    pads = [(size - len(ids), 0) if left else (0, size - len(ids)) for ids, _ in pairs]
    return {
        "input_ids": torch.stack(
            [F.pad(ids, pad, value=7) for (ids, _), pad in zip(pairs, pads, strict=True)]
        ),
        "labels": torch.stack(
            [F.pad(labels, pad, value=7) for (_, labels), pad in zip(pairs, pads, strict=True)]
        ),
        "attention_mask": torch.stack(
            [F.pad(torch.ones_like(ids), pad) for (ids, _), pad in zip(pairs, pads, strict=True)]
        ),
    }


def left_padded(rows: list[Row]) -> Loaded:
    """With positions as `generate` counts them: 1 at padding."""
    batch = padded(rows, left=True)
    mask = batch["attention_mask"]
    return batch | {"position_ids": (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)}


def by_positions(rows: list[Row]) -> Loaded:
    positions = [torch.cat([torch.arange(len(d.labels)) for d in row]) for row in rows]
    return plain_rows(rows) | {"position_ids": torch.stack(positions)}


def by_seq_idx(rows: list[Row]) -> Loaded:
    """Padded as well."""

    def index(row: Row) -> Tensor:
        return torch.cat([torch.full((len(d.labels),), i) for i, d in enumerate(row)])

    batch = padded(rows)
    size = batch["input_ids"].shape[1]
    return batch | {
        "seq_idx": torch.stack([F.pad(index(row), (0, size - len(index(row)))) for row in rows])
    }


def flattened(rows: list[Row]) -> Loaded:
    """All documents in one row, by transformers' own collator, which says four times where they
    begin.
    """
    collate = DataCollatorWithFlattening(
        return_tensors="pt", return_flash_attn_kwargs=True, return_seq_idx=True
    )
    documents = [(d,) for row in rows for d in row]
    return dict(
        collate([dict(zip(("input_ids", "labels"), unshifted(d), strict=True)) for d in documents])
    )


def by_cu_seq_lens(rows: list[Row]) -> Loaded:
    """Nothing but the lengths, over two rows."""
    borders = torch.tensor([0, *(len(d.labels) for row in rows for d in row)]).cumsum(0)
    return plain_rows(rows) | {"cu_seq_lens_q": borders.int()}


PACKED = [(10, 13), (6, 6, 11), (1, 1, 20, 1), (23,)]  # rows of 23 tokens, which P does not divide
RAGGED = [(23,), (5,), (1,), (16,)]
LOADERS: dict[str, tuple[Callable[[list[Row]], Loaded], list[tuple[int, ...]]]] = {
    "unpacked": (plain_rows, [(23,)] * 4),
    "padded right": (padded, RAGGED),
    "padded left": (lambda rows: padded(rows, left=True), RAGGED),
    "padded left with positions": (left_padded, RAGGED),
    "position_ids": (by_positions, PACKED),
    "seq_idx and padding": (by_seq_idx, [(10, 13), (6, 5), (1, 1, 20, 1), (2, 3)]),
    "cu_seq_lens": (by_cu_seq_lens, PACKED),
    "flattened": (flattened, PACKED),
}


def steps_of(name: str) -> list[list[Row]]:
    return [
        make_rows(LOADERS[name][1], masked="uneven", vocab_size=61, seed=10 * step)
        for step in range(STEPS)
    ]


def loader_of(name: str, mesh: Mesh, accumulate: int = 1) -> Iterator[Loaded]:
    """This data-parallel rank's batches: its share of each step's rows, in `accumulate` pieces."""
    for rows in steps_of(name):
        count = len(rows) // mesh.batch.size() // accumulate
        first = mesh.batch.get_local_rank() * count * accumulate
        for piece in range(accumulate):
            yield LOADERS[name][0](rows[first + piece * count :][:count])


# --- the loop against plain transformers ----------------------------------------------------------


def train_by_loop(name: str, degrees: tuple[int, int, int], accumulate: int) -> Record:
    mesh, record = mesh_of(*degrees), Record()
    model = parallelize(real_model(), mesh, memory={"loss_tile_tokens": 5})
    optimizer = build_optimizer(model, OPTIMIZER)
    losses = []
    for batch in shard(loader_of(name, mesh, accumulate), model, accumulate=accumulate):
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        if len(losses) == accumulate:
            record.grad_norms.append(
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).full_tensor().item()
            )
            record.gradients.append(
                {name: p.grad.full_tensor() for name, p in hf.named_parameters(model)}
            )
            record.losses.append(sum(losses))
            optimizer.step()
            optimizer.zero_grad()
            losses = []
    record.parameters = whole_parameters(model)
    return record


CASES = [(name, SP2, 1) for name in LOADERS] + [
    ("padded left with positions", SP2, 2),
    ("seq_idx and padding", DP2, 1),
    ("flattened", DP2, 2),
    ("padded right", (1, 2, 2), 1),
]


@pytest.mark.parametrize(("name", "degrees", "accumulate"), CASES, ids=str)
def test_the_loop_equals_plain_transformers(
    name: str, degrees: tuple[int, int, int], accumulate: int
) -> None:
    """Loss, gradients, parameters after two AdamW steps; plain transformers sees each document
    alone.
    """
    found = run_on_ranks(
        degrees[0] * degrees[1] * degrees[2], train_by_loop, name, degrees, accumulate
    )
    assert all(other.losses == found[0].losses for other in found), (
        "the loss is not the same on every rank"
    )
    assert len(found[0].losses) == STEPS
    expected = train_plain(STARCODER2, [[rows] for rows in steps_of(name)], torch.float64)
    worst = largest_difference(found[0], expected)
    assert max(worst.values()) < 1e-12, {k: v for k, v in worst.items() if v >= 1e-12}


def losses_of_loaded(batches: list[Loaded]) -> list[float]:
    model = parallelize(real_model(), mesh_of(*SP2))
    return [model(**batch).loss.item() for batch in shard(batches, model)]


def test_the_loss_is_the_one_that_transformers_returns() -> None:
    """Of the very same batch. To 1e-6, because transformers computes its loss in fp32; and without
    labels: all.
    """
    rows = make_rows([(23,), (23,)], masked="none", vocab_size=61, seed=0)
    right = padded(make_rows([(23,), (9,)], masked="none", vocab_size=61, seed=1))
    right["labels"] = right["labels"].masked_fill(right["attention_mask"] == 0, -100)
    batches = [plain_rows(rows), {"input_ids": plain_rows(rows)["input_ids"]}, right]
    plain = real_model()
    expected = [plain(**{"labels": batch["input_ids"]} | batch).loss.item() for batch in batches]
    found = run_on_ranks(2, losses_of_loaded, batches)
    assert found[0] == found[1] == pytest.approx(expected, rel=1e-6)


# --- positions that start anywhere ----------------------------------------------------------------

DYNAMIC = STARCODER2 | {
    "max_position_embeddings": 11,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 3.0},
}
LEFT_PADDED = torch.tensor([[0] * 4 + [1] * 19, [1] * 23])
Piece = tuple[int, slice]
WHOLE: list[Piece] = [(0, slice(0, 23)), (1, slice(0, 23))]


def ahead(row: list[int]) -> Loaded:
    """Both rows count like this one."""
    return {"position_ids": torch.tensor([row, row])}


# What is given beside the ids, and what of the rows is a document.
GIVEN: dict[str, tuple[Loaded, list[Piece]]] = {
    "from 5": (ahead([*range(5, 28)]), WHOLE),
    "left padding that is counted": (
        ahead([*range(23)]) | {"attention_mask": LEFT_PADDED},
        [(0, slice(4, 23)), (1, slice(0, 23))],
    ),
    "falling back to 3": (
        ahead([*range(7, 17), *range(3, 16)]),
        [(row, slice(*ends)) for row in (0, 1) for ends in ((0, 10), (10, 23))],
    ),
    "a jump in a row with a mask": (
        ahead([*range(10), *range(30, 43)]) | {"attention_mask": torch.ones(2, 23).long()},
        WHOLE,
    ),
}


def loss_and_gradients(table: dict[str, Any], given: Loaded) -> tuple[float, dict[str, Tensor]]:
    model = parallelize(real_model(table), mesh_of(*SP2))
    (batch,) = shard([given], model)
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def plain_loss_and_gradients(
    table: dict[str, Any], given: Loaded, pieces: list[Piece]
) -> tuple[float, dict[str, Tensor]]:
    """Of transformers, which sees each document alone, with the positions given."""
    plain, total, labels = real_model(table), 0.0, 0
    rotary = plain.model.rotary_emb
    for row, here in pieces:
        plain.model.rotary_emb = deepcopy(rotary)  # "dynamic" remembers how long the longest was
        ids, positions = (given[key][row, here][None] for key in ("input_ids", "position_ids"))
        mask = torch.ones_like(ids)
        logits = plain(
            input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False
        ).logits
        total = total + F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
        labels += ids.shape[1] - 1
    loss = total / labels
    loss.backward()
    return loss.item(), {name: p.grad for name, p in plain.named_parameters()}


@pytest.mark.parametrize("case", [*GIVEN, "llama4, from 5"])
def test_positions_that_start_anywhere(case: str) -> None:
    """llama4 tunes the temperature by a token's place in what it is given, whatever its
    position.
    """
    given, pieces = GIVEN[case.removeprefix("llama4, ")]
    given = given | {
        "input_ids": torch.randint(61, (2, 23), generator=torch.Generator().manual_seed(0))
    }
    table = model_of("llama4_text") if "llama4" in case else DYNAMIC
    expected, gradients = kept_in_fp64(plain_loss_and_gradients, table, given, pieces)
    for loss, found in run_on_ranks(2, kept_in_fp64, loss_and_gradients, table, given):
        assert loss == pytest.approx(expected, rel=1e-12)
        for name, gradient in gradients.items():
            assert (found[name] - gradient).abs().max() <= 1e-12 * gradient.abs().max(), name


def test_a_row_that_transformers_takes_for_packed_is_packed() -> None:
    """The very batch, to 1e-6 as transformers computes its loss in fp32: a jump is a border where
    there is no mask.
    """
    ids = torch.randint(61, (2, 23), generator=torch.Generator().manual_seed(0))
    batch = ahead([*range(5, 15), *range(30, 43)]) | {"input_ids": ids}
    labels = ids.clone()
    labels[:, 10] = -100  # across the border, which transformers' loss does not look for
    expected = real_model()(**batch, labels=labels, use_cache=False).loss.item()
    assert run_on_ranks(2, losses_of_loaded, [batch])[0] == [pytest.approx(expected, rel=1e-6)]


# --- names ----------------------------------------------------------------------------------------


def names_and_shapes(model: PreTrainedModel) -> list[dict[str, Any]]:
    named = (model.state_dict().items(), model.named_parameters(), model.named_buffers())
    shapes = [{name: tuple(tensor.shape) for name, tensor in pairs} for pairs in named]
    return [*shapes, dict.fromkeys(name for name, _ in model.named_modules())]


def sharded_names(every: int) -> list[dict[str, Any]]:
    checkpoints = {"every": every} if every else {"mode": "none"}
    model = parallelize(real_model(), mesh_of(*SP2), activation_checkpoint=checkpoints)
    return names_and_shapes(model)


@pytest.mark.parametrize("every", [0, 1, 2])
def test_names_are_those_of_the_model_before(every: int) -> None:
    """Of parameters, buffers and modules, in their order."""
    found, expected = run_on_ranks(2, sharded_names, every)[0], names_and_shapes(real_model())
    assert [list(names.items()) for names in found] == [list(names.items()) for names in expected]


# --- the loop against the trainer -----------------------------------------------------------------


def by_trainer_and_by_loop(
    degrees: tuple[int, int, int],
) -> list[tuple[list[float], dict[str, Tensor]]]:
    mesh, bf16 = mesh_of(*degrees), {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    steps = [
        make_rows([(24,), (5, 19)], masked="uneven", vocab_size=61, seed=step)
        for step in range(STEPS)
    ]

    trained = hf.build_on_meta(hf.load_model_config("", LLAMA), torch.float32)
    parallelize(trained, mesh, **bf16)
    hf.allocate(trained, mesh.device)
    hf.initialize(trained, seed=3)
    optimizer = build_optimizer(trained, OPTIMIZER)
    batches = [local_batch(rows, mesh) for rows in steps]
    losses = [
        train_step(trained, optimizer, [batch], mesh, max_norm=0.5)[0].item() for batch in batches
    ]

    model = parallelize(real_model(LLAMA, dtype=torch.float32), mesh, **bf16)
    optimizer = build_optimizer(model, OPTIMIZER)
    count, rank = 2 // mesh.batch.size(), mesh.batch.get_local_rank()
    found = []
    for batch in shard([by_positions(rows[rank * count :][:count]) for rows in steps], model):
        loss = model(**batch).loss
        loss.backward()
        clip_gradients(list(model.parameters()), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return [(losses, whole_parameters(trained)), (found, whole_parameters(model))]


@pytest.mark.parametrize("degrees", [SP2, DP2], ids=["sp2", "dp2"])
def test_the_loop_equals_the_trainer_bit_for_bit(degrees: tuple[int, int, int]) -> None:
    for (expected_losses, expected), (losses, parameters) in run_on_ranks(
        2, by_trainer_and_by_loop, degrees
    ):
        assert losses == expected_losses and len(set(losses)) == STEPS
        assert parameters.keys() == expected.keys()
        assert all(torch.equal(parameters[name], expected[name]) for name in expected)


# --- several models, whole sequences, scores ------------------------------------------------------

PADDED_ROWS = make_rows([(23,), (9,), (16,), (23,)], masked="uneven", vocab_size=61, seed=5)


def own_rows(mesh: Mesh) -> list[Loaded]:
    count = len(PADDED_ROWS) // mesh.batch.size()
    return [padded(PADDED_ROWS[mesh.batch.get_local_rank() * count :][:count])]


def expected_scores(model: PreTrainedModel) -> Tensor:
    """[4, 23] of each document alone."""
    scores = torch.zeros(len(PADDED_ROWS), 23, dtype=torch.float64)
    for row, (document,) in enumerate(PADDED_ROWS):
        labels = document.labels
        logits = model(input_ids=document.tokens[None, :-1], use_cache=False).logits[0]
        picked = logits.log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
        scores[row, : len(labels)] = picked.where(labels != -100, 0)
    return scores


def policy_and_reference() -> dict[str, Any]:
    """A policy on sp2, a frozen reference on dp2, made of one config, and a plain model of the same
    config beside.
    """
    sp2, dp2 = build_mesh(sequence=2), build_mesh()
    config = AutoConfig.for_model(**STARCODER2)
    models = [AutoModelForCausalLM.from_config(config, dtype=torch.float64) for _ in range(3)]
    for seed, model in zip((3, 4, 5), models, strict=True):
        hf.initialize(model, seed)
    expected = [expected_scores(model).detach() for model in models]
    policy, reference, plain = models
    parallelize(policy, sp2)
    parallelize(reference.eval().requires_grad_(False), dp2)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    (of_policy,) = shard(own_rows(sp2), policy)
    (of_reference,) = shard(own_rows(dp2), reference)
    first = dp2.batch.get_local_rank() * 2
    differences = {"policy": score(policy, of_policy)[:, :23] - expected[0]}
    for step in range(2):
        policy(**of_policy).loss.backward()
        differences[f"reference, step {step}"] = (
            score(reference, of_reference) - expected[1][first : first + 2]
        )
        optimizer.step()
        optimizer.zero_grad()
    differences["plain"] = expected_scores(plain) - expected[2]
    return {name: difference.abs().max().item() for name, difference in differences.items()} | {
        "trained": (score(policy, of_policy)[:, :23] - expected[0]).abs().max().item()
    }


def test_a_policy_and_a_reference_do_not_touch_each_other() -> None:
    for found in run_on_ranks(2, policy_and_reference):
        assert found.pop("trained") > 1e-2
        assert max(found.values()) < 1e-12, found


def losses_with_visits(visits: bool) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Train two steps on sp2; visits: evaluate on whole sequences between backward and step, and
    score after it.
    """
    mesh, evaluated, losses = mesh_of(*SP2), [], []
    model = parallelize(real_model(), mesh)
    optimizer = build_optimizer(model, OPTIMIZER)
    for batch in shard(loader_of("padded right", mesh), model):
        loss = model(**batch).loss
        loss.backward()
        if visits:
            with torch.no_grad(), whole_sequences(model) as whole:
                assert whole.sp.size() == 1 and whole.batch.size() == 2
                evaluated += [loss.item()] + [
                    model(**rows).loss.item() for rows in shard(own_rows(whole), model)
                ]
            with torch.no_grad():
                evaluated += [model(**rows).loss.item() for rows in shard(own_rows(mesh), model)]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if visits:
            score(model, batch)
    return losses, evaluated, whole_parameters(model)


def test_whole_sequences_and_back() -> None:
    """Evaluating does not show in training, not even between backward and step; and it gives the
    sharded loss.
    """
    expected, _, parameters = run_on_ranks(2, losses_with_visits, False)[0]
    for losses, evaluated, found in run_on_ranks(2, losses_with_visits, True):
        assert losses == expected
        assert all(torch.equal(found[name], parameters[name]) for name in parameters)
        whole, sharded = evaluated[1::3], evaluated[2::3]
        assert whole == pytest.approx(sharded, rel=1e-12) and len(set(whole)) == STEPS


def trained_in_whole_sequences() -> dict[str, Tensor]:
    """A step's gradients on whole sequences, then the same on sp2."""
    mesh, gradients = mesh_of(*SP2), []
    model = parallelize(real_model(), mesh)
    with whole_sequences(model) as whole:
        for batch in shard(own_rows(whole), model):
            model(**batch).loss.backward()
    for batch in shard(own_rows(mesh), model):
        gradients.append(
            {name: p.grad.full_tensor().clone() for name, p in hf.named_parameters(model)}
        )
        model.zero_grad()
        model(**batch).loss.backward()
    gradients.append({name: p.grad.full_tensor() for name, p in hf.named_parameters(model)})
    return {name: (gradients[0][name] - gradients[1][name]).abs().max() for name in gradients[0]}


def test_gradients_on_whole_sequences() -> None:
    assert max(run_on_ranks(2, trained_in_whole_sequences)[0].values()) < 1e-12


def test_scores_of_a_capped_and_scaled_head_come_by_tiles() -> None:
    from titan_ulysses.memory.loss_head import LossHead

    generator = torch.Generator().manual_seed(0)
    head = LossHead(
        torch.nn.Linear(8, 61, dtype=torch.float64), tile_tokens=5, scale=0.5, softcap=2.0
    )
    hidden = torch.randn(2, 9, 8, dtype=torch.float64, generator=generator)
    labels = torch.randint(61, (2, 9), generator=generator)
    labels[0, 3] = -100
    with torch.no_grad():
        found = head(hidden, labels, reduction="none")
        expected = F.cross_entropy(
            head(hidden).flatten(0, 1), labels.flatten(), reduction="none"
        ).view(2, 9)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    assert found[0, 3] == 0
    hidden.requires_grad_()
    weights = torch.randn(2, 9, dtype=torch.float64, generator=generator)
    each = head(hidden, labels, reduction="none")
    scores = head(hidden).flatten(0, 1)
    plain = F.cross_entropy(scores, labels.flatten(), reduction="none").view(2, 9)
    parts = (hidden, head.weight)
    for mine, other in zip(
        torch.autograd.grad((each * weights).sum(), parts),
        torch.autograd.grad((plain * weights).sum(), parts),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


# --- rows -----------------------------------------------------------------------------------------


def test_labels_positions_and_documents_of_a_padded_and_packed_row() -> None:
    # Whatever padding has is no document.
    rows = read_rows(
        {
            "input_ids": torch.tensor([[9, 9, 11, 12, 13, 21, 22, 9]]),
            "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0]]),
            "seq_idx": torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1]], dtype=torch.int32),
            "position_ids": torch.tensor([[1, 1, 0, 1, 2, 0, 1, 0]]),
        }
    )
    assert rows.labels.tolist() == [[-100, -100, 12, 13, -100, 22, -100, -100]]
    assert rows.position_ids.tolist() == [[0, 1, 0, 1, 2, 0, 1, 0]]
    assert rows.documents == ((2, 3, 2, 1),)


def test_what_a_jump_of_positions_is() -> None:
    """A border where nothing else speaks of documents, as in transformers; else what that says."""
    ids, jump = torch.arange(6)[None], torch.tensor([[4, 5, 6, 9, 10, 11]])
    batch = {"input_ids": ids, "position_ids": jump}

    def documents(**others: Any) -> list[tuple[int, ...]]:
        rows = read_rows(batch | others)
        assert torch.equal(rows.position_ids, jump)
        return [*rows.documents, *rows.position_limits]

    assert documents() == [(3, 3), (7, 12)]
    assert documents(attention_mask=torch.ones(1, 6)) == [(6,), (12,)]
    assert documents(seq_idx=torch.zeros(1, 6)) == [(6,), (12,)]
    assert documents(seq_idx=torch.tensor([[0, 0, 0, 1, 1, 1]])) == [(3, 3), (7, 12)]
    assert documents(cu_seq_lens_q=[0, 3, 6]) == [(3, 3), (7, 12)]
    assert read_rows({"input_ids": ids}).position_limits is None


IDS = torch.arange(8).view(2, 4)
BAD: dict[str, tuple[Any, str]] = {
    "no mapping": ([IDS], 'must be a mapping with "input_ids"'),
    "no input_ids": ({"labels": IDS}, 'must be a mapping with "input_ids"'),
    "unknown key": (
        {"input_ids": IDS, "pixel_values": IDS},
        r"batch\['pixel_values'\]: the sharded model would ignore",
    ),
    "one dimension": ({"input_ids": IDS[0]}, r"input_ids\"\] is \[4\]"),
    "empty": ({"input_ids": IDS[:0]}, r"is \[0, 4\]: it must be \[B, S\], and not empty"),
    "other shape": (
        {"input_ids": IDS, "labels": IDS[:, 1:]},
        r"batch\['labels'\] is \[2, 3\], input_ids is \[2, 4\]",
    ),
    "4-D mask": (
        {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 4, 4)},
        r"4 dimensions, \[2, 1, 4, 4\]",
    ),
    "mask values": ({"input_ids": IDS, "attention_mask": IDS}, "values other than 0 and 1"),
    "mask with a hole": (
        {"input_ids": IDS, "attention_mask": [[1, 1, 1, 1], [1, 0, 1, 1]]},
        "a hole in row 1",
    ),
    "positions fall back inside": (
        {
            "input_ids": IDS,
            "position_ids": [[5, 6, 7, 8], [5, 6, 2, 3]],
            "seq_idx": [[0, 0, 0, 0], [0, 0, 0, 0]],
        },
        'batch\\["seq_idx"\\] and batch\\["position_ids"\\] disagree: .* at token 2 of row 1',
    ),
    "positions and seq_idx": (
        {
            "input_ids": IDS,
            "position_ids": [[0, 1, 2, 3], [0, 1, 0, 1]],
            "seq_idx": [[0, 0, 0, 0], [0, 1, 1, 1]],
        },
        'batch\\["seq_idx"\\] and batch\\["position_ids"\\] disagree: .* at token 1 of row 1',
    ),
    "positions and lengths": (
        {
            "input_ids": IDS,
            "position_ids": [[0, 1, 2, 3], [0, 1, 2, 3]],
            "cu_seq_lens_q": [0, 4, 6, 8],
        },
        'batch\\["cu_seq_lens_q"\\] and batch\\["position_ids"\\] disagree: .* at token 2 of row 1',
    ),
    "lengths too short": (
        {"input_ids": IDS, "cu_seq_lens_q": [0, 4, 7]},
        "from 0 to 8, .*; the lengths sum to 7",
    ),
    "lengths fall": ({"input_ids": IDS, "cu_seq_lens_q": [0, 5, 4, 8]}, "must grow from 0 to 8"),
    "over the end of a row": (
        {"input_ids": IDS, "cu_seq_lens_q": [0, 3, 8]},
        "extends past the end of a row of 4",
    ),
    "two kinds of lengths": (
        {"input_ids": IDS, "cu_seq_lens_q": [0, 4, 8], "cu_seq_lens_k": [0, 2, 4, 8]},
        "differs from cu_seq_lens_q",
    ),
    "longest": (
        {"input_ids": IDS, "cu_seq_lens_q": [0, 4, 8], "max_length_q": 3},
        "= 3, but cu_seq_lens_q has 4",
    ),
    "label": ({"input_ids": IDS, "labels": IDS - 1}, "labels are token ids, or -100"),
}


@pytest.mark.parametrize(("batch", "message"), BAD.values(), ids=BAD.keys())
def test_a_batch_that_contradicts_itself(batch: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_rows(batch)


def test_accumulate() -> None:
    with pytest.raises(UserError, match="accumulate = 0"):
        shard([], None, accumulate=0)


# --- ranks that do not agree ----------------------------------------------------------------------


def on(mesh: Mesh) -> Any:
    """What `shard` reads of a model."""
    return SimpleNamespace(sharding=SimpleNamespace(mesh=mesh, stream_chunk_tokens=-1, vision=None))


def load_differently(what: str, degrees: tuple[int, int, int]) -> str:
    """The message that this rank gets; rank 1 loads something else than rank 0, from the first step
    on or later.
    """
    from titan_ulysses.data import adapter as sharding

    sharding.CHECK_EVERY = 2
    rank, mesh = torch.distributed.get_rank(), mesh_of(*degrees)
    batches = [{"input_ids": IDS, "labels": IDS.clone()} for _ in range(4)]
    if rank == 1:
        step = {"first": 0, "third": 2}[what]
        batches[step]["labels"][0, 2] = 17
    seen = 0
    try:
        for _ in shard(batches, on(mesh)):
            seen += 1
    except UserError as error:
        return f"{seen}: {error}"
    finally:
        sharding.CHECK_EVERY = 100
    return f"{seen}: no message"


@pytest.mark.parametrize(("what", "step"), [("first", 0), ("third", 2)])
def test_ranks_of_a_group_that_load_different_rows(what: str, step: int) -> None:
    for message in run_on_ranks(2, load_differently, what, SP2):
        assert message.startswith(
            f"{step}: shard: ranks [0, 1] share a sequence (sequence-parallel degree 2)"
        )
    assert run_on_ranks(2, load_differently, what, DP2) == ["4: no message"] * 2


def load_unequally(batches: int) -> None:
    """Rank 1 has one batch less."""
    mine = [{"input_ids": IDS}] * (batches - torch.distributed.get_rank())
    for _ in shard(mine, on(mesh_of(*DP2)), accumulate=2):
        pass


@pytest.mark.parametrize("batches", [3, 4])
def test_loaders_of_different_lengths(batches: int) -> None:
    with pytest.raises(
        RankFailure,
        match=f"this rank's loader ended after {batches - 1} batches, but others continue",
    ):
        run_on_ranks(2, load_unequally, batches)


def differing_weights() -> str:
    model = real_model()
    with torch.no_grad():
        if torch.distributed.get_rank() == 1:
            model.model.layers[1].mlp.c_proj.weight[3, 4] += 1e-9
    try:
        parallelize(model, mesh_of(*SP2))
    except UserError as error:
        return str(error)
    return "no message"


def test_ranks_with_different_weights() -> None:
    for message in run_on_ranks(2, differing_weights):
        assert (
            "different weights: model.layers.1.mlp.c_proj.weight on rank 1 differs from that of "
            "rank 0" in message
        )


def weights_on_one_rank() -> str:
    """Rank 0 has loaded the model, the other one builds it without data."""
    with torch.device("cpu" if torch.distributed.get_rank() == 0 else "meta"):
        config = hf.load_model_config("", STARCODER2)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    try:
        parallelize(model, mesh_of(*SP2))
    except UserError as error:
        return str(error)
    return "no message"


def test_ranks_of_which_one_has_no_weights() -> None:
    for message in run_on_ranks(2, weights_on_one_rank):
        assert "on rank 1 differs from that of rank 0: only one of them is on the meta" in message


def attention_dropout() -> str:
    with pytest.raises(UserError) as caught:
        parallelize(real_model(STARCODER2 | {"attention_dropout": 0.1}), mesh_of(1, 1, 1))
    return str(caught.value)


def test_a_group_of_nccl_alone_cannot_offload_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    def backend_of(device: torch.device) -> None:
        raise RuntimeError("No backend type associated with device type cpu")

    group = SimpleNamespace(_get_backend=backend_of)
    loss = SimpleNamespace(get_group=lambda: group)
    monkeypatch.setattr(dist, "get_backend", lambda group: "nccl")
    mesh = SimpleNamespace(device=torch.device("cuda"), loss=loss)
    with pytest.raises(
        UserError, match=r'CPU tensors too, and this is "nccl" alone. Create it with'
    ):
        check_group(mesh, parameter_offload=True)
    check_group(mesh, parameter_offload=False)
    check_group(SimpleNamespace(device=torch.device("cpu"), loss=loss), parameter_offload=True)


def test_attention_dropout_is_refused() -> None:
    assert (
        "attention_dropout = 0.1: dropped attention weights"
        in run_on_ranks(1, attention_dropout)[0]
    )


def mesh_of_three() -> str:
    with pytest.raises(UserError) as caught:
        build_mesh(replicate=1, sequence=3)
    return str(caught.value)


def test_degrees_that_are_not_the_number_of_ranks() -> None:
    message = run_on_ranks(2, mesh_of_three)[0]
    assert (
        "replicate(1) * shard(1) * sequence(3) is not the number of ranks, 2: start 3 ranks"
        in message
    )


# --- the package ----------------------------------------------------------------------------------


def test_the_public_names_are_the_functions_whatever_was_imported_first() -> None:
    code = (
        "import sys, titan_ulysses; assert 'torch' not in sys.modules\n"
        "from titan_ulysses.setup.parallelize import parallelize as inner\n"
        "from titan_ulysses import *\n"
        "assert parallelize is inner is titan_ulysses.parallelize and callable(shard) and "
        "callable(build_mesh)\n"
        "assert build_mesh().sp.size() == 1\n"  # which joins a process group of one
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)
