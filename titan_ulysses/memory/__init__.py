"""What makes long sequences fit: tiling, the loss head, activation checkpointing and offloading."""
