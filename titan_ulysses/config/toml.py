"""Conversion of values and tables to TOML text, for files and for messages."""

from __future__ import annotations

import json
import re
from datetime import date, time
from typing import Any


def table_to_toml(header: str, table: dict[Any, Any], brackets: str = "[{}]") -> list[str]:
    """Return the lines of a table and of its subtables; keys with the value None are left out."""
    lines = [brackets.format(header)]
    nested = {
        key: value for key, value in table.items() if isinstance(value, dict) or _is_tables(value)
    }
    lines += [
        f"{_toml_key(k)} = {to_toml(v)}"
        for k, v in table.items()
        if k not in nested and v is not None
    ]
    for key, value in nested.items():
        below = f"{header}.{_toml_key(key)}"
        for one in value if isinstance(value, list) else [value]:
            lines += [
                "",
                *table_to_toml(below, one, "[[{}]]" if isinstance(value, list) else "[{}]"),
            ]
    return lines


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _toml_key(key: Any) -> str:
    return (
        key if isinstance(key, str) and re.fullmatch(r"[A-Za-z0-9_-]+", key) else to_toml(str(key))
    )


def to_toml(value: Any) -> str:
    """Return a value as TOML on one line; TypeError for a type that TOML does not have."""
    # JSON's escapes are valid in TOML too, but TOML also requires DEL to be escaped.
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)  # inf, nan and 1e-08 are written as in Python
    if isinstance(value, (date, time)):
        return value.isoformat()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(to_toml(item) for item in value)}]"
    if isinstance(value, dict):
        items = (f"{_toml_key(k)} = {to_toml(v)}" for k, v in value.items() if v is not None)
        return f"{{{', '.join(items)}}}"
    raise TypeError(f"TOML has no {type(value).__name__}: {value!r}")


def show(value: Any) -> str:
    """Return a value of any type as text for a message: as TOML where possible."""
    try:
        return to_toml(value)
    except TypeError:
        return repr(value)
