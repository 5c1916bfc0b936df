"""titan_ulysses: train unmodified Hugging Face causal LMs on very long sequences.

It is PyTorch-native and does not need DeepSpeed. The names below are enough to write your own
training loop, without the trainer or a config file:

    mesh = build_mesh(sequence=2)
    model = parallelize(AutoModelForCausalLM.from_pretrained(path), mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    state = load_checkpoint("checkpoints", model, optimizer)  # {"step": 0} if there is none
    for batch in shard(islice(loader, state["step"], None), model):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        state["step"] += 1
        if state["step"] % 100 == 0:
            save_checkpoint("checkpoints", model, optimizer, state)
    save_pretrained(model, "trained", tokenizer)  # for AutoModelForCausalLM.from_pretrained
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from titan_ulysses.checkpoint.saving import load_checkpoint, save_checkpoint, save_pretrained
    from titan_ulysses.data.adapter import local_slice, shard
    from titan_ulysses.distributed.errors import UserError
    from titan_ulysses.distributed.mesh import build_mesh
    from titan_ulysses.setup.parallelize import parallelize
    from titan_ulysses.train.evaluation import log_probs, score, whole_sequences
    from titan_ulysses.train.huggingface.ulysses_trainer import UlyssesTrainer

__all__ = [
    "UlyssesTrainer",
    "UserError",
    "build_mesh",
    "load_checkpoint",
    "local_slice",
    "log_probs",
    "parallelize",
    "save_checkpoint",
    "save_pretrained",
    "score",
    "shard",
    "whole_sequences",
]

__version__ = "0.1.0"

_MODULE_OF = {
    "UlyssesTrainer": "train.huggingface.ulysses_trainer",
    "UserError": "distributed.errors",
    "build_mesh": "distributed.mesh",
    "load_checkpoint": "checkpoint.saving",
    "local_slice": "data.adapter",
    "log_probs": "train.evaluation",
    "parallelize": "setup.parallelize",
    "save_checkpoint": "checkpoint.saving",
    "save_pretrained": "checkpoint.saving",
    "score": "train.evaluation",
    "shard": "data.adapter",
    "whole_sequences": "train.evaluation",
}


def __getattr__(name: str):
    """Import a public name at its first use, so that reading a config does not load torch."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
