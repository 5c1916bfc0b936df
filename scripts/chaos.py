"""Campaigns against what a run stands on: damaged checkpoints, kills, broken configs, broken data.

    python scripts/chaos.py damage               100 kinds and places of damage to a stored run
    python scripts/chaos.py config               500 mutations over every key of the schema
    python scripts/chaos.py data                 200 broken files of data
    python scripts/chaos.py kill                 100 kills while a run steps, saves and exports
    python scripts/chaos.py damage=20 config=50 --seed 7 --minutes 5
    python scripts/chaos.py damage --without-hashes     how much only the hashes find

A case is drawn from (seed, its number), so that a line of the output can be repeated with --only N.
Each case is a line, kept in --out, where a campaign that was stopped goes on. A table is at the
end, and the exit code is 1 if a case has failed. Runs on a CPU, on 1 to 4 ranks, with a tiny model.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import chaos_cases as cases
from chaos_ranks import Ended, copy_folder, preload, run_ranks

GOOD = {"recovered", "refused", "harmless", "accepted", "equal"}
"""Verdicts with which a case has passed."""
COUNTS = {"damage": 100, "config": 500, "data": 200, "kill": 100}


class Verdict(NamedTuple):
    """What became of a case."""

    word: str
    """recovered: the run went on from an older checkpoint, said so by name, and got the same bits;
    refused: it ended with a message that names the place; harmless: the damage is not read, and the
    bits are the same; accepted: a config or data with which it trains; equal: killed runs that
    ended with the bits of an undisturbed one. All others are failures: undetected, unnamed,
    traceback, hung, lost.
    """
    detail: str = ""


class Campaign:
    """Cases of one kind, in a folder of their own."""

    def __init__(self, name: str, folder: Path, seed: int, *, patient: float) -> None:
        self.name, self.folder, self.seed = name, folder, seed
        self.timeout = patient
        folder.mkdir(parents=True, exist_ok=True)

    def draw(self, number: int) -> random.Random:
        return random.Random(f"{self.name}/{self.seed}/{number}")

    def run(self, arguments: list[str], *, ranks: int, **options: Any) -> Ended:
        arguments = ["--config", str(self.folder / "run.toml"), *arguments]
        here = self.folder / "a" / "b" / "c"  # where a path such as ../.. does no harm
        here.mkdir(parents=True, exist_ok=True)
        options = {"timeout": self.timeout} | options
        return run_ranks(arguments, ranks=ranks, folder=here, **options)

    def case(self, number: int) -> tuple[str, Verdict, float]:
        """Return what case `number` is, what became of it, and the seconds of its run."""
        raise NotImplementedError


def failed(ended: Ended) -> Verdict | None:
    """Return the verdict of a run that must not end so, whatever it was given."""
    if ended.hung:
        return Verdict("hung", cases.last_lines(ended.text))
    if ended.broke:
        return Verdict("traceback", cases.last_lines(ended.text))
    return None


class Damage(Campaign):
    """A stored run of 6 steps, 3 checkpoints and an export is damaged, and goes on to step 8."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        cases.write_run(self.folder)
        self.longer = ["--training.steps=8", "--checkpoint.export=false"]
        self.stored, self.outputs = self.folder / "stored", self.folder / "outputs"
        if not self.stored.exists():
            shutil.rmtree(self.outputs, ignore_errors=True)
            self._expect_ok(self.run(["--training.steps=6"], ranks=2))
            copy_folder(self.outputs, self.folder / "new")
            (self.folder / "new").rename(self.stored)
        copy_folder(self.stored, self.outputs)
        self._expect_ok(self.run(self.longer, ranks=2))
        self.expected = cases.results(self.outputs / "run", 8)
        self.exported = cases.contents(self.stored / "run" / "export")

    def _expect_ok(self, ended: Ended) -> None:
        assert ended.codes == [0, 0], ended.text

    def case(self, number: int) -> tuple[str, Verdict, float]:
        copy_folder(self.stored, self.outputs)
        run = self.outputs / "run"
        damage = cases.draw_damage(self.draw(number), run)
        damage.do()
        if damage.of_export:
            ended = self.run(["--training.steps=6"], ranks=2)
            same = cases.contents(run / "export") == self.exported
        else:
            ended = self.run(self.longer, ranks=2)
            same = cases.results(run, 8) == self.expected
        return damage.what, self._verdict(ended, same, damage), ended.seconds

    def _verdict(self, ended: Ended, same: bool, damage: cases.Damage) -> Verdict:
        if verdict := failed(ended):
            return verdict
        named = any(name in ended.text for name in damage.names)
        if any(ended.codes):
            return Verdict("refused" if named else "unnamed", cases.last_lines(ended.text))
        if not same:
            return Verdict("undetected", cases.last_lines(ended.text))
        if not damage.is_read:
            return Verdict("harmless")
        if damage.of_export:
            return Verdict("recovered")  # written again, as the first time
        return Verdict("recovered" if named else "unnamed", cases.last_lines(ended.text))


class Config(Campaign):
    """A run of one step whose config has one to two keys with other values."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        cases.write_run(self.folder)

    def case(self, number: int) -> tuple[str, Verdict, float]:
        shutil.rmtree(self.folder / "outputs", ignore_errors=True)
        mutation = cases.draw_config(self.draw(number), number)
        arguments = ["--training.steps=1", "--checkpoint.export=false"]
        arguments += cases.as_arguments(mutation, self.folder)
        ended = self.run(arguments, ranks=1)
        what = ", ".join(f"{key} = {str(value)[:40]!r}" for key, value in mutation.items())
        if verdict := failed(ended):
            return what, verdict, ended.seconds
        if ended.codes == [0]:
            return what, Verdict("accepted"), ended.seconds
        sections = {f"[{key.split('.')[0]}]" for key in mutation}
        names = {*mutation, *sections} | {key.split(".", 1)[1] for key in mutation}
        named = any(name in ended.text for name in names)
        word = "refused" if named else "unnamed"
        return what, Verdict(word, cases.last_lines(ended.text)), ended.seconds


class Data(Campaign):
    """A run of one step on a file that is not what it should be."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        cases.write_run(self.folder)

    def case(self, number: int) -> tuple[str, Verdict, float]:
        for name in ("outputs", "broken"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        broken = cases.draw_data(self.draw(number), self.folder / "broken")
        arguments = ["--training.steps=1", "--checkpoint.enable=false", "--checkpoint.export=false"]
        arguments += [f"--{key}={value}" for key, value in broken.settings.items()]
        ended = self.run(arguments, ranks=1)
        if verdict := failed(ended):
            return broken.what, verdict, ended.seconds
        if ended.codes == [0]:
            return broken.what, Verdict("accepted"), ended.seconds
        named = broken.file in ended.text or "data." in ended.text
        word = "refused" if named else "unnamed"
        return broken.what, Verdict(word, cases.last_lines(ended.text)), ended.seconds


class Kill(Campaign):
    """A run is killed up to three times, then left alone: it must end as if it had not been."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        cases.write_run(self.folder)
        self.settings = ["--training.steps=10", "--checkpoint.interval=2"]
        self.settings += ["--validation.enable=true", "--validation.interval=4"]
        self.expected: dict[int, tuple[Any, float]] = {}

    def _undisturbed(self, ranks: int) -> tuple[Any, float]:
        if ranks not in self.expected:
            shutil.rmtree(self.folder / "outputs", ignore_errors=True)
            ended = self.run(self._arguments(ranks), ranks=ranks)
            assert ended.codes == [0] * ranks, ended.text
            self.expected[ranks] = self._found(), ended.seconds
        return self.expected[ranks]

    def _arguments(self, ranks: int) -> list[str]:
        return [*self.settings, f"--parallelism.sequence_parallel_degree={ranks}"]

    def _found(self) -> Any:
        run = self.folder / "outputs" / "run"
        return cases.results(run, 10), cases.contents(run / "export")

    def case(self, number: int) -> tuple[str, Verdict, float]:
        draw = self.draw(number)
        ranks = draw.choice([2, 2, 4])
        expected, seconds = self._undisturbed(ranks)
        run = self.folder / "outputs" / "run"
        shutil.rmtree(run.parent, ignore_errors=True)
        what, total = [f"{ranks} ranks"], 0.0
        for _ in range(draw.randint(1, 3)):
            killer = cases.Killer(draw, run, seconds)
            ended = self.run(self._arguments(ranks), ranks=ranks, meddle=killer)
            total += ended.seconds
            what.append(killer.what)
            if ended.hung:
                return ", ".join(what), Verdict("hung", cases.last_lines(ended.text)), total
        ended = self.run(self._arguments(ranks), ranks=ranks)
        total += ended.seconds
        if verdict := failed(ended):
            return ", ".join(what), verdict, total
        if ended.codes != [0] * ranks:
            return ", ".join(what), Verdict("lost", cases.last_lines(ended.text)), total
        word = "equal" if self._found() == expected else "lost"
        return ", ".join(what), Verdict(word), total


CAMPAIGNS: dict[str, type[Campaign]] = {
    "damage": Damage,
    "config": Config,
    "data": Data,
    "kill": Kill,
}


def without_hashes() -> None:
    """Let every hash be right, in this process and its forks."""
    from titan_ulysses.checkpoint import manifest, reader

    manifest._checksum = lambda state: ""
    manifest.digest_of = lambda path: ""
    for name in ("check_piece", "check_file"):
        setattr(reader, name, lambda *_: None)


def journal(path: Path) -> dict[int, dict[str, Any]]:
    """Return the cases that are done, by number."""
    if not path.exists():
        return {}
    lines = path.read_text().splitlines(keepends=True)
    return {line["case"]: line for line in map(json.loads, lines)}


def play(
    campaign: Campaign, numbers: list[int], path: Path, *, until: float, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Yield the line of each case, those that are in the journal first."""
    done = journal(path)
    with open(path, "a") as file:
        for number in numbers:
            line = done.get(number)
            if line is None:
                if time.monotonic() > until:
                    say(f"{campaign.name}: the time is over before case {number}")
                    return
                what, verdict, seconds = campaign.case(number)
                line = {
                    "case": number,
                    "verdict": verdict.word,
                    "seconds": round(seconds, 2),
                    "what": what,
                    "detail": verdict.detail,
                }
                file.write(json.dumps(line) + "\n")
                file.flush()
                say(f"{campaign.name} {number:>3}  {line['verdict']:<10} {seconds:5.1f} s  {what}")
                if verdict.word not in GOOD:
                    say(f"    {verdict.detail}")
            yield line


def table(name: str, lines: list[dict[str, Any]]) -> list[str]:
    """Return the rows of the table at the end."""
    verdicts = Counter(line["verdict"] for line in lines)
    passed = sum(count for word, count in verdicts.items() if word in GOOD)
    seconds = [line["seconds"] for line in lines] or [0.0]
    words = ", ".join(f"{count} {word}" for word, count in verdicts.most_common())
    return [
        f"| {name} | {passed} of {len(lines)} | {words} | {median(seconds):.1f} s | "
        f"{max(seconds):.1f} s |"
    ]


def named(text: str) -> tuple[str, int]:
    """Return the campaign that an argument names, and how many cases of it to play."""
    name, equals, count = text.partition("=")
    if name not in CAMPAIGNS:
        raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(CAMPAIGNS)}")
    return name, int(count) if equals else COUNTS[name]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("campaigns", nargs="+", type=named, metavar="CAMPAIGN[=CASES]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this case alone, again")
    parser.add_argument("--minutes", type=float, default=60.0, help="for all campaigns together")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds until a run hangs")
    parser.add_argument("--out", type=Path, help="folder that keeps the lines of the cases")
    parser.add_argument("--without-hashes", action="store_true")
    options = parser.parse_args(argv)
    until = time.monotonic() + 60 * options.minutes
    if options.without_hashes:
        import titan_ulysses.model  # noqa: F401  imports transformers without its warnings

        without_hashes()
    print(f"imports: {preload():.1f} s, which each run of its own would take too", flush=True)
    rows, is_good = [], True
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        for name, count in options.campaigns:
            out = options.out or Path(temporary)
            out.mkdir(parents=True, exist_ok=True)
            path = out / f"{name}-{options.seed}.jsonl"
            campaign = CAMPAIGNS[name](
                name, Path(temporary) / name, options.seed, patient=options.patience
            )
            numbers = [*range(count)]
            if options.only is not None:
                numbers, path = [options.only], Path(temporary) / "only.jsonl"
            say = lambda text: print(text, flush=True)  # noqa: E731
            lines = [*play(campaign, numbers, path, until=until, say=say)]
            rows += table(name, lines)
            is_good &= all(line["verdict"] in GOOD for line in lines)
    print("\n| campaign | passed | verdicts | median | longest |\n| - | - | - | - | - |")
    print("\n".join(rows))
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
