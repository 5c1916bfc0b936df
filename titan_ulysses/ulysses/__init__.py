"""DeepSpeed-Ulysses sequence parallelism (arXiv 2309.14509): shard tokens everywhere, heads inside
attention.
"""
