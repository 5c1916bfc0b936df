"""What `versus.py --peers` does: the same job by this project and by those that people use beside
it. Do they train the same, how long does a step take, what does a token cost, and how many lines
does a user write for it?

The losses of three steps must agree to 1e-4 with those of one plain process. Of this project,
`train.py` with versus_ours.toml is among them. The lines are those of code in the files of WRITTEN,
which are the ones that run here: within their functions and classes, without blank lines, comments
and docstrings, which leaves out what the files import for versus.py. Of TOML and YAML, all lines
that are neither blank nor comments count.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import ROOT, launch, sequence

sys.path.append(str(ROOT / "scripts"))
from code_lines import code_lines
from versus import CONTENDERS, FOLDER, UNABLE, Match

HERE = Path(__file__).parent
WRITTEN = {
    "plain": ("versus_plain.py",),
    "ours": ("versus_ours.toml",),
    "library": ("versus_library.py",),
    "alst": ("versus_alst.py",),
    "accelerate": ("versus_accelerate.yaml", "versus_accelerate.py"),
    "fsdp2": ("versus_fsdp2.py",),
    "ring": ("versus_ring.py",),
}
"""The contenders, and what a user writes for each."""
NOT_MEASURED = ("plain", "library")
"""One process, and the steps that `ours` takes too."""
STEPS, TOLERANCE = 3, 1e-4
SETTINGS = {"dtypes": ["float32"], "rounds": 3, "steps": 1, "repeats": 1, "longest_fsdp2": 4096}
TIMED, HELD = [4096], [2048, 4096, 8192]
"""Lengths of the timed steps, and of those whose memory is measured."""


def main(args: argparse.Namespace) -> None:
    """Compare, print the table, and write it to peers.json. SystemExit if losses do not agree."""
    vars(args).update(SETTINGS, contenders=[name for name in WRITTEN if name not in NOT_MEASURED])
    started, match = time.perf_counter(), Match(args)
    found: dict[str, Any] = {"lines": {name: lines_of(name) for name in WRITTEN}}
    FOLDER.mkdir(parents=True, exist_ok=True)
    for what in args.what:
        print(f"\n{what}")
        if what == "agreement":
            found[what] = agreement(match)
            able = [row["contender"] for row in found[what] if "losses" in row]
            args.contenders = [name for name in args.contenders if name in able]
        else:
            args.seq_lens = TIMED if what == "time" else HELD
            found[what] = getattr(match, what)()
        found["minutes"] = (time.perf_counter() - started) / 60
        (FOLDER / "peers.json").write_text(json.dumps(found, indent=1))
    print("\n" + "\n".join(table(found)))
    print(f"\n{found['minutes']:.1f} minutes; written to {(FOLDER / 'peers.json')}")
    failed = [row for row in found.get("agreement", ()) if not row["agrees"]]
    if failed:
        raise SystemExit(f"error: {len(failed)} did not train the same: see above")


# ---------------------------------------------------------------- do they train the same?


def agreement(match: Match) -> list[dict[str, Any]]:
    """Compare the losses of STEPS steps with those of one plain process."""
    seq_len = match.args.agreement_seq_len
    rows: list[dict[str, Any]] = []
    expected: list[float] | None = None
    for name in (*WRITTEN, "train.py"):
        if name == "train.py":
            losses = train_py_losses(match.args.ranks, seq_len, minutes=match.args.minutes)
        else:
            found = match.child(name, "agreement", "float32", [seq_len] * STEPS)
            losses = found if isinstance(found, str) else found[0]["loss"]
        if expected is None:
            if isinstance(losses, str):
                raise SystemExit(f"error: {CONTENDERS[name]}: {losses}")
            expected = losses
        rows.append(compared(name, losses, expected))
    return rows


def compared(name: str, losses: list[float] | str, expected: list[float]) -> dict[str, Any]:
    """Return the row of a contender: its losses, or the reason where it has none."""
    label = f"{CONTENDERS.get(name, name):<23}"
    if isinstance(losses, str):
        print(f"{label} {losses}")
        return {"contender": name, "failed": losses, "agrees": UNABLE in losses}
    # Not a number is no agreement either.
    worst = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    agrees = all(abs(a - b) <= TOLERANCE for a, b in zip(losses, expected, strict=True))
    shown = ", ".join(f"{loss:.6f}" for loss in losses)
    what = "" if agrees else f": MORE THAN {TOLERANCE:g}, it does not train the same"
    print(f"{label} {shown}   at most {worst:.1e} from one process{what}")
    return {"contender": name, "losses": losses, "difference": worst, "agrees": agrees}


def train_py_losses(ranks: int, seq_len: int, *, minutes: float) -> list[float] | str:
    """Return the losses in metrics.jsonl after a run of train.py with versus_ours.toml."""
    from titan_ulysses.data.packing import shuffled

    # The order of a run is drawn from its seed: write the sequences such that it is 0, 1, 2.
    rows: list[list[int]] = [[]] * STEPS
    for index, row in enumerate(shuffled(STEPS, seed=0, epoch=0)):
        rows[row] = sequence(index, seq_len).tolist()
    lines = [json.dumps({"input_ids": row}) + "\n" for row in rows]
    (FOLDER / "tokens.jsonl").write_text("".join(lines))
    shutil.rmtree(FOLDER / "train.py", ignore_errors=True)  # it would resume
    command = [*launch(ranks, str(ROOT / "train.py")), "--config", str(HERE / WRITTEN["ours"][0])]
    command += ["--job.dump_folder", str(FOLDER), "--job.name", "train.py"]
    command += ["--model.path", str(FOLDER / "agreement"), "--training.seq_len", str(seq_len)]
    command += ["--data.path", str(FOLDER / "tokens.jsonl")]
    command += ["--parallelism.sequence_parallel_degree", str(ranks)]
    child = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        timeout=60 * minutes,
        capture_output=True,
        text=True,
    )
    if child.returncode:
        return (child.stderr.strip().splitlines() or [f"exit {child.returncode}"])[-1]
    metrics = (FOLDER / "train.py" / "metrics.jsonl").read_text().splitlines()
    return [step["loss"] for step in map(json.loads, metrics) if "loss" in step]


# ---------------------------------------------------------------- what a user writes


def lines_of(contender: str) -> dict[str, int]:
    """Return the lines of configuration and of code of a contender."""
    found = {"config": 0, "code": 0}
    for name in WRITTEN[contender]:
        text = (HERE / name).read_text()
        if name.endswith(".py"):
            found["code"] += sum(
                code_lines(ast.get_source_segment(text, node) or "")
                for node in ast.parse(text).body
                if isinstance(node, (ast.FunctionDef, ast.ClassDef))
            )
        else:
            lines = [line.strip() for line in text.splitlines()]
            found["config"] += sum(bool(line) and not line.startswith("#") for line in lines)
    return found


# ---------------------------------------------------------------- the table


def table(found: dict[str, Any]) -> list[str]:
    """Return the lines of the table in Markdown: a row for each contender."""
    heads = ["", "config", "code", "loss, from one process"]
    heads += [f"a step at {s:,}" for s in TIMED] + ["hidden states a token"]
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    agreed = {row["contender"]: row for row in found.get("agreement", ())}
    times = {(row["contender"], row["seq_len"]): row for row in found.get("time", ())}
    held = {row["contender"]: row for row in found.get("memory", ())}
    for name, lines in found["lines"].items():
        row = agreed.get(name, {})
        cells = [CONTENDERS[name], str(lines["config"]), str(lines["code"])]
        cells.append(f"{row['difference']:.1e}" if "difference" in row else row.get("failed", ""))
        for seq_len in TIMED:
            one = times.get((name, seq_len), {})
            cells.append(
                f"{one['seconds']:.2f} s (CPU {one['cpu']:.2f})" if "seconds" in one else ""
            )
        units = held.get(name, {}).get("units")
        cells.append("" if units is None else f"{units:.2f}")
        rows.append(f"| {' | '.join(cells)} |")
    return rows


if __name__ == "__main__":
    sys.exit("error: run scripts/bench/versus.py --peers")
