"""Encodes a prompt with two completions of it, for DPO: two documents that stay together.

Of texts, the prompt and the completion are encoded one after the other, and the end of a document
follows. Of messages, the chat template renders the prompt with the beginning of an answer, and the
whole; the completion is what is added.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from titan_ulysses.data.chat import render_messages
from titan_ulysses.data.sources import LONE_SURROGATE_ERROR, Preference, RefusedRow, has_surrogate
from titan_ulysses.data.tokenizer import encode
from titan_ulysses.distributed.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_preference(
    tokenizer: PreTrainedTokenizerBase, pair: Preference
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return (ids [tokens], trained [tokens] bool, split) of a pair.

    ids are the prompt with the chosen completion, and from index `split` on the prompt with the
    rejected one. `trained` marks the tokens of the completions. Raise `RefusedRow` if one of them
    is empty, or the template does not take the row.
    """
    documents, masks = [], []
    for name, completion in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if not completion:
            raise RefusedRow(f"the {name} completion is empty")
        encoded: Callable[..., Any] = _of_texts if isinstance(completion, str) else _of_messages
        ids, trained = encoded(tokenizer, pair.prompt, completion)
        documents.append(ids)
        masks.append(trained)
        if not trained[1:].any():  # the first token of a document is never a label
            raise RefusedRow(f"nothing of the {name} completion can be predicted")
    return np.concatenate(documents), np.concatenate(masks), len(documents[0])


def _of_texts(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of prompt and completion, and which of them are the completion's."""
    if has_surrogate(prompt) or has_surrogate(completion):
        raise RefusedRow(LONE_SURROGATE_ERROR)
    before = encode(tokenizer, prompt, ends=False)
    ids = np.concatenate([before, encode(tokenizer, completion)])
    return ids, np.arange(len(ids)) >= len(before)


def _of_messages(
    tokenizer: PreTrainedTokenizerBase, prompt: list[Any], completion: list[Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the same of messages. A token with a character of the completion is one of its own."""
    if not (tokenizer.chat_template and tokenizer.is_fast):
        raise UserError(
            f'model.tokenizer = "{tokenizer.name_or_path}" has no chat template, or is not a fast '
            "tokenizer, which completions of messages need: take the tokenizer of the family's "
            "instruct model, or give prompt, chosen and rejected as texts"
        )
    before = render_messages(tokenizer, prompt, None, asks=True)
    whole = render_messages(tokenizer, [*prompt, *completion], None)
    if has_surrogate(whole):
        raise RefusedRow(LONE_SURROGATE_ERROR)
    if not whole.startswith(before):
        raise RefusedRow(
            "the chat template renders the prompt differently once a completion follows it, so "
            "that nobody knows where the completion begins"
        )
    found = tokenizer(
        whole,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ends = np.array([end for _, end in found["offset_mapping"]], dtype=np.int64)
    return np.array(found["input_ids"], dtype=np.uint32), ends > len(before)
