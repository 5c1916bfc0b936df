"""Reading a TOML file and overrides into a `Config`, and writing a `Config` as TOML.

Errors are explained in terms of what the user wrote.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from titan_ulysses.config.fields import expand_path
from titan_ulysses.config.rules import problems_of
from titan_ulysses.config.schema import KEYS, SECTIONS, Config, in_words, named_values_of
from titan_ulysses.config.toml import excess, from_toml, show, table_to_toml
from titan_ulysses.distributed.errors import UsageError


def load_config(path: str | os.PathLike[str], overrides: Iterable[tuple[str, Any]] = ()) -> Config:
    """Read a TOML file, apply ("section.key", value) overrides, and validate the result.

    A file with `extends` is merged over the file that it names. Raises UserError (exit code 2) with
    one line for each problem: unreadable file, invalid syntax, unknown key, wrong type, value out
    of bounds.
    """
    return config_of(_read_toml(Path(path), chain=()), overrides)


def config_of(settings: dict[str, Any], overrides: Iterable[tuple[str, Any]] = ()) -> Config:
    """Return tables of settings, as in a TOML file, with overrides applied, as a valid `Config`.

    Raises UserError as `load_config` does. `settings` is changed by the overrides.
    """
    for setting, value in overrides:
        _override(settings, setting, value)
    if problem := excess(settings):
        raise UsageError(problem)
    try:
        config = Config.model_validate(settings)
    except ValidationError as error:
        raise UsageError("\n".join(explained(error))) from None
    if problems := problems_of(config):
        raise UsageError("\n".join(problems))
    return config


def dump_toml(config: Config) -> str:
    """Return the resolved settings as TOML; keys with the value None are left out.

    `load_config` reads the text back to an equal Config.
    """
    tables = []
    for section, table in config.model_dump().items():
        values = {key: in_words(f"{section}.{key}", value) for key, value in table.items()}
        tables.append("\n".join(table_to_toml(section, values)))
    return "\n\n".join(tables) + "\n"


def _read_toml(path: Path, *, chain: tuple[Path, ...]) -> dict[str, Any]:
    """Read a file and merge its tables over those of the file that it `extends`.

    `chain` holds the files whose `extends` led to this one; it is used to detect circles.
    """
    named_by = f'"extends" of {chain[-1]}' if chain else "--config"
    try:
        path = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, NUL
        raise UsageError(
            f"{str(path)!r}: is not a path ({error}); correct the path in {named_by}"
        ) from None
    if path in chain:
        circle = " -> ".join(str(p) for p in (*chain[chain.index(path) :], path))
        raise UsageError(f"extends forms a cycle: {circle}; remove one of these lines")
    try:
        settings = from_toml(path.read_bytes().decode())
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; correct the path in {named_by}") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; {named_by} needs a readable file") from None
    except ValueError as error:  # broken TOML (the message has line and column), or not UTF-8
        raise UsageError(f"{path}: not valid TOML: {error}") from None
    except RecursionError:
        raise UsageError(f"{path}: its tables or lists are nested too deep") from None
    if problem := excess(settings):
        raise UsageError(f"{path}: {problem}")
    base = settings.pop("extends", None)
    if base is None:
        return settings
    if not isinstance(base, str):
        raise UsageError(
            f'{path}: extends = {show(base)}: needs one file, as in extends = "base.toml"'
        )
    return _merge(_read_toml(path.parent / expand_path(base), chain=(*chain, path)), settings)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merge tables key by key; any other value in `above` replaces the value in `below`."""
    merged = below | above
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            merged[key] = _merge(below[key], above[key])
    return merged


def _override(settings: dict[str, Any], setting: str, value: Any) -> None:
    *tables, key = setting.split(".")
    for depth, name in enumerate(tables, start=1):
        settings = settings.setdefault(name, {})
        if not isinstance(settings, dict):
            table = ".".join(tables[:depth])
            raise UsageError(
                f"{setting}: {table} = {show(settings)} has no keys; set {table} itself"
            )
    settings[key] = value


_BOUNDS = {
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "finite_number": "needs a finite number",
    "string_too_short": "must not be empty",
    "too_long": "needs no more than {max_length} values",
    "missing": "a value is missing from the list",
    "value_error": "{error}",
    "literal_error": "needs {expected}",
}
# Keyed by the first word of pydantic's error types: int_parsing, int_type, int_from_float, ...
_TYPES = {
    "int": "needs an integer",
    "float": "needs a number",
    "bool": "needs true or false",
    "string": "needs text",
    "list": "needs a list",
    "tuple": "needs a list",
    "dict": "needs a table",
    "model": "needs a table: write [{section}] and its keys below it",
}


def explained(error: ValidationError) -> list[str]:
    """Return pydantic's errors as lines for the user: setting, value, what it needs."""
    return [_explain(one) for one in error.errors(include_url=False)]


def _explain(error: Any) -> str:
    location, kind, context = error["loc"], error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return _explain_unknown(location, error["input"])
    setting = _setting(location)
    reason = _BOUNDS.get(kind) or _TYPES.get(kind.split("_")[0])
    reason = reason or error["msg"].replace("{", "{{").replace("}", "}}")
    if kind.startswith("int") and setting in KEYS and (words := named_values_of(setting)):
        reason += f", or {' or '.join(map(show, words))}"
    if kind == "literal_error":
        context = {"expected": context["expected"].replace("'", '"')}
    return f"{setting} = {show(error['input'])}: {reason.format(section=setting, **context)}"


def _setting(location: Sequence[str | int]) -> str:
    """Return a location as a user would write it: training.steps, optimizer.betas[1]."""
    return re.sub(r"\.(\d+)\b", r"[\1]", ".".join(str(part) for part in location))


def _explain_unknown(location: Sequence[str], value: Any) -> str:
    *sections, key = location
    if not sections and isinstance(value, dict):
        near = get_close_matches(key, SECTIONS, n=1)
        remedy = f"did you mean [{near[0]}]?" if near else f"the sections are {', '.join(SECTIONS)}"
        return f"[{key}]: no such section; {remedy}"
    section = sections[0] if sections else ""
    remedy = "keys belong in a section"
    if keys := nearest_keys(section, key):
        remedy = f"did you mean {keys}?"
    elif section:
        remedy = f"[{section}] has {', '.join(SECTIONS[section].model_fields)}"
    return f"{_setting(location)}: no such key; {remedy}"


def nearest_keys(section: str, key: str) -> str:
    """Return the "section.key" most similar to a misspelt or misplaced key, or "" if none is.

    If several are equally similar, the result is "a or b".
    """
    scores = {}
    for setting in KEYS:
        candidate_section, candidate = setting.split(".")
        # A typo is more likely than a key in the wrong section.
        here = 0.2 if candidate_section == section else 0.0
        scores[setting] = SequenceMatcher(None, key.replace("-", "_"), candidate).ratio() + here
    best = max(scores.values())
    return " or ".join(s for s, score in scores.items() if score == best) if best >= 0.7 else ""
