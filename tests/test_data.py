"""From files to one rank's batch: order, packing, labels, resumption, slices, and what users are
told.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from titan_ulysses.config.schema import SourceSettings
from titan_ulysses.data.corpus import Corpus
from titan_ulysses.data.loader import Loader
from titan_ulysses.data.packing import PackedSequences
from titan_ulysses.data.sources import open_rows
from titan_ulysses.data.tokenizer import encode, is_byte_tokenizer, load_tokenizer, num_token_ids
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.sequence import IGNORE_INDEX

few = settings(max_examples=40, deadline=None)
document_lengths = st.lists(st.integers(1, 30), min_size=1, max_size=12)


def numbered_corpus(lengths: list[int]) -> Corpus:
    """Every token is different (0, 1, 2, ...), so that a token says which document and place it
    came from.
    """
    tokens = np.arange(sum(lengths))
    return Corpus.from_documents(np.split(tokens, np.cumsum(lengths)[:-1]))


def pieces(sequence):
    """(input ids, labels, positions) of each document piece, as lists."""
    bounds = [0, *np.cumsum(sequence.document_lengths).tolist()]
    for begin, end in zip(bounds, bounds[1:], strict=False):
        yield tuple(tensor[begin:end].tolist() for tensor in sequence[:3])


def naive_sequences(documents: list[list[int]], seq_len: int, count: int):
    """The same stream a token at a time, documents in order, epoch after epoch."""
    stream = []
    while len(stream) < count * seq_len:
        for document in documents:
            labels = [*document[1:], IGNORE_INDEX]
            stream += [
                (token, label, k == 0)
                for k, (token, label) in enumerate(zip(document, labels, strict=True))
            ]
    for i in range(count):
        input_ids, labels, positions, lengths = [], [], [], []
        for token, label, starts in stream[i * seq_len : (i + 1) * seq_len]:
            if starts or not lengths:
                lengths.append(0)
            input_ids.append(token)
            labels.append(label)
            positions.append(lengths[-1])
            lengths[-1] += 1
        yield input_ids, labels, positions, tuple(lengths)


def assert_same_batch(one, other):
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.documents == other.documents


# --- packing


@few
@given(lengths=document_lengths, data=st.data())
def test_sequences_match_the_naive_reference(lengths, data):
    seq_len = data.draw(st.integers(1, sum(lengths)))
    corpus = numbered_corpus(lengths)
    sequences = PackedSequences(corpus, seq_len=seq_len, seed=0, shuffle=False)
    count = 2 * len(sequences) + 3  # past the second epoch's start
    expected = naive_sequences([corpus[d].tolist() for d in range(len(corpus))], seq_len, count)
    for i, (input_ids, labels, positions, document_lengths) in enumerate(expected):
        sequence = sequences[i]
        assert sequence.input_ids.tolist() == input_ids
        assert sequence.labels.tolist() == labels
        assert sequence.position_ids.tolist() == positions
        assert sequence.document_lengths == document_lengths
        assert {tensor.dtype for tensor in sequence[:3]} == {torch.int64}


@few
@given(lengths=document_lengths, seed=st.integers(0, 5), data=st.data())
def test_an_epoch_loses_and_repeats_nothing_and_crosses_no_boundary(lengths, seed, data):
    total, epochs = sum(lengths), 3
    seq_len = data.draw(st.integers(1, total))
    corpus = numbered_corpus(lengths)
    sequences = PackedSequences(corpus, seq_len=seq_len, seed=seed)
    input_stream, label_stream = [], []
    for i in range(-(-epochs * total // seq_len)):
        for ids, labels, positions in pieces(sequences[i]):
            end = int(corpus.ends[np.searchsorted(corpus.ends, ids[0], side="right")])
            assert ids == list(range(ids[0], ids[0] + len(ids))) and ids[-1] < end
            assert labels == [token + 1 if token + 1 < end else IGNORE_INDEX for token in ids]
            assert positions == list(range(len(ids)))
            input_stream += ids
            label_stream += labels
    firsts = set(corpus.begins.tolist())
    for epoch in range(epochs):
        part = slice(epoch * total, (epoch + 1) * total)
        assert sorted(input_stream[part]) == list(range(total))
        targets = [token for token in range(total) if token not in firsts]
        assert sorted(label_stream[part]) == [IGNORE_INDEX] * len(lengths) + targets


def test_each_epoch_is_a_whole_permutation_of_its_own():
    corpus = numbered_corpus([3] * 20)
    epochs = []
    sequences = PackedSequences(corpus, seq_len=60, seed=1)
    for epoch in range(3):
        epochs.append(sequences[epoch].input_ids[::3].tolist())
        assert sorted(epochs[-1]) == list(range(0, 60, 3))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert PackedSequences(corpus, seq_len=60, seed=2)[0].input_ids[::3].tolist() != epochs[0]


def test_random_access_does_not_depend_on_what_was_read_before():
    corpus = numbered_corpus([5, 1, 8, 13, 2])
    one, other = (PackedSequences(corpus, seq_len=7, seed=3) for _ in range(2))
    forward = [one[i] for i in range(20)]
    for i in reversed(range(20)):
        assert torch.equal(other[i].input_ids, forward[i].input_ids)
        assert other[i].document_lengths == forward[i].document_lengths


def test_the_shuffled_order_is_pinned():
    """A run that is resumed elsewhere, with another numpy, must find this very order."""
    sequences = PackedSequences(numbered_corpus([1] * 8), seq_len=8, seed=42)
    assert [sequences[epoch].input_ids.tolist() for epoch in range(2)] == [
        [4, 1, 3, 6, 0, 7, 2, 5],
        [1, 2, 5, 3, 6, 0, 4, 7],
    ]


def test_one_token_documents_predict_nothing():
    sequence = PackedSequences(numbered_corpus([1] * 6), seq_len=4, seed=0)[0]
    assert sequence.labels.tolist() == [IGNORE_INDEX] * 4
    assert sequence.position_ids.tolist() == [0] * 4
    assert sequence.document_lengths == (1, 1, 1, 1)


def test_document_of_exactly_one_sequence():
    sequences = PackedSequences(numbered_corpus([4, 4]), seq_len=4, seed=0, shuffle=False)
    assert len(sequences) == 2
    assert sequences[1].document_lengths == (4,)
    assert sequences[1].input_ids.tolist() == [4, 5, 6, 7]
    assert sequences[1].labels.tolist() == [5, 6, 7, IGNORE_INDEX]


def test_a_long_document_goes_on_with_the_true_next_token():
    sequences = PackedSequences(numbered_corpus([11]), seq_len=4, seed=0, shuffle=False)
    assert len(sequences) == 2
    assert [sequences[i].document_lengths for i in range(3)] == [(4,), (4,), (3, 1)]
    assert sequences[1].labels.tolist() == [5, 6, 7, 8]
    assert sequences[1].position_ids.tolist() == [0, 1, 2, 3]
    # The next epoch begins in its last place.
    assert sequences[2].labels.tolist() == [
        9,
        10,
        IGNORE_INDEX,
        1,
    ]


def test_data_shorter_than_one_sequence():
    with pytest.raises(
        UserError,
        match=r"training\.seq_len = 9 is longer than all of validation\.path, 8 tokens in 2",
    ):
        PackedSequences(numbered_corpus([5, 3]), seq_len=9, seed=0, setting="validation.path")
    with pytest.raises(UserError, match=r"training\.seq_len = 1 .* data\.path, 0 tokens"):
        PackedSequences(Corpus.from_documents([]), seq_len=1, seed=0)


# --- corpus


@pytest.mark.parametrize(
    "largest, dtype",
    [
        (255, np.uint8),
        (256, np.uint16),
        (65535, np.uint16),
        (65536, np.uint32),
        (2**32 - 1, np.uint32),
    ],
)
def test_corpus_uses_the_smallest_type(largest, dtype):
    corpus = Corpus.from_documents(
        [np.array([1, 2]), np.array([], dtype=np.int64), np.array([largest])]
    )
    assert corpus.tokens.dtype == dtype and corpus.begins.dtype == corpus.ends.dtype == np.int64
    assert corpus.tokens.tolist() == [1, 2, largest]
    # The empty document is left out.
    assert (corpus.begins.tolist(), corpus.ends.tolist()) == (
        [0, 2],
        [2, 3],
    )


@pytest.mark.parametrize(
    "count, held_out",
    [(2, [1]), (99, [98]), (100, [99]), (199, [99]), (250, [99, 199]), (300, [99, 199, 299])],
)
def test_held_out_documents(count, held_out):
    train, validation = numbered_corpus([1] * count).split_held_out()
    assert validation.begins.tolist() == held_out
    assert train.begins.tolist() == [d for d in range(count) if d not in held_out]


def test_one_document_cannot_be_split():
    with pytest.raises(
        UserError, match=r"validation\.path is not set and data\.path has 1 document"
    ):
        numbered_corpus([50]).split_held_out()


# --- loader


@few
@given(
    lengths=document_lengths,
    batch_size=st.integers(1, 3),
    dp=st.integers(1, 3),
    sp=st.sampled_from([1, 2, 4]),
    steps=st.integers(1, 3),
)
def test_ranks_together_read_the_unsharded_batch(lengths, batch_size, dp, sp, steps):
    sequences = PackedSequences(numbered_corpus([*lengths, 8]), seq_len=8, seed=1)
    whole = Loader(sequences, batch_size=batch_size * dp)
    ranks = [
        [
            Loader(
                sequences,
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
    for _ in range(steps):
        expected = whole.next_batch()
        batches = [[loader.next_batch() for loader in group] for group in ranks]
        first = whole.state_dict()["sequences_consumed"] - batch_size * dp
        dealt = [row for rank in ranks[0][0].step_of_last_batch().sequences[0] for row in rank]
        assert sorted(dealt) == [*range(first, first + batch_size * dp)]
        order = [row - first for row in dealt]
        for name in ("input_ids", "labels", "position_ids"):
            rows = [
                torch.cat([getattr(batch, name) for batch in group], dim=1) for group in batches
            ]
            assert torch.equal(torch.cat(rows), getattr(expected, name)[order]), name
            assert all(
                getattr(b, name).shape == (batch_size, 8 // sp) for group in batches for b in group
            )
        for r, group in enumerate(batches):  # whole rows' lengths, the same on every SP rank
            assert {batch.documents for batch in group} == {
                tuple(
                    expected.documents[row] for row in order[r * batch_size : (r + 1) * batch_size]
                )
            }
        assert all(sum(row) == 8 for row in expected.documents)
    assert {tuple(loader.state_dict().items()) for group in ranks for loader in group} == {
        tuple(whole.state_dict().items())
    }


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_resume_on_another_mesh(steps):
    """Stopped within an epoch on dp 2 x sp 1, resumed on dp 1 x sp 2: the remaining sequences are
    the same.
    """
    corpus = numbered_corpus([7, 20, 3, 11, 1, 16])
    before = Loader(
        PackedSequences(corpus, seq_len=8, seed=5), batch_size=1, batch_rank=1, batch_degree=2
    )
    uninterrupted = Loader(PackedSequences(corpus, seq_len=8, seed=5), batch_size=2)
    for _ in range(steps):
        before.next_batch()
        uninterrupted.next_batch()
    state = before.state_dict()
    assert state == {"sequences_consumed": 2 * steps}

    def resumed(**ranks):
        loader = Loader(PackedSequences(corpus, seq_len=8, seed=5), **ranks)
        loader.load_state_dict(state)
        return loader

    same = resumed(batch_size=1, batch_rank=1, batch_degree=2)
    slices = [resumed(batch_size=2, sp_rank=s, sp_degree=2) for s in range(2)]
    for _ in range(8):
        assert_same_batch(same.next_batch(), before.next_batch())
        expected, halves = uninterrupted.next_batch(), [loader.next_batch() for loader in slices]
        for name in ("input_ids", "labels", "position_ids"):
            assert torch.equal(
                torch.cat([getattr(half, name) for half in halves], dim=1), getattr(expected, name)
            )
        assert halves[0].documents == halves[1].documents == expected.documents


def test_labels_and_positions_are_those_of_the_whole_sequence():
    """The label at a slice's end is the first token of the next rank's slice; positions go on."""
    sequences = PackedSequences(numbered_corpus([8]), seq_len=8, seed=0)
    first, second = (
        Loader(sequences, batch_size=1, sp_rank=s, sp_degree=2).next_batch() for s in range(2)
    )
    assert first.labels.tolist() == [[1, 2, 3, 4]]
    assert second.position_ids.tolist() == [[4, 5, 6, 7]]


def test_batch_moves_to_a_device():
    batch = Loader(
        PackedSequences(numbered_corpus([8]), seq_len=4, seed=0), batch_size=2
    ).next_batch()
    moved = batch.to("meta")
    assert {
        moved.input_ids.device.type,
        moved.labels.device.type,
        moved.position_ids.device.type,
    } == {"meta"}
    assert moved.documents == batch.documents
    assert_same_batch(batch.to("cpu"), batch)


def test_batch_that_moves_to_the_host_has_come():
    """Nobody waits for a copy to the host that has only begun, so none may be asked for."""
    asked = []

    class Copies(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.Tensor.to:
                asked.append((str(args[1]), kwargs))
            return function(*args, **kwargs or {})

    batch = Loader(
        PackedSequences(numbered_corpus([8]), seq_len=4, seed=0), batch_size=2
    ).next_batch()
    with Copies():
        batch.to("cpu")
    assert asked == 3 * [("cpu", {"non_blocking": False})]


@pytest.mark.gpu
def test_batch_moves_to_cuda():
    batch = Loader(
        PackedSequences(numbered_corpus([8]), seq_len=4, seed=0), batch_size=2
    ).next_batch()
    moved = batch.to(torch.device("cuda", 0))
    assert moved.labels.is_cuda
    assert_same_batch(moved.to("cpu"), batch)


# --- sources


def text_documents(path, *, extensions, encoding="utf-8", setting="data.path"):
    """(name, text) of each file, opened at once."""
    source = SourceSettings(path=str(path), extensions=extensions, encoding=encoding)
    return ((row.place, row.content) for row in open_rows(source, setting))


def write(root, files: dict[str, bytes]):
    for name, content in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return root


def test_files_come_sorted_and_hidden_installed_and_empty_ones_do_not(tmp_path):
    write(
        tmp_path,
        {
            "b.txt": b"b\r\n",
            "a/z.txt": b"az",
            "a-1.txt": b"a1",
            "a/B.TXT": "ä".encode(),
            "B.md": b"md",
            "empty.txt": b"",
            "c.py": b"not asked for",
            ".hidden.txt": b"no",
            ".git/x.txt": b"no",
            "a/__pycache__/x.txt": b"no",
            "lib/site-packages/p/x.txt": b"no",
        },
    )
    found = list(text_documents(tmp_path, extensions=[".txt", "md"], encoding="utf-8"))
    # By code point of the relative path: "-" < "/" and upper case first; line ends stay as they
    # are.
    assert found == [
        ("B.md", "md"),
        ("a-1.txt", "a1"),
        ("a/B.TXT", "ä"),
        ("a/z.txt", "az"),
        ("b.txt", "b\r\n"),
    ]


def test_the_given_folder_may_itself_be_hidden_or_installed(tmp_path):
    root = write(tmp_path / ".venv" / "site-packages", {"a.txt": b"a"})
    assert list(text_documents(root, extensions=[".txt"], encoding="utf-8")) == [("a.txt", "a")]


def test_one_file_whatever_its_extension_and_raw_bytes(tmp_path):
    write(tmp_path, {"data.bin": b"\xff\x00a"})
    assert list(text_documents(tmp_path / "data.bin", extensions=[".txt"], encoding="bytes")) == [
        ("data.bin", b"\xff\x00a")
    ]
    assert list(text_documents(tmp_path / "data.bin", extensions=[], encoding="latin-1")) == [
        ("data.bin", "ÿ\x00a")
    ]


def test_wide_codec(tmp_path):
    write(tmp_path, {"a.txt": "aé".encode("utf-16")})
    assert list(text_documents(tmp_path, extensions=[".txt"], encoding="utf-16")) == [
        ("a.txt", "aé")
    ]


def test_undecodable_file_is_named_with_its_offset(tmp_path):
    write(tmp_path, {"a.txt": b"fine", "b.txt": b"caf\xe9!"})
    documents = text_documents(
        tmp_path, extensions=[".txt"], encoding="utf-8", setting="validation.path"
    )
    assert next(documents) == ("a.txt", "fine")
    with pytest.raises(UserError) as caught:
        next(documents)
    message = str(caught.value)
    assert message.startswith(f"validation.path: {tmp_path / 'b.txt'} is not utf-8 text at byte 3 ")
    assert (
        'data.encoding to the right codec, or to "bytes" with model.tokenizer = "bytes"' in message
    )
    assert "convert the file" in message and "\n" not in message


@pytest.mark.parametrize(
    "files, path, encoding, message",
    [
        ({}, "gone", "utf-8", r'data\.path = ".*gone" does not exist'),
        (
            {"a.py": b"1", "b.py": b"1", "c": b"1"},
            "",
            "utf-8",
            r"in \.md \.txt \(found: 2 \.py, 1 without extension\)",
        ),
        ({}, "", "utf-8", r"found: no files at all"),
        (
            {"a.txt": b"", "b.txt": b""},
            "",
            "utf-8",
            r'data\.path = ".*" contains only empty files',
        ),
        ({"a.txt": b""}, "a.txt", "utf-8", r"only empty files"),
        ({"a.txt": b"a"}, "", "klingon", r'data\.encoding = "klingon" is not a text codec'),
        ({"a.txt": b"a"}, "", "hex", r'data\.encoding = "hex" is not a text codec'),
    ],
)
def test_unusable_data_is_refused_before_the_first_document(
    tmp_path, files, path, encoding, message
):
    write(tmp_path, files)
    with pytest.raises(UserError, match=message):
        text_documents(tmp_path / path, extensions=[".txt", ".md"], encoding=encoding)


def test_unreadable_folder_is_not_skipped_silently(tmp_path, monkeypatch):
    write(tmp_path, {"a.txt": b"a", "locked/b.txt": b"b"})
    scandir = os.scandir

    def refusing(folder):
        if str(folder).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(
        UserError, match=r"data\.path: cannot read the folder .*locked \(Permission denied\)"
    ):
        text_documents(tmp_path, extensions=[".txt"], encoding="utf-8")


# --- tokenizer


@pytest.fixture(scope="module")
def byte_tokenizer():
    return load_tokenizer("bytes")


@few
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_byte_ids_are_the_utf8_bytes_and_decode_back(byte_tokenizer, text):
    ids = encode(byte_tokenizer, text)
    assert ids.tolist() == [*text.encode("utf-8"), 256]
    assert encode(byte_tokenizer, text.encode("utf-8")).tolist() == ids.tolist()
    assert byte_tokenizer.decode(ids, skip_special_tokens=True) == text
    # The fast path is what the tokenizer itself does, with nothing read as a special token.
    assert byte_tokenizer(text, split_special_tokens=True)["input_ids"] == ids[:-1].tolist()


def test_byte_tokenizer_facts(byte_tokenizer):
    assert byte_tokenizer.eos_token == "<|endoftext|>" and byte_tokenizer.eos_token_id == 256
    assert len(byte_tokenizer) == num_token_ids(byte_tokenizer) == 257
    every_byte = bytes(range(256))
    assert encode(byte_tokenizer, every_byte).tolist() == list(range(257))
    assert encode(byte_tokenizer, "<|endoftext|>").tolist() == [*b"<|endoftext|>", 256]
    text = " a . b ,  it 's\n"
    assert byte_tokenizer.decode(list(text.encode())) == text  # no clean-up of spaces


def test_saved_byte_tokenizer_opens_with_auto_tokenizer(byte_tokenizer, tmp_path):
    byte_tokenizer.save_pretrained(tmp_path)
    opened = load_tokenizer(str(tmp_path))
    text = "Zwölf Boxkämpfer 漢字 🙂\r\n\t\x00 <|endoftext|> ."
    ids = opened(text)["input_ids"]
    assert ids == byte_tokenizer(text)["input_ids"] and ids.count(256) == 1
    assert opened.decode(ids) == text
    assert is_byte_tokenizer(opened)
    assert encode(opened, b"\xff").tolist() == [255, 256]


@pytest.fixture
def word_tokenizer():
    """A word-level tokenizer with ids that leave gaps, and a beginning-of-text token that it would
    put in front.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {"<bos>": 0, "<eos>": 1, "<unk>": 2, "hello": 5, "world": 300}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=2,
    )


def test_other_tokenizers_add_only_the_end_of_text(word_tokenizer, caplog):
    assert word_tokenizer("hello")["input_ids"] == [0, 5]
    assert encode(word_tokenizer, "hello world").tolist() == [5, 300, 1]
    assert 1 not in encode(word_tokenizer, "hello <eos> world")[:-1].tolist()
    assert num_token_ids(word_tokenizer) == 301 > len(word_tokenizer)
    assert not is_byte_tokenizer(word_tokenizer)
    word_tokenizer.eos_token = None
    assert encode(word_tokenizer, "hello world").tolist() == [5, 300]
    assert encode(word_tokenizer, "").tolist() == []
    assert "longer than" not in caplog.text


def test_raw_bytes_need_the_byte_tokenizer(word_tokenizer):
    with pytest.raises(
        UserError, match=r'data\.encoding = "bytes" needs model\.tokenizer = "bytes"'
    ):
        encode(word_tokenizer, b"hello")


@pytest.mark.parametrize("name", ["empty", "gone/deep/er"])
def test_missing_tokenizer_names_the_setting(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(tmp_path / name))
    message = str(caught.value)
    assert message.startswith(f'model.tokenizer = "{tmp_path / name}" cannot be loaded (')
    assert message.endswith(
        'give a folder with a saved tokenizer, a hub name that this machine can reach, or "bytes"'
    )
    assert "\n" not in message


# --- the whole way


def test_from_files_to_a_batch(tmp_path, byte_tokenizer):
    write(tmp_path, {"1.txt": b"abc", "2.txt": b"de"})
    documents = text_documents(tmp_path, extensions=[".txt"], encoding="utf-8")
    corpus = Corpus.from_documents(encode(byte_tokenizer, text) for _, text in documents)
    assert corpus.tokens.dtype == np.uint16
    batch = Loader(
        PackedSequences(corpus, seq_len=7, seed=0, shuffle=False), batch_size=1
    ).next_batch()
    assert batch.input_ids.tolist() == [[*b"abc", 256, *b"de", 256]]
    assert batch.labels.tolist() == [[*b"bc", 256, IGNORE_INDEX, *b"e", 256, IGNORE_INDEX]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch.documents == ((4, 3),)
