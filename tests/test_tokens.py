"""data.source = "tokens": from files of every kind to the same sequences and losses as the text."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from helpers.ranks import run_on_ranks
from helpers.runs import learned, refusal, train, write_run
from titan_ulysses.config.schema import SourceSettings
from titan_ulysses.data import cache
from titan_ulysses.data.cache import read_corpus
from titan_ulysses.data.corpus import Corpus
from titan_ulysses.data.encoding import Encoder
from titan_ulysses.data.records import BadRow, Row, tokens_of
from titan_ulysses.data.sources import open_rows
from titan_ulysses.data.tokenizer import encode, load_tokenizer
from titan_ulysses.distributed.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = load_tokenizer("bytes")
TEXTS = ["one", "zwei ä", "三\n", "four is a longer one"]
DOCUMENTS = [encode(TOKENIZER, text).tolist() for text in TEXTS]
# Two documents a row: their borders are told by positions here and by lengths there.
FLAT = [[*DOCUMENTS[0], *DOCUMENTS[1]], [*DOCUMENTS[2], *DOCUMENTS[3]]]
LENGTHS = [[len(d) for d in DOCUMENTS[:2]], [len(d) for d in DOCUMENTS[2:]]]
POSITIONS = [[i for n in row for i in range(n)] for row in LENGTHS]


def rows(*, packed: str = "") -> list[dict[str, Any]]:
    if not packed:
        return [{"input_ids": document, "source": "a book"} for document in DOCUMENTS]
    more = {"position_ids": POSITIONS, "document_lengths": LENGTHS, "seq_lengths": LENGTHS}[packed]
    return [{"input_ids": row, packed: value} for row, value in zip(FLAT, more, strict=True)]


def write_jsonl(folder: Path, records: list[dict[str, Any]]) -> None:
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def write_parquet(folder: Path, records: list[dict[str, Any]]) -> None:
    datasets.Dataset.from_list(records).to_parquet(folder / "a.parquet", batch_size=3)


def write_arrow_file(folder: Path, records: list[dict[str, Any]]) -> None:
    table = pyarrow.Table.from_pylist(records)
    with pyarrow.ipc.new_file(str(folder / "a.arrow"), table.schema) as file:
        file.write_table(table, max_chunksize=3)


def write_arrow_stream(folder: Path, records: list[dict[str, Any]]) -> None:
    table = pyarrow.Table.from_pylist(records)
    with pyarrow.ipc.new_stream(str(folder / "a.arrow"), table.schema) as file:
        file.write_table(table, max_chunksize=3)


def write_saved(folder: Path, records: list[dict[str, Any]]) -> None:
    datasets.Dataset.from_list(records).save_to_disk(folder)


RECORD_WRITERS = {
    "jsonl": write_jsonl,
    "parquet": write_parquet,
    "arrow file": write_arrow_file,
    "arrow stream": write_arrow_stream,
    "save_to_disk": write_saved,
}


def write_megatron(
    prefix: Path,
    documents: list[list[int]],
    *,
    kind: str = "<u2",
    sentences: int = 1,
    order: str = "<",
    modes: bool = False,
) -> None:
    """As Megatron-LM's `IndexedDatasetBuilder`, written from the format's description."""
    code = {"u1": 1, "<i4": 4, ">i4": 4, "<i8": 5, "<u2": 8, ">u2": 8, "<f4": 7}[kind]
    # Each document as so many sequences, the last of which has what is left.
    cut = [
        [d[i * len(d) // sentences : (i + 1) * len(d) // sentences] for i in range(sentences)]
        for d in documents
    ]
    sequences = [sequence for document in cut for sequence in document]
    lengths = np.array([len(sequence) for sequence in sequences])
    size = np.dtype(kind).itemsize
    pointers = (np.cumsum(lengths) - lengths) * size
    borders = np.arange(len(documents) + 1) * sentences
    header = struct.pack(f"{order}9sQBQQ", b"MMIDIDX\0\0", 1, code, len(sequences), len(borders))
    arrays = [lengths.astype(order + "i4"), pointers.astype(order + "i8")]
    arrays += [borders.astype(order + "i8")] + [np.zeros(len(sequences), "i1")] * modes
    prefix.with_suffix(".idx").write_bytes(header + b"".join(a.tobytes() for a in arrays))
    tokens = np.array([token for document in documents for token in document], dtype=kind)
    prefix.with_suffix(".bin").write_bytes(tokens.tobytes())


def corpus_of(path: Path | str, **settings: Any) -> Corpus:
    source = SourceSettings(source="tokens", path=str(path), **settings)
    return read_corpus(source, Encoder(TOKENIZER, source.train_on))[0]


def documents_of(corpus: Corpus) -> list[list[int]]:
    return [corpus[i].tolist() for i in range(len(corpus))]


# --- every kind of file holds the same documents --------------------------------------------------


@pytest.mark.parametrize("packed", ["", "position_ids", "document_lengths", "seq_lengths"])
@pytest.mark.parametrize("kind", RECORD_WRITERS)
def test_records(kind: str, packed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RECORD_WRITERS[kind](tmp_path, rows(packed=packed))
    assert documents_of(corpus_of(tmp_path)) == DOCUMENTS
    monkeypatch.setattr(cache, "SMALL_CHARACTERS", -1)  # through the cache on the disk
    source = SourceSettings(source="tokens", path=str(tmp_path))
    kept, tally = read_corpus(source, Encoder(TOKENIZER), cache_folder=str(tmp_path / "cache"))
    assert documents_of(kept) == DOCUMENTS and tally.documents == 4


@pytest.mark.parametrize(
    ("kind", "sentences", "modes"), [("<u2", 1, False), ("<i4", 3, False), ("<i8", 2, True)]
)
def test_megatron(kind: str, sentences: int, modes: bool, tmp_path: Path) -> None:
    documents = [DOCUMENTS[0], [], *DOCUMENTS[1:]]
    write_megatron(tmp_path / "a_text", documents, kind=kind, sentences=sentences, modes=modes)
    for path in (tmp_path, *(tmp_path / f"a_text{end}" for end in ("", ".idx", ".bin"))):
        found = corpus_of(path)
        assert documents_of(found) == DOCUMENTS
        assert isinstance(found[0].base, np.ndarray) and found[0].dtype == np.dtype(kind)
    write_megatron(tmp_path / "b", DOCUMENTS[::-1], kind="<u2")
    assert documents_of(corpus_of(tmp_path)) == DOCUMENTS + DOCUMENTS[::-1]


@pytest.mark.parametrize("modes", [b"", bytes([0, 1, 0])])
@pytest.mark.parametrize(
    ("code", "letter"), [(1, "B"), (2, "b"), (3, "h"), (4, "i"), (5, "q"), (8, "H")]
)
def test_megatron_byte_by_byte(code: int, letter: str, modes: bytes, tmp_path: Path) -> None:
    """Files after Megatron-LM's megatron/core/datasets/indexed_dataset.py (commit 00caa53), not by
    a writer of this repository: `_IndexWriter`, `DType`, `IndexedDatasetBuilder`.

    Document 0 has the sequences [5, 6] and [7], document 1 has none, document 2 has [8, 9, 10].
    """
    width = struct.calcsize(f"<{letter}")
    index = b"MMIDIDX\x00\x00"
    index += b"\x01\x00\x00\x00\x00\x00\x00\x00"  # version 1, <Q
    index += bytes([code])  # <B
    index += struct.pack("<Q", 3)  # sequences
    index += struct.pack("<Q", 4)  # documents, and the 0 with which their list begins
    index += struct.pack("<iii", 2, 1, 3)  # tokens of each sequence
    index += struct.pack("<qqq", 0, 2 * width, 3 * width)  # bytes at which they begin
    index += struct.pack("<qqqq", 0, 2, 2, 3)  # sequences before the end of each document
    assert len(index) == 34 + 3 * (4 + 8) + 4 * 8
    (tmp_path / "hand.idx").write_bytes(index + modes)
    (tmp_path / "hand.bin").write_bytes(struct.pack(f"<6{letter}", 5, 6, 7, 8, 9, 10))
    corpus, tally = read_corpus(
        SourceSettings(source="tokens", path=str(tmp_path / "hand")), Encoder(TOKENIZER)
    )
    assert documents_of(corpus) == [[5, 6, 7], [8, 9, 10]]
    assert (tally.documents, tally.empty, tally.tokens) == (2, 1, 6)
    for wrong in (6, 7, 9):  # float64, float32, none
        (tmp_path / "hand.idx").write_bytes(index[:17] + bytes([wrong]) + index[18:])
        with pytest.raises(UserError, match=f"type {wrong}, which is not an integer type"):
            corpus_of(tmp_path / "hand")


def test_labels_and_padding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels mask what is not trained on, and padding is no data."""
    ids = [1, 2, 3, 4, 5, 0, 0]
    records = [
        {
            "input_ids": ids,
            "labels": [-100, 2, -100, 4, 5, -100, -100],
            "position_ids": [0, 1, 0, 1, 2, 0, 1],
            "attention_mask": [1, 1, 1, 1, 1, 0, 0],
        },
        {"input_ids": [7, 8], "labels": None, "position_ids": None, "attention_mask": None},
    ]
    for write in (write_jsonl, write_parquet):
        write(tmp_path, records)
        corpus = corpus_of(tmp_path)
        trained = {1: [False, True], 3: [False, True, True], 7: [True, True]}
        expected = (
            [[7, 8], [1, 2], [3, 4, 5]]
            if records[0]["labels"] is None
            else ([[1, 2], [3, 4, 5], [7, 8]])
        )
        assert documents_of(corpus) == expected
        assert corpus.trained.tolist() == [x for one in expected for x in trained[one[0]]]
        assert corpus_of(tmp_path, train_on="all").trained is None
        with monkeypatch.context() as patch:
            patch.setattr(cache, "SMALL_CHARACTERS", -1)
            source = SourceSettings(source="tokens", path=str(tmp_path))
            kept, _ = read_corpus(source, Encoder(TOKENIZER), cache_folder=str(tmp_path / "cache"))
            assert kept.trained.tolist() == corpus.trained.tolist()
        next(tmp_path.glob("a.*")).unlink()
        records.reverse()


# --- the same losses as the text ------------------------------------------------------------------

SETTINGS = {"training.steps": 4, "checkpoint.interval": 2, "training.global_batch_size": 2}
SETTINGS |= {"training.local_batch_size": 1, "lr_scheduler.warmup_steps": 1}
MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {}),
    "sp2": (2, {"parallelism.sequence_parallel_degree": 2}),
}


def run(config: Path, name: str, mesh: str, **settings: Any) -> list[tuple[int, float, float]]:
    ranks, degrees = MESHES[mesh]
    named = {key.replace("__", "."): value for key, value in settings.items()}
    settings = SETTINGS | degrees | named | {"job.name": name}
    run_on_ranks(ranks, train, config, settings, timeout=300)
    return learned(config.parent / "outputs" / name)


def test_losses_are_those_of_the_text_on_every_mesh_and_resumed(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    texts = [file.read_text() for file in sorted((tmp_path / "data").glob("*.txt"))]
    documents = [encode(TOKENIZER, text).tolist() for text in texts]
    write_megatron(tmp_path / "tokens", documents)
    (tmp_path / "records").mkdir()
    write_parquet(tmp_path / "records", [{"input_ids": document} for document in documents])
    tokens = {"data__source": "tokens"}
    for mesh in MESHES:
        text = run(config, f"text-{mesh}", mesh)
        found = run(config, f"bin-{mesh}", mesh, data__path=str(tmp_path / "tokens.bin"), **tokens)
        assert len(text) == 4 and found == text
    # Interrupted after two steps on two ranks, resumed from other files on one.
    records = {"data__path": str(tmp_path / "records"), **tokens}
    run(config, "resumed", "sp2", training__steps=2, lr_scheduler__decay_type="constant", **records)
    found = run(config, "resumed", "one", lr_scheduler__decay_type="constant", **records)
    text = run(config, "whole", "one", lr_scheduler__decay_type="constant")
    assert np.allclose(found, text, rtol=2e-5, atol=0) and len(found) == 4


def test_streamed_records_with_several_documents(tmp_path: Path) -> None:
    """A position in the stream is in the middle of a row, whose documents do not see each other."""
    from titan_ulysses.data.sources import DatasetRows
    from titan_ulysses.data.stream import StreamedSequences

    write_saved(tmp_path, rows(packed="position_ids"))
    source = SourceSettings(source="tokens", path=str(tmp_path), streaming=True)

    def stream() -> StreamedSequences:
        return StreamedSequences(
            DatasetRows(source, "data.path"), Encoder(TOKENIZER), seq_len=7, seed=0
        )

    one, found = stream(), []
    for index in range(6):
        other = stream()
        other.seek(index, one.position(index))
        sample = one[index]
        assert [x.tolist() for x in sample[:3]] == [x.tolist() for x in other[index][:3]]
        begins = sample.position_ids == 0
        assert tuple(np.diff([*np.flatnonzero(begins), 7])) == sample.document_lengths
        found += list(zip(sample.input_ids.tolist(), sample.labels.tolist(), strict=True))
    ends = [label for token, label in found if token == DOCUMENTS[0][-1]]
    assert len(ends) >= 4 and set(ends) == {-100}


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"tokens": [1]}, 'no field "input_ids" (it has tokens)'),
        ({"input_ids": [1.5]}, "input_ids is no list of whole numbers"),
        ({"input_ids": [[1]]}, "input_ids is no list of whole numbers"),
        ({"input_ids": [True]}, "input_ids is no list of whole numbers"),
        ({"input_ids": [2**70]}, "input_ids is no list of whole numbers"),
        ({"input_ids": [1, [2]]}, "input_ids is no list of whole numbers"),
        ({"input_ids": "abc"}, "input_ids is no list of whole numbers"),
        ({"input_ids": [1, 2], "labels": [1]}, "1 labels for 2 input_ids"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, "give labels that are not shifted"),
        ({"input_ids": [1, 2], "position_ids": [1, 2]}, "position_ids[0] is 1"),
        ({"input_ids": [1, 2], "position_ids": [0, 2]}, "position_ids[1] is 2"),
        ({"input_ids": [1, 2], "document_lengths": [1]}, "document_lengths sum to 1, not to 2"),
        (
            {"input_ids": [1, 2], "document_lengths": [2**63 - 1, 2**63 - 1, 4]},
            f"document_lengths sum to {2**64 + 2}, not to 2 tokens",
        ),
        (
            {"input_ids": [1, 2], "document_lengths": [1, 1], "position_ids": [0, 1]},
            "document_lengths and position_ids describe different documents",
        ),
    ],
)
def test_bad_records(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        tokens_of(record)
    assert reason in str(caught.value)


def test_a_token_outside_of_the_vocabulary_is_refused_with_its_place(tmp_path: Path) -> None:
    found = Encoder(TOKENIZER)(Row("a:3", tokens_of({"input_ids": [1, 2, 257]})))
    assert isinstance(found, BadRow)
    assert found.reason == "token 2 of 3 (from 0) is 257, and the tokenizer has the ids 0 to 256"
    records = [*rows(), {"input_ids": [5, -1]}]
    write_jsonl(tmp_path, records)
    with pytest.raises(UserError, match=r"a\.jsonl:5: token 1 of 2 \(from 0\) is -1"):
        corpus_of(tmp_path)
    assert documents_of(corpus_of(tmp_path, bad_lines="skip")) == DOCUMENTS


Damage = Callable[[Path], None]


def cut(name: str, count: int) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / name
        file.write_bytes(file.read_bytes()[:-count])

    return damage


def megatron(**options: Any) -> Damage:
    return lambda folder: write_megatron(folder / "a", DOCUMENTS, **options)


def overwritten(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content) and None


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("a.idx", cut("a.bin", 2), "a.bin is cut short: it has 74 bytes, but the index describes"),
        ("a.idx", cut("a.idx", 1), "it is cut short or damaged: it has "),
        ("a.idx", megatron(order=">"), "it has another byte order (big-endian)"),
        ("a.idx", megatron(kind=">u2"), "it would fit in another byte order (big-endian)"),
        ("a.idx", megatron(kind="<f4"), "type 7, which is not an integer type"),
        ("a.idx", overwritten("a.idx", b"TNTIDX\0\0" + 50 * b"\0"), "before MMapIndexedDataset"),
        ("a.idx", overwritten("a.idx", b"PK" + 50 * b"\0"), "does not begin as Megatron's index"),
        ("a.idx", lambda folder: (folder / "a.bin").unlink(), "a.bin cannot be read (No such file"),
        ("a.bin", lambda folder: (folder / "a.idx").unlink(), "has no a.idx beside it"),
        ("", lambda folder: write_jsonl(folder, rows()), "has Megatron's a.idx and a.jsonl"),
    ],
)
def test_damaged_megatron(name: str, damage: Damage, message: str, tmp_path: Path) -> None:
    write_megatron(tmp_path / "a", DOCUMENTS)
    damage(tmp_path)
    with pytest.raises(UserError) as caught:
        corpus_of(tmp_path / name)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_megatron_documents_with_bad_tokens_are_named_or_skipped(tmp_path: Path) -> None:
    documents = [DOCUMENTS[0], [1, 2, 300, 301], *DOCUMENTS[1:]]
    write_megatron(tmp_path / "a", documents)
    expected = "data.path: a.idx: document 1: token 2 (from 0) is 300, and the tokenizer has the"
    with pytest.raises(UserError) as caught:
        corpus_of(tmp_path)
    assert str(caught.value).startswith(expected)
    assert documents_of(corpus_of(tmp_path, bad_lines="skip")) == DOCUMENTS


@pytest.mark.parametrize("kind", ["parquet", "arrow file", "arrow stream"])
def test_record_files_cut_short(kind: str, tmp_path: Path) -> None:
    RECORD_WRITERS[kind](tmp_path, rows())
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match=f"{file.name} cannot be read"):
        corpus_of(tmp_path)


@pytest.mark.parametrize(
    ("kind", "streaming"),
    [
        ("arrow file", False),
        ("arrow stream", False),
        ("save_to_disk", False),
        ("save_to_disk", True),
        ("folder", False),
        ("folder", True),
    ],
)
def test_offsets_that_go_backwards(kind: str, streaming: bool, tmp_path: Path) -> None:
    """They would be read as they are; those of a list would end the process by a signal."""
    writer = RECORD_WRITERS["arrow stream" if kind == "folder" else kind]
    writer(tmp_path, [{"text": "abc"}] * 3)
    file = next(tmp_path.glob("*.arrow"))
    offsets = struct.pack("<3i", 0, 3, 6)
    assert file.read_bytes().count(offsets) == 1
    file.write_bytes(file.read_bytes().replace(offsets, struct.pack("<3i", 0, 3, 1)))
    name, path = ("hf", tmp_path) if kind in ("save_to_disk", "folder") else ("jsonl", file)
    source = SourceSettings(source=name, path=str(path), streaming=streaming)
    with pytest.raises(UserError, match=f"{path}.* cannot be (read|opened) .*Offset"):
        [*open_rows(source)]


def test_show_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from titan_ulysses.tools.show_data import main as show

    write_megatron(tmp_path / "a", DOCUMENTS)
    write_jsonl(
        tmp_path, [{"input_ids": [*b"abc"], "labels": [-100, -100, 99]}, {"input_ids": [999]}]
    )
    arguments = ["--config", str(write_run(tmp_path)), "--data.source", "tokens", "--data.path"]
    show([*arguments, str(tmp_path / "a.bin"), "--rows", "2"])
    printed = capsys.readouterr().out
    assert "--- document 1: 8 tokens, 7 trained on" in printed and "z[[wei ä" in printed
    show([*arguments, str(tmp_path / "a.jsonl")])
    printed = capsys.readouterr().out
    assert "--- a.jsonl:1: 3 tokens, 1 trained on\nab[[c]]" in printed
    assert "a.jsonl:2: cannot be used: token 0 of 1 (from 0) is 999" in printed
    with pytest.raises(UserError, match="--rows none: needs a number of rows"):
        show([*arguments, "x", "--rows", "none"])


def test_through_the_front_door(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    write_jsonl(tmp_path, [*rows(), {"input_ids": [1, 999]}])
    settings = {"data.source": "tokens", "data.path": str(tmp_path / "a.jsonl")}
    told = run_on_ranks(1, refusal, config, settings)[0]
    assert told.startswith("data.path: a.jsonl:5: token 1 of 2 (from 0) is 999")
