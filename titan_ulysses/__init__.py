"""titan_ulysses: train unmodified Hugging Face causal LMs on very long sequences, with nothing but PyTorch."""
