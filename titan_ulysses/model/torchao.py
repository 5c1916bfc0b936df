"""torchao: imported when a setting needs it, and without what its import says about parts that
nothing here uses.
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
    # Extensions in C++, for other devices, Pythons or torch versions.
    "torchao": ("Failed to load ", "Skipping import of cpp extensions"),
    # "... is an Enum subclass and is now natively supported", about torchao's enums.
    "torch.utils._pytree": ("<enum '",),
}


def require_torchao(setting: str) -> None:
    """UserError that names setting where torchao is not installed. Imports nothing."""
    if importlib.util.find_spec("torchao") is None:
        raise UserError(f"{setting} needs torchao, which is not installed: pip install torchao")


def import_torchao(module: str) -> ModuleType:
    """The module torchao.<module>."""
    with suppress_torchao_warnings():
        return importlib.import_module(f"torchao.{module}")


@contextmanager
def suppress_torchao_warnings() -> Iterator[None]:
    """Import torchao, or what imports it, without exactly those messages."""

    def is_news(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_NOISE[record.name])

    for name in _NOISE:
        logging.getLogger(name).addFilter(is_news)
    try:
        yield
    finally:
        for name in _NOISE:
            logging.getLogger(name).removeFilter(is_news)
