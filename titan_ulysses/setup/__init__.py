"""From a config to a model that is wrapped and sharded."""

import titan_ulysses.model  # noqa: F401  imports transformers, and torchao with it, quietly
