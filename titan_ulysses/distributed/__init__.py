"""The mesh of ranks, communication counts, and errors that end all ranks together."""
