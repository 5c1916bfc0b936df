"""Unmodified transformers models: built on meta, sharded, then filled; exported as transformers opens them."""
