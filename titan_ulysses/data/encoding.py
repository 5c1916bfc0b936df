"""Encodes rows as token ids with a mask of the trained tokens, in worker processes if useful."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from multiprocessing import get_context, parent_process
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from titan_ulysses.data.chat import check_chat_template, encode_answer, encode_chat
from titan_ulysses.data.records import Answers, BadRow, Chat, Completion, Encoded, Row
from titan_ulysses.data.tokenizer import encode, num_token_ids
from titan_ulysses.distributed.errors import RefusedRow, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from titan_ulysses.data.processor import VisionProcessor

_CHUNK_CHARACTERS = 2**18
"""Size of the chunks sent to worker processes: large enough to be worth the transfer, small enough
to keep all workers busy until the end.
"""
_IMAGE_CHARACTERS = 2**12
"""What reading the header of an image costs, and encoding its placeholders."""


@dataclass(frozen=True)
class Encoder:
    """Encodes one row. It is pickled and sent to the worker processes."""

    tokenizer: PreTrainedTokenizerBase
    train_on: str = "assistant"
    vision: VisionProcessor | None = None
    """reads chats with images; None: a row with one is refused"""

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

    def _encode(self, content: str | bytes | Completion | Chat | Answers | Encoded) -> Encoded:
        tokenizer = self.tokenizer
        if isinstance(content, Encoded):
            return self._checked(content)
        if isinstance(content, Answers):
            return self._answers(content)
        if isinstance(content, Chat):
            return encode_chat(tokenizer, content, train_on=self.train_on, vision=self.vision)
        if isinstance(content, Completion):
            ids, trained = self._completion(*content)
            return Encoded(ids, None if self.train_on == "all" else trained)
        return Encoded(encode(tokenizer, content) if content else np.empty(0, dtype=np.uint32))

    def _completion(self, prompt: str, completion: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of both, end to end, and which of them are the completion's."""
        before = encode(self.tokenizer, prompt, ends=False)
        ids = np.concatenate([before, encode(self.tokenizer, completion)])
        return ids, (np.arange(len(ids)) >= len(before)) & bool(completion)

    def _answers(self, row: Answers) -> Encoded:
        """Encode the prompt with its completion; of two, one behind the other."""
        is_pair = row.desirable is None
        names = ("chosen completion", "rejected completion") if is_pair else ("completion",)
        named = zip(row.completions, names, strict=True)
        found = [self._answer(row.prompt, one, name) for one, name in named]
        ids, trained = map(np.concatenate, zip(*found, strict=True))
        split = len(found[0][0]) if is_pair else int(trained.argmax())
        if not split:
            raise RefusedRow("its prompt has no token, and KTO needs prompts")
        return Encoded(
            ids, trained, split=split, parsed_calls=row.parsed_calls, desirable=row.desirable
        )

    def _answer(self, prompt: Any, completion: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of a prompt and a completion, and which of them are the completion's."""
        if not completion:
            raise RefusedRow(f"the {name} is empty")
        if isinstance(completion, str):
            ids, trained = self._completion(prompt, completion)
        else:
            ids, trained = encode_answer(self.tokenizer, prompt, completion)
        if not trained[1:].any():  # the first token of a document is never a label
            raise RefusedRow(f"nothing of the {name} can be predicted")
        return ids, trained

    def _checked(self, tokens: Encoded) -> Encoded:
        """Return tokens that exist already. Raise `RefusedRow` for one outside the vocabulary."""
        ids, teacher, most = tokens.ids, tokens.teacher, self._num_token_ids - 1
        if (outside := np.flatnonzero((ids < 0) | (ids > most))).size:
            raise RefusedRow(
                f"token {outside[0]} of {len(ids):,} (from 0) is {ids[outside[0]]}, and the "
                f"tokenizer has the ids 0 to {most}"
            )
        if teacher is not None and (largest := teacher["id"].max(initial=0)) > most:
            raise RefusedRow(
                f"teacher_ids has {largest}, and the tokenizer has the ids 0 to {most}"
            )
        trained = None if self.train_on == "all" else tokens.trained
        return tokens._replace(ids=ids.astype(self.dtype), trained=trained)

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
        versions = (transformers.__version__, tokenizers.__version__)
        special = (tokenizer.special_tokens_map, tokenizer.eos_token_id)
        parts: list[tuple] = [
            (*versions, type(tokenizer).__name__, self.train_on),
            (backend, tokenizer.chat_template, *special),
        ]
        if self.vision:
            parts.append((self.vision.fingerprint(),))
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
    pool, waiting = worker_pool(workers, encoder), deque[Any]()
    try:
        for chunk in _chunks(rows):
            waiting.append(pool.submit(_encode_chunk, chunk))
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "A tokenizing worker process was killed (out of memory?). Free memory, or give this "
            "run fewer cores (taskset)."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def size_of(row: Row | BadRow) -> int:
    """Return approximately how many characters of the row have to be encoded."""
    content = row.content if isinstance(row, Row) else ""
    if isinstance(content, Chat):
        texts = sum(len(str(message.get("content", ""))) for message in content.messages)
        return texts + sum(_IMAGE_CHARACTERS + len(one.data) for one in content.media)
    if isinstance(content, Answers):
        return len(str(content))
    if isinstance(content, Encoded):
        return len(content.ids) + (0 if content.teacher is None else content.teacher.size)
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


_job: Callable[..., Any]
"""Of a worker process, once it has started."""


def worker_pool(workers: int, job: Callable[..., Any]) -> ProcessPoolExecutor:
    """Return processes that each get `job` once, and then do it on what is given to `do_job`."""
    # Spawn, not fork: torch and the tokenizer may have running threads.
    return ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(job,)
    )


def do_job(*given: Any) -> Any:
    return _job(*given)


def _start_worker(job: Callable[..., Any]) -> None:
    """Prepare a worker process: it leaves Ctrl-C to its parent, and ends with it."""
    global _job
    _job = job
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is one process per core already
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Exit when the parent does: workers of a killed parent would wait for work forever."""
    parent_process().join()
    os._exit(1)


def _encode_chunk(chunk: list[Row | BadRow]) -> list[Encoded | BadRow]:
    return [_job(row) for row in chunk]
