"""Weights on disk: DCP checkpoints, safetensors in and out, initial weights, room on disk."""
