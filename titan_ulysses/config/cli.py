"""The command line of `train.py`.

It has `--config`, an option for every setting, and `--help`, which is generated from the schema.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

from titan_ulysses.config.load import nearest_keys
from titan_ulysses.config.schema import KEYS, SECTIONS, in_words, is_switch, named_values_of
from titan_ulysses.config.toml import from_toml, show
from titan_ulysses.distributed.errors import UsageError


class CommandLine(NamedTuple):
    config_path: Path
    # ("section.key", value) pairs in the order given; the last one for a key counts.
    overrides: list[tuple[str, Any]]
    print_config: bool
    plan: bool = False
    evaluate: bool = False


def parse_command_line(argv: Sequence[str]) -> CommandLine:
    """Parse `--config X.toml`, flags and `--section.key value` overrides.

    The flags are `--print-config`, `--plan` and `--evaluate`. `--help` prints `usage()` and exits
    with code 0. `argv` does not include the program's name. Raises UserError (exit code 2) for an
    unknown argument and for a missing value.
    """
    config_path = ""
    overrides = []
    flags = dict.fromkeys(("print-config", "plan", "evaluate"), False)
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if argument in ("-h", "--help"):
            print(usage())
            raise SystemExit(0)
        option, equals, text = argument.partition("=")
        value = text if equals else None
        if argument[2:] in flags and argument.startswith("--"):
            flags[argument[2:]] = True
        elif option == "--config" or (option.startswith("--") and "." in option):
            if value is None and rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            if option == "--config":
                config_path = value or ""
            else:
                setting = option[2:]
                overrides.append((setting, _override_value(setting, value)))
        else:
            raise UsageError(_explain_option(argument))
    if not config_path:
        raise UsageError(
            "--config is missing: say which TOML file to run, as in --config configs/X.toml"
        )
    return CommandLine(Path(config_path), overrides, *flags.values())


def _explain_option(argument: str) -> str:
    if argument.endswith(".toml"):
        return f"{argument}: unexpected; did you mean --config {argument}?"
    if not argument.startswith("-"):
        return (
            f"{argument}: unexpected; settings are written --section.key value, lists 0.9,0.95 "
            "without spaces"
        )
    name = argument.lstrip("-").partition("=")[0]
    known = ["config", "print-config", "plan", "evaluate", "help", *KEYS]
    near = get_close_matches(name, known, n=1) or nearest_keys("", name).split()[:1]
    remedy = f"did you mean --{near[0]}?" if near else "see --help"
    return f"{argument}: no such option; {remedy}"


def _override_value(setting: str, text: str | None) -> Any:
    """Return the value of an override; `text` is None where the option has no value.

    Without a value, a switch or an unknown setting becomes True; any other raises UserError. Text
    settings take the text unchanged. For all others see `_parse_value`; a single value for a
    list setting becomes a list of one.
    """
    kind = KEYS[setting].annotation if setting in KEYS else Any
    if text is None:
        if setting not in KEYS or is_switch(setting):
            return True
        raise UsageError(
            f"--{setting}: needs a value, as in --{setting} {show(KEYS[setting].default)}"
        )
    if kind is str or get_origin(kind) is Literal:
        return text
    try:
        value = _parse_value(text)
    except RecursionError:
        raise UsageError(f"--{setting}: its value is nested too deep") from None
    return [value] if get_origin(kind) in (list, tuple) and not isinstance(value, list) else value


def _parse_value(text: str) -> Any:
    """Parse a TOML or JSON value or an unquoted list (`[a,b]`, `a,b`); else return the text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        parsed = from_toml(f"value = {text}")
        if parsed.keys() == {"value"}:
            return parsed["value"]
    except ValueError:
        pass
    if text.startswith(("[", "{")):
        try:
            return json.loads(text)
        except ValueError:
            pass
    if text.startswith("[") and text.endswith("]"):
        return [_parse_value(item.strip()) for item in text[1:-1].split(",")]
    if "," in text and not text.startswith(("[", "{")):
        return [_parse_value(item.strip()) for item in text.split(",")]
    return text


def usage() -> str:
    """Return the text of `--help`, generated from the schema.

    It lists every key with its type, default and description.
    """
    lines = [
        "usage: torchrun --nproc-per-node N train.py --config X.toml [--section.key value ...]",
        "       python train.py --config X.toml --print-config    show the resolved settings and "
        "stop",
        "       python train.py --config X.toml --plan            does it fit these GPUs, and what "
        "binds? Needs none",
        "       torchrun ... train.py --config X.toml --evaluate  validate the run's model alone, "
        "into evaluation.json",
        "       python train.py --help",
        "",
        "Every setting is a key of the TOML file and an option. Lists: 0.9,0.95 or [0.9,0.95]. "
        "Tables, key by key:",
        '--model.config.hidden_size 256. A file may begin with extends = "base.toml" to change '
        "another one.",
    ]
    for section, schema in SECTIONS.items():
        lines += ["", f"[{section}]"]
        for key, field in schema.model_fields.items():
            name, default = f"{section}.{key}", "unset"
            if field.default is not None:
                default = show(in_words(name, field.default))
            kind = "|".join([_type_name(field.annotation), *named_values_of(name)])
            lines.append(f"  --{name}  {kind}  (default: {default})")
            lines.append(f"      {field.description}")
    return "\n".join(lines)


def _type_name(kind: Any) -> str:
    if get_origin(kind) is list and get_args(kind) != (str,):
        return "list of tables"
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if kind is Any:
        return "integer|number|text"
    names = {str: "text", int: "integer", float: "number", bool: "true|false", list: "list of text"}
    return (names | {tuple: "list of numbers"}).get(get_origin(kind) or kind, "table")
