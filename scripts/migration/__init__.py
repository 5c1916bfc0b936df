"""What each key of the recipes of other trainers becomes here. For scripts/migrate.py."""

from migration.accelerate import ACCELERATE
from migration.arctic import ARCTIC
from migration.axolotl import AXOLOTL
from migration.torchtitan import TORCHTITAN

FORMATS = {
    "arctic": ARCTIC,
    "accelerate": ACCELERATE,
    "axolotl": AXOLOTL,
    "torchtitan": TORCHTITAN,
}
