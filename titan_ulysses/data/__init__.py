"""The data pipeline, from files and data sets to the batch of one rank: see `pipeline`."""
