"""Weights on disk: DCP checkpoints, safetensors in and out, initial weights, disk space."""

import titan_ulysses.model  # noqa: F401  imports transformers and torchao without their warnings
