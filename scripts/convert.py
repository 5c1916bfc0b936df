"""A run's checkpoint as a folder that transformers opens, or such a folder as a checkpoint.

    python scripts/convert.py outputs/books/checkpoints/step-500 ~/models/books-500

The same as `titan-ulysses convert`; see titan_ulysses/checkpoint/convert.py.
"""

from titan_ulysses.checkpoint.convert import main

if __name__ == "__main__":
    main()
