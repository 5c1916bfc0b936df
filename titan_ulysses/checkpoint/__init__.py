"""Weights on disk: DCP checkpoints, safetensors in and out, initial weights, room on disk."""

import titan_ulysses.model  # noqa: F401  imports transformers, and torchao with it, quietly
