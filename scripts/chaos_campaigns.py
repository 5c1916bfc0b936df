"""The campaigns of chaos.py: what a case is, how its run is played, and when it has passed."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import chaos_cases as cases
from chaos_ranks import Ended, copy_folder, run_ranks

GOOD = {"recovered", "refused", "harmless", "accepted", "equal", "close", "ended", "flat"}
"""Verdicts with which a case has passed."""


class Verdict(NamedTuple):
    """What became of a case."""

    word: str
    """recovered: the run went on from an older checkpoint, said so by name, and got the same bits;
    refused: it ended with a message that names the place; harmless: the damage is not read, and the
    bits are the same; accepted: a config or data with which it trains; equal: killed runs that
    ended with the bits of an undisturbed one; close: on another mesh, with its losses to the order
    of sums; ended: a run that hung or had no disk ended in time, said why, and went on with the
    bits of an undisturbed one; flat: memory, files and threads stayed what they were. All
    others are failures: undetected, unnamed, unnoticed, traceback, hung, lost, half (something is
    left that is half-written), grows.
    """
    detail: str = ""


class Campaign:
    """Cases of one kind, in a folder of their own, with the config and data of a tiny run."""

    def __init__(
        self, name: str, folder: Path, seed: int, *, patient: float, soak_seconds: float
    ) -> None:
        self.name, self.folder, self.seed = name, folder, seed
        self.timeout, self.soak_seconds = patient, soak_seconds
        folder.mkdir(parents=True, exist_ok=True)
        cases.write_run(folder)
        self.outputs, self.stored = folder / "outputs", folder / "outputs" / "run"

    def draw(self, number: int) -> random.Random:
        return random.Random(f"{self.name}/{self.seed}/{number}")

    def run(self, arguments: list[str], *, ranks: int, **options: Any) -> Ended:
        arguments = ["--config", str(self.folder / "run.toml"), *arguments]
        here = self.folder / "a" / "b" / "c"  # where a path such as ../.. does no harm
        here.mkdir(parents=True, exist_ok=True)
        options = {"timeout": self.timeout} | options
        return run_ranks(arguments, ranks=ranks, folder=here, **options)

    def clear(self) -> None:
        shutil.rmtree(self.outputs, ignore_errors=True)

    def case(self, number: int) -> tuple[str, Verdict, float]:
        """Return what case `number` is, what became of it, and the seconds of its run."""
        raise NotImplementedError


class Disturbed(Campaign):
    """Runs that are disturbed, and must then go on to the results of an undisturbed one."""

    steps = 10
    settings: tuple[str, ...] = ()

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.expected: dict[int, tuple[Any, float]] = {}

    def play(self, ranks: int, *arguments: str, **more: Any) -> Ended:
        own = [f"--training.steps={self.steps}", "--checkpoint.interval=2", *self.settings]
        own.append(f"--parallelism.sequence_parallel_degree={ranks}")
        return self.run([*own, *arguments], ranks=ranks, **more)

    def results(self) -> Any:
        return cases.results(self.stored, self.steps), cases.contents(self.stored / "export")

    def undisturbed(self, ranks: int, *arguments: str, **more: Any) -> float:
        """Make sure that the expected results are known, and clear the folder. Returns the seconds
        of an undisturbed run.
        """
        self.clear()
        if ranks not in self.expected:
            ended = self.play(ranks, *arguments, **more)
            assert ended.codes == [0] * ranks, ended.text
            self.expected[ranks] = self.results(), ended.seconds
            self.clear()
        return self.expected[ranks][1]

    def after(self, ranks: int, word: str, *arguments: str) -> Verdict:
        """Return the verdict of a run that has ended as `word` says, if it goes on as it should."""
        again = self.play(ranks, *arguments)
        if again.hung or again.broke:
            return failed(again) or Verdict(word)
        is_equal = not any(again.codes) and self.results() == self.expected[ranks][0]
        return Verdict(word) if is_equal else Verdict("lost", cases.last_lines(again.text))


def failed(ended: Ended) -> Verdict | None:
    """Return the verdict of a run that must not end so, whatever it was given."""
    if ended.hung:
        return Verdict("hung", cases.last_lines(ended.text))
    if ended.broke:
        return Verdict("traceback", cases.last_lines(ended.text))
    return None


def answered(ended: Ended, *, named: bool) -> Verdict:
    """Return the verdict of a run that may train, or refuse what it was given, which it names."""
    if verdict := failed(ended):
        return verdict
    if not any(ended.codes):
        return Verdict("accepted")
    return Verdict("refused" if named else "unnamed", cases.last_lines(ended.text))


class Damage(Campaign):
    """A stored run of 6 steps, 3 checkpoints and an export is damaged, and goes on to step 8."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.longer = ["--training.steps=8", "--checkpoint.export=false"]
        self.good = self.folder / "good"
        if not self.good.exists():
            self.clear()
            self._expect_ok(self.run(["--training.steps=6"], ranks=2))
            copy_folder(self.outputs, self.folder / "new")
            (self.folder / "new").rename(self.good)
        copy_folder(self.good, self.outputs)
        self._expect_ok(self.run(self.longer, ranks=2))
        self.expected = cases.results(self.stored, 8)
        self.exported = cases.contents(self.good / "run" / "export")

    def _expect_ok(self, ended: Ended) -> None:
        assert ended.codes == [0, 0], ended.text

    def case(self, number: int) -> tuple[str, Verdict, float]:
        copy_folder(self.good, self.outputs)
        damage = cases.draw_damage(self.draw(number), self.stored)
        damage.do()
        if damage.of_export:
            ended = self.run(["--training.steps=6"], ranks=2)
            same = cases.contents(self.stored / "export") == self.exported
        else:
            ended = self.run(self.longer, ranks=2)
            same = cases.results(self.stored, 8) == self.expected
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

    def case(self, number: int) -> tuple[str, Verdict, float]:
        self.clear()
        mutation = cases.draw_config(self.draw(number), number)
        arguments = ["--training.steps=1", "--checkpoint.export=false"]
        arguments += cases.as_arguments(mutation, self.folder)
        ended = self.run(arguments, ranks=1)
        what = ", ".join(f"{key} = {str(value)[:40]!r}" for key, value in mutation.items())
        sections = {f"[{key.split('.')[0]}]" for key in mutation}
        names = {*mutation, *sections} | {key.split(".", 1)[1] for key in mutation}
        named = any(name in ended.text for name in names)
        return what, answered(ended, named=named), ended.seconds


class Data(Campaign):
    """A run of one step on a file that is not what it should be."""

    write = staticmethod(cases.draw_data)

    def case(self, number: int) -> tuple[str, Verdict, float]:
        self.clear()
        shutil.rmtree(self.folder / "broken", ignore_errors=True)
        broken = self.write(self.draw(number), self.folder / "broken")
        arguments = ["--training.steps=1", "--checkpoint.enable=false", "--checkpoint.export=false"]
        arguments += [f"--{key}={value}" for key, value in broken.settings.items()]
        ended = self.run(arguments, ranks=1)
        named = broken.file in ended.text or "data." in ended.text
        return broken.what, answered(ended, named=named), ended.seconds


class Flips(Data):
    """A run of one step on a good file with flipped bits."""

    write = staticmethod(cases.draw_flips)


class Kill(Disturbed):
    """A run is killed up to three times, then left alone: it must end as if it had not been."""

    settings = ("--validation.enable=true", "--validation.interval=4")

    def case(self, number: int) -> tuple[str, Verdict, float]:
        draw = self.draw(number)
        ranks, mode = draw.choice([2, 2, 4]), draw.choice(["disabled", "async"])
        seconds = self.undisturbed(ranks)
        what, total = [f"{ranks} ranks, async_mode {mode}"], 0.0
        in_mode = f"--checkpoint.async_mode={mode}"
        for _ in range(draw.randint(1, 3)):
            killer = cases.Killer(draw, self.stored, seconds)
            ended = self.play(ranks, in_mode, meddle=killer)
            total += ended.seconds
            what.append(killer.what)
            if ended.hung:
                return ", ".join(what), Verdict("hung", cases.last_lines(ended.text)), total
        return ", ".join(what), self.after(ranks, "equal", in_mode), total
