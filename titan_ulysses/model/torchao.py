"""Imports of torchao, made only when a setting needs it.

Its messages about parts that nothing here uses are suppressed.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from titan_ulysses.distributed.errors import UserError

_NOISE = {
    # C++ extensions that are for other devices, Python versions or torch versions.
    "torchao": ("Failed to load ", "Skipping import of cpp extensions"),
    # "... is an Enum subclass and is now natively supported", about torchao's enums.
    "torch.utils._pytree": ("<enum '",),
}
"""For each logger, how the messages that are suppressed begin."""


def require_torchao(setting: str) -> None:
    """Raise UserError, naming the setting, if torchao is not installed. Imports nothing."""
    if importlib.util.find_spec("torchao") is None:
        raise UserError(f"{setting} needs torchao, which is not installed: pip install torchao")


def import_torchao(module: str) -> ModuleType:
    """Import and return the module torchao.<module>."""
    with suppress_torchao_warnings():
        return importlib.import_module(f"torchao.{module}")


@contextmanager
def suppress_torchao_warnings() -> Iterator[None]:
    """Suppress exactly these messages while torchao, or a library that imports it, is imported."""

    def is_not_noise(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_NOISE[record.name])

    for name in _NOISE:
        logging.getLogger(name).addFilter(is_not_noise)
    try:
        yield
    finally:
        for name in _NOISE:
            logging.getLogger(name).removeFilter(is_not_noise)
