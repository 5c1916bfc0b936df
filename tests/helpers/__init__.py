"""What tests share: tiny models, plain and sharded training, ranks, and runs of `train.py`."""
