"""Unmodified transformers models: built on meta, sharded, then filled.

They are exported in the form in which transformers opens them.
"""

from titan_ulysses.model.torchao import suppress_torchao_warnings

with suppress_torchao_warnings():
    # This also imports torchao, wherever that is installed.
    import transformers.modeling_utils  # noqa: F401
