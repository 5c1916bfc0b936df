"""Texts that the model goes on with, from the prompts of [validation], as it is sharded.

Each new token is a forward of the whole text so far, on all ranks: exact, with the adapters and the
attention of training, and with no more memory than a validation of such a sequence. It is for a few
short texts: nothing is kept from one token to the next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from titan_ulysses.config.schema import Config, SourceSettings
from titan_ulysses.data.adapter import slice_rows
from titan_ulysses.data.chat import encode_question
from titan_ulysses.data.loader import Batch
from titan_ulysses.data.tokenizer import encode
from titan_ulysses.distributed.errors import RefusedRow, UsageError
from titan_ulysses.distributed.sequence import IGNORE_INDEX
from titan_ulysses.train.evaluation import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def encode_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """Return the token ids of each of validation.prompts; if the data has chats, of a chat in which
    a user says it.

    UserError for one that is empty, or too long for training.seq_len with what follows.
    """
    validation, found = config.validation, []
    sources: list[SourceSettings] = [*config.data.mixture] or [config.data]
    chats = any(one.source == "chat" for one in sources)
    for number, prompt in enumerate(validation.prompts):
        try:
            if chats:
                ids = encode_question(tokenizer, prompt)
            else:
                ids = encode(tokenizer, prompt, ends=False)
        except RefusedRow as error:
            raise UsageError(f"validation.prompts[{number}]: {error}") from error
        most = config.training.seq_len - validation.prompt_tokens
        if not 0 < len(ids) <= most:
            raise UsageError(
                f"validation.prompts[{number}] has {len(ids):,} tokens: give at least one, and at "
                f"most training.seq_len - validation.prompt_tokens = {most:,}"
            )
        found.append(ids)
    return found


def continuations(
    config: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[np.ndarray],
) -> list[str]:
    """Return the text after each prompt: the likeliest tokens, up to the end of the text.

    What ends a text is what ends it in transformers' `generate`, and the tokenizer's eos token.
    Each rank returns the same. Collective.
    """
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    training, tokens = config.training, config.validation.prompt_tokens
    length = max(map(len, prompts)) + tokens
    rows = training.local_batch_size * training.seq_len // length  # at once: no more than a batch
    texts = [ids.tolist() for ids in prompts]
    with evaluating(model), torch.no_grad():
        for first in range(0, len(texts), rows):
            going_on = texts[first : first + rows]
            for _ in range(tokens):
                found = zip(going_on, _next_tokens(model, going_on, length), strict=True)
                longer = [(text, token) for text, token in found if token not in ends]
                for text, token in longer:
                    text.append(token)
                if not longer:
                    break
                going_on = [text for text, _ in longer]
    return [
        tokenizer.decode(text[len(ids) :], clean_up_tokenization_spaces=False)
        for text, ids in zip(texts, prompts, strict=True)
    ]


def _next_tokens(model: PreTrainedModel, texts: list[list[int]], length: int) -> list[int]:
    """Return the likeliest token after each text; each row is padded to length. Collective."""
    input_ids = torch.zeros(len(texts), length, dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    positions = torch.arange(length).repeat(len(texts), 1)
    for row, text in enumerate(texts):
        input_ids[row, : len(text)] = torch.tensor(text)
        labels[row, len(text) - 1] = 0  # any: what it would be predicted as is looked at
        positions[row, len(text) :] -= len(text)
    documents = tuple((len(text), length - len(text)) for text in texts)  # a text, and padding
    whole, sharding = Batch(input_ids, labels, positions, documents), model.sharding
    mesh = sharding.mesh
    batch = slice_rows(whole, mesh, sharding.stream_chunk_tokens)
    inputs = batch.to(mesh.device).inputs()
    found = model(**inputs, reduction="none", loss_function=_likeliest).loss.sum(dim=1)
    dist.all_reduce(found, group=mesh.sp.get_group())
    dist.broadcast(found, src=0)  # the ranks must agree, or they would not make as many forwards
    return found.tolist()


def _likeliest(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the likeliest token of each row [n, V] with a label, 0 elsewhere."""
    return logits.argmax(dim=-1).where(labels != IGNORE_INDEX, 0)
