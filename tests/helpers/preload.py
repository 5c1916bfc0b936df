"""What every rank of the tests needs, imported once by the process that ranks are forks of."""

import gc
import importlib

# What is imported stays for ever: the collector need not look through it again and again.
gc.disable()
for _name in (
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "titan_ulysses.model",  # before transformers, whose import is noisy without it
    "transformers.models.llama.modeling_llama",
    # Most ranks run `Trainer`. On its own each of them would take a second to import this.
    "titan_ulysses.train.trainer",
    "tensorboard.summary.writer.record_writer",
):
    importlib.import_module(_name)
# transformers compiles a thousand patterns for the first weights that are read or written.
importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("")

gc.freeze()
gc.enable()
