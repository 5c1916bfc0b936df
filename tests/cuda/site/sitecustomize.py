"""Python runs this when it starts, in every process whose PYTHONPATH has this folder: with
FAKECUDA=1 the device is loaded before anyone can import torch.
"""

import os

if os.environ.get("FAKECUDA") == "1":
    import fakecuda

    fakecuda.load()
