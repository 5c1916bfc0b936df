"""Rows -> token ids and which of them are trained on; in worker processes where there is much to
do.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from hashlib import blake2b
from multiprocessing import get_context, parent_process
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from titan_ulysses.data.chat import check_chat_template, encode_chat
from titan_ulysses.data.sources import (
    LONE_SURROGATE_ERROR,
    BadRow,
    Chat,
    Completion,
    RefusedRow,
    Row,
    has_surrogate,
)
from titan_ulysses.data.tokenizer import encode, num_token_ids
from titan_ulysses.distributed.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK_CHARACTERS = 2**18
"""What a worker gets at a time: enough to be worth sending, little enough to keep all of them busy
to the end.
"""


class Encoded(NamedTuple):
    ids: np.ndarray
    """[tokens] unsigned; empty for a row that holds nothing."""
    trained: np.ndarray | None = None
    """[tokens] bool; None: all of them."""


@dataclass(frozen=True)
class Encoder:
    """One row -> its tokens. Travels to the workers."""

    tokenizer: PreTrainedTokenizerBase
    train_on: str = "assistant"

    def __call__(self, row: Row | BadRow) -> Encoded | BadRow:
        """`BadRow` where the row is one, where the chat template refuses it, or where nothing of it
        is trained on.
        """
        if isinstance(row, BadRow):
            return row
        try:
            encoded = self._encode(row.content)
        except RefusedRow as error:
            return BadRow(row.place, str(error))
        except UserError as error:
            raise UserError(f"{row.place}: {error}", exit_code=error.exit_code) from error
        # The first token is nobody's label.
        if encoded.trained is not None and not encoded.trained[1:].any():
            return BadRow(
                row.place,
                "nothing in it is trained on (no turn of the assistant, or an empty completion)",
            )
        return encoded

    def _encode(self, content: str | bytes | Completion | Chat) -> Encoded:
        if isinstance(content, Chat):
            return Encoded(*encode_chat(self.tokenizer, content, train_on=self.train_on))
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
        """The smallest type that holds every id of the tokenizer."""
        return np.min_scalar_type(num_token_ids(self.tokenizer) - 1)

    def check(self, kind: str) -> None:
        """UserError where the tokenizer cannot do what data.source = `kind` needs."""
        if kind == "chat":
            check_chat_template(self.tokenizer, train_on=self.train_on)

    def fingerprint(self) -> str:
        """Equal for tokenizers that make the same ids of everything."""
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
    """Every row encoded, in order; by `workers` processes where there are several.

    Raises the `UserError` of the first row that has one, and `UserError` where a worker is killed.
    """
    if workers == 1:
        yield from map(encoder, rows)
        return
    # Not forked: threads of torch and of the tokenizer's own may be running.
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
    """About how many characters there are to encode."""
    content = row.content if isinstance(row, Row) else ""
    if isinstance(content, Chat):
        return sum(len(str(message.get("content", ""))) for message in content.messages)
    return sum(map(len, content)) if isinstance(content, Completion) else len(content)


def _chunks(rows: Iterable[Row | BadRow]) -> Iterator[list[Row | BadRow]]:
    chunk, size = [], 0
    for row in rows:
        chunk.append(row)
        size += size_of(row) + 100  # many empty rows are work too
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
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process a core is enough
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool whose owner is killed would wait for work forever."""
    parent_process().join()
    os._exit(1)


def _encode_chunk(chunk: list[Row | BadRow]) -> list[Encoded | BadRow]:
    return [_encoder(row) for row in chunk]
