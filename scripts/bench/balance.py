"""How evenly the attention of a step is spread over data-parallel ranks, for documents of
long-tailed lengths: as the loader deals sequences, and in the order of the data.

    python scripts/bench/balance.py

The lengths are log-normal, and 1 % of the documents have 64 times the median. They are packed end
to end, as data.packing = "concat" does. A figure is what the ranks wait for in a step (in each
micro-batch the costliest rank), divided by max(cost / ranks, the costliest sequence), and the mean
over steps. The loader's own code runs; no token is read.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from common import parser_of

from titan_ulysses.data.balance import attention_cost, deal, in_order, slowest
from titan_ulysses.data.corpus import Corpus
from titan_ulysses.data.packing import PackedSequences


def corpus_of(tokens: int, *, median: float, sigma: float, seed: int) -> Corpus:
    """Return documents of about so many tokens, which are all the same."""
    random = np.random.default_rng(seed)
    mean = median * np.exp(sigma**2 / 2) * 0.99 + 0.01 * 64 * median
    count = int(tokens / mean) + 1
    lengths = np.exp(random.normal(np.log(median), sigma, count))
    lengths[random.random(count) < 0.01] = 64 * median
    lengths = np.maximum(2, lengths).astype(np.int64)
    ends = np.cumsum(lengths)
    return Corpus(np.zeros(int(ends[-1]), dtype=np.uint8), ends - lengths, ends, None)


def ratios(costs_of_steps: list[list[int]], *, ranks: int) -> tuple[float, float]:
    """Return the mean over steps of what is waited for over the bound: (dealt, in order)."""
    found = []
    for costs in costs_of_steps:
        bound = max(sum(costs) / ranks, max(costs))
        before = in_order(len(costs), ranks=ranks, batch_size=1)
        dealt = deal(costs, ranks=ranks, batch_size=1)
        found.append((slowest(costs, dealt) / bound, slowest(costs, before) / bound))
    dealt_mean, before_mean = np.mean(found, axis=0)
    return float(dealt_mean), float(before_mean)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--seq-len", type=int, default=16384)
    parser.add_argument("--median", type=float, default=512, help="tokens of a document")
    parser.add_argument("--sigma", type=float, default=1.0, help="of the lengths' logarithm")
    parser.add_argument("--sequences", type=int, default=512, help="in a step")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    tokens = options.seq_len * options.sequences * options.steps
    corpus = corpus_of(tokens, median=options.median, sigma=options.sigma, seed=options.seed)
    sequences = PackedSequences(corpus, seq_len=options.seq_len, seed=options.seed)
    print(
        f"{len(corpus):,} documents, median {options.median:g}, sigma {options.sigma:g}, 1 % at 64 "
        f"x the median; sequences of {options.seq_len:,}, {options.sequences} a step, "
        f"{options.steps} steps"
    )
    per_step, costs = options.sequences, []
    for first in range(0, options.steps * per_step, per_step):
        lengths = map(sequences.document_lengths, range(first, first + per_step))
        costs.append([*map(attention_cost, lengths)])
    rows = []
    for ranks in (2, 4, 8):
        dealt, before = ratios(costs, ranks=ranks)
        rows.append({"ranks": ranks, "dealt": dealt, "in_order": before})
        print(f"dp {ranks}: dealt {dealt:.3f}, in order {before:.3f}")
    if options.json:
        options.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
