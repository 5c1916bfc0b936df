"""What every rank of the tests needs, imported once by the process that ranks are forks of."""

import gc
import importlib

for _name in (
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "titan_ulysses.model",  # before transformers, whose import is noisy without it
    "transformers.models.llama.modeling_llama",
):
    importlib.import_module(_name)

# What is imported stays for ever: the collector need not look through it again and again.
gc.collect()
gc.freeze()
