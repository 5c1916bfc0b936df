"""report.html of a run's folder: one self-contained page, which needs no network and no script.

A plan and a finished run each have a section of it, and each keeps the section of the other.
Pictures are SVG inside the page.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO
from urllib.parse import quote

from titan_ulysses.distributed.atomic import whole_file
from titan_ulysses.observability.pictures import has_matplotlib

PAGE = "report.html"
SECTIONS = {"run": "The run", "plan": "The plan", "runs": "The runs"}
"""The sections of a page, in their order, with their titles."""

_LONG = 200
"""Characters of a cell from which on its column stays wide on a narrow screen."""

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --faint: #555; --line: #ddd;
  --shade: #f6f6f6; --link: #0058a3 }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--ink); background: var(--paper); overflow-wrap: anywhere }
a { color: var(--link) }
h1 { font-size: 1.6rem }
h2 { font-size: 1.3rem; border-bottom: 1px solid var(--line); margin-top: 2.5rem }
h3 { font-size: 1.05rem; margin-bottom: .3rem }
table { border-collapse: collapse; margin: .5rem 0 1.2rem; display: block; overflow-x: auto }
th, td { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top }
th { border-bottom: 1px solid var(--faint) } td { border-bottom: 1px solid var(--line) }
td { overflow-wrap: normal; white-space: pre-wrap; min-width: 6rem }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap;
  min-width: 0 }
td.long { min-width: 36rem }
figure { margin: .5rem 0 1.5rem; overflow-x: auto } figcaption { color: var(--faint) }
figure svg { width: 100%; min-width: 34rem; height: auto }
pre { background: var(--shade); padding: .8rem; overflow-x: auto } code { font-size: .9em }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #16181b; --faint: #a5a5a5; --line: #3a3d42; --shade: #22252a;
    --link: #7cb8f2 }
  /* Pictures are black on white: inverted, with their hues turned back. */
  figure svg { filter: invert(.91) hue-rotate(180deg) }
}
"""


class PageSection:
    """The body of a section, as it is built from top to bottom. Text is escaped."""

    def __init__(self, name: str):
        assert name in SECTIONS
        self.name = name
        self._parts: list[str] = []
        self._figures = 0

    def heading(self, text: str) -> None:
        self._parts.append(f"<h3>{html.escape(text)}</h3>")

    def text(self, *lines: str) -> None:
        """Add a paragraph for each line."""
        self._parts += [f"<p>{html.escape(line)}</p>" for line in lines]

    def table(
        self,
        head: Sequence[str],
        rows: Iterable[Sequence[str]],
        *,
        links: Mapping[str, str] | None = None,
    ) -> None:
        """Add a table. Columns of numbers are on the right. A head of empty texts is left out.

        links: the pages that cells with these texts lead to.
        """
        links = links or {}
        rows = [[str(cell) for cell in row] for row in rows]

        def kind(column: int, cells: Sequence[str]) -> str:
            if column > 0 and all(re.match(r"[-+<]?[ \d]|-$|$", cell) for cell in cells):
                return ' class="number"'
            return ' class="long"' if max(map(len, cells), default=0) > _LONG else ""

        columns = [[row[column] for row in rows] for column in range(len(head))]
        kinds = [kind(number, cells) for number, cells in enumerate(columns)]

        def line(tag: str, cells: Sequence[str]) -> str:
            made = (
                f"<{tag}{mark}>{_linked(cell, links.get(cell))}</{tag}>"
                for mark, cell in zip(kinds, cells, strict=True)
            )
            return f"<tr>{''.join(made)}</tr>"

        lines = [line("th", head)] * any(head) + [line("td", row) for row in rows]
        self._parts.append("\n".join(["<table>", *lines, "</table>"]))

    def figure(self, caption: str, draw: Callable[[IO[str]], None]) -> None:
        """Add a picture, which `draw` writes to a file as SVG (see `pictures.picture`)."""
        if not has_matplotlib():
            return
        file = io.StringIO()
        draw(file)
        self._figures += 1
        svg = _inline(file.getvalue(), prefix=f"{self.name}{self._figures}-", label=caption)
        self._parts.append(
            f"<figure>\n{svg}\n<figcaption>{html.escape(caption)}</figcaption>\n</figure>"
        )

    def folded(self, title: str, text: str) -> None:
        """Add text as it is, which its reader has to open."""
        self._parts.append(
            f"<details><summary>{html.escape(title)}</summary>\n<pre>{html.escape(text)}</pre>"
            "</details>"
        )

    def html(self) -> str:
        parts = list(self._parts)
        if not has_matplotlib():
            parts.append("<p>There are no pictures: matplotlib is not installed.</p>")
        inside = "\n".join(parts)
        return (
            f'<section id="{self.name}">\n<h2>{SECTIONS[self.name]}</h2>\n{inside}\n</section>'
            f"<!-- end of {self.name} -->"
        )


def write_page(folder: Path, section: PageSection, *, title: str) -> Path:
    """Write report.html of a folder with this section, and with the other one if it is there."""
    path = folder / PAGE
    try:
        before = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        before = ""
    bodies = []
    for name in SECTIONS:
        found = re.search(rf'<section id="{name}">.*?<!-- end of {name} -->', before, re.DOTALL)
        kept = found[0] if found else ""
        bodies.append(section.html() if name == section.name else kept)
    name = html.escape(title)
    text = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Without it a browser asks the server, or the folder, for one.
        f'<link rel="icon" href="data:,">\n<title>{name}</title>\n<style>{_STYLE}</style>\n'
        f"</head>\n<body>\n<h1>{name}</h1>\n" + "\n".join(filter(None, bodies)) + "\n"
        "<footer><p>Written by titan_ulysses. What is planned was computed, not measured.</p>"
        "</footer>\n</body>\n</html>\n"
    )
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def _linked(text: str, link: str | None) -> str:
    shown = html.escape(text)
    return shown if link is None else f'<a href="{html.escape(quote(link))}">{shown}</a>'


def _inline(svg: str, *, prefix: str, label: str) -> str:
    """Return an SVG file as an element of a page, whose ids no other element has."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1).strip()
