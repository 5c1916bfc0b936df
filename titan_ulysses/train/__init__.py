"""The training loop: one optimizer step, the trainer, evaluation, and what a run prints."""
