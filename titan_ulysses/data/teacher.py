"""What a teacher has said of each token, stored with the tokens: its largest log-probabilities.

A record with `input_ids` then also has `teacher_ids` and `teacher_log_probs`: for each token a list
of k token ids, and a list of their log-probabilities in the teacher's distribution of that token,
given those before it. As `labels`, they are not shifted. Tokens that are not trained on, and the
first one of a document, may have empty lists, or null.
"""

from __future__ import annotations

from typing import Any

import numpy as np

FIELDS = ("teacher_ids", "teacher_log_probs")
TOP = np.dtype([("id", np.uint32), ("log_prob", np.float32)])
"""One of the k largest log-probabilities of a token, in fp32."""


def top_of(record: dict[str, Any], top_k: int, *, needed: np.ndarray) -> np.ndarray:
    """Return the teacher's largest log-probabilities [tokens, k] of a record, as TOP.

    needed [tokens] bool: which tokens must have them; those of others are 0. Raise `ValueError`
    with the reason if they are not there, or not k for each token.
    """
    found = np.zeros((len(needed), top_k), dtype=TOP)
    places = np.flatnonzero(needed)
    for name, key, kinds in zip(FIELDS, ("id", "log_prob"), ("iu", "iuf"), strict=True):
        rows = record.get(name)
        if rows is None:
            raise ValueError(f'no field "{name}", which data.teacher_top_k = {top_k} needs')
        if not isinstance(rows, list) or len(rows) != len(needed):
            count = len(rows) if isinstance(rows, list) else "no list of"
            raise ValueError(f"{count} {name} for {len(needed)} input_ids")
        for place in places.tolist():
            row = rows[place]
            if not isinstance(row, list) or len(row) != top_k:
                count = len(row) if isinstance(row, list) else "no"
                raise ValueError(
                    f"{name}[{place}] has {count} entries, and data.teacher_top_k = {top_k}"
                )
        try:
            values = np.array([rows[place] for place in places.tolist()])
        except ValueError:  # lists in lists
            values = np.array(None)
        if not len(places):
            continue
        if values.dtype.kind not in kinds or values.ndim != 2:
            raise ValueError(f"{name} has an entry that is no {_KINDS[key]}")
        low, high = _RANGES[key]
        if (wrong := values[~((values >= low) & (values <= high))]).size:  # NaN too
            raise ValueError(f"{name} has an entry that is no {_KINDS[key]}: {wrong[0]}")
        twice = (np.diff(np.sort(values)) == 0).any(axis=1)
        if key == "id" and twice.any():
            raise ValueError(f"{name}[{places[twice][0]}] has one token id twice")
        found[key][places] = values
    return found


_KINDS = {"id": "token id", "log_prob": "number in fp32"}
_LARGEST = float(np.finfo(np.float32).max)
_RANGES = {"id": (0, np.iinfo(np.uint32).max), "log_prob": (-_LARGEST, _LARGEST)}
