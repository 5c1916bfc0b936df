"""The training loop: one optimizer step, the trainer, evaluation, and what a run prints.

`huggingface` brings sequence parallelism to the trainers of transformers and TRL.
"""
