"""Encodes a prompt with two completions of it, for DPO: two documents that stay together.

As TRL does it: a completion is what follows the prompt's own tokens. Of texts, the prompt and the
completion are encoded one after the other, and the end of a document follows. Of messages, the
chat template renders the prompt with the beginning of an answer, and the whole.
"""

from __future__ import annotations

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
        encoded = _of_texts if isinstance(completion, str) else _of_messages
        prompt, ids = encoded(tokenizer, pair.prompt, completion)
        documents.append(ids)
        masks.append(np.arange(len(ids)) >= prompt)
        if not masks[-1][1:].any():  # the first token of a document is never a label
            raise RefusedRow(f"nothing of the {name} completion can be predicted")
    return np.concatenate(documents), np.concatenate(masks), len(documents[0])


def _of_texts(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str
) -> tuple[int, np.ndarray]:
    """Return the number of the prompt's tokens, and the ids of prompt and completion."""
    if has_surrogate(prompt) or has_surrogate(completion):
        raise RefusedRow(LONE_SURROGATE_ERROR)
    before = encode(tokenizer, prompt, ends=False)
    return len(before), np.concatenate([before, encode(tokenizer, completion)])


def _of_messages(
    tokenizer: PreTrainedTokenizerBase, prompt: list[Any], completion: list[Any]
) -> tuple[int, np.ndarray]:
    if not tokenizer.chat_template:
        raise UserError(
            f'model.tokenizer = "{tokenizer.name_or_path}" has no chat template, which completions '
            "of messages need: take the tokenizer of the family's instruct model, or give prompt, "
            "chosen and rejected as texts"
        )
    before, whole = (
        render_messages(tokenizer, prompt, None, asks=True),
        render_messages(tokenizer, [*prompt, *completion], None),
    )
    if has_surrogate(whole):
        raise RefusedRow(LONE_SURROGATE_ERROR)
    options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    prompt_ids, ids = (
        np.array(tokenizer(text, add_special_tokens=False, **options)["input_ids"], dtype=np.uint32)
        for text in (before, whole)
    )
    if not np.array_equal(ids[: len(prompt_ids)], prompt_ids):
        raise RefusedRow(
            "the chat template or the tokenizer reads the prompt differently once a completion "
            "follows it, so that nobody knows where the completion begins"
        )
    return len(prompt_ids), ids
