"""Validation: the same on any mesh and in any batches, by position, before the first step, and
without training.
"""

from __future__ import annotations

import json
import random
import shutil
from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import train as train_script
from helpers.meshes import mesh_of
from helpers.models import STARCODER2, plain_model
from helpers.ranks import run_on_ranks
from helpers.runs import Settings, logged, train, write_documents, write_run
from titan_ulysses.data.corpus import Corpus
from titan_ulysses.data.loader import Loader
from titan_ulysses.data.packing import PackedSequences
from titan_ulysses.data.records import Encoded
from titan_ulysses.data.tokenizer import encode, load_tokenizer
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.model import hf
from titan_ulysses.observability.metrics import describe_validation, short
from titan_ulysses.setup.parallelize import parallelize
from titan_ulysses.train.evaluation import (
    TokenEvaluation,
    evaluate,
    held_out_batches,
    perplexity,
    position_edges,
    spread,
)

SEQ_LEN, SEQUENCES = 24, 7  # neither batches of 2 or 3 nor two data-parallel ranks divide them
Case = tuple[tuple[int, int, int], int]
"""dp_replicate, dp_shard, sp; and the rows of a rank's batch"""


def documents() -> list[Encoded]:
    """150 tokens, of which some are not trained on, in documents of 1 to 60: 6 sequences and a
    quarter, end to end.
    """
    draw = np.random.default_rng(0)
    return [
        Encoded(draw.integers(61, size=n), draw.random(n) < 0.8)
        for n in (60, 1, 7, 40, 23, 2, 9, 8)
    ]


def sequences() -> PackedSequences:
    return PackedSequences(
        Corpus.from_documents(documents()), seq_len=SEQ_LEN, seed=0, shuffle=False, once=True
    )


# --- the value ------------------------------------------------------------------------------------


def by_plain_transformers(model: Any, texts: list[Encoded], *, seq_len: int) -> TokenEvaluation:
    """What the README says of data that is packed end to end.

    A piece ends where a document or a sequence does, and is a forward of its own, from position 0.
    Each token of a document but its first one is predicted, once.
    """
    edges, at = position_edges(seq_len), 0
    losses, counts = [0.0] * len(edges), [0] * len(edges)
    for ids, trained, *_ in texts:
        begin = 0
        while begin < len(ids):
            end = min(len(ids), begin + seq_len - at % seq_len)
            with torch.no_grad():
                logits = model(
                    input_ids=torch.from_numpy(ids[None, begin:end].astype(np.int64))
                ).logits[0]
            for position, row in enumerate(logits.double().log_softmax(-1)[: len(ids) - begin - 1]):
                label = begin + position + 1
                if trained is None or trained[label]:
                    place = bisect_right(edges, position) - 1
                    losses[place] -= row[int(ids[label])].item()
                    counts[place] += 1
            at, begin = at + end - begin, end
    ranges = [(edge, loss / n, n) for edge, loss, n in zip(edges, losses, counts, strict=True) if n]
    return TokenEvaluation(sum(losses) / sum(counts), sum(counts), -(-at // seq_len), ranges)


def evaluated(cases: list[Case]) -> list[tuple[TokenEvaluation, bool]]:
    found = []
    for degrees, batch_size in cases:
        mesh = mesh_of(*degrees)
        model = hf.build_on_meta(hf.load_model_config("", STARCODER2), torch.float64)
        parallelize(model, mesh, memory={"loss_tile_tokens": 5}, param_dtype=torch.float64)
        hf.allocate(model, mesh.device)
        hf.initialize(model, seed=3)
        loader = Loader(
            sequences(),
            batch_size=batch_size,
            batch_rank=mesh.batch.get_local_rank(),
            batch_degree=mesh.batch.size(),
            sp_rank=mesh.sp.get_local_rank(),
            sp_degree=mesh.sp.size(),
        )
        # A part of the data is spread over it.
        assert sum(held_out_batches(loader, 2), []) == [
            0,
            3,
        ]
        found.append((evaluate(model.train(batch_size == 2), loader, mesh), model.training))
        with pytest.raises(UserError, match=r"the 1 held-out sequence\(s\) have no label"):
            loader.sequences.corpus.trained[: SEQ_LEN + 1] = False
            evaluate(model, loader, mesh, sequences=1)
    return found


MESHES: dict[int, list[Case]] = {
    1: [((1, 1, 1), 1), ((1, 1, 1), 3)],
    2: [((1, 1, 2), 2), ((2, 1, 1), 3)],
    4: [((1, 1, 4), 2), ((1, 2, 2), 1), ((1, 2, 2), 3)],
}


@pytest.mark.parametrize("world_size", MESHES)
def test_the_value_depends_neither_on_the_mesh_nor_on_the_batches(world_size: int) -> None:
    plain = plain_model(STARCODER2, torch.float64, experts=None).eval()
    hf.initialize(plain, seed=3)
    expected = by_plain_transformers(plain, documents(), seq_len=SEQ_LEN)
    assert expected.sequences == SEQUENCES and 90 < expected.tokens < 150 - len(documents())
    for of_a_rank in run_on_ranks(world_size, evaluated, MESHES[world_size]):
        for (found, trains), (_, batch_size) in zip(of_a_rank, MESHES[world_size], strict=True):
            assert trains == (batch_size == 2)  # as it was
            assert found.loss == pytest.approx(expected.loss, rel=1e-12)
            assert (found.tokens, found.sequences) == (expected.tokens, SEQUENCES)
            assert [(first, n) for first, _, n in found.by_position] == [
                (e, n) for e, _, n in expected.by_position
            ]
            losses, wanted = ([loss for _, loss, _ in one.by_position] for one in (found, expected))
            assert losses == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    ("seq_len", "edges"),
    [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (8, [0, 1, 2, 4]), (9, [0, 1, 2, 4, 8])],
)
def test_ranges_of_positions(seq_len: int, edges: list[int]) -> None:
    assert position_edges(seq_len) == edges


def test_a_part_of_the_data_is_spread_over_it() -> None:
    assert spread(10, 0) == spread(10, 12) == list(range(10))
    assert spread(10, 4) == [0, 2, 5, 7] and spread(10, 1) == [0]


def test_perplexity() -> None:
    assert perplexity(np.log(257)) == pytest.approx(257)
    assert perplexity(1e4) == np.inf and np.isnan(perplexity(np.nan))


def test_what_the_console_says_of_positions() -> None:
    """Two ranges are one, from the last on, weighted by their labels; what is left at the front is
    one.
    """
    loss, positions = describe_validation(2.0, [(edge, 1.0, 1) for edge in position_edges(2**15)])
    assert loss == "loss 2.0000  perplexity 7.39"
    assert positions == "by position: 0+ 1.000  128+ 1.000  512+ 1.000  2K+ 1.000  8K+ 1.000"
    assert (
        describe_validation(2.0, [(0, 3.0, 1), (1, 2.0, 1), (2, 1.0, 3)])[1]
        == "by position: 0+ 3.000  1+ 1.250"
    )
    assert [short(n) for n in (1, 512, 1024, 1536, 2**19, 2**20)] == [
        "1",
        "512",
        "1K",
        "1536",
        "512K",
        "1M",
    ]


# --- in a run, and without one --------------------------------------------------------------------

SP2: Settings = {"parallelism.sequence_parallel_degree": 2}


def train_main(config: Path, settings: Settings, *flags: str) -> None:
    """`train.py` on the ranks that call this."""
    train_script.main(
        ["--config", str(config), *(f"--{key}={value}" for key, value in settings.items()), *flags]
    )


def contents(folder: Path) -> dict[str, bytes]:
    files = (
        file for file in folder.rglob("*") if file.is_file() and file.name != "evaluation.json"
    )
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_before_the_first_step_and_without_training(tmp_path: Path) -> None:
    config, run = write_run(tmp_path), tmp_path / "outputs" / "run"
    held_out = write_documents(tmp_path / "held-out", documents=6, seed=1)
    settings = SP2 | {"validation.enable": True, "validation.path": held_out, "validation.steps": 0}
    settings |= {"training.steps": 2, "validation.interval": 10, "lr_scheduler.warmup_steps": 1}
    settings |= {"training.global_batch_size": 2}
    run_on_ranks(2, train_main, config, settings | {"checkpoint.enable": False})
    first = logged(run)
    # Nothing was saved: it begins again.
    run_on_ranks(2, train_main, config, settings | {"checkpoint.export": True})
    lines = logged(run)
    assert [line["step"] for line in lines] == [line["step"] for line in first] == [0, 1, 2, 2]
    before, after = lines[0], lines[-1]
    assert before == first[0] and after["validation_loss"] < before["validation_loss"]
    assert (
        sum(labels for *_, labels in after["validation_by_position"]) == after["validation_tokens"]
    )
    mean = (
        sum(loss * labels for _, loss, labels in after["validation_by_position"])
        / after["validation_tokens"]
    )
    assert mean == pytest.approx(after["validation_loss"])

    kept = contents(run)
    no_training_data = settings | {"data.path": ""}
    export: Settings = {"model.config": "{}", "model.path": run / "export", "model.tokenizer": ""}
    dp2: Settings = {"parallelism.sequence_parallel_degree": 1, "training.local_batch_size": 1}
    for changes in (
        settings | {"training.steps": 1},  # the newest checkpoint, as resuming would
        no_training_data
        | export
        | dp2
        | {"checkpoint.enable": False, "training.global_batch_size": -1},
    ):
        run_on_ranks(2, train_main, config, changes, "--evaluate")
        found = json.loads((run / "evaluation.json").read_text())
        (run / "evaluation.json").unlink()
        assert found["loss"] == pytest.approx(after["validation_loss"], rel=1e-6)
        assert found["tokens"] == after["validation_tokens"] and found[
            "perplexity"
        ] == pytest.approx(np.exp(found["loss"]))
        assert found["by_position"] == [
            pytest.approx(one, rel=1e-6) for one in after["validation_by_position"]
        ]
        assert found["weights"].endswith(
            "export" if changes.get("model.path") else "checkpoints/step-2"
        )
        assert contents(run) == kept


def test_all_of_the_held_out_data(tmp_path: Path) -> None:
    """4,559 tokens are four sequences of 1,024 and less than half of a fifth; another text is no
    whole sequence.
    """
    config, tokenizer = write_run(tmp_path), load_tokenizer("bytes")
    table = {"model_type": "llama", "vocab_size": 257, "hidden_size": 32, "intermediate_size": 48}
    table |= {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**table), dtype=torch.float32
    ).eval()
    plain.save_pretrained(tmp_path / "model")
    settings = SP2 | {"model.config": "{}", "model.path": tmp_path / "model", "validation.steps": 0}
    settings |= {"training.seq_len": 1024, "validation.path": tmp_path / "held-out"}
    for lengths in ([3000, 1500, 56], [40]):
        shutil.rmtree(tmp_path / "held-out", ignore_errors=True)
        (tmp_path / "held-out").mkdir()
        draw, texts = random.Random(0), []
        for number, length in enumerate(lengths):
            text = "".join(draw.choices("etaoin shrdlu", k=length))
            (tmp_path / "held-out" / f"{number}.txt").write_text(text)
            texts.append(Encoded(encode(tokenizer, text)))  # and the end of the text
        total = sum(len(one.ids) for one in texts)
        assert total in (4559, 41)
        run_on_ranks(2, train_main, config, settings, "--evaluate")
        found = json.loads((tmp_path / "outputs" / "run" / "evaluation.json").read_text())
        expected = by_plain_transformers(plain, texts, seq_len=1024)
        assert found["tokens"] == expected.tokens == total - len(lengths)
        assert found["loss"] == pytest.approx(expected.loss, rel=1e-6)


def refused(config: Path, settings: Settings) -> str:
    with pytest.raises(UserError) as caught:
        train_main(config, settings, "--evaluate")
    return str(caught.value)


def test_nothing_to_evaluate(tmp_path: Path) -> None:
    """No weights; no held-out data, in each way. Found before anything is made."""
    config = write_run(tmp_path)
    assert "there is no model yet: " in refused(config, {}) and "has no checkpoint" in refused(
        config, {}
    )
    message = refused(config, {"data.path": "", "validation.path": tmp_path / "nowhere"})
    assert message.startswith(f'validation.path = "{tmp_path / "nowhere"}" does not exist')
    assert refused(config, {"data.path": ""}).startswith("data.path is not set")
    one = write_documents(tmp_path / "one", documents=1, seed=1)
    assert refused(config, {"data.path": one}).startswith(
        "validation.path is not set and data.path has 1 document"
    )
    assert not (tmp_path / "outputs").exists()


def test_a_run_goes_on_after_an_evaluation(tmp_path: Path) -> None:
    """Resumed runs do not validate before their first step."""
    config, settings = write_run(tmp_path), SP2 | {"training.steps": 4, "validation.enable": True}
    settings |= {"training.global_batch_size": 2}
    run_on_ranks(2, train, config, settings)
    run_on_ranks(2, train, config, settings | {"training.steps": 5})
    lines = logged(tmp_path / "outputs" / "run")
    assert [line["step"] for line in lines if "validation_loss" in line] == [0, 4, 5]
