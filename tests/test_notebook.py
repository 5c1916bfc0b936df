"""docs/first_steps.ipynb: a notebook without outputs, whose cells run from the top."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "docs" / "first_steps.ipynb"


def cells(kind: str) -> list[str]:
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len({*ids}) == len(ids)
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == kind]


def test_the_cells_are_python_and_have_no_outputs() -> None:
    for number, cell in enumerate(cells("code")):
        compile(cell, f"cell {number}", "exec")
    assert cells("markdown")[0].startswith("# First steps")
    found = json.loads(NOTEBOOK.read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in found)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    """In an empty folder, the cells one after the other."""
    (tmp_path / "notebook.py").write_text("\n".join(cells("code")))
    done = subprocess.run(
        [sys.executable, "notebook.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "gradients agree" in done.stdout and "tokens on 8 x H100-80GB fit" in done.stdout
