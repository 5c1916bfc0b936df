"""Campaigns against what a run stands on: damage, kills, hangs, broken configs and data.

    python scripts/chaos.py damage               100 kinds and places of damage to a stored run
    python scripts/chaos.py config               500 mutations over every key of the schema
    python scripts/chaos.py data                 200 broken files of data
    python scripts/chaos.py flips                300 files of data with flipped bits
    python scripts/chaos.py kill                 100 kills while a run steps, saves and exports
    python scripts/chaos.py hang                 40 ranks that stop, loop or exit, and full disks
    python scripts/chaos.py publish              100 files of a rank lost before a checkpoint counts
    python scripts/chaos.py storage              45 writes, fsyncs and renames that fail
    python scripts/chaos.py reshape              100 runs that go on on another mesh
    python scripts/chaos.py soak                 a long run, whose memory must stay what it is
    python scripts/chaos.py damage=20 config=50 --seed 7 --minutes 5
    python scripts/chaos.py damage --without-hashes     how much only the hashes find

A case is drawn from (seed, its number), so that a line of the output can be repeated with --only N.
Each case is a line, kept in --out, where a campaign that was stopped goes on. A table is at the
end, and the exit code is 1 if a case has failed. Runs on a CPU, on 1 to 4 ranks, with a tiny model.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chaos_campaigns import GOOD, Campaign, Config, Damage, Data, Flips, Kill
from chaos_disturbed import Hang, Reshape, Soak
from chaos_ranks import preload
from chaos_storage import Publish, Storage

CAMPAIGNS: dict[str, tuple[type[Campaign], int]] = {
    "damage": (Damage, 100),
    "config": (Config, 500),
    "data": (Data, 200),
    "flips": (Flips, 300),
    "kill": (Kill, 100),
    "hang": (Hang, 40),
    "publish": (Publish, 100),
    "storage": (Storage, 45),
    "reshape": (Reshape, 100),
    "soak": (Soak, 1),
}
"""The campaigns, each with the number of its cases."""


def without_hashes() -> None:
    """Let every hash be right, in this process and its forks."""
    from titan_ulysses.checkpoint import manifest, storage

    manifest._checksum = lambda state: ""
    manifest.digest_of = lambda path: ""
    storage.expect_saved = lambda *_: None


def journal(path: Path) -> dict[int, dict[str, Any]]:
    """Return the cases that are done, by number."""
    if not path.exists():
        return {}
    lines = path.read_text().splitlines(keepends=True)
    return {line["case"]: line for line in map(json.loads, lines)}


@cache
def import_once() -> None:
    """Make the imports of all runs, and say how long they took."""
    print(f"imports: {preload():.1f} s, which each run of its own would take too")


def play(
    name: str, make: Callable[[], Campaign], numbers: list[int], path: Path, *, until: float
) -> Iterator[dict[str, Any]]:
    """Yield the line of each case. The campaign is made for those that are not in the journal."""
    done, campaign = journal(path), None
    with open(path, "a") as file:
        for number in numbers:
            line = done.get(number)
            if line is None:
                if time.monotonic() > until:
                    print(f"{name}: the time is over before case {number}")
                    return
                if campaign is None:
                    import_once()
                    campaign = make()
                what, verdict, seconds = campaign.case(number)
                line = {"case": number, "verdict": verdict.word, "seconds": round(seconds, 2)}
                line |= {"what": what, "detail": verdict.detail}
                file.write(json.dumps(line) + "\n")
                file.flush()
                print(f"{name} {number:>3}  {line['verdict']:<10} {seconds:5.1f} s  {what}")
                if verdict.word not in GOOD:
                    print(f"    {verdict.detail}")
            yield line


def table_row(name: str, lines: list[dict[str, Any]]) -> str:
    """Return the row of a campaign in the table at the end."""
    verdicts = Counter(line["verdict"] for line in lines)
    passed = sum(count for word, count in verdicts.items() if word in GOOD)
    seconds = [line["seconds"] for line in lines] or [0.0]
    words = ", ".join(f"{count} {word}" for word, count in verdicts.most_common())
    times = f"{median(seconds):.1f} s | {max(seconds):.1f} s"
    return f"| {name} | {passed} of {len(lines)} | {words} | {times} |"


def named(text: str) -> tuple[str, int]:
    """Return the campaign that an argument names, and how many cases of it to play."""
    name, equals, count = text.partition("=")
    if name not in CAMPAIGNS:
        raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(CAMPAIGNS)}")
    return name, int(count) if equals else CAMPAIGNS[name][1]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("campaigns", nargs="+", type=named, metavar="CAMPAIGN[=CASES]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this case alone, again")
    parser.add_argument("--minutes", type=float, default=60.0, help="for all campaigns together")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds until a run hangs")
    parser.add_argument("--soak-seconds", type=float, default=60.0, help="of a case of soak")
    parser.add_argument("--out", type=Path, help="folder that keeps the lines of the cases")
    parser.add_argument("--without-hashes", action="store_true")
    options = parser.parse_args(argv)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    until = time.monotonic() + 60 * options.minutes
    if options.without_hashes:
        import titan_ulysses.model  # noqa: F401  imports transformers without its warnings

        without_hashes()
    rows, is_good = [], True
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        for name, count in options.campaigns:
            out = options.out or Path(temporary)
            out.mkdir(parents=True, exist_ok=True)
            path = out / f"{name}-{options.seed}.jsonl"
            make = partial(
                CAMPAIGNS[name][0],
                *(name, Path(temporary) / name, options.seed),
                patient=options.patience,
                soak_seconds=options.soak_seconds,
            )
            numbers = [*range(count)]
            if options.only is not None:
                numbers, path = [options.only], Path(temporary) / "only.jsonl"
            lines = [*play(name, make, numbers, path, until=until)]
            rows.append(table_row(name, lines))
            is_good &= all(line["verdict"] in GOOD for line in lines)
    print("\n| campaign | passed | verdicts | median | longest |\n| - | - | - | - | - |")
    print("\n".join(rows))
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
