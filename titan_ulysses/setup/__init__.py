"""The way from a config to a wrapped and sharded model."""

import titan_ulysses.model  # noqa: F401  imports transformers and torchao without their warnings
