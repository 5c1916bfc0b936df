"""Sequences of a step, dealt to data-parallel ranks and micro-batches by their attention."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.ranks import run_on_ranks
from helpers.runs import logged, train, write_run
from titan_ulysses.data.balance import attention_cost, balance, deal, in_order, slowest
from titan_ulysses.data.corpus import Corpus
from titan_ulysses.data.loader import Loader
from titan_ulysses.data.mixture import MixedSequences
from titan_ulysses.data.packing import PackedSequences, PaddedSequences, SampleStream

ROOT = Path(__file__).resolve().parents[1]
few = settings(max_examples=60, deadline=None)
lengths_of_documents = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def corpus_of(lengths: list[int]) -> Corpus:
    ends = np.cumsum(lengths)
    return Corpus.from_documents(
        [np.arange(end - n, end) for n, end in zip(lengths, ends, strict=True)]
    )


def stream_of(kind: str, lengths: list[int]) -> SampleStream:
    lengths = [*lengths, 8]
    if kind == "mixed":
        parts = {k: stream_of(k, lengths) for k in ("concat", "best_fit")}
        return MixedSequences(parts, [2.0, 1.0], seed=3)
    if kind in ("concat", "once"):
        return PackedSequences(corpus_of(lengths), seq_len=8, seed=1, once=kind == "once")
    return PaddedSequences(corpus_of(lengths), seq_len=8, seed=1, best_fit=kind == "best_fit")


@few
@given(
    lengths_of_documents,
    st.sampled_from(["concat", "once", "padded", "best_fit", "mixed"]),
    st.lists(st.integers(0, 60), min_size=1, max_size=8),
)
def test_lengths_are_those_of_the_sequences_that_are_read(lengths, kind, indices):
    """In any order, over several epochs, and padding is one of them."""
    sequences = stream_of(kind, lengths)
    for index in indices:
        if kind == "once":
            index %= len(sequences)
        assert sequences.document_lengths(index) == sequences[index].document_lengths


@few
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.data())
def test_each_sequence_is_dealt_once_and_never_worse_than_in_order(ranks, rows, batches, data):
    count = ranks * rows * batches
    costs = data.draw(st.lists(st.integers(1, 1000), min_size=count, max_size=count))
    dealt = deal(costs, ranks=ranks, batch_size=rows)
    assert len(dealt) == batches and all(len(batch) == ranks for batch in dealt)
    assert all(len(of_rank) == rows for batch in dealt for of_rank in batch)
    assert sorted(p for batch in dealt for of_rank in batch for p in of_rank) == [*range(count)]
    assert balance(costs, dealt) >= 1 - 1e-12
    if rows == 1:
        assert slowest(costs, dealt) <= slowest(costs, in_order(count, ranks=ranks, batch_size=1))


@few
@given(st.lists(st.integers(1, 50), min_size=6, max_size=6))
def test_no_way_to_deal_is_better_with_a_batch_size_of_1(costs):
    best = min(
        sum(max(costs[p] for p in order[at : at + 2]) for at in (0, 2, 4))
        for order in permutations(range(6))
    )
    assert slowest(costs, deal(costs, ranks=2, batch_size=1)) == best


@pytest.mark.parametrize(("ranks", "batches"), [(1, 3), (2, 2), (4, 1)])
def test_equal_costs_leave_the_order(ranks, batches):
    count = ranks * batches
    assert deal([7] * count, ranks=ranks, batch_size=1) == in_order(
        count, ranks=ranks, batch_size=1
    )


def loaders(sequences: SampleStream, *, dp: int, rows: int, accumulation: int) -> list[Loader]:
    return [
        Loader(
            sequences,
            batch_size=rows,
            batch_rank=rank,
            batch_degree=dp,
            accumulation_steps=accumulation,
        )
        for rank in range(dp)
    ]


def tokens_of_step(ranks: list[Loader]) -> list[list[int]]:
    """The rows that all ranks read in a step, sorted."""
    batches = [loader.next_batch() for loader in ranks for _ in range(loader.accumulation_steps)]
    return sorted(row.tolist() for batch in batches for row in batch.input_ids)


@few
@given(
    lengths_of_documents,
    st.sampled_from(["concat", "best_fit", "mixed"]),
    st.integers(0, 4),
    st.lists(
        st.sampled_from([(1, 1, 8), (2, 1, 4), (4, 2, 1), (8, 1, 1), (2, 4, 1)]),
        min_size=2,
        max_size=4,
    ),
)
def test_the_same_set_in_each_step_on_every_mesh_also_resumed(lengths, kind, before, meshes):
    """No sequence is lost or doubled: a run that changes its mesh reads, step by step, what one
    rank alone reads in order.
    """
    sequences = stream_of(kind, lengths)
    state, reads = {"sequences_consumed": 0}, []
    for dp, rows, accumulation in meshes:
        ranks = loaders(sequences, dp=dp, rows=rows, accumulation=accumulation)
        for loader in ranks:
            loader.load_state_dict(state)
        reads += [tokens_of_step(ranks) for _ in range(before + 1)]
        states = [loader.state_dict() for loader in ranks]
        assert all(one == states[0] for one in states)
        state = states[0]
    for step, read in enumerate(reads):
        expected = [sequences[8 * step + place].input_ids.tolist() for place in range(8)]
        assert read == sorted(expected)


def test_a_batch_is_named_by_the_documents_that_it_had():
    sequences = stream_of("concat", [3, 30, 1, 1, 9, 2])
    loader = loaders(sequences, dp=2, rows=1, accumulation=2)[1]
    read = []
    for _ in range(6):
        loader.next_batch()
        step = loader.step_of_last_batch()
        batch = (loader._batches - 1) % 2
        read.append([d for row in step.sequences[batch][1] for d in sequences.documents(row)])
    assert [loader.documents(ago) for ago in range(6, 0, -1)] == read


def test_the_long_tail(tmp_path):
    """What docs/data.md reports, with fewer steps."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/bench/balance.py", "--steps", "5", "--json",
         tmp_path / "found.json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["ranks"] for row in found] == [2, 4, 8], done.stdout
    for row in found:
        assert 1 <= row["dealt"] <= 1.1 < row["in_order"]


def test_attention_cost():
    assert attention_cost((3, 4)) == 25


def test_a_run_on_two_ranks_is_that_of_one(tmp_path):
    """Long-tailed documents, four micro-batches: the same losses and norms, and it goes on on one
    rank from where two were.
    """
    config = write_run(tmp_path)
    settings = {"training.steps": 6, "checkpoint.interval": 3, "lr_scheduler.warmup_steps": 0}
    settings |= {"lr_scheduler.decay_type": "constant"}
    two = settings | {"training.local_batch_size": 1, "job.name": "two"}
    run_on_ranks(1, train, config, settings | {"job.name": "one"})
    run_on_ranks(2, train, config, two | {"training.steps": 3})
    assert all(line["balance"] >= 1 for line in logged(tmp_path / "outputs" / "two"))
    run_on_ranks(1, train, config, two)
    one, other = (logged(tmp_path / "outputs" / name) for name in ("one", "two"))
    assert [line["step"] for line in other] == [*range(1, 7)]
    for a, b in zip(one, other, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=2e-5)
    assert {line["balance"] for line in one} == {None}


def test_a_document_that_cannot_be_balanced_is_named_once():
    from titan_ulysses.train.log import Imbalance
    from titan_ulysses.train.summary import expected_balance

    sequences = PaddedSequences(corpus_of([64, *[1] * 7]), seq_len=64, seed=0, best_fit=False)
    lengths = {0: (64,)} | {place: (1,) * 64 for place in range(1, 8)}
    sequences.document_lengths = lambda index: lengths[index % 8]
    sequences.documents = lambda index: [f"{index}-{at}" for at in range(len(lengths[index % 8]))]
    loader = loaders(sequences, dp=2, rows=1, accumulation=4)[0]
    said, imbalance = [], Imbalance()
    assert "attention takes 1." in expected_balance(loader)
    for step in range(1, 4):
        for _ in range(4):
            loader.next_batch()
        said.append(imbalance.note(step, loader))
    assert "step 1: document 0-0 has 90% of the step's attention" in said[0]
    assert said[1:] == [None, None]
    assert imbalance.take() > 1.5 and imbalance.take() is None
