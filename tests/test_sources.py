"""Sources, the cache of tokens, and whole configurations: from data of every kind to sequences."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from titan_ulysses.config.schema import Config, SourceSettings
from titan_ulysses.data import cache
from titan_ulysses.data.cache import read_corpus
from titan_ulysses.data.corpus import Corpus, CorpusStats
from titan_ulysses.data.encoding import Encoder, encode_rows
from titan_ulysses.data.packing import SampleStream
from titan_ulysses.data.pipeline import open_sequences
from titan_ulysses.data.records import BadRow, Completion, Encoded, Row
from titan_ulysses.data.sources import open_rows
from titan_ulysses.data.tokenizer import END_OF_TEXT_ID, load_tokenizer
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.sequence import IGNORE_INDEX

TOKENIZER = load_tokenizer("bytes")
RECORDS = [
    {"text": text, "n": i}
    for i, text in enumerate(["one", "zwei ä", "三\n", "four\u2028still four"])
]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)


# --- the same records in every format


def plain(path: Path) -> None:
    path.write_text(LINES)


def blank_lines(path: Path) -> None:
    path.write_text("\n" + LINES.replace("\n", "\r\n\n"))


def byte_order_mark(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + LINES.rstrip().encode())


def array(path: Path) -> None:
    path.write_text(json.dumps(RECORDS, indent=1))


def array_after_a_byte_order_mark(path: Path) -> None:
    path.write_text(json.dumps(RECORDS), encoding="utf-8-sig")


def gzipped(path: Path) -> None:
    path.write_bytes(gzip.compress(LINES.encode()))


def gzipped_array(path: Path) -> None:
    path.write_bytes(gzip.compress(json.dumps(RECORDS).encode()))


def zstandard(path: Path) -> None:
    with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
        file.write(LINES.encode())


def parquet(path: Path) -> None:
    datasets.Dataset.from_list(RECORDS).to_parquet(path, batch_size=3)


FORMATS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "lines": ("a.jsonl", plain),
    "lines called json": ("a.json", plain),
    "blank lines": ("a.jsonl", blank_lines),
    "byte order mark": ("a.jsonl", byte_order_mark),
    "array": ("a.json", array),
    "array after a byte order mark": ("a.json", array_after_a_byte_order_mark),
    "gz": ("a.jsonl.gz", gzipped),
    "gz array": ("a.json.gz", gzipped_array),
    "zst": ("a.jsonl.zst", zstandard),
    "parquet": ("a.parquet", parquet),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_holds_the_same_rows(name: str, tmp_path: Path) -> None:
    file, write = FORMATS[name]
    write(tmp_path / file)
    for path in (tmp_path, tmp_path / file, tmp_path / "*"):
        rows = open_rows(SourceSettings(source="jsonl", path=str(path)))
        found = [*rows]
        assert [row.content for row in found] == [record["text"] for record in RECORDS]
        assert [row.content for row in rows] == [record["text"] for record in RECORDS]  # again
        assert rows.done == rows.total == (tmp_path / file).stat().st_size
    lines = [2, 4, 6, 8] if name == "blank lines" else [1, 2, 3, 4]
    assert [Path(row.place).name for row in found] == [f"{file}:{line}" for line in lines]


def test_files_have_no_splits_and_no_subsets(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINES)
    for key in ("split", "subset"):
        source = SourceSettings(source="chat", path=str(tmp_path / "a.jsonl"), **{key: "test"})
        with pytest.raises(
            UserError, match=f'a.jsonl" are files, which have no {key} "test": give a data set'
        ):
            open_rows(source)


def test_files_of_a_folder_come_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "sub/a.json", "a.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    (tmp_path / "notes.txt").write_text("no data")
    (tmp_path / "empty.jsonl").touch()
    rows = open_rows(SourceSettings(source="jsonl", path=str(tmp_path)))
    assert [row.content for row in rows] == ["a.jsonl", "b.jsonl", "sub/a.json"]


@pytest.mark.parametrize("streaming", [False, True])
def test_data_sets(tmp_path: Path, streaming: bool) -> None:
    table = datasets.Dataset.from_list(RECORDS)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "rest": table.select([1])}).save_to_disk(
        tmp_path / "split"
    )
    (tmp_path / "folder").mkdir()
    parquet(tmp_path / "folder" / "train.parquet")  # what `load_dataset` reads

    def texts(path: str, **settings: Any) -> list:
        rows = open_rows(
            SourceSettings(source="hf", path=str(tmp_path / path), streaming=streaming, **settings)
        )
        return [row.content for row in rows]

    expected = [record["text"] for record in RECORDS]
    assert texts("one") == texts("split") == texts("folder") == expected
    assert texts("split", split="rest") == expected[1:2]
    with pytest.raises(UserError, match=r'has no split "dev", only train, rest: set data\.split'):
        texts("split", split="dev")
    with pytest.raises(
        UserError, match=r'data\.path = ".*one" has no field "body" \(it has text, n\)'
    ):
        texts("one", text_field="body")


def test_chats_come_from_files_and_from_data_sets(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    datasets.Dataset.from_list([{"messages": messages}]).save_to_disk(tmp_path / "saved")
    found = [
        [row.content for row in open_rows(SourceSettings(source="chat", path=str(tmp_path / name)))]
        for name in ("a.jsonl", "*.jsonl", "saved")
    ]
    assert found[0] == found[1] == found[2] and found[0][0].messages == messages


def test_a_hub_that_cannot_be_reached(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    for source in ("hf", "chat"):
        with pytest.raises(UserError) as caught:
            open_rows(SourceSettings(source=source, path="nobody/no-such-data"))
        message = str(caught.value)
        assert message.startswith(
            'data.path = "nobody/no-such-data" is not a local folder, and the hub cannot be '
            "reached ("
        )
        assert message.endswith(
            'datasets.load_dataset("nobody/no-such-data").save_to_disk(FOLDER), then give that '
            "folder"
        )
        assert "\n" not in message
    assert capfd.readouterr().err == ""
    # A file, not a name.
    with pytest.raises(UserError, match=r'data\.path = "no/such.jsonl" does not exist'):
        open_rows(SourceSettings(source="chat", path="no/such.jsonl"))


# --- rows -> tokens


def test_prompts_are_masked() -> None:
    encoded = Encoder(TOKENIZER)(Row("a", Completion("ab", "cd")))
    assert encoded.ids.tolist() == [*b"abcd", END_OF_TEXT_ID]  # no end of text between them
    assert encoded.trained.tolist() == [False, False, True, True, True]
    assert Encoder(TOKENIZER, "all")(Row("a", Completion("ab", "cd"))).trained is None
    assert Encoder(TOKENIZER)(Row("a", Completion("", "cd"))).trained.tolist() == [True, True, True]
    refused = Encoder(TOKENIZER)(Row("a:3", Completion("ab", "")))
    assert isinstance(refused, BadRow) and "nothing in it is trained on" in refused.reason


BAD_LINES = {
    '{"text": "half': "not JSON (Unterminated string",
    "nonsense": "not JSON (Expecting value",
    '["text"]': "a JSON list, not an object with fields",
    "null": "a JSON NoneType, not an object with fields",
    '{"body": "x"}': 'no field "text" (it has body)',
    "{}": 'no field "text" (it has none)',
    '{"text": 3}': 'the field "text" holds 3, not text',
    '{"text": null}': 'the field "text" holds null, not text',
    '{"text": "\\ud83d"}': "it contains half of a surrogate pair",
    b'{"text": "caf\xe9"}': "'utf-8' codec can't decode byte 0xe9",
    "[" * 100_000: "not JSON (",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_stops_or_is_counted(line: str | bytes, tmp_path: Path) -> None:
    raw = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "fine"}\n\n' + raw + b'\n{"text": ""}\n{"text": "also"}\n' + raw
    )
    source = SourceSettings(source="jsonl", path=str(tmp_path / "a.jsonl"))
    with pytest.raises(UserError) as caught:
        read_corpus(source, Encoder(TOKENIZER), setting="data.mixture[1].path")
    message = str(caught.value)
    assert (
        message.startswith(f"data.mixture[1].path: a.jsonl:3: {BAD_LINES[line]}")
        and "\n" not in message
    )
    assert message.endswith(
        'or set data.mixture[1].bad_lines = "skip" to leave such lines out and count them'
    )
    corpus, tally = read_corpus(source.model_copy(update={"bad_lines": "skip"}), Encoder(TOKENIZER))
    assert [bytes(corpus[d][:-1].astype(np.uint8)) for d in range(len(corpus))] == [
        b"fine",
        b"also",
    ]
    assert (tally.documents, tally.bad, tally.empty) == (2, 2, 1)
    first, second = tally.notes()
    assert first.startswith(f"2 bad line(s) skipped (the first: a.jsonl:3: {BAD_LINES[line]}")
    assert second == "1 empty one(s) left out"


def test_nothing_but_bad_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("x\ny\n")
    source = SourceSettings(source="jsonl", path=str(tmp_path), bad_lines="skip")
    with pytest.raises(
        UserError,
        match=r"has no document to train on \(2 bad line\(s\) skipped \(the first: a.jsonl:1",
    ):
        read_corpus(source, Encoder(TOKENIZER))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", b"no gzip at all", "a.jsonl.gz cannot be read ("),
        (
            "a.jsonl.gz",
            gzip.compress(LINES.encode() * 99)[:-20],
            "a.jsonl.gz cannot be read (Truncated",
        ),
        ("a.parquet", b"no parquet at all", "a.parquet cannot be read ("),
        ("a.json", b'[{"text": "a"},', "a.json cannot be read ("),
        pytest.param("a.json", b"[" * 100_000, "a.json cannot be read (", id="too deep"),
    ],
)
def test_broken_files_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        [*open_rows(SourceSettings(source="jsonl", path=str(tmp_path)))]
    assert str(caught.value).startswith(f"data.path: {tmp_path}/{message}")


# --- workers and the cache


def test_workers_make_the_same_in_order() -> None:
    rows = [Row(str(i), f"{i} " * (i % 50)) for i in range(5_000)]
    rows[500] = BadRow("500", "bad")
    alone, shared = ([*encode_rows(rows, Encoder(TOKENIZER), workers=n)] for n in (1, 2))
    assert shared[500] == alone[500] == rows[500]
    for one, other in zip(alone, shared, strict=True):
        assert isinstance(one, BadRow) or one.ids.tolist() == other.ids.tolist()


def kill_own_process(row: Row) -> Encoded:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError(row)


def test_a_worker_that_is_killed() -> None:
    with pytest.raises(UserError, match="A tokenizing worker process was killed"):
        [*encode_rows([Row("a", "a")], kill_own_process, workers=2)]


class Refusing(type(TOKENIZER)):
    """A tokenizer that fails at one word, as those with a damaged or remote table do."""

    def __call__(self, text: str, **options: Any) -> Any:
        if "three" in text:
            raise OverflowError("no id for it")
        return super().__call__(text, **options)


def test_a_tokenizer_that_fails_is_named_with_the_row(source: SourceSettings) -> None:
    refusing = Refusing(tokenizer_object=TOKENIZER.backend_tokenizer, name_or_path="broken")
    refusing.add_tokens(["more"])  # the byte tokenizer itself is never called
    message = 'a.jsonl:4: model.tokenizer = "broken" cannot encode it (no id for it): take another'
    with pytest.raises(UserError, match=re.escape(message)):
        read_corpus(source, Encoder(refusing))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Everything is cached, whatever its size; counts the documents that are tokenized."""
    calls: Counter = Counter()
    encode = Encoder.__call__

    def counting(self: Encoder, row: Row | BadRow) -> Encoded | BadRow:
        calls["rows"] += 1
        return encode(self, row)

    monkeypatch.setattr(Encoder, "__call__", counting)
    monkeypatch.setattr(cache, "SMALL_CHARACTERS", -1)
    monkeypatch.setattr(cache, "usable_cores", lambda: 1)
    return calls


def contents(corpus: Corpus) -> list[list[int]]:
    return [corpus[d].tolist() for d in range(len(corpus))]


@pytest.fixture
def source(tmp_path: Path) -> SourceSettings:
    lines = [
        {"text": text, "prompt": "p", "completion": text} for text in ("one", "two", "", "three")
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "bad\n")
    return SourceSettings(source="jsonl", path=str(tmp_path / "a.jsonl"), bad_lines="skip")


def read(source: SourceSettings, **settings: Any) -> tuple[Corpus, CorpusStats]:
    encoder = Encoder(TOKENIZER, source.train_on)
    return read_corpus(
        source, encoder, cache_folder=str(Path(source.path).parent / "cache"), **settings
    )


def test_a_cache_is_made_once_and_mapped(source: SourceSettings, counted: Counter) -> None:
    made, tally = read(source)
    assert counted["rows"] == 5 and contents(made) == [
        [*text, 256] for text in (b"one", b"two", b"three")
    ]
    again, told = read(source)
    assert counted["rows"] == 5
    assert contents(again) == contents(made) and told == tally == CorpusStats(
        3, 14, 1, 1, tally.first_bad
    )
    assert again.tokens.dtype == np.uint16 and again.trained is None
    array = again.tokens
    while not isinstance(array, np.memmap):
        array = array.base
    assert not again.tokens.flags.writeable


def test_masks_are_kept(source: SourceSettings, counted: Counter) -> None:
    prompts = source.model_copy(update={"prompt_field": "prompt", "completion_field": "completion"})
    (made, _), (again, tally) = read(prompts), read(prompts)
    for corpus in (made, again):
        assert contents(corpus) == [[*text, 256] for text in (b"pone", b"ptwo", b"pthree")]
        assert corpus.trained.tolist() == [
            letter != ord("p") or i > 10 for i, letter in enumerate(corpus.tokens)
        ]
    assert tally.bad == 2  # the line, and a completion that is empty


def test_content_tokenizer_and_settings_are_the_key(
    source: SourceSettings, counted: Counter, tmp_path: Path
) -> None:
    read(source)
    file = Path(source.path)
    stat = file.stat()
    file.write_text(file.read_text().replace("one", "eno"))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # neither its size nor its time tells
    changed, _ = read(source)
    assert contents(changed)[0] == [*b"eno", 256] and counted["rows"] == 10
    read(source.model_copy(update={"text_field": "completion"}))
    assert counted["rows"] == 15
    other = load_tokenizer("bytes")
    other.add_tokens(["one"])
    read_corpus(source, Encoder(other), cache_folder=str(tmp_path / "cache"))
    assert counted["rows"] == 20
    file.rename(tmp_path / "sub.jsonl")
    # Places in messages hold its name.
    read(source.model_copy(update={"path": str(tmp_path / "sub.jsonl")}))
    assert counted["rows"] == 25


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


BREAK: dict[str, Callable[[Path], None]] = {
    "truncated": lambda folder: os.truncate(folder / "tokens.bin", 4),
    "changed": lambda folder: damage(folder / "tokens.bin"),
    "lengths changed": lambda folder: damage(folder / "lengths.bin"),
    "file gone": lambda folder: (folder / "lengths.bin").unlink(),
    "description cut": lambda folder: os.truncate(folder / "corpus.json", 9),
    "description empty": lambda folder: (folder / "corpus.json").write_text("{}"),
    "description a list": lambda folder: (folder / "corpus.json").write_text("[]"),
}


@pytest.mark.parametrize("how", BREAK)
def test_a_broken_cache_is_made_again(
    how: str, source: SourceSettings, counted: Counter, tmp_path: Path
) -> None:
    expected = contents(read(source)[0])
    [folder] = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    BREAK[how](folder)
    assert contents(read(source)[0]) == expected and counted["rows"] == 10
    assert contents(read(source)[0]) == expected and counted["rows"] == 10


def test_what_fails_half_way_leaves_nothing(
    source: SourceSettings, counted: Counter, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl:5: not JSON"):
        read(source.model_copy(update={"bad_lines": "stop"}))
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] in ([".lock"], [])


def test_a_cache_folder_that_cannot_be(
    source: SourceSettings, counted: Counter, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(
        UserError, match=r"data\.cache_folder = .*cache: cannot keep the tokenized data there"
    ):
        read(source)


READER = """
import sys
from titan_ulysses.config.schema import SourceSettings
from titan_ulysses.data import cache
from titan_ulysses.data.encoding import Encoder
from titan_ulysses.data.tokenizer import load_tokenizer

cache.SMALL_CHARACTERS, cache.usable_cores, made = -1, lambda: 1, []
encode = Encoder.__call__
Encoder.__call__ = lambda self, row: (made.append(1), encode(self, row))[1]
source = SourceSettings(source="jsonl", path=sys.argv[1])
corpus, _ = cache.read_corpus(source, Encoder(load_tokenizer("bytes")), cache_folder=sys.argv[2])
print(len(made), len(corpus), int(corpus.tokens.sum()))
"""


def test_of_several_processes_one_makes_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINES * 200)
    command = [sys.executable, "-c", READER, str(tmp_path / "a.jsonl"), str(tmp_path / "cache")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    started = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    found = sorted(
        tuple(map(int, process.communicate(timeout=120)[0].split())) for process in started
    )
    assert [made for made, *_ in found] == [0, 800]
    assert found[0][1:] == found[1][1:]


def test_what_a_killed_process_has_left_goes(
    source: SourceSettings, counted: Counter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the next one has the same number, as the first process of a container has."""
    for name, days in {".old.elsewhere.partial": 2, ".new.elsewhere.partial": 0}.items():
        folder = tmp_path / "cache" / name
        folder.mkdir(parents=True)
        (folder / "tokens.bin").touch()
        for path in (folder / "tokens.bin", folder):
            os.utime(path, (time.time() - days * 86_400,) * 2)
    monkeypatch.setattr(os, "getpid", lambda: 1)
    if (killed := os.fork()) == 0:
        monkeypatch.setattr(Encoder, "__call__", lambda *_: os._exit(9))
        read(source)
    assert os.waitstatus_to_exitcode(os.waitpid(killed, 0)[1]) == 9
    assert len([*(tmp_path / "cache").glob(".*.partial")]) == 2
    read(source)
    left = [path.name for path in (tmp_path / "cache").glob(".*.partial")]
    assert left == [".new.elsewhere.partial"]


# --- whole configurations


def configured(
    tmp_path: Path, data: dict[str, Any], seq_len: int = 16, **validation: Any
) -> Config:
    return Config.model_validate(
        {
            "model": {"config": {"model_type": "llama"}, "tokenizer": "bytes"},
            "data": {"cache_folder": str(tmp_path / "cache"), **data},
            "training": {"seq_len": seq_len},
            "validation": validation,
        }
    )


def opened(
    tmp_path: Path, data: dict[str, Any], **settings: Any
) -> tuple[SampleStream, SampleStream | None]:
    return open_sequences(configured(tmp_path, data, **settings), TOKENIZER)


def write_lines(path: Path, texts: list[str]) -> str:
    path.write_text(
        "".join(
            json.dumps({"text": text, "prompt": text[:2], "answer": text[2:]}) + "\n"
            for text in texts
        )
    )
    return str(path)


@pytest.mark.parametrize("packing", ["none", "concat", "best_fit"])
@pytest.mark.parametrize("kind", ["text", "jsonl", "prompts", "hf"])
@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(lengths=st.lists(st.integers(3, 40), min_size=2, max_size=8))
def test_every_source_in_every_packing(
    kind: str, packing: str, tmp_path_factory, lengths: list[int]
) -> None:
    """One epoch holds every character and every label once; of prompts only the answers are
    labels.
    """
    tmp_path = tmp_path_factory.mktemp("data")
    characters = count()
    texts = ["".join(chr(next(characters) % 94 + 33) for _ in range(length)) for length in lengths]
    data: dict[str, Any] = {"source": kind, "path": str(tmp_path / "data"), "packing": packing}
    if kind == "text":
        (tmp_path / "data").mkdir()
        for i, text in enumerate(texts):
            (tmp_path / "data" / f"{i}.txt").write_text(text)
    elif kind == "hf":
        datasets.Dataset.from_list([{"text": text} for text in texts]).save_to_disk(
            tmp_path / "data"
        )
    else:
        data["path"] = write_lines(tmp_path / "data.jsonl", texts)
        if kind == "prompts":
            data |= {"source": "jsonl", "prompt_field": "prompt", "completion_field": "answer"}
    total = sum(lengths) + len(lengths)
    sequences, _ = opened(tmp_path, data, seq_len=total if packing == "concat" else 16)
    tokens, labels = Counter(), Counter()
    for i in range(len(sequences)):
        sequence = sequences[i]
        ids = sequence.input_ids.tolist()
        if ids[-1] == 0:
            ids = ids[: -sequence.document_lengths[-1]]  # padding, all of it in the last document
        tokens.update(ids)
        labels.update(sequence.labels[sequence.labels != IGNORE_INDEX].tolist())
    documents = [[*text.encode(), END_OF_TEXT_ID] for text in texts]
    first = 2 if kind == "prompts" else 1
    assert tokens == Counter(token for document in documents for token in document)
    assert labels == Counter(token for document in documents for token in document[first:])


@pytest.mark.parametrize("packing", ["none", "concat", "best_fit"])
def test_long_documents_are_split_or_dropped_and_counted(packing: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", ["x" * 40, "a" * 15, "b" * 16, "c" * 3])
    data = {"source": "jsonl", "path": path, "packing": packing}
    split, _ = opened(tmp_path, data)
    assert "2 longer than 16 tokens split" in split.describe()
    dropped, _ = opened(tmp_path, data | {"long_documents": "drop"})
    assert "2 longer than 16 tokens left out" in dropped.describe()
    ids = [token for i in range(len(dropped)) for token in dropped[i].input_ids.tolist()]
    assert set(ids) <= {ord("a"), ord("c"), END_OF_TEXT_ID, 0}
    with pytest.raises(
        UserError,
        match=r"each document is longer than training\.seq_len = 3: set data\.long_documents",
    ):
        opened(tmp_path, data | {"long_documents": "drop"}, seq_len=3)


def test_a_mixture(tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text("b" * 200)
    lines = write_lines(tmp_path / "a.jsonl", ["j" * 9] * 30)
    data = {
        "mixture": [
            {"path": str(tmp_path / "books"), "weight": 3},
            {"source": "jsonl", "path": lines},
        ]
    }
    sequences, nothing = opened(tmp_path, data)
    assert nothing is None
    kinds = Counter("b" if ord("b") in sequences[i].input_ids else "j" for i in range(400))
    assert abs(kinds["b"] - 300) <= 3
    described = sequences.describe()
    assert "the weights sum to 4, not 1: divided by that, they are 0.75, 0.25" in described
    assert f"0.75 of {tmp_path / 'books'}: 1 document(s), 201 tokens" in described
    assert sequences.epochs(400).keys() == {str(tmp_path / "books"), lines}


def test_an_empty_source_of_a_mixture_is_named(tmp_path: Path) -> None:
    full = write_lines(tmp_path / "a.jsonl", ["j" * 9] * 30)
    empty = write_lines(tmp_path / "b.jsonl", ["", ""])
    mixture = [{"source": "jsonl", "path": full}, {"source": "jsonl", "path": empty}]
    with pytest.raises(UserError) as caught:
        opened(tmp_path, {"mixture": mixture})
    start = (
        f'data.mixture[1].path = "{empty}" has no document to train on (2 empty one(s) left out)'
    )
    assert str(caught.value).startswith(start)


def test_held_out_data_without_a_label(tmp_path: Path) -> None:
    """Each document is one token: there is nothing that it could be predicted from."""
    path = write_lines(tmp_path / "a.jsonl", ["j"] * 3)
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"j": 0}, unk_token="j"))
    )
    settings = configured(tmp_path, {"source": "jsonl", "path": path}, enable=True)
    with pytest.raises(
        UserError, match="the held-out documents of data.path: no document has more than one token"
    ):
        open_sequences(settings, words)


def test_held_out_of_each_source_and_given(tmp_path: Path) -> None:
    one = write_lines(tmp_path / "a.jsonl", ["j" * 19] * 100)
    two = write_lines(tmp_path / "b.jsonl", ["k" * 19] * 100)
    mixture = [
        {"source": "jsonl", "path": one, "weight": 0.5},
        {"source": "jsonl", "path": two, "weight": 0.5},
    ]
    _, held_out = opened(tmp_path, {"mixture": mixture}, enable=True)
    # 20 tokens each, padded to 32.
    assert [chr(held_out[i].input_ids[0]) for i in range(len(held_out))] == [*"jjkk"]
    _, given_apart = opened(
        tmp_path, {"mixture": mixture, "source": "jsonl"}, enable=True, path=two
    )
    assert given_apart.epoch_tokens == 2000
    tables = {
        "train": datasets.Dataset.from_list([{"text": "t" * 50}]),
        "test": datasets.Dataset.from_list([{"text": "h" * 50}]),
    }
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "saved")
    for streaming in (False, True):
        data = {"source": "hf", "path": str(tmp_path / "saved"), "streaming": streaming}
        training, held_out = opened(tmp_path, data, enable=True, split="test")
        assert training[0].input_ids.tolist() == [ord("t")] * 16
        assert held_out[0].input_ids.tolist() == [ord("h")] * 16


def test_streaming_is_for_data_sets(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}))
    TOKENIZER.chat_template = "{{ messages[0].content }}"
    try:
        with pytest.raises(
            UserError, match="is files, but only data sets can be streamed: set streaming = false"
        ):
            opened(
                tmp_path, {"source": "chat", "path": str(tmp_path / "a.jsonl"), "streaming": True}
            )
    finally:
        TOKENIZER.chat_template = None
