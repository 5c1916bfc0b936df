"""What losses read beside texts: pairs of completions, and what a teacher has said of tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from helpers.material import _write_tokenizer as write_tokenizer
from helpers.meshes import ONE, SP2, Degrees
from helpers.ranks import run_on_ranks
from test_loss_settings import (
    MESHES,
    PAIRS,
    STEPS,
    STREAMED,
    TOP_K,
    Trained,
    compare,
    distillation_from_data,
    on_ranks,
    taught,
    train_plainly,
    write_material,
)
from titan_ulysses.config.schema import MixtureEntry
from titan_ulysses.data import cache
from titan_ulysses.data.packing import PackedSequences, PaddedSequences
from titan_ulysses.data.records import TEACHER_FIELDS as FIELDS
from titan_ulysses.data.tokenizer import load_tokenizer
from titan_ulysses.distributed.errors import UserError


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_material(tmp_path_factory.mktemp("data"))


# --- pairs of completions -------------------------------------------------------------------------


def read(material: Path, rows: list[dict[str, Any]], tokenizer: Any, **more: Any) -> Any:
    """The corpus of some rows, and the tally."""
    from titan_ulysses.data.cache import read_corpus
    from titan_ulysses.data.encoding import Encoder

    file = material / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = MixtureEntry(source="preference", path=str(file), bad_lines="skip", **more)
    return read_corpus(source, Encoder(tokenizer), cache_folder=str(material / "cache"))


def test_conversations_are_rendered(tmp_path: Path) -> None:
    """With a prompt, and without one, where both begin alike; what cannot be told apart is bad."""
    write_tokenizer(tmp_path / "chat")
    tokenizer = load_tokenizer(str(tmp_path / "chat"))
    ask = [{"role": "user", "content": "that?"}]
    yes, no = ([{"role": "assistant", "content": text}] for text in ("this", "taste it"))
    rows = [
        {"prompt": ask, "chosen": yes, "rejected": no},
        {"prompt": "that?", "chosen": ask + yes, "rejected": ask + no},
        {"chosen": yes, "rejected": no},
        {"prompt": ask, "chosen": "this", "rejected": no},
        {"prompt": ask, "chosen": yes},
        {"prompt": "p", "chosen": "", "rejected": "r"},
    ]
    corpus, tally = read(tmp_path, rows, tokenizer)
    assert (
        len(corpus) == 2
        and tally.bad == 4
        and "do not begin with the same messages" in tally.first_bad
    )
    for pair in range(2):
        begin, split = corpus.begins[pair], corpus.splits[pair]
        for span, wanted in (
            (slice(begin, begin + split), "assistant: this<end>"),
            (slice(begin + split, corpus.ends[pair]), "assistant: taste it<end>"),
        ):
            ids, trained = corpus.tokens[span], corpus.trained[span]
            assert tokenizer.decode(ids) == f"user: that?<end>{wanted}"
            assert tokenizer.decode(ids[trained]).strip() == wanted.removeprefix("assistant: ")


def test_pairs_come_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "usable_cores", lambda: 1)
    tokenizer = load_tokenizer("bytes")
    small = read(tmp_path, PAIRS, tokenizer)[0]
    monkeypatch.setattr(cache, "SMALL_CHARACTERS", -1)
    for _ in range(2):
        corpus, _ = read(tmp_path, PAIRS, tokenizer)
        assert corpus.splits.tolist() == small.splits.tolist()
        assert corpus.tokens.tolist() == small.tokens.tolist()
    with pytest.raises(UserError, match="has no chat template"):
        read(tmp_path, [{"chosen": CHAT, "rejected": CHAT[:1]}], tokenizer)


# --- what a teacher has said --------------------------------------------------------------------


def plain_distillation_from_data(material: Path) -> Trained:
    def step(model: PreTrainedModel) -> tuple[Tensor, dict[str, float]]:
        total, count = torch.zeros((), dtype=torch.float64), 0
        for row in taught():
            begin = 0
            for length in row["document_lengths"]:
                span = slice(begin, begin + length)
                ids, labels = (torch.tensor(row[key][span]) for key in ("input_ids", "labels"))
                scores = model(ids[None], use_cache=False).logits[0]
                for place in range(1, length):
                    if labels[place] == -100:
                        continue
                    top, said = (row[key][begin + place] for key in FIELDS)
                    student = (scores[place - 1] / 2).log_softmax(-1)[top]
                    wanted = (torch.tensor(said).double() / 2).log_softmax(-1)
                    kl = (wanted.exp() * (wanted - student)).sum()
                    own = F.cross_entropy(scores[place - 1], labels[place])
                    total, count = total + 0.7 * 4 * kl + 0.3 * own, count + 1
                begin += length
        return total / count, {}

    return train_plainly(material, step)


@pytest.mark.parametrize("degrees", MESHES)
def test_distillation_from_data_is_that_of_plain_transformers(
    degrees: Degrees, material: Path, tmp_path: Path
) -> None:
    expected = run_on_ranks(1, plain_distillation_from_data, material)[0]
    wanted = distillation_from_data(material) | STREAMED
    if degrees == SP2:  # all rows in one sequence
        wanted |= {"data.packing": "best_fit", "training.seq_len": 208}
        wanted |= {"training.global_batch_size": -1, "validation.enable": True}
        wanted |= {"validation.path": f"{material}/plain.jsonl", "validation.interval": STEPS}
        held_out = [{"input_ids": row["input_ids"]} for row in taught()]
        (material / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    elif degrees != ONE:  # documents are sequences: there are eight of them
        wanted |= {"training.global_batch_size": 8}
    else:
        wanted |= {"training.global_batch_size": 8, "training.local_batch_size": 4}
    for found in on_ranks(tmp_path, wanted, degrees):
        compare(found, expected)
        assert not found.has_second_model


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "cached"])
def test_what_a_teacher_said_stays_with_its_token(
    kind: str, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of each token's three is the token itself: so it must be of each label, in every
    packing, also where a document is cut.
    """
    from titan_ulysses.data.cache import read_corpus
    from titan_ulysses.data.encoding import Encoder

    path = material / "taught.jsonl"
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        path = tmp_path / "taught.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(taught()), path)
    if kind == "cached":
        monkeypatch.setattr(cache, "SMALL_CHARACTERS", -1)
    source = MixtureEntry(source="tokens", path=str(path), teacher_top_k=TOP_K)
    for _ in range(2):  # written to the cache, and read from there
        encoder = Encoder(load_tokenizer("bytes"))
        corpus, _ = read_corpus(source, encoder, cache_folder=str(tmp_path / "cache"))
    half = corpus.select(np.arange(len(corpus))[::-2])
    for sequences in (
        PackedSequences(corpus, seq_len=16, seed=1),
        PackedSequences(half, seq_len=13, seed=1, shuffle=False, once=True),
        PaddedSequences(corpus, seq_len=12, seed=2),
        PaddedSequences(half, seq_len=64, seed=3, best_fit=True),
    ):
        labels = 0
        for index in range(len(sequences) + 2 * (not getattr(sequences, "once", False))):
            sample = sequences[index]
            trained = sample.labels != -100
            said = sample.loss_inputs
            assert torch.equal(said["teacher_ids"][trained, 0], sample.labels[trained])
            assert (said["teacher_logits"][trained] != 0).all()
            labels += int(trained.sum())
        assert labels > 20


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"teacher_ids": None}, 'no field "teacher_ids", which data.teacher_top_k = 3 needs'),
        ({"teacher_ids": [[1, 2, 3]] * 2}, "2 teacher_ids for 3 input_ids"),
        ({"teacher_log_probs": [[0.0] * 3] * 4}, "4 teacher_log_probs for 3 input_ids"),
        ({"teacher_ids": [[], [1, 2], [1, 2, 3]]}, "teacher_ids[1] has 2 entries, and data.teach"),
        ({"teacher_log_probs": [[], [0.0] * 3, None]}, "teacher_log_probs[2] has no entries"),
        ({"teacher_ids": [[], [1, 2, 3.5], [1, 2, 3]]}, "an entry that is no token id"),
        ({"teacher_ids": [[], [1, 2, -1], [1, 2, 3]]}, "an entry that is no token id: -1"),
        ({"teacher_ids": [[], [1, 2, 999], [1, 2, 3]]}, "teacher_ids has 999, and the tokenizer"),
        ({"teacher_ids": [[], [1, 2, 2**32], [1, 2, 3]]}, "an entry that is no token id: 4294967"),
        ({"teacher_ids": [[], [1, 2, 3], [3, 2, 3]]}, "teacher_ids[2] has one token id twice"),
        ({"teacher_ids": [[], [[1], [2], [3]], [[1]] * 3]}, "an entry that is no token id"),
        ({"teacher_log_probs": [[], [0, 0, float("-inf")], [0.0] * 3]}, "no number in fp32: -inf"),
        ({"teacher_log_probs": [[], [0, 0, -1e39], [0.0] * 3]}, "no number in fp32: -1e+39"),
    ],
)
def test_what_a_teacher_said_is_checked(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    from titan_ulysses.data.cache import read_corpus
    from titan_ulysses.data.encoding import Encoder

    row: dict[str, Any] = {"input_ids": [5, 6, 7], "teacher_ids": [[], [1, 2, 3], [1, 2, 3]]}
    row |= {"teacher_log_probs": [[], [-1.0] * 3, [-1.0] * 3]} | change
    file = tmp_path / "row.jsonl"
    file.write_text(json.dumps(row))
    source = MixtureEntry(source="tokens", path=str(file), teacher_top_k=TOP_K)
    with pytest.raises(UserError) as raised:
        read_corpus(source, Encoder(load_tokenizer("bytes")))
    assert f"row.jsonl:1: {words}" in str(raised.value) or words in str(raised.value)


CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
