"""`titan-ulysses models`: the table of types, and its page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from titan_ulysses.distributed.errors import UserError
from titan_ulysses.model.families import CHECKED_FAMILIES
from titan_ulysses.tools import models

ROOT = Path(__file__).resolve().parent.parent


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    table = json.loads(models.TABLE.read_text())
    assert models.as_markdown(table) == (ROOT / "docs" / "model-types.md").read_text()
    for rows, least in ((models.of_text(table), 60), (models.of_images(table), 30)):
        assert [row["result"] for row in rows.values()].count("exact") >= least
    known = CHECKED_FAMILIES & table["types"].keys()
    assert all(table["types"][kind]["result"].startswith("exact") for kind in known)
    models.main(["falcon"])
    assert "falcon" in capsys.readouterr().out.splitlines()[0]
    with pytest.raises(UserError, match="Did you mean falcon"):
        models.main(["falco"])
