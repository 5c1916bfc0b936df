"""Turn a recipe of another trainer into our TOML: of ArcticTraining, accelerate, axolotl,
LLaMA-Factory, ms-swift, torchtitan or TRL.

    titan-ulysses migrate run-h100-sp8-llama-8b.yml --ranks 8 --output llama.toml
    titan-ulysses migrate llama3_8b.toml      torchtitan's; ours goes to the console
    titan-ulysses migrate sft.sh              the command of ms-swift or TRL in a script
    titan-ulysses migrate fsdp.yaml --model.path FOLDER     accelerate's, which has no model
    titan-ulysses migrate --table axolotl     the keys that are known, as in docs/migration.md

Any setting may be given as an option, as for train.py. A key that the recipe leaves to its own
trainer has that trainer's default, and every setting that decides what is trained is written out,
with the key that it comes from. A key that has no counterpart is named, with its value and the
reason, on the console and in comments at the end of the file. Nothing is left out silently. The
rules are in migration/.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby, takewhile
from pathlib import Path
from string import Template
from textwrap import fill
from typing import Any

from titan_ulysses.config.cli import parse_command_line
from titan_ulysses.config.load import config_of
from titan_ulysses.config.schema import KEYS, SECTIONS, SourceSettings
from titan_ulysses.config.toml import from_toml, show, table_to_toml
from titan_ulysses.distributed.atomic import whole_file
from titan_ulysses.distributed.errors import UsageError, UserError
from titan_ulysses.tools import parser_of
from titan_ulysses.tools.migration import FORMATS
from titan_ulysses.tools.migration.key_rules import Flat, Format, Lost, Rule, decisive


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a YAML, TOML or JSON file, or the command of a script. UserError where it cannot be
    read, or is not a table.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise UsageError(f"{path}: {why}. Give the file of a recipe.") from None
    try:
        if path.suffix == ".toml":
            table = from_toml(text)
        elif path.suffix == ".json":
            table = json.loads(text)
        elif path.suffix == ".sh":
            table = _read_command(text)
        else:
            table = _read_yaml(text)
    except Exception as error:  # of three parsers
        line = " ".join(str(error).split())
        raise UsageError(f"{path}: cannot be parsed: {line}") from None
    if not isinstance(table, dict):
        raise UsageError(f"{path}: has no keys: it is not a recipe.")
    return table


def _read_yaml(text: str) -> Any:
    import yaml  # comes with transformers

    class RecipeLoader(yaml.SafeLoader):
        """Reads 2e-5 as the number that YAML 1.2 has there; PyYAML's 1.1 takes it for text."""

    number = re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$")
    RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:float", number, [*"-+.0123456789"])
    return yaml.load(text, RecipeLoader)


_TRAINING = ("sft", "pt", "rlhf", "dpo")


def _read_command(text: str) -> dict[str, Any]:
    """Return the options of the first training command of ms-swift or TRL in a script, as a table;
    the variables that are set for it are under "env". Other such commands are "other_commands".
    """
    lexer = shlex.shlex(
        re.sub(r"(?m)^\s*#.*$", "", text.replace("\\\n", " ")),
        posix=True,
        punctuation_chars=";&|\n",
    )
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, ""
    variables: dict[str, Any] = {}
    found: list[tuple[list[str], dict[str, Any]]] = []
    for is_end, group in groupby(lexer, lambda word: bool(word) and not word.strip(";&|\n")):
        words, env = [] if is_end else [*group], dict(variables)
        while words and (words[0] == "export" or re.match(r"\w+=", words[0])):
            name, equals, value = words.pop(0).partition("=")
            if equals:
                env[name] = _scalar(Template(value).safe_substitute(env))
        if not words:
            variables = env
        elif words[0] in ("swift", "trl") and len(words) > 1:
            found.append((words, env))
    if not found:
        raise ValueError("no command begins with swift or trl")
    commands = [one for one in found if one[0][1] in _TRAINING] or found
    (launcher, what, *words), env = commands[0]
    options: dict[str, list[Any]] = {}
    last = "arguments"
    for word in takewhile(lambda word: not word.startswith("#"), words):
        if word.startswith("--"):
            last, equals, word = word[2:].partition("=")
            last = last.replace("-", "_")
            options[last] = []
            if not equals:
                continue
        options.setdefault(last, []).append(_scalar(Template(word).safe_substitute(env)))
    table = {"command": f"{launcher} {what}"} | {
        option: values[0] if len(values) == 1 else values or True
        for option, values in options.items()
    }
    table["env"] = {name: value for name, value in env.items() if name.isupper()}
    table["other_commands"] = [" ".join(words[:2]) for words, _ in commands[1:]]
    return {key: value for key, value in table.items() if value not in ({}, [])}


def _scalar(text: str) -> Any:
    """Return a word of a command line as a number, a boolean, a table or list, or else as text."""
    try:
        value = _read_yaml(text)
    except Exception:  # it is a sentence
        return text
    return value if isinstance(value, (bool, int, float)) or text[:1] in ("{", "[") else text


def flatten(table: dict[str, Any], prefix: str = "") -> Flat:
    flat: Flat = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat


def format_of(path: Path, table: dict[str, Any]) -> Format:
    """Return whose recipe this is, by the keys that it has. UserError where that is not clear."""
    flat = flatten(table)
    found = [one for one in FORMATS.values() if one.has(flat)]
    if len(found) != 1:
        raise UsageError(
            f"{path}: which trainer is this recipe for? Say so with --from {'|'.join(FORMATS)}."
        )
    return found[0]


class Migration:
    """A recipe, the settings that follow from it, and what could not be carried.

    beside: what the recipe does not hold, and some rules need: "--ranks", "--dataset_info"
    given: settings that count more than those of the recipe
    """

    def __init__(
        self,
        kind: Format,
        recipe: Flat,
        *,
        beside: Mapping[str, Any] | None = None,
        given: Mapping[str, Any] | None = None,
    ):
        self.kind = kind
        self.settings: Flat = {}
        self.origin: dict[str, list[str]] = {}
        """our keys -> the keys of the recipe that say so; none for what nobody said"""
        self.lost: list[tuple[str, Any, str]] = []
        self.needless: list[tuple[str, Any, str]] = []
        self.off = [key for key, value in recipe.items() if value is None]
        """keys that ask for nothing"""
        recipe = {key: value for key, value in recipe.items() if value is not None}
        self._values = {"--ranks": None} | kind.defaults | kind.beside | recipe | dict(beside or {})
        for key, value in kind.defaults.items():
            if key not in recipe and (rule := kind.rule_of(key)):
                self._apply(rule, key, value, default=True)
        for key, value in recipe.items():
            if rule := kind.rule_of(key):
                lost = len(self.lost)
                if not self._apply(rule, key, value) and len(self.lost) == lost:
                    self.needless.append((key, value, rule.why or "it is so here"))
            elif value in (False, "", [], {}):
                self.off.append(key)
            else:
                self.lost.append((key, value, "not known here"))
        mentioned = {key for keys in self.origin.values() for key in keys}
        mentioned |= {key for key, _, _ in [*self.needless, *self.lost]}
        assert recipe.keys() <= mentioned | {*self.off}, "a key of the recipe is not mentioned"
        self._share_among_sources()
        self.settings |= dict(given or {})
        self.origin |= {key: ["given"] for key in given or {}}
        self.ours = [key for key in decisive(self.settings) if key not in self.settings]
        """our keys that decide what is trained, and neither the recipe nor its trainer sets"""
        for key in self.ours:
            self.settings[key] = KEYS[key].get_default(call_default_factory=True)
            self.origin[key] = ["our default: the recipe does not say it"]

    def _share_among_sources(self) -> None:
        """Move the keys of [data] that each source of a mixture has for itself into them."""
        if sources := self.settings.get("data.mixture"):
            for key in SourceSettings.model_fields:
                if (ours := f"data.{key}") in self.settings:
                    value = self.settings.pop(ours)
                    for source in sources:
                        source.setdefault(key, value)

    def _apply(self, rule: Rule, key: str, value: Any, *, default: bool = False) -> Flat:
        """Add what a key becomes to the settings, and return it. Name it if something is lost."""
        of = f"the default of {self.kind.name}"
        try:
            found = rule.become(value, self._values)
        except Lost as why:
            self.lost.append((key, value, f"{why} ({of})" if default else str(why)))
            found = why.kept
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError):
            self.lost.append((key, value, "this key does not have such a value"))
            found = {}
        for ours in found:
            if default:
                self.origin[ours] = [f"{of}: {key} = {show(value)}"]
                continue
            others = self.origin.get(ours, [])
            others = [] if others and others[0].startswith(of) else others
            if others and self.settings[ours] != found[ours]:
                self.lost += [(o, self._values[o], f"{key} says otherwise") for o in others]
                others = []
            self.origin[ours] = [*others, key]
        self.settings |= found
        return found


def with_included(path: Path, flat: Flat, kind: Format) -> tuple[Flat, Flat]:
    """Return flat with the keys of the files that it names, such as a DeepSpeed config, and what
    lies beside it. Names are looked for in the folder of the recipe and in those that hold it.
    """
    result: Flat = {}
    beside: Flat = {}
    for key, value in ({key: kind.defaults.get(key) for key in kind.files} | flat).items():
        prefix = kind.files.get(key)
        found = [folder / value for folder in path.resolve().parents] if prefix and value else []
        if file := next((one for one in found if one.is_file()), None):
            result |= flatten(read_recipe(file), f"{prefix}.")
        elif key in flat:
            result[key] = value
        for folder in found:
            if (file := folder / f"{prefix}.json").is_file():
                beside = {f"--{prefix}": read_recipe(file)}
                break
    return result, beside


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
    for section in SECTIONS:
        if section in tables:
            order = [k for k in SECTIONS[section].model_fields if k in tables[section]]
            toml = table_to_toml(section, {k: tables[section][k] for k in order})
            lines += ["", *(_with_origin(line, section, migration) for line in toml)]
    if migration.lost:
        lines += ["", "# Not carried over:"]
        lines += [f"#   {key} = {show(value)}: {why}" for key, value, why in migration.lost]
    if migration.kind.differs:
        lines += ["", "# Not the same:", *(f"#   {why}" for why in migration.kind.differs)]
    return "\n".join(lines) + "\n"


def _with_origin(line: str, section: str, migration: Migration) -> str:
    """Return a line of TOML with a comment that says where its value comes from."""
    key = line.strip("[]") if line.startswith("[") else f"{section}.{line.partition(' = ')[0]}"
    origin = migration.origin.get(key)
    return f"{line}  # {', '.join(origin)}" if origin else line


def markdown(kind: Format) -> str:
    """Return the table of a format for docs/migration.md."""
    defaults = (f"| `{key}` | if unset: `{show(value)}` |" for key, value in kind.defaults.items())
    rows = (rule.table_row() for rule in kind.rules)
    differs = (f"| not the same | {why} |" for why in kind.differs)
    table = [f"| {kind.name} | here |", "|---|---|", *rows, *defaults, *differs, ""]
    return "\n".join([fill(f"From {kind.source}:", 100), "", *table])


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
    parser.add_argument(
        "recipe", type=Path, nargs="?", metavar="RECIPE", help="YAML, TOML, JSON or .sh"
    )
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
        raise UsageError(f"--ranks {options.ranks}: at least 1.")
    return options


def said_of(migration: Migration) -> list[str]:
    """Return the lines for the console: what the file that is written does not show by itself."""
    reasons: dict[str, list[str]] = {}
    for key, value, why in migration.needless:
        reasons.setdefault(why, []).append(f"{key} = {show(value)}")
    said = [f"needs nothing here: {', '.join(keys)}: {why}" for why, keys in reasons.items()]
    said += [f"off, or empty: {', '.join(migration.off)}"] if migration.off else []
    said += [f"LOST: {k} = {show(v)}: {why}" for k, v, why in migration.lost]
    said += [f"OUR DEFAULT: {k} = {show(migration.settings[k])}" for k in migration.ours]
    said += [f"DIFFERS: {why}" for why in migration.kind.differs]
    return said


def main(argv: list[str]) -> None:
    options = parse(argv)
    if options.table:
        print(markdown(FORMATS[options.table]), end="")
        return
    path: Path = options.recipe
    table = read_recipe(path)
    kind = FORMATS[options.kind] if options.kind else format_of(path, table)
    flat, beside = with_included(path, flatten(table), kind)
    migration = Migration(
        kind, flat, beside=beside | {"--ranks": options.ranks}, given=dict(options.overrides)
    )
    if not {"model.path", "model.config"} & migration.settings.keys():
        raise UsageError(f"{path}: it names no model: add --model.path FOLDER.")
    print("\n".join(said_of(migration)), file=sys.stderr)
    text = as_text(path.name, migration)
    if options.output:
        if options.output.exists():
            raise UserError(f"{options.output} exists already: give another --output.")
        with whole_file(options.output) as partial:
            partial.write_text(text)
        print(f"{options.output}: {len(migration.settings)} of {len(KEYS)} settings are set.")
    else:
        print(text, end="")
