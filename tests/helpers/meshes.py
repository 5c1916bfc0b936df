"""The meshes that tests train on: (dp_replicate, dp_shard, sp)."""

from __future__ import annotations

from functools import lru_cache

from titan_ulysses.distributed.mesh import Mesh, build_mesh

Degrees = tuple[int, int, int]

ONE: Degrees = (1, 1, 1)
SP2: Degrees = (1, 1, 2)
SP4: Degrees = (1, 1, 4)
DP2: Degrees = (1, 2, 1)
DP2_SP2: Degrees = (1, 2, 2)


@lru_cache
def mesh_of(replicate: int, shard: int, sequence: int) -> Mesh:
    """A rank makes each mesh once: process groups are not given back."""
    return build_mesh(replicate=replicate, shard=shard, sequence=sequence)
