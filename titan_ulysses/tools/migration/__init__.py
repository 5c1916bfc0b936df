"""What each key of the recipes of other trainers becomes here. For `titan-ulysses migrate`."""

from titan_ulysses.tools.migration.key_rules import read_format

_NAMES = ("arctic", "accelerate", "axolotl", "llama-factory", "ms-swift", "torchtitan", "trl")
FORMATS = {name: read_format(name.replace("-", "_")) for name in _NAMES}
