"""Packing, mixtures and streams: nothing lost, invented or trained twice, masks exact, resumable on
any mesh.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import datasets
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from titan_ulysses.config.schema import SourceSettings
from titan_ulysses.data.corpus import Corpus
from titan_ulysses.data.encoding import Encoder
from titan_ulysses.data.loader import Loader
from titan_ulysses.data.mixture import ChainedSequences, MixedSequences
from titan_ulysses.data.packing import PackedSequences, PaddedSequences, SampleStream, best_fit_bins
from titan_ulysses.data.records import Encoded
from titan_ulysses.data.sources import DatasetRows
from titan_ulysses.data.stream import StreamedSequences
from titan_ulysses.data.tokenizer import load_tokenizer
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.sequence import IGNORE_INDEX

few = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
document_lengths = st.lists(st.integers(1, 30), min_size=1, max_size=12)
PACKINGS: dict[str, Callable[..., SampleStream]] = {
    "concat": PackedSequences,
    "none": PaddedSequences,
    "best_fit": lambda corpus, **options: PaddedSequences(corpus, best_fit=True, **options),
}


def numbered_corpus(lengths: list[int], *, masks: int | None = None) -> Corpus:
    """Tokens 1, 2, 3, ... (0 is padding); with `masks`, a seed, about half of them are trained
    on.
    """
    draw = np.random.default_rng(masks)
    documents, first = [], 1
    for length in lengths:
        ids = np.arange(first, first + length)
        documents.append(Encoded(ids, None if masks is None else draw.random(length) < 0.5))
        first += length
    return Corpus.from_documents(documents)


def labels_of_an_epoch(corpus: Corpus) -> list[int]:
    """Every token that is trained on and has one before it, once."""
    trained = (
        corpus.trained if corpus.trained is not None else np.ones(len(corpus.tokens), dtype=bool)
    )
    firsts = set(corpus.begins.tolist())
    return [int(token) for i, token in enumerate(corpus.tokens) if trained[i] and i not in firsts]


@pytest.mark.parametrize("packing", PACKINGS)
@few
@given(
    lengths=document_lengths,
    masks=st.none() | st.integers(0, 9),
    seed=st.integers(0, 5),
    data=st.data(),
)
def test_an_epoch_holds_every_token_and_every_label_once(
    packing: str, lengths, masks, seed: int, data
) -> None:
    corpus = numbered_corpus(lengths, masks=masks)
    seq_len = data.draw(st.integers(1, sum(lengths) if packing == "concat" else 40))
    sequences = PACKINGS[packing](corpus, seq_len=seq_len, seed=seed)
    # End to end, epochs end within sequences: as many of them as come out even.
    epochs, count = (seq_len, sum(lengths)) if packing == "concat" else (2, 2 * len(sequences))
    if packing == "concat":
        epochs, count = epochs // np.gcd(epochs, count), count // np.gcd(epochs, count)
    tokens, labels = Counter(), Counter()
    for i in range(count):
        sequence = sequences[i]
        assert sum(sequence.document_lengths) == seq_len and min(sequence.document_lengths) > 0
        expected_positions = [position for n in sequence.document_lengths for position in range(n)]
        assert sequence.position_ids.tolist() == expected_positions
        ids = sequence.input_ids.tolist()
        tokens.update(ids)
        for token, label in zip(ids, sequence.labels.tolist(), strict=True):
            # Of the same document, the next.
            assert label == IGNORE_INDEX or (token > 0 and label == token + 1)
            labels[label] += 1
        padding = sequence.document_lengths[-1] if ids[-1] == 0 else 0
        assert ids.count(0) == padding  # all of it at the end, and one document
    assert packing != "concat" or tokens[0] == 0
    del tokens[0], labels[IGNORE_INDEX]
    assert tokens == Counter(corpus.tokens.tolist() * int(epochs))
    assert labels == Counter(labels_of_an_epoch(corpus) * int(epochs))


HELD_OUT: dict[str, Callable[..., SampleStream]] = {
    "concat": lambda corpus, **options: PackedSequences(corpus, once=True, **options),
    "none": PaddedSequences,
    "best_fit": PACKINGS["best_fit"],
    "mixture": lambda corpus, **options: ChainedSequences(
        {
            "a": PackedSequences(corpus.select(np.arange(1)), once=True, **options),
            "b": PaddedSequences(corpus.select(np.arange(1, len(corpus))), **options),
        }
    ),
}


@pytest.mark.parametrize("packing", HELD_OUT)
@few
@given(lengths=document_lengths, masks=st.none() | st.integers(0, 9), data=st.data())
def test_held_out_data_has_every_token_once_in_order(packing: str, lengths, masks, data) -> None:
    """Also where all of it is less than a sequence. What is not filled is padding: a document
    without labels.
    """
    corpus = numbered_corpus([*lengths, 5], masks=masks)
    seq_len = data.draw(st.integers(1, 2 * corpus.num_tokens))
    sequences = HELD_OUT[packing](corpus, seq_len=seq_len, seed=0, shuffle=False)
    tokens, labels = [], []
    for sequence in (sequences[i] for i in range(len(sequences))):
        assert sum(sequence.document_lengths) == len(sequence.input_ids) == seq_len
        assert sequence.position_ids.tolist() == [
            place for n in sequence.document_lengths for place in range(n)
        ]
        padding = sequence.document_lengths[-1] if sequence.input_ids[-1] == 0 else 0
        assert (sequence.input_ids == 0).sum() == padding
        assert (sequence.labels[seq_len - padding :] == IGNORE_INDEX).all()
        tokens += sequence.input_ids[: seq_len - padding].tolist()
        labels += sequence.labels.tolist()
    labels = [label for label in labels if label != IGNORE_INDEX]
    expected = corpus.tokens.tolist(), labels_of_an_epoch(corpus)
    assert (
        (tokens, labels) == expected
        if packing != "best_fit"
        else (sorted(tokens), sorted(labels)) == expected
    )


@few
@given(lengths=document_lengths, seq_len=st.integers(1, 40), best_fit=st.booleans())
def test_documents_stay_whole_wherever_they_fit(lengths, seq_len: int, best_fit: bool) -> None:
    corpus = numbered_corpus(lengths)
    sequences = PaddedSequences(corpus, seq_len=seq_len, seed=0, best_fit=best_fit)
    if not best_fit:
        assert len(sequences) == sum(-(-length // seq_len) for length in lengths)
    found = Counter()
    for i in range(len(sequences)):
        bounds = [0, *np.cumsum(sequences[i].document_lengths).tolist()]
        pieces = [
            sequences[i].input_ids[a:b].tolist() for a, b in zip(bounds, bounds[1:], strict=False)
        ]
        found.update((piece[0], len(piece)) for piece in pieces if piece[0])
    expected = Counter()
    for begin, end in zip(corpus.begins.tolist(), corpus.ends.tolist(), strict=True):
        expected.update(
            (first + 1, min(seq_len, end - first)) for first in range(begin, end, seq_len)
        )
    assert found == expected
    assert sequences.fill_rate == pytest.approx(sum(lengths) / (len(sequences) * seq_len))


def naive_fit(lengths: list[int], size: int, look_ahead: int) -> list[list[int]]:
    waiting, bins = list(range(len(lengths))), []
    while waiting:
        chosen: list[int] = []
        while True:
            space = size - sum(lengths[place] for place in chosen)
            fitting = [place for place in waiting[:look_ahead] if lengths[place] <= space]
            if not fitting:
                break
            longest = max(fitting, key=lambda place: (lengths[place], -place))
            waiting.remove(longest)
            chosen.append(longest)
        bins.append(chosen)
    return bins


@few
@given(lengths=st.lists(st.integers(1, 20), max_size=30), look_ahead=st.integers(1, 8))
def test_best_fit_is_the_naive_one(lengths: list[int], look_ahead: int) -> None:
    order, bounds = best_fit_bins(np.array(lengths, dtype=np.int64), 20, look_ahead)
    found = [order[a:b].tolist() for a, b in zip(bounds, bounds[1:], strict=False)]
    assert found == naive_fit(lengths, 20, look_ahead)


def test_best_fit_fills_better_than_one_document_a_sequence() -> None:
    corpus = numbered_corpus(np.random.default_rng(0).integers(1, 60, size=500).tolist())
    packed, alone = (
        PaddedSequences(corpus, seq_len=100, seed=0, best_fit=best) for best in (True, False)
    )
    assert packed.fill_rate > 0.99 > 0.4 > alone.fill_rate
    assert f"filled to {packed.fill_rate:.1%}" in packed.describe()


def test_no_document() -> None:
    with pytest.raises(UserError, match=r"data\.path has no document to train on"):
        PaddedSequences(Corpus.from_documents([]), seq_len=4, seed=0)


# --- resumed anywhere, on any mesh


def mixture(corpus: Corpus, *, seq_len: int, seed: int) -> SampleStream:
    sources = {
        "a": PackedSequences(corpus, seq_len=seq_len, seed=seed),
        "b": PaddedSequences(numbered_corpus([3, 9, 14]), seq_len=seq_len, seed=seed),
    }
    return MixedSequences(sources, [0.7, 0.3], seed=seed)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data set of 23 texts on disk, no two characters of them equal."""
    folder, letters = tmp_path_factory.mktemp("saved"), iter(range(0x100, 0x1000))
    texts = ["".join(chr(next(letters)) for _ in range(1 + 7 * i % 19)) for i in range(23)]
    datasets.Dataset.from_list([{"text": text} for text in texts]).save_to_disk(folder)
    return str(folder)


def stream(path: str, *, seq_len: int, seed: int) -> StreamedSequences:
    rows = DatasetRows(SourceSettings(source="hf", path=path, streaming=True), "data.path")
    return StreamedSequences(rows, Encoder(load_tokenizer("bytes")), seq_len=seq_len, seed=seed)


@pytest.fixture(params=["concat", "none", "best_fit", "mixture", "stream", "mixture with a stream"])
def opened(request: pytest.FixtureRequest, saved: str) -> Callable[[int], SampleStream]:
    """seed -> a new stream of sequences of 8 tokens."""
    corpus = numbered_corpus([7, 20, 3, 11, 1, 16, 8], masks=3)

    def make(seed: int) -> SampleStream:
        options = {"seq_len": 8, "seed": seed}
        if request.param == "mixture":
            return mixture(corpus, **options)
        if request.param == "stream":
            return stream(saved, **options)
        if request.param == "mixture with a stream":
            parts = {"s": stream(saved, **options), "c": PackedSequences(corpus, **options)}
            return MixedSequences(parts, [1, 2], seed=seed)
        return PACKINGS[request.param](corpus, **options)

    return make


def read_on_mesh(
    make: Callable[[int], SampleStream],
    seed: int,
    state: dict,
    mesh: tuple[int, int, int],
    steps: int,
):
    """(rows of `steps` global batches, state afterwards) of all ranks of a mesh: batch size, dp,
    sp.
    """
    batch_size, dp, sp = mesh
    ranks = [
        [
            Loader(
                make(seed),
                batch_size=batch_size,
                batch_rank=r,
                batch_degree=dp,
                sp_rank=s,
                sp_degree=sp,
            )
            for s in range(sp)
        ]
        for r in range(dp)
    ]
    for group in ranks:
        for loader in group:
            loader.load_state_dict(json.loads(json.dumps(state)))
    rows = []
    for _ in range(steps):
        for group in ranks:
            batches = [loader.next_batch() for loader in group]
            assert len({batch.documents for batch in batches}) == 1
            whole = [
                torch.cat([getattr(b, name) for b in batches], dim=1)
                for name in ("input_ids", "labels", "position_ids")
            ]
            rows += [
                (*(t[i].tolist() for t in whole), batches[0].documents[i])
                for i in range(batch_size)
            ]
    states = [loader.state_dict() for group in ranks for loader in group]
    assert all(one == states[0] for one in states)
    return rows, states[0]


meshes = st.tuples(st.integers(1, 2), st.integers(1, 3), st.sampled_from([1, 2, 4]))


@settings(few, max_examples=15)
@given(seed=st.integers(0, 3), first=meshes, second=meshes, steps=st.integers(0, 12))
def test_resumed_on_another_mesh_the_rest_is_the_same(
    opened, seed: int, first, second, steps: int
) -> None:
    sequences = opened(seed)
    start = {"sequences_consumed": 0}
    before, state = read_on_mesh(opened, seed, start, first, steps)
    assert state["sequences_consumed"] == len(before) == steps * first[0] * first[1]
    after, _ = read_on_mesh(opened, seed, state, second, 3)
    read = [sequences[i] for i in range(len(before) + len(after))]
    expected = [(*(t.tolist() for t in s[:3]), s.document_lengths) for s in read]

    def by_step(rows: list) -> list[list]:
        """The sequences of each step, without their order: they are dealt to the ranks."""
        old, new = first[0] * first[1], second[0] * second[1]
        starts = [*range(0, len(before), old), *range(len(before), len(rows), new)]
        return [sorted(rows[a:b]) for a, b in pairwise([*starts, len(rows)])]

    assert by_step(before + after) == by_step(expected)


# --- mixtures


@few
@given(
    weights=st.lists(st.floats(0.05, 10), min_size=1, max_size=5),
    seed=st.integers(0, 9),
    start=st.integers(0, 9000),
)
def test_every_source_gets_its_share_in_order(weights: list[float], seed: int, start: int) -> None:
    """Any 64 sequences in a row hold each source's share to within a few, and a source's own come
    in order.
    """
    lengths = [3] * 40
    parts = {
        str(k): PackedSequences(numbered_corpus(lengths), seq_len=4, seed=k)
        for k in range(len(weights))
    }
    mixed = MixedSequences(parts, weights, seed=seed)
    assert sum(mixed.weights) == pytest.approx(1)
    counts = mixed._counts(start)
    assert counts.sum() == start
    for index in range(start, start + 64):
        source = int(mixed._sources(index, index + 1)[0])
        assert torch.equal(
            mixed[index].input_ids, parts[str(source)][int(counts[source])].input_ids
        )
        counts[source] += 1
    assert (counts == mixed._counts(start + 64)).all()
    shares = counts - MixedSequences(parts, weights, seed=seed)._counts(start)
    assert np.abs(shares - 64 * np.array(mixed.weights)).max() <= 4


def test_epochs_of_each_source_are_reported_apart() -> None:
    parts = {
        "short": PackedSequences(numbered_corpus([16]), seq_len=4, seed=0),
        "long": PaddedSequences(numbered_corpus([4] * 100), seq_len=4, seed=0),
    }
    mixed = MixedSequences(parts, [0.5, 0.5], seed=0)
    found = mixed.epochs(80)
    assert found["short"] == pytest.approx(10, abs=0.5) and found["long"] == pytest.approx(
        0.4, abs=0.02
    )
    assert mixed.notes == []
    assert (
        "weights sum to 5, not 1: divided by that, they are 0.4, 0.6"
        in MixedSequences(parts, [2, 3], seed=0).describe()
    )


def test_the_order_of_a_mixture_is_pinned() -> None:
    """A run that is resumed on another machine must find this very order."""
    parts = {name: PackedSequences(numbered_corpus([4]), seq_len=4, seed=0) for name in "abc"}
    mixed = MixedSequences(parts, [0.5, 0.3, 0.2], seed=42)
    assert mixed._sources(0, 20).tolist() == [
        1,
        0,
        0,
        1,
        0,
        2,
        0,
        0,
        1,
        0,
        2,
        1,
        0,
        2,
        0,
        0,
        1,
        0,
        2,
        1,
    ]


# --- streams


@pytest.mark.parametrize("seq_len", [4, 7, 64])
def test_an_epoch_of_a_stream_holds_every_token_once(saved: str, seq_len: int) -> None:
    encode = Encoder(load_tokenizer("bytes"))
    documents = [
        encode(row) for row in DatasetRows(SourceSettings(source="hf", path=saved), "data.path")
    ]
    total = sum(len(one.ids) for one in documents)
    sequences = stream(saved, seq_len=seq_len, seed=1)
    tokens = []
    for i in range(2 * total // seq_len + 1):
        tokens += sequences[i].input_ids.tolist()
    for epoch in range(2):
        here = tokens[epoch * total : (epoch + 1) * total]
        assert Counter(here) == Counter(token for one in documents for token in one.ids.tolist())
    assert tokens[:total] != tokens[total : 2 * total]  # another order


def test_a_stream_is_packed_as_documents_in_memory_are(saved: str) -> None:
    sequences = stream(saved, seq_len=16, seed=2)
    corpus = Corpus.from_documents(
        document for _, document in stream(saved, seq_len=16, seed=2)._read(skip=0)
    )
    packed = PackedSequences(corpus, seq_len=16, seed=0, shuffle=False)
    for i in range(len(packed)):
        found, expected = sequences[i], packed[i]
        assert all(torch.equal(a, b) for a, b in zip(found[:3], expected[:3], strict=True))
        assert found.document_lengths == expected.document_lengths
    assert sequences.epochs(len(packed)) == 0.0
    sequences[len(packed) + 1]
    assert sequences.epochs(len(packed) + 2) == 1.0


def test_a_stream_without_a_document_ends(tmp_path) -> None:
    datasets.Dataset.from_list([{"text": ""}] * 3).save_to_disk(tmp_path)
    with pytest.raises(
        UserError, match=r"data\.path has no document to train on \(3 empty one\(s\) left out"
    ):
        stream(str(tmp_path), seq_len=4, seed=0)[0]
