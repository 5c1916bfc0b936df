"""titan_ulysses: train unmodified Hugging Face causal LMs on very long sequences, with nothing but PyTorch.

A training loop of one's own needs these names, and no trainer and no config file:

    mesh = build_mesh(sequence=2)
    model = parallelize(AutoModelForCausalLM.from_pretrained(path), mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    state = load_checkpoint("checkpoints", model, optimizer)  # {"step": 0} at first
    for batch in shard(islice(loader, state["step"], None), mesh):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        state["step"] += 1
        if state["step"] % 100 == 0:
            save_checkpoint("checkpoints", model, optimizer, state)
    save_pretrained(model, "trained", tokenizer)  # for AutoModelForCausalLM.from_pretrained
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from titan_ulysses.data.sharding import shard
    from titan_ulysses.errors import UserError
    from titan_ulysses.evaluation import score, whole_sequences
    from titan_ulysses.mesh import build_mesh
    from titan_ulysses.parallelize import parallelize
    from titan_ulysses.saving import load_checkpoint, save_checkpoint, save_pretrained

__all__ = [
    "UserError",
    "build_mesh",
    "load_checkpoint",
    "parallelize",
    "save_checkpoint",
    "save_pretrained",
    "score",
    "shard",
    "whole_sequences",
]

_HOMES = {
    "UserError": "errors",
    "build_mesh": "mesh",
    "load_checkpoint": "saving",
    "parallelize": "parallelize",
    "save_checkpoint": "saving",
    "save_pretrained": "saving",
    "score": "evaluation",
    "shard": "data.sharding",
    "whole_sequences": "evaluation",
}


def __getattr__(name: str):
    """The public names are imported when they are asked for: looking at a configuration need not load torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


class _Package(ModuleType):
    """Python binds a submodule to its package once it is imported: for `parallelize` it is to be the function."""

    def __setattr__(self, name: str, value) -> None:
        super().__setattr__(name, getattr(value, name) if name in _HOMES and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Package
