"""Count lines of code: those that hold more than blanks, comments and docstrings.

python scripts/code_lines.py                    the package by room, then scripts/ and tests/
python scripts/code_lines.py titan_ulysses/plan    a folder by file
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from pathlib import Path

_NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def code_lines(text: str) -> int:
    """Return the lines of code of Python source. Strings that stand alone are docstrings."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                lines -= {*range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    return len(lines)


def count(place: Path) -> int:
    files = [place] if place.is_file() else place.rglob("*.py")
    return sum(code_lines(file.read_text(encoding="utf-8")) for file in files)


def main(arguments: list[str]) -> None:
    root = Path(__file__).resolve().parent.parent
    folders = [*map(Path, arguments)] or [root / x for x in ("titan_ulysses", "scripts", "tests")]
    for folder in folders:
        for place in sorted(folder.iterdir()) if folder != root / "tests" else ():
            if place.suffix == ".py" or place.is_dir() and place.name != "__pycache__":
                print(f"{count(place):>8,}  {place.name}")
        print(f"{count(folder):>8,}  {folder.name}/ in all")


if __name__ == "__main__":
    main(sys.argv[1:])
