"""Conversion of values and tables to TOML text, for files and for messages, and back."""

from __future__ import annotations

import json
import re
from datetime import date, time
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

_DEEPEST = 50
"""Levels of tables and lists: more than any config of a model has, few enough for recursion."""
_DIGITS = 100
"""Digits of a whole number: Python itself refuses to print more than 4,300."""


def from_toml(text: str) -> dict[str, Any]:
    """Return the tables of a TOML text. `ValueError` with line and column where it is not one."""
    return tomllib.loads(text)


def table_to_toml(header: str, table: dict[Any, Any], brackets: str = "[{}]") -> list[str]:
    """Return the lines of a table and of its subtables; keys with the value None are left out."""
    lines = [brackets.format(header)]
    nested = []
    for key, value in table.items():
        below = f"{header}.{_toml_key(key)}"
        if isinstance(value, dict):
            nested += ["", *table_to_toml(below, value)]
        elif isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
            for one in value:
                nested += ["", *table_to_toml(below, one, "[[{}]]")]
        elif value is not None:
            lines.append(f"{_toml_key(key)} = {to_toml(value)}")
    return lines + nested


def _toml_key(key: Any) -> str:
    is_bare = isinstance(key, str) and re.fullmatch(r"[A-Za-z0-9_-]+", key)
    return key if is_bare else to_toml(str(key))


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
    """Return a value of any type as text for a message: as TOML where possible, and cut if long."""
    try:
        text = to_toml(value)
    except TypeError:
        text = repr(value)
    return text if len(text) <= 500 else f"{text[:500]} ..."


def excess(table: dict[str, Any]) -> str | None:
    """Return what in a table is nested too deep or too long a number for any setting, or None."""
    deep: list[tuple[str, Any, int]] = [(str(key), value, 1) for key, value in table.items()]
    while deep:
        name, value, level = deep.pop()
        if level > _DEEPEST:
            return f"{name}: is nested deeper than {_DEEPEST} levels"
        if isinstance(value, int) and abs(value) >= 10**_DIGITS:
            return f"{name}: holds a number of more than {_DIGITS} digits"
        if isinstance(value, dict):
            for key, item in value.items():
                deep.append((f"{name}.{key}" if level < 2 else name, item, level + 1))
        elif isinstance(value, list):
            deep += [(name, item, level + 1) for item in value]
    return None
