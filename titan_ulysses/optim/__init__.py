"""The optimizer: AdamW, also with low-bit or offloaded state."""
