"""`titan-ulysses models`: which types of transformers train exactly, and why others do not.

    titan-ulysses models            all of them
    titan-ulysses models falcon     one: its result, with and without adapters

`scripts/check_models.py` of a clone tries them and makes the table. What it holds for is the type's
default config, with the versions that it names. A type that is not in CHECKED_FAMILIES is tried
again before each run, as it is configured.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

from titan_ulysses.distributed.errors import UserError

TABLE = Path(__file__).with_name("models.json")
Row = dict[str, str]
"""result: "exact", "exact unstreamed" or "refused"; reason, of a refusal; adapters: "exact", "exact
unstreamed" or why not; takes: "images and text", of a model that is trained on both.
"""


def versions() -> dict[str, str]:
    """Return the versions of the packages that a table holds for."""
    return {name: version(name) for name in ("torch", "transformers", "peft")}


def line(kind: str, row: Row) -> str:
    """Return what is printed of a type."""
    if row["result"] == "refused":
        return f"{kind:<24} refused: {row['reason']}"
    return f"{kind:<24} {row['result']}; with adapters: {row['adapters']}"


def as_markdown(table: dict[str, Any]) -> str:
    """Return the page of the documentation that shows the table."""
    made = ", ".join(f"{name} {number}" for name, number in table["versions"].items())
    lines = [
        "# Types of transformers",
        "",
        "`python scripts/check_models.py` tries each causal type, and each of images and text:",
        "one step of a tiny model on two ranks, packed and sharded, against unmodified",
        "transformers on each document alone, and again with adapters against peft, with",
        f"{made}. A type that is missing was not tried.",
        "`titan-ulysses models NAME` prints a row, with the whole reason of a refusal.",
        "",
        "- exact: loss and all gradients are equal, streamed and not",
        "- exact unstreamed: only without streaming, which is then off",
    ]
    for title, types in (("Text", of_text(table)), ("Images and text", of_images(table))):
        lines += ["", f"## {title}", "", _counted(types), ""]
        lines += ["| type | result | with adapters |", "|---|---|---|"]
        for kind, row in types.items():
            refused = row["result"] == "refused"
            what = f"refused: {_short(row['reason'])}" if refused else row["result"]
            lines.append(f"| `{kind}` | {what} | {_short(row.get('adapters', ''))} |")
    return "\n".join(lines) + "\n"


def of_text(table: dict[str, Any]) -> dict[str, Row]:
    """Return the rows of models of text."""
    return {kind: row for kind, row in table["types"].items() if "takes" not in row}


def of_images(table: dict[str, Any]) -> dict[str, Row]:
    """Return the rows of models of images and text."""
    return {kind: row for kind, row in table["types"].items() if "takes" in row}


def _short(reason: str) -> str:
    """Return the beginning of a reason, for a cell of the table."""
    reason = reason.replace("|", "/").replace("\n", " ")
    return reason if len(reason) <= 60 else reason[:57].rpartition(" ")[0] + " ..."


def _counted(types: dict[str, Row]) -> str:
    counts = Counter(row["result"] for row in types.values())
    parts = ", ".join(f"{count} {result}" for result, count in counts.most_common())
    return f"{len(types)} types: {parts}."


def main(argv: list[str]) -> None:
    """Print the table, or a type's row. UserError for a type that is not in it."""
    parser = argparse.ArgumentParser("titan-ulysses models", description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", help="a model_type of transformers")
    name = parser.parse_args(argv).name
    table = json.loads(TABLE.read_text())
    types = table["types"]
    if name is not None and name not in types:
        near = get_close_matches(name, types, n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f'titan-ulysses models: no type "{name}" is known.{hint}')
    for kind in [name] if name else types:
        print(line(kind, types[kind]))
    made = ", ".join(f"{package} {number}" for package, number in table["versions"].items())
    print(f"{'' if name else _counted(types) + ' '}Tried with {made}.")
