"""The folder that a model's weights came from, and what an export takes over from it.

That is all that the model does not have: tensors of prediction layers and of other modes, as they
are stored, and all files but weights. Code among them is copied, and never run.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from titan_ulysses.checkpoint.folder import (
    CONFIG_FILE,
    STEP_FILE,
    Get,
    Stored,
    find,
    opened,
    some,
    without_data,
)
from titan_ulysses.checkpoint.layout import Layout, Read
from titan_ulysses.model import hf, prediction
from titan_ulysses.model.families import text_part

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"}
_BUFFERS = ("inv_freq", "position_ids", "masked_bias", "attn.bias")
"""Ends of names of buffers that old files have, and nobody needs."""
_OF_TOKENIZERS = (
    *("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template"),
    *("spiece", "sentencepiece", "tekken", "qwen.tiktoken"),
)
"""How the names of a tokenizer's files begin."""


@dataclass
class Origin:
    """A folder of weights, seen from a model that was filled from it."""

    path: str
    """The folder or hub name."""
    layout: Layout
    stored: Stored
    rest: list[str]
    """Names of tensors that the model does not have."""
    copies: dict[str, str]
    """Names of tensors that are copies of the model's, and what they are copies of."""

    @classmethod
    def of(cls, path: str, layout: Layout, stored: Stored | None = None) -> Origin:
        """Open the folder or hub name `path`. Raise `UserError` if there are no weights."""
        stored = stored or find(path)
        # Heads of language models, and what belongs to them, have no place in a classifier.
        rest = [] if hf.classifies(layout.plain) else layout.reads(stored.names)[1]
        if stored.quantization:  # without scales of what is computed, such as keys and values
            rest = [name for name in rest if not name.endswith("_scale")]
        copies = prediction.copies(layout.plain)
        copies = {name: layout.main[copies[name]] for name in rest if name in copies}
        rest = [name for name in rest if name not in copies]
        return cls(path, layout, stored, rest, copies)

    @property
    def files(self) -> list[Path]:
        """All files of the folder but weights, their index, and the manifest of an export."""
        return sorted(
            file
            for file in self.stored.folder.iterdir()
            if file.is_file()
            and not file.name.startswith(".")
            and not _WEIGHTS & set(file.suffixes)
            and file.name != STEP_FILE
        )

    def describe(self) -> str:
        """Return sentences about quantized weights and what the model does not have, if any."""
        told = [name for name in self.rest if not name.endswith(_BUFFERS)]
        code = [file.name for file in self.files if file.suffix == ".py"]
        name = hf.class_name(self.layout.plain)
        count = "1 tensor" if len(told) == 1 else f"{len(told)} tensors"
        parts = [f"ignored {count} that {name} does not have: {some(told)}"] if told else []
        parts += [f"code that is not run: {some(code)}"] if code else []
        lines = ["; ".join([*parts, "an export has them as they are"])] if parts else []
        return "\n".join(filter(None, [self.stored.describe(), *lines]))

    def size_of(self, name: str) -> int:
        """Return the bytes of a tensor in an export."""
        for get, _ in self._opened(name):
            tensor = without_data(get(name))
        itemsize = 2 if name in self.stored.quantized else tensor.dtype.itemsize
        return tensor.numel() * itemsize

    def read(self, name: str) -> Tensor:
        """Return a tensor as it is stored. Numbers that were quantized are in bf16."""
        for get, _ in self._opened(name):
            tensor = get(name)[...]
        return tensor.to(torch.bfloat16) if name in self.stored.quantized else tensor

    def _opened(self, name: str) -> Iterator[tuple[Get, Read]]:
        return opened([Read(self.layout.plain, name, None, {name: [name]})], self.stored)

    def copy_files(self, target: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Copy the files to the folder `target`, before an export writes its own over them.

        Files of a tokenizer are left out if the model was trained with another one.
        """
        # A processor has a tokenizer.
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        own = tokenizer is None or Path(tokenizer.name_or_path) == Path(self.path)
        for file in self.files:
            if own or not file.name.startswith(_OF_TOKENIZERS):
                shutil.copyfile(file, target / file.name)

    @cached_property
    def whole(self) -> PreTrainedConfig | None:
        """The config of the multi-modal model of which the model is the text part, with the model's
        own config as that of its text; None if it is no part.
        """
        if hf.classifies(self.layout.plain) or not (self.stored.folder / CONFIG_FILE).is_file():
            return None
        whole = hf.load_model_config(str(self.stored.folder), None)
        text, own = text_part(whole), copy.deepcopy(self.layout.plain.config)
        if text is whole or type(text) is not type(own):
            return None
        key = next(key for key in whole.sub_configs if getattr(whole, key, None) is text)
        setattr(whole, key, own)
        if hasattr(own, "quantization_config"):
            del own.quantization_config
        whole.dtype = own.dtype
        return whole

    def name_of(self, name: str) -> str:
        """Return the name that a tensor has in the folder, given that in a model of text alone."""
        return self._before.get(name.partition(".")[0], "") + name if self.whole else name

    @cached_property
    def _before(self) -> dict[str, str]:
        """What is before names of the text part in the folder, by how they begin: "language_model."
        before "model.norm.weight", and often nothing before "lm_head.weight".
        """
        return {
            read.target.partition(".")[0]: read.names[0].removesuffix(read.target)
            for read in self.layout.reads(self.stored.names)[0]
            if read.converter is None and read.names[0].endswith(read.target)
        }
