"""Train a Hugging Face causal LM on long sequences.

`torchrun --nproc-per-node N train.py --config configs/X.toml` starts N ranks.
An installed package has the same as `titan-ulysses train`.
"""

from __future__ import annotations

import sys

from titan_ulysses.__main__ import run as main
from titan_ulysses.launch.failure import exit_on_error

if __name__ == "__main__":
    with exit_on_error():
        main(sys.argv[1:])
