"""Measure the tokens per second of the data path, compared with those that the quickstart trains.

    python scripts/bench/data.py

First, two ranks train the quickstart for a few steps. The data path should be 20 times as fast.
Measured are tokenizing (with the byte tokenizer, and with a byte-level BPE of 8,192 tokens that is
trained here) in one process and in workers, the loader with each packing, and how the time for one
document grows with its length. The text is the source code of Python's standard library.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from common import ROOT, launch, parser_of

TARGET = 20


def timed(
    work: Callable[[], Any], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the median seconds of `work` over `repeats` calls."""
    seconds = []
    for _ in range(repeats):
        started = clock()
        work()
        seconds.append(clock() - started)
    return statistics.median(seconds)


def quickstart(steps: int) -> float:
    """Return the tokens per second that two ranks train in the quickstart, as the median of the
    steps after the first few.
    """
    with tempfile.TemporaryDirectory() as folder:
        off = ("validation.enable", "checkpoint.enable", "checkpoint.export")
        settings = dict.fromkeys(off, "false") | {"job.dump_folder": folder}
        settings |= {"training.steps": str(steps), "lr_scheduler.warmup_steps": "1"}
        options = [f"--{key}={value}" for key, value in settings.items()]
        command = [*launch(2, str(ROOT / "train.py")), "--config", "configs/quickstart.toml"]
        subprocess.run([*command, *options], cwd=ROOT, check=True, capture_output=True)
        lines = (Path(folder) / "quickstart" / "metrics.jsonl").read_text().splitlines()
    return statistics.median(json.loads(line)["tokens_per_second"] for line in lines[3:])


def bpe(texts: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8192,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def tokenizing(name: str, tokenizer: Any, texts: list[str], consumed: float) -> Any:
    """Print the tokens per second of one process and of all cores. Returns the corpus."""
    from titan_ulysses.data.corpus import Corpus
    from titan_ulysses.data.encoding import Encoder, encode_rows
    from titan_ulysses.data.records import Row
    from titan_ulysses.launch.host import usable_cores

    rows = [Row(str(number), text) for number, text in enumerate(texts)]
    for workers in dict.fromkeys((1, usable_cores())):
        started = time.perf_counter()
        encoded: list[Any] = [*encode_rows(rows, Encoder(tokenizer), workers=workers)]
        seconds = time.perf_counter() - started
        show(
            f"tokenizing, {name}, {workers} process(es)",
            sum(len(one.ids) for one in encoded) / seconds,
            consumed,
        )
    return Corpus.from_documents(encoded)


def read(loader: Any, batches: int) -> None:
    for _ in range(batches):
        loader.next_batch()


def loading(corpus: Any, seq_len: int, repeats: int, consumed: float) -> None:
    from titan_ulysses.data.loader import Loader
    from titan_ulysses.data.packing import PackedSequences, PaddedSequences

    packings = {
        "concat": lambda **options: PackedSequences(corpus, **options),
        "none": lambda **options: PaddedSequences(corpus, **options),
        "best_fit": lambda **options: PaddedSequences(corpus, best_fit=True, **options),
    }
    for name, pack in packings.items():
        sequences = pack(seq_len=seq_len, seed=0)
        loader = Loader(sequences, batch_size=1, sp_rank=1, sp_degree=2)
        batches = max(8, min(len(sequences), 2**20 // seq_len))
        seconds = timed(partial(read, loader, batches), repeats)
        fill_rate = getattr(sequences, "fill_rate", 1.0)  # padding does not count
        what = f"loader, {name}, S {seq_len:,}, filled to {fill_rate:.1%}"
        show(what, batches * seq_len * fill_rate / seconds, consumed)


def through(encoder: Any, content: Any) -> int:
    """Pass one document through the whole data path, as one sequence. Returns its tokens."""
    from titan_ulysses.data.corpus import Corpus
    from titan_ulysses.data.loader import Loader
    from titan_ulysses.data.packing import PackedSequences
    from titan_ulysses.data.records import Row

    corpus = Corpus.from_documents([encoder(Row("", content))])
    sequences = PackedSequences(corpus, seq_len=corpus.num_tokens, seed=0)
    Loader(sequences, batch_size=1).next_batch()
    return corpus.num_tokens


def long_documents(tokenizer: Any, text: str, repeats: int) -> None:
    """Measure one document of 1/8, 1/4, 1/2 and 1 million tokens, as text and as a chat of 16
    turns.
    """
    from titan_ulysses.data.encoding import Encoder
    from titan_ulysses.data.records import Chat, Row

    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '</s>' }}{% endfor %}{% if "
        "add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    encoder = Encoder(tokenizer)
    characters = len(text) / len(encoder(Row("", text)).ids)
    for millionth in (8, 4, 2, 1):
        size = int(characters * 1e6 / millionth)
        piece = (text * (1 + size // len(text)))[:size]
        roles, turn = ("user", "assistant") * 8, -(-size // 16)
        turns = [
            {"role": role, "content": piece[i * turn : (i + 1) * turn]}
            for i, role in enumerate(roles)
        ]
        for kind, content in {"text": piece, "chat": Chat(turns, None)}.items():
            work = partial(through, encoder, content)
            tokens = work()
            # CPU time of this process, so that other processes do not matter.
            seconds = timed(work, repeats, time.process_time)
            each = 1e6 * seconds / tokens
            print(
                f"one {kind} of {tokens:>9,} tokens {seconds:7.2f} s of a core {each:6.2f} us a "
                "token"
            )


def show(what: str, tokens_per_second: float, consumed: float) -> None:
    times = tokens_per_second / consumed
    met = "" if times >= TARGET else f"  below {TARGET}"
    print(f"{what:<52} {tokens_per_second:>14,.0f} tokens/s {times:>9,.0f} x quickstart{met}")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=40, help="of the quickstart")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    from titan_ulysses.config.fields import expand_path
    from titan_ulysses.data.files import find_files
    from titan_ulysses.data.tokenizer import load_tokenizer

    consumed = quickstart(args.steps)
    print(f"quickstart, two ranks: {consumed:,.0f} tokens/s")
    files = find_files(expand_path("{stdlib}"), extensions=[".py"])
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files.values()]
    trained = bpe(texts[::10])
    tokenizing("bytes", load_tokenizer("bytes"), texts, consumed)
    corpus = tokenizing("BPE", trained, texts, consumed)
    for seq_len in (1024, 2**17):
        loading(corpus, seq_len, args.repeats, consumed)
    long_documents(trained, "".join(texts[:200]), args.repeats)


if __name__ == "__main__":
    main()
