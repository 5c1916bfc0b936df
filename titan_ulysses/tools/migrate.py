"""Turn a recipe of ArcticTraining, accelerate, axolotl or torchtitan into our TOML.

    titan-ulysses migrate run-h100-sp8-llama-8b.yml --ranks 8 --output llama.toml
    titan-ulysses migrate llama3_8b.toml      torchtitan's; ours goes to the console
    titan-ulysses migrate fsdp.yaml --model.path FOLDER     accelerate's, which has no model
    titan-ulysses migrate --table axolotl     the keys that are known, as in docs/migration.md

Any setting may be given as an option, as for train.py. A key that the recipe leaves to its own
trainer is read as if it had that trainer's default, where ours would train something else. A key
that has no counterpart is named, with its value and the reason, on the console and in comments at
the end of the file. Nothing is left out silently but what is empty or off. The rules are in
migration/.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from titan_ulysses.config.cli import parse_command_line
from titan_ulysses.config.load import config_of
from titan_ulysses.config.schema import KEYS, SECTIONS
from titan_ulysses.config.toml import show, table_to_toml
from titan_ulysses.distributed.atomic import whole_file
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.tools import parser_of
from titan_ulysses.tools.migration import FORMATS
from titan_ulysses.tools.migration.key_rules import Flat, Format, Lost, Rule

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a YAML, TOML or JSON file. UserError where it cannot be read, or is not a table."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise UserError(f"{path}: {why}. Give the file of a recipe.", exit_code=2) from None
    try:
        if path.suffix == ".toml":
            table = tomllib.loads(text)
        elif path.suffix == ".json":
            table = json.loads(text)
        else:
            table = _read_yaml(text)
    except Exception as error:  # of three parsers
        line = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be parsed: {line}", exit_code=2) from None
    if not isinstance(table, dict):
        raise UserError(f"{path}: has no keys: it is not a recipe.", exit_code=2)
    return table


def _read_yaml(text: str) -> Any:
    import yaml  # comes with transformers

    class RecipeLoader(yaml.SafeLoader):
        """Reads 2e-5 as the number that YAML 1.2 has there; PyYAML's 1.1 takes it for text."""

    number = re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$")
    RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:float", number, [*"-+.0123456789"])
    return yaml.load(text, RecipeLoader)


def flatten(table: dict[str, Any], prefix: str = "") -> Flat:
    flat: Flat = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat


def format_of(path: Path, table: dict[str, Any]) -> Format:
    """Return whose recipe this is, by the keys that it has. UserError where that is not clear."""
    found = [one for one in FORMATS.values() if one.recognize(table)]
    if len(found) != 1:
        raise UserError(
            f"{path}: which trainer is this recipe for? Say so with --from {'|'.join(FORMATS)}.",
            exit_code=2,
        )
    return found[0]


class Migration:
    """A recipe, the settings that follow from it, and what could not be carried."""

    def __init__(self, kind: Format, recipe: Flat, *, ranks: int | None):
        self.kind = kind
        self.settings: Flat = {}
        self.from_defaults: set[str] = set()
        """our keys that follow from their trainer's defaults alone"""
        self.lost: list[tuple[str, Any, str]] = []
        self.needless: list[tuple[str, Any, str]] = []
        recipe = {key: value for key, value in recipe.items() if value is not None}
        self._values = kind.defaults | recipe | {"--ranks": ranks}
        for key, value in kind.defaults.items():
            if key not in recipe and (rule := kind.rule_of(key)):
                found = self._apply(rule, key, value, f" (the default of {kind.name})")
                self.from_defaults |= found.keys()
        for key, value in recipe.items():
            if rule := kind.rule_of(key):
                found = self._apply(rule, key, value)
                self.from_defaults -= found.keys()
                if not found and rule.why:
                    self.needless.append((key, value, rule.why))
            elif value not in (False, "", [], {}):  # what is off or empty asks for nothing
                self.lost.append((key, value, "not known here"))

    def _apply(self, rule: Rule, key: str, value: Any, of: str = "") -> Flat:
        """Add what a key becomes to the settings, and return it. Name it if something is lost."""
        try:
            found = rule.become(value, self._values)
        except Lost as why:
            self.lost.append((key, value, f"{why}{of}"))
            found = why.kept
        except (TypeError, ValueError, KeyError, AttributeError):
            self.lost.append((key, value, "this key does not have such a value"))
            found = {}
        self.settings |= found
        return found


def with_included(path: Path, flat: Flat, kind: Format) -> Flat:
    """Return flat with the keys of the files that it names, such as a DeepSpeed config."""
    result: Flat = {}
    for key, value in flat.items():
        prefix = kind.includes.get(key)
        if prefix and isinstance(value, str) and (file := path.parent / value).is_file():
            result |= flatten(read_recipe(file), f"{prefix}.")
        else:
            result[key] = value
    return result


def as_text(source: str, migration: Migration) -> str:
    """Return the TOML text. UserError where a value cannot be one of ours."""
    tables: dict[str, dict[str, Any]] = {}
    for key, value in migration.settings.items():
        section, name = key.split(".")
        tables.setdefault(section, {})[name] = value
    config = config_of(json.loads(json.dumps(tables)))
    for section, table in tables.items():
        for name, value in table.items():
            ours = getattr(getattr(config, section), name)
            if isinstance(value, str) and isinstance(ours, (int, float)):
                table[name] = ours  # a number in quotes, which their trainers take too
    lines = [f"# From {source}, a recipe of {migration.kind.name}, by titan-ulysses migrate."]
    if migration.from_defaults:
        lines.append(f"# From defaults of {migration.kind.name}, which the recipe does not set:")
        lines += [f"#   {key}" for key in sorted(migration.from_defaults)]
    for section in SECTIONS:
        if section in tables:
            order = [k for k in SECTIONS[section].model_fields if k in tables[section]]
            lines += ["", *table_to_toml(section, {k: tables[section][k] for k in order})]
    if migration.lost:
        lines += ["", "# Not carried over:"]
        lines += [f"#   {key} = {show(value)}: {why}" for key, value, why in migration.lost]
    return "\n".join(lines) + "\n"


def markdown(kind: Format) -> str:
    """Return the table of a format for docs/migration.md."""
    defaults = (f"| `{key}` | if unset: `{show(value)}` |" for key, value in kind.defaults.items())
    rows = (rule.table_row() for rule in kind.rules)
    return "\n".join([f"| {kind.name} | here |", "|---|---|", *rows, *defaults, ""])


def split_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments of this script, and the settings with their values."""
    own, settings, rest = [], [], [*argv]
    while rest:
        argument = rest.pop(0)
        option, equals, _ = argument.partition("=")
        if not option.startswith("--") or "." not in option:
            own.append(argument)
            continue
        settings.append(argument)
        if not equals and rest and not rest[0].startswith("--"):
            settings.append(rest.pop(0))
    return own, settings


def parse(argv: list[str]) -> argparse.Namespace:
    parser = parser_of("migrate", __doc__)
    parser.add_argument("recipe", type=Path, nargs="?", metavar="RECIPE", help="YAML or TOML")
    parser.add_argument("--from", dest="kind", choices=FORMATS, help="default: seen from its keys")
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="GPUs of the run, for keys that depend on them"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: the console")
    parser.add_argument("--table", choices=FORMATS, help="print the keys that are known")
    own, settings = split_arguments(argv)
    options, unknown = parser.parse_known_args(own)
    options.overrides = parse_command_line(["--config", "none", *unknown, *settings]).overrides
    if not options.table and not options.recipe:
        parser.error("give a RECIPE, or --table")
    if options.ranks is not None and options.ranks < 1:
        raise UserError(f"--ranks {options.ranks}: at least 1.", exit_code=2)
    return options


def main(argv: list[str]) -> None:
    options = parse(argv)
    if options.table:
        print(markdown(FORMATS[options.table]), end="")
        return
    path: Path = options.recipe
    table = read_recipe(path)
    kind = FORMATS[options.kind] if options.kind else format_of(path, table)
    flat = with_included(path, flatten(table), kind)
    migration = Migration(kind, flat, ranks=options.ranks)
    given = dict(options.overrides)
    migration.settings |= given
    migration.from_defaults -= given.keys()
    if not {"model.path", "model.config"} & migration.settings.keys():
        raise UserError(f"{path}: it names no model: add --model.path FOLDER.", exit_code=2)
    text = as_text(path.name, migration)
    if options.output:
        if options.output.exists():
            raise UserError(f"{options.output} exists already: give another --output.")
        with whole_file(options.output) as partial:
            partial.write_text(text)
        print(f"{options.output}: {len(migration.settings)} of {len(KEYS)} settings are set.")
    else:
        print(text, end="")
    for title, found in (("needs nothing here", migration.needless), ("LOST", migration.lost)):
        for key, value, why in found:
            print(f"{title}: {key} = {show(value)}: {why}", file=sys.stderr)
