"""The library inside of other trainers. What they need is imported when they are used."""

import titan_ulysses.model  # noqa: F401  imports transformers and torchao without their warnings
