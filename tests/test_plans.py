"""The tables and sentences of plans in the pages, against what scripts/bench/plans.sh made, and
plans against what others measured.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
MADE: dict[str, Any] = json.loads((ROOT / "scripts" / "bench" / "plans.json").read_text())


@pytest.fixture(scope="module")
def published() -> ModuleType:
    sys.path.insert(0, str(ROOT / "scripts" / "bench"))
    try:
        import published
    finally:
        sys.path.pop(0)
    return published


@pytest.mark.parametrize("name", MADE)
def test_a_page_has_the_table_that_was_made(name: str) -> None:
    table = MADE[name]
    lines = (ROOT / table["page"]).read_text().splitlines()
    start = lines.index(table["header"]) + 2
    end = start + len(table["rows"])
    assert lines[start:end] == table["rows"] and not "".join(lines[end : end + 1])


@pytest.mark.parametrize("sentence", [one for table in MADE.values() for one in table["sentences"]])
def test_a_page_has_the_sentence_that_was_made(sentence: str) -> None:
    page, _, text = sentence.partition(": ")
    assert " ".join(text.split()) in " ".join((ROOT / page).read_text().split())


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
