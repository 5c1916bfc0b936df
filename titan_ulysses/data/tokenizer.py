"""Tokenizers: any transformers tokenizer, or "bytes", which needs no files and no download."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from titan_ulysses.distributed.errors import RefusedRow, UserError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BYTES = "bytes"
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 256


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer `name` of `model.tokenizer`: "bytes", a folder, or a hub name.

    Raise `UserError` if there is no such tokenizer or it cannot be opened.
    """
    if name == BYTES:
        return _byte_tokenizer()
    from transformers import AutoTokenizer

    from titan_ulysses.model.remote_code import check_tokenizer_code

    try:
        check_tokenizer_code(name, f'model.tokenizer = "{name}"')
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # of any kind, depending on which file is missing or damaged
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(
            f'model.tokenizer = "{name}" cannot be loaded ({reason.strip().rstrip(".:")}): give a '
            f'folder with a saved tokenizer, a hub name that this machine can reach, or "{BYTES}"'
        ) from error


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str | bytes, *, ends: bool = True
) -> np.ndarray:
    """Return the token ids of one document, 1-D and unsigned.

    No token is added in front. The eos token, if the tokenizer has one, is appended, unless
    `ends=False`, which is for a prompt that something follows.

    Text inside a document that looks like a special token is encoded as ordinary characters: a file
    that mentions `<|endoftext|>` does not end there. Raise `RefusedRow` for half of a surrogate
    pair, and `UserError` for `bytes` with any other than the byte tokenizer.
    """
    refuse_surrogates(text)
    if is_byte_tokenizer(tokenizer):
        raw = text.encode("utf-8") if isinstance(text, str) else text
        ids = np.empty(len(raw) + 1, dtype=np.uint16)
        ids[:-1] = np.frombuffer(raw, dtype=np.uint8)
        ids[-1] = END_OF_TEXT_ID
        return ids if ends else ids[:-1]
    if isinstance(text, bytes):
        raise UserError(
            f'data.encoding = "bytes" needs model.tokenizer = "{BYTES}": other tokenizers read text'
        )
    ids = tokenized(tokenizer, text, split_special_tokens=True)["input_ids"]
    if ends and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return np.array(ids, dtype=np.uint32)


def tokenized(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> Mapping[str, Any]:
    """Call the tokenizer for ids alone, without adding a token.

    Raise `UserError` if it fails.
    """
    try:
        return tokenizer(
            text,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            # No warning about documents longer than the tokenizer's `model_max_length`: they are
            # the purpose of this project.
            verbose=False,
            **options,
        )
    except BaseException as error:
        # A panic of its Rust code does not derive from `Exception`, and is reported in the same
        # way.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(
            f'model.tokenizer = "{tokenizer.name_or_path}" cannot encode it ({one_line(error)}): '
            "take another tokenizer, or leave the text out"
        ) from error


def refuse_surrogates(text: str | bytes) -> None:
    """Raise `RefusedRow` if the text contains half of a surrogate pair.

    JSON can express it, but it is not a valid character and tokenizers fail on it.
    """
    if isinstance(text, str) and not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise RefusedRow("it contains half of a surrogate pair, which is not a character")


def num_token_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the largest id + 1, which is the smallest number of embedding rows.

    `len(tokenizer)` is smaller if the ids have gaps.
    """
    return max(tokenizer.get_vocab().values()) + 1


def is_byte_tokenizer(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether this is the "bytes" tokenizer, even if it was reloaded from a folder."""
    return len(tokenizer) == END_OF_TEXT_ID + 1 and tokenizer.get_vocab() == _byte_vocab()


def _byte_tokenizer() -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for token, i in _byte_vocab().items() if i != END_OF_TEXT_ID}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT)


@lru_cache(maxsize=1)
def _byte_vocab() -> dict[str, int]:
    """Return {token: id} of the byte tokenizer.

    Byte-level BPE (as in GPT-2) writes each byte as one printable character: the byte itself if it
    is printable Latin-1, otherwise the next free code point from 256 on.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    vocab = {chr(byte): byte for byte in printable}
    vocab |= {chr(256 + i): byte for i, byte in enumerate(others)}
    return vocab | {END_OF_TEXT: END_OF_TEXT_ID}
