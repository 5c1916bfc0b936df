"""The tables and sentences of plans in the pages, against what scripts/bench/plans.sh made, and
plans against what others measured.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from test_scaling import bench

ROOT = Path(__file__).resolve().parents[1]
MADE: dict[str, Any] = json.loads((ROOT / "scripts" / "bench" / "plans.json").read_text())
PAGES = ["README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))]
SENTENCES = [one for table in MADE.values() for one in table["sentences"]]
MOST_SECONDS = 20 * 60
"""CPU seconds of scripts/bench/plans.sh."""


@pytest.fixture(scope="module")
def published() -> ModuleType:
    return bench("published")


def read(page: str) -> str:
    return (ROOT / page).read_text()


def lacking(table: dict[str, Any], read: Callable[[str], str] = read) -> list[str]:
    """Return what the pages lack of a table that was made: its rows, sentences that quote it."""
    lacks = []
    if table["header"]:
        below = read(table["page"]).partition(f"\n{table['header']}\n")[2]
        rows = below.partition("\n\n")[0].splitlines()[1:]
        lacks += [row for row in table["rows"] if rows != table["rows"]]
    for sentence in table["sentences"]:
        page, _, text = sentence.partition(": ")
        if " ".join(text.split()) not in " ".join(read(page).split()):
            lacks.append(sentence)
    return lacks


@pytest.mark.parametrize("name", MADE)
def test_the_pages_have_what_was_made(name: str) -> None:
    assert not lacking(MADE[name])


@pytest.mark.parametrize("name", MADE)
def test_another_figure_in_a_page_is_seen(name: str) -> None:
    table = MADE[name]
    quoted = [(table["page"], row) for row in table["rows"]]
    quoted += [tuple(one.split(": ", 1)) for one in table["sentences"]]
    for page, text in quoted:
        at = max(i for i, sign in enumerate(text) if sign.isdigit())
        wrong = text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]
        words = r"\s+".join(map(re.escape, text.split()))

        def changed(other: str, page: str = page, words: str = words, wrong: str = wrong) -> str:
            return re.sub(words, lambda _: wrong, read(other)) if other == page else read(other)

        assert lacking(table, changed), text


def test_all_tables_are_made_in_time_and_no_page_has_another() -> None:
    tables = bench("plans").TABLES
    made = {name: (table["page"], table["header"]) for name, table in MADE.items()}
    assert made == {name: (table.page, table.header) for name, table in tables.items()}
    assert sum(table["cpu_seconds"] for table in MADE.values()) < MOST_SECONDS
    for page in PAGES:
        of_page = [
            text for where, _, text in (x.partition(": ") for x in SENTENCES) if where == page
        ]
        for before, table in re.findall(r"((?:.*\n)*?)((?:\|.*\n)+)", read(page)):
            if re.search(r"\*\*[Pp]lanned", re.split(r"^#", before, flags=re.M)[-1]):
                header, _, *rows = table.splitlines()
                quoted = all(row.endswith(tuple(of_page)) for row in rows)
                assert quoted or (page, header) in made.values(), f"{page}: {header}"


def test_plans_are_close_to_what_others_measured_or_say_what_they_lack(
    published: ModuleType,
) -> None:
    """In the table of the page: the ratios are those of its figures."""
    low, high = published.BOUNDS
    names = [one.name for one in published.PUBLISHED]
    figures = [figure for one in published.PUBLISHED for figure in one.measured]
    rows = [row.strip("|").split("|") for row in MADE["published"]["rows"]]
    assert len(rows) == len(figures) and len({*names}) == len(names)
    for (run, measured, planned, ratio, missing), (what, value) in zip(rows, figures, strict=True):
        assert any(run.strip().startswith(name) for name in names)
        assert measured.strip() == f"{what.text.format(value)} {what.unit}"
        plan = float(planned.replace(",", ""))
        assert float(ratio) == pytest.approx(plan / value, abs=0.01)
        if what is published.FITS:
            assert plan <= value
        else:
            lacks = sum(float(size) for size in re.findall(r"([\d.]+) GB", missing))
            assert low <= (plan + lacks) / value <= high, run
        if what is published.SECONDS:
            assert 0.9 <= float(ratio) <= 1.1, run


# The table that was made is compared above; each plan takes 20 s or more.
@pytest.mark.parametrize("index", [pytest.param(i, marks=pytest.mark.slow) for i in range(14)])
def test_a_measurement_is_planned_as_the_table_says(published: ModuleType, index: int) -> None:
    one = published.PUBLISHED[index]
    rows = [row for row in MADE["published"]["rows"] if row.startswith(f"| {one.name} (")]
    for row, found in zip(rows, published.compare(one, published.plan_of(one)), strict=True):
        what = published.BY_UNIT[found["unit"]]
        assert f"| {what.text.format(found['planned'])} | {found['ratio']:.2f} |" in row
