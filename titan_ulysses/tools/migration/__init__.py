"""What each key of the recipes of other trainers becomes here. For `titan-ulysses migrate`."""

from titan_ulysses.tools.migration.accelerate import ACCELERATE
from titan_ulysses.tools.migration.arctic import ARCTIC
from titan_ulysses.tools.migration.axolotl import AXOLOTL
from titan_ulysses.tools.migration.llamafactory import LLAMA_FACTORY
from titan_ulysses.tools.migration.swift import SWIFT
from titan_ulysses.tools.migration.torchtitan import TORCHTITAN
from titan_ulysses.tools.migration.trl import TRL

FORMATS = {
    "arctic": ARCTIC,
    "accelerate": ACCELERATE,
    "axolotl": AXOLOTL,
    "llama-factory": LLAMA_FACTORY,
    "ms-swift": SWIFT,
    "torchtitan": TORCHTITAN,
    "trl": TRL,
}
