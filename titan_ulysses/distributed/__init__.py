"""The mesh of ranks, what goes over the wire, and how a run fails on all ranks together."""
