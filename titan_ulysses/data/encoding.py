"""Encodes rows as token ids with a mask of the trained tokens, in worker processes if useful."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from multiprocessing import get_context, parent_process
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from titan_ulysses.data.chat import check_chat_template, encode_chat
from titan_ulysses.data.preference import encode_preference
from titan_ulysses.data.sources import (
    LONE_SURROGATE_ERROR,
    BadRow,
    Chat,
    Completion,
    Preference,
    RefusedRow,
    Row,
    has_surrogate,
)
from titan_ulysses.data.tokenizer import encode, num_token_ids
from titan_ulysses.data.tokens import Tokens, token_problem
from titan_ulysses.distributed.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK_CHARACTERS = 2**18
"""Size of the chunks sent to worker processes: large enough to be worth the transfer, small enough
to keep all workers busy until the end.
"""


class Encoded(NamedTuple):
    ids: np.ndarray
    """[tokens] unsigned; empty for an empty row."""
    trained: np.ndarray | None = None
    """[tokens] bool: which tokens are trained on; None: all of them."""
    lengths: tuple[int, ...] | None = None
    """the lengths of the documents that the row became, in order; None: it is one."""
    split: int | None = None
    """where the second document of a pair begins; None: it is no pair."""
    teacher: np.ndarray | None = None
    """[tokens, k] TOP: a teacher's largest log-probabilities (see teacher.py); None: none."""
    parsed_calls: int = 0
    """tool calls of the row whose arguments were JSON text"""

    def documents(self) -> Iterator[Encoded]:
        """Yield each document of the row. A pair is one."""
        if self.lengths is None:
            yield self
            return
        begin = 0
        for length in self.lengths:
            span = slice(begin, begin + length)
            yield Encoded(
                self.ids[span],
                None if self.trained is None else self.trained[span],
                teacher=None if self.teacher is None else self.teacher[span],
            )
            begin += length


@dataclass(frozen=True)
class Encoder:
    """Encodes one row. It is pickled and sent to the worker processes."""

    tokenizer: PreTrainedTokenizerBase
    train_on: str = "assistant"

    def __call__(self, row: Row | BadRow) -> Encoded | BadRow:
        """Encode the row.

        Return a `BadRow` if the row is one already, if it cannot be encoded (for example because
        the chat template refuses it), or if none of its tokens is trained on.
        """
        if isinstance(row, BadRow):
            return row
        try:
            encoded = self._encode(row.content)
        except RefusedRow as error:
            return BadRow(row.place, str(error))
        except UserError as error:
            raise UserError(f"{row.place}: {error}", exit_code=error.exit_code) from error
        # The first token is never a label.
        if encoded.trained is not None and not encoded.trained[1:].any():
            return BadRow(
                row.place,
                "nothing in it is trained on (no turn of the assistant, none without "
                '"train": false, or an empty completion)',
            )
        return encoded

    def _encode(self, content: str | bytes | Completion | Chat | Preference | Tokens) -> Encoded:
        if isinstance(content, Tokens):
            if problem := token_problem(content.ids, self._num_token_ids):
                raise RefusedRow(problem)
            teacher = content.teacher
            largest = 0 if teacher is None else teacher["id"].max(initial=0)
            if largest >= self._num_token_ids:
                raise RefusedRow(
                    f"teacher_ids has {largest}, and the tokenizer has the ids 0 to "
                    f"{self._num_token_ids - 1}"
                )
            trained = None if self.train_on == "all" else content.trained
            ids = content.ids.astype(self.dtype)
            return Encoded(ids, trained, content.lengths, teacher=teacher)
        if isinstance(content, Preference):
            ids, trained, split = encode_preference(self.tokenizer, content)
            return Encoded(ids, trained, split=split, parsed_calls=content.parsed_calls)
        if isinstance(content, Chat):
            ids, trained, lengths = encode_chat(self.tokenizer, content, train_on=self.train_on)
            return Encoded(ids, trained, lengths, parsed_calls=content.parsed_calls)
        if any(
            has_surrogate(text)
            for text in (content if isinstance(content, Completion) else [content])
        ):
            raise RefusedRow(LONE_SURROGATE_ERROR)
        if isinstance(content, Completion):
            prompt = encode(self.tokenizer, content.prompt, ends=False)
            completion = encode(self.tokenizer, content.completion)
            ids = np.concatenate([prompt, completion])
            if self.train_on == "all":
                return Encoded(ids)
            return Encoded(ids, (np.arange(len(ids)) >= len(prompt)) & bool(content.completion))
        return Encoded(encode(self.tokenizer, content) if content else np.empty(0, dtype=np.uint32))

    @property
    def dtype(self) -> np.dtype:
        """The smallest dtype that holds every id of the tokenizer."""
        return np.min_scalar_type(self._num_token_ids - 1)

    @cached_property
    def _num_token_ids(self) -> int:
        return num_token_ids(self.tokenizer)

    def check(self, kind: str) -> None:
        """Raise `UserError` if the tokenizer cannot encode rows of data.source = `kind`."""
        if kind == "chat":
            check_chat_template(self.tokenizer, train_on=self.train_on)

    def fingerprint(self) -> str:
        """Return a hash of all that determines the result of encoding.

        It covers the tokenizer, `train_on`, and the versions of transformers and tokenizers.
        """
        import tokenizers
        import transformers

        tokenizer = self.tokenizer
        backend = (
            tokenizer.backend_tokenizer.to_str()
            if tokenizer.is_fast
            else sorted(tokenizer.get_vocab().items())
        )
        parts = [
            (
                transformers.__version__,
                tokenizers.__version__,
                type(tokenizer).__name__,
                self.train_on,
            ),
            (
                backend,
                tokenizer.chat_template,
                tokenizer.special_tokens_map,
                tokenizer.eos_token_id,
            ),
        ]
        return blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def encode_rows(
    rows: Iterable[Row | BadRow], encoder: Encoder, *, workers: int = 1
) -> Iterator[Encoded | BadRow]:
    """Encode every row, in order, in `workers` processes if there are several.

    Raise the first `UserError` that encoding a row raises, or a `UserError` if a worker is killed.
    """
    if workers == 1:
        yield from map(encoder, rows)
        return
    # Spawn, not fork: torch and the tokenizer may have running threads.
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(encoder,)
    )
    waiting: deque = deque()
    try:
        for chunk in _chunks(rows):
            waiting.append(pool.submit(_encode_chunk, chunk))
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "A process that tokenizes was ended from outside (out of memory?). Give the machine "
            "more memory, or fewer cores to this run (taskset)."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def size_of(row: Row | BadRow) -> int:
    """Return approximately how many characters of the row have to be encoded."""
    content = row.content if isinstance(row, Row) else ""
    if isinstance(content, Chat):
        return sum(len(str(message.get("content", ""))) for message in content.messages)
    if isinstance(content, Preference):
        return len(str(content))
    if isinstance(content, Tokens):
        stored = 0 if content.teacher is None else content.teacher.size
        return len(content.ids) + stored
    return sum(map(len, content)) if isinstance(content, Completion) else len(content)


def _chunks(rows: Iterable[Row | BadRow]) -> Iterator[list[Row | BadRow]]:
    chunk, size = [], 0
    for row in rows:
        chunk.append(row)
        size += size_of(row) + 100  # a constant cost per row, since many empty rows take time too
        if size >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


_encoder: Encoder
"""Of a worker process, once it has started."""


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is one process per core already
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Exit when the parent does: workers of a killed parent would wait for work forever."""
    parent_process().join()
    os._exit(1)


def _encode_chunk(chunk: list[Row | BadRow]) -> list[Encoded | BadRow]:
    return [_encoder(row) for row in chunk]
