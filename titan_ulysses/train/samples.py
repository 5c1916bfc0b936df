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

from titan_ulysses.config.schema import Config
from titan_ulysses.data.loader import Batch
from titan_ulysses.data.tokenizer import encode
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.sequence import IGNORE_INDEX
from titan_ulysses.train.evaluation import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def encode_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """Return the token ids of each of validation.prompts; of chats, as what a user says.

    UserError for one that is empty, or too long for training.seq_len with what follows.
    """
    validation, found = config.validation, []
    for number, prompt in enumerate(validation.prompts if validation.enable else ()):
        if config.data.source == "chat" and tokenizer.chat_template:
            asked = [{"role": "user", "content": prompt}]
            ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True)
            ids = np.array(ids["input_ids"] if hasattr(ids, "keys") else ids)
        else:
            ids = encode(tokenizer, prompt, ends=False)
        most = config.training.seq_len - validation.prompt_tokens
        if not 0 < len(ids) <= most:
            raise UserError(
                f"validation.prompts[{number}] has {len(ids):,} tokens: give at least one, and at "
                f"most training.seq_len - validation.prompt_tokens = {most:,}",
                exit_code=2,
            )
        found.append(ids)
    return found


@torch.no_grad()
def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[np.ndarray],
    *,
    tokens: int,
) -> list[str]:
    """Return the text after each prompt: the likeliest tokens, up to the end of the text.

    Each rank returns the same. Collective.
    """
    texts = [[int(x) for x in ids] for ids in prompts]
    ends = [len(ids) for ids in texts]
    length, over = max(ends) + tokens, [False] * len(texts)
    head = model.get_output_embeddings()
    checked, head.checked = head.checked, _likeliest  # it is no loss that could be checked
    with evaluating(model):
        for _ in range(tokens):
            found = _next_tokens(model, texts, length)
            for row, token in enumerate(found):
                over[row] = over[row] or token == tokenizer.eos_token_id
                texts[row] += [] if over[row] else [token]
            if all(over):
                break
    head.checked = checked
    return [
        tokenizer.decode(text[end:], clean_up_tokenization_spaces=False)
        for text, end in zip(texts, ends, strict=True)
    ]


def _next_tokens(model: PreTrainedModel, texts: list[list[int]], length: int) -> list[int]:
    """Return the likeliest token after each text: the head computes it as if it were a loss."""
    mesh = model.sharding.mesh
    input_ids = torch.zeros(len(texts), length, dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    positions = torch.arange(length).repeat(len(texts), 1)
    for row, text in enumerate(texts):
        input_ids[row, : len(text)] = torch.tensor(text)
        labels[row, len(text) - 1] = 0
        positions[row, len(text) :] -= len(text)
    batch = Batch(
        input_ids=input_ids,
        labels=labels,
        position_ids=positions,
        documents=tuple((len(text), length - len(text)) for text in texts),  # and padding
    ).local(
        rank=mesh.sp.get_local_rank(),
        degree=mesh.sp.size(),
        stream_chunk_tokens=model.sharding.stream_chunk_tokens,
    )
    one = torch.ones((), dtype=torch.int64, device=mesh.device)
    batch = batch.to(mesh.device)
    model(**batch.inputs(), num_items_in_batch=one, loss_function=_likeliest, loss_inputs={})
    found = model.get_output_embeddings().row_losses
    dist.all_reduce(found, group=mesh.sp.get_group())
    return [int(token) for token in found.tolist()]


def _likeliest(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the likeliest token of each row with a label, 0 elsewhere, in fp64."""
    return logits.argmax(dim=-1).double().where(labels != IGNORE_INDEX, 0)
