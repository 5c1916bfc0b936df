"""DeepSpeed-Ulysses sequence parallelism (arXiv 2309.14509).

Tensors are sharded by tokens everywhere except inside attention, where they are sharded by heads.
"""
