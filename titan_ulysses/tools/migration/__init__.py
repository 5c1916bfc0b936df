"""What each key of the recipes of other trainers becomes here. For `titan-ulysses migrate`."""

from titan_ulysses.tools.migration.accelerate import ACCELERATE
from titan_ulysses.tools.migration.arctic import ARCTIC
from titan_ulysses.tools.migration.axolotl import AXOLOTL
from titan_ulysses.tools.migration.torchtitan import TORCHTITAN

FORMATS = {
    "arctic": ARCTIC,
    "accelerate": ACCELERATE,
    "axolotl": AXOLOTL,
    "torchtitan": TORCHTITAN,
}
