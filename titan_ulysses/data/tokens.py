"""Records of tokens that exist already: `input_ids`, and what else a record may say about them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from titan_ulysses.data.teacher import FIELDS, top_of

TOKEN_EXTENSIONS = [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow", ".idx"]
TOKEN_FIELDS = (
    "input_ids",
    "labels",
    "position_ids",
    "document_lengths",
    "seq_lengths",
    "attention_mask",
)
"""The fields that are read, with the names that Hugging Face's collators and TRL give them."""
NOT_TRAINED = -100


class Tokens(NamedTuple):
    ids: np.ndarray
    """[tokens] int64"""
    trained: np.ndarray | None
    """[tokens] bool: which tokens are trained on; None: all of them."""
    lengths: tuple[int, ...] | None
    """lengths of the documents of the record, in order; None: it is one document."""
    teacher: np.ndarray | None = None
    """[tokens, k] TOP: a teacher's largest log-probabilities (see teacher.py); None: none."""


def tokens_of(
    record: dict[str, Any], *, teacher_top_k: int = 0, train_on_all: bool = False
) -> Tokens:
    """Return the tokens of a record.

    - `input_ids`: the tokens. Nothing is added to them.
    - `labels`: as transformers takes them, one for each token and not shifted: the token itself, or
      -100 where it is not trained on.
    - `position_ids`, or `document_lengths` (TRL: `seq_lengths`): where each document of the record
      begins. Positions begin at 0 in each document, and go up by 1.
    - `attention_mask`: tokens at which it is 0 are padding, and left out.
    - with teacher_top_k: what a teacher says of each token that is trained on (see teacher.py);
      train_on_all: also where labels are -100.

    Raise `ValueError` with the reason if the fields contradict each other.
    """
    given = {name: record[name] for name in TOKEN_FIELDS if record.get(name) is not None}
    if "input_ids" not in given:
        there = ", ".join(map(str, record)) or "none"
        raise ValueError(f'no field "input_ids" (it has {there})')
    arrays = {name: _whole_numbers(name, values) for name, values in given.items()}
    ids = arrays["input_ids"]
    for name, values in arrays.items():
        if not name.endswith("_lengths") and len(values) != len(ids):
            raise ValueError(f"{len(values)} {name} for {len(ids)} input_ids")
    lengths = _lengths(arrays, len(ids))
    labels = arrays.get("labels")
    if labels is not None:
        wrong = np.flatnonzero((labels != NOT_TRAINED) & (labels != ids))
        if len(wrong):
            raise ValueError(
                f"labels[{wrong[0]}] is {labels[wrong[0]]}, neither {NOT_TRAINED} nor "
                f"input_ids[{wrong[0]}] = {ids[wrong[0]]}: give labels that are not shifted"
            )
    trained = None if labels is None else labels != NOT_TRAINED
    kept = arrays["attention_mask"] != 0 if "attention_mask" in arrays else None
    teacher = None
    if teacher_top_k:
        needed = np.ones(len(ids), bool) if trained is None or train_on_all else trained.copy()
        if kept is not None:
            needed &= kept
        begins = np.cumsum((0, *(lengths or (len(ids),))))[:-1]
        needed[begins[begins < len(ids)]] = False  # the first token of a document is never a label
        teacher = top_of(record, teacher_top_k, needed=needed)
    tokens = Tokens(ids, trained, lengths, teacher)
    return tokens if kept is None else _without_padding(tokens, kept)


def _whole_numbers(name: str, values: Any) -> np.ndarray:
    """Return [n] int64. Raise `ValueError` if values are no list of whole numbers."""
    try:
        array = np.asarray(values)
    except ValueError:  # lists of different lengths
        array = np.array(None)
    if array.ndim == 1 and not len(array):
        return np.empty(0, dtype=np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{name} is no list of whole numbers")
    return array.astype(np.int64)


def _lengths(arrays: dict[str, np.ndarray], count: int) -> tuple[int, ...] | None:
    """Return the lengths of the documents, where a field tells them."""
    told: dict[str, tuple[int, ...]] = {}
    for name in ("document_lengths", "seq_lengths"):
        if name in arrays:
            total = sum(arrays[name].tolist())  # in Python's numbers, which do not overflow
            if (arrays[name] < 0).any() or total != count:
                raise ValueError(f"{name} sum to {total}, not to {count} tokens")
            told[name] = tuple(length for length in arrays[name].tolist() if length)
    if "position_ids" in arrays and count:
        positions = arrays["position_ids"]
        begins = np.flatnonzero(positions == 0)
        goes_on = np.flatnonzero((np.diff(positions) != 1) & (positions[1:] != 0))
        if positions[0] != 0 or len(goes_on):
            place = 0 if positions[0] != 0 else int(goes_on[0]) + 1
            raise ValueError(
                f"position_ids[{place}] is {positions[place]}: positions begin at 0 in each "
                "document, and go up by 1"
            )
        told["position_ids"] = tuple(np.diff(np.append(begins, count)).tolist())
    if len(set(told.values())) > 1:
        raise ValueError(f"{' and '.join(told)} tell different documents")
    return next(iter(told.values()), None)


def _without_padding(tokens: Tokens, kept: np.ndarray) -> Tokens:
    ids, trained, lengths, teacher = tokens
    if lengths is not None:
        parts = np.split(kept, np.cumsum(lengths)[:-1])
        lengths = tuple(int(part.sum()) for part in parts if part.any())
    masked = (None if x is None else x[kept] for x in (trained, teacher))
    return Tokens(ids[kept], next(masked), lengths, next(masked))


def token_records(batch: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of an Arrow batch: lists of tokens as arrays, not as Python numbers."""
    columns = {name: batch.column(name) for name in batch.schema.names}
    for row in range(batch.num_rows):
        yield {name: _value(column[row], name) for name, column in columns.items()}


def _value(scalar: Any, name: str) -> Any:
    if name in FIELDS:
        return scalar.as_py()
    if name not in TOKEN_FIELDS:
        return None  # only its name is of use, for messages
    values = getattr(scalar, "values", None)  # of a list
    return scalar.as_py() if values is None else values.to_numpy(zero_copy_only=False)


def token_problem(ids: np.ndarray, num_token_ids: int) -> str | None:
    """Return which token is outside of the vocabulary, and where; None if none is."""
    if not len(ids) or (ids.min() >= 0 and ids.max() < num_token_ids):
        return None
    place = int(np.flatnonzero((ids < 0) | (ids >= num_token_ids))[0])
    return (
        f"token {place} of {len(ids):,} (from 0) is {ids[place]}, and the tokenizer has the ids 0 "
        f"to {num_token_ids - 1}"
    )
