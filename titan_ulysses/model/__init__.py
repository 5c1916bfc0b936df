"""Unmodified transformers models: built on meta, sharded, then filled; exported as transformers
opens them.
"""

from titan_ulysses.model.torchao import suppress_torchao_warnings

with suppress_torchao_warnings():
    import transformers.modeling_utils  # noqa: F401  imports torchao wherever it is installed
