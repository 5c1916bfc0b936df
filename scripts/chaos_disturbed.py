"""Campaigns of chaos.py whose runs are disturbed but not killed: hang, reshape, soak."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from statistics import median
from typing import Any

import chaos_cases as cases
from chaos_campaigns import Campaign, Disturbed, Verdict, answered, failed
from chaos_ranks import Ended

TIMEOUT_S = 8.0
"""comm.timeout_s of the runs that hang."""
KINDS_OF_HANG = {"stopped": 2, "loops": 2, "exits": 1, "no folder": 1, "full disk": 1}
"""How often each is drawn."""
GRACE_S = 10.0
"""Seconds after comm.timeout_s within which all ranks must have ended."""


def looping_core(q: Any, k: Any, v: Any, *, documents: Any, scale: float) -> Any:
    """sdpa, but in the step and on the rank that TITAN_CHAOS names it never returns, or exits."""
    import torch
    import torch.distributed as dist

    from titan_ulysses.distributed.seeds import seed_of
    from titan_ulysses.ulysses.cores import sdpa

    how, rank, step = os.environ["TITAN_CHAOS"].split("/")
    rank_now = dist.get_rank()
    if rank_now == int(rank) and torch.initial_seed() == seed_of(0, int(step), rank_now):
        if how == "exits":
            os._exit(3)
        while True:
            time.sleep(0.01)
    return sdpa(q, k, v, documents=documents, scale=scale)


class Hang(Disturbed):
    """A rank is stopped, loops or exits, or the disk takes nothing: the run ends in time, and by
    name. Left alone, it goes on as if nothing had been.
    """

    settings = (
        "--checkpoint.export=false",
        "--model.attention=chaos_disturbed:looping_core",
        f"--comm.timeout_s={TIMEOUT_S}",
        "--comm.startup_timeout_s=60",
    )

    def play(self, ranks: int, *arguments: str, loop: str = "none/-1/0", **more: Any) -> Ended:
        os.environ["TITAN_CHAOS"] = loop
        return super().play(ranks, *arguments, **more)

    def case(self, number: int) -> tuple[str, Verdict, float]:
        draw = self.draw(number)
        ranks = draw.choice([2, 2, 4])
        self.undisturbed(ranks)
        how = draw.choices([*KINDS_OF_HANG], [*KINDS_OF_HANG.values()])[0]
        rank, step = draw.randrange(ranks), draw.randint(2, 8)
        watcher = Watcher(self.stored, rank if how == "stopped" else -1, step)
        what = f"{ranks} ranks, {how}"
        if how in ("no folder", "full disk"):
            mode = ["disabled", "async"][number % 2]
            what += f", async_mode {mode}"
            ended, undo = self._without_disk(how, ranks, mode)
            named, late = "checkpoint.folder" in ended.text, 0.0
            undo()
        else:
            what += f": rank {rank} in step {step + 1}"
            ended = self.play(ranks, loop=f"{how}/{rank}/{step}", meddle=watcher)
            late = watcher.seconds_until_the_end(time.perf_counter())
            words = [f"rank {rank} "]
            words += ["another rank died without a message"] * (how == "exits")
            named = any(word in ended.text for word in words)
        verdict = self._verdict(ended, late, named)
        if verdict.word == "ended":
            verdict = self.after(ranks, "ended")
        return what, verdict, ended.seconds

    @staticmethod
    def _verdict(ended: Any, late: float, named: bool) -> Verdict:
        text = cases.last_lines(ended.text)
        if ended.hung or late > TIMEOUT_S + GRACE_S:
            return Verdict("hung", f"{late:.1f} s: {text}")
        if "Traceback (most recent call last)" in ended.text or ended.codes.count(0):
            return Verdict("traceback" if "Traceback" in ended.text else "unnoticed", text)
        return Verdict("ended" if named else "unnamed", text)

    def _without_disk(self, how: str, ranks: int, mode: str) -> tuple[Ended, Any]:
        """Play a run whose checkpoints cannot be made, or fill the disk; and what mends that."""
        folder, in_mode = self.stored / "checkpoints", f"--checkpoint.async_mode={mode}"
        self.stored.mkdir(parents=True)
        if how == "no folder":
            folder.symlink_to("/proc/nothing")  # in which not even root can make a file
            return self.play(ranks, in_mode), folder.unlink
        return self.play(ranks, in_mode, file_bytes=20_000), lambda: None


class Watcher:
    """Stops a rank in a step, and ends it when all others have ended."""

    def __init__(self, run: Path, rank: int, step: int) -> None:
        self._metrics, self._rank, self._step = run / "metrics.jsonl", rank, step
        self._pids: list[int] = []
        self._since = 0.0
        self._ended = 0.0

    def __call__(self, pids: list[int]) -> None:
        self._pids = self._pids or pids
        if not self._since and self._steps() >= self._step:
            self._since = time.perf_counter()
            if self._rank >= 0:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._pids[self._rank], signal.SIGSTOP)
        if self._rank >= 0 and self._since and pids == [self._pids[self._rank]]:
            self._ended = time.perf_counter()
            os.kill(pids[0], signal.SIGKILL)

    def seconds_until_the_end(self, now: float) -> float:
        return (self._ended or now) - self._since if self._since else 0.0

    def _steps(self) -> int:
        with contextlib.suppress(OSError):
            return self._metrics.read_bytes().count(b"\n")
        return 0


MESHES = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (4, 1, 1)]
MESHES += [(1, 4, 1), (1, 1, 4), (2, 2, 1), (2, 1, 2), (1, 2, 2)]
KINDS: dict[str, tuple[list[str], float]] = {
    "full": ([], 2e-6),
    "lora": (["--lora.rank=4"], 2e-6),
    "adamw8bit": (["--optimizer.name=adamw8bit"], 1e-4),
    "adamw4bit": (["--optimizer.name=adamw4bit"], 2e-3),
}
"""The arguments of a kind of training, and by how much a loss may differ on another mesh."""


class Reshape(Campaign):
    """A run of 3 steps on a mesh goes on to step 6 on another: its losses are those of an
    undisturbed run, bit for bit on the same mesh. All pairs of meshes of 1, 2 and 4 ranks.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.known: dict[Any, tuple[Path, dict[int, float]]] = {}

    def _arguments(self, kind: str, mesh: tuple[int, int, int]) -> list[str]:
        shape = {"vocab_size": 264, "hidden_size": 128, "intermediate_size": 128}
        replicate, shard, sequence = mesh
        return [
            "--training.steps=6",
            "--checkpoint.interval=3",
            "--checkpoint.keep_latest_k=0",
            "--checkpoint.export=false",
            "--training.local_batch_size=1",
            "--training.global_batch_size=8",
            f"--parallelism.data_parallel_replicate_degree={replicate}",
            f"--parallelism.data_parallel_shard_degree={shard}",
            f"--parallelism.sequence_parallel_degree={sequence}",
            *(f"--model.config.{key}={value}" for key, value in shape.items()),
            *KINDS[kind][0],
        ]

    def _losses(self) -> dict[int, float]:
        lines = (self.stored / "metrics.jsonl").read_text().splitlines()
        return {line["step"]: line["loss"] for line in map(json.loads, lines)}

    def _whole(self, kind: str, mesh: tuple[int, int, int]) -> tuple[Path, dict[int, float]]:
        if (kind, mesh) not in self.known:
            self.clear()
            ranks = mesh[0] * mesh[1] * mesh[2]
            ended = self.run(self._arguments(kind, mesh), ranks=ranks)
            assert ended.codes == [0] * ranks, ended.text
            kept = self.folder / f"{kind}-{'-'.join(map(str, mesh))}"
            shutil.copytree(self.stored / "checkpoints/step-3", kept)
            self.known[kind, mesh] = kept, self._losses()
        return self.known[kind, mesh]

    def case(self, number: int) -> tuple[str, Verdict, float]:
        draw: random.Random = self.draw(number // len(MESHES) ** 2)
        pairs = [(one, other) for one in MESHES for other in MESHES]
        draw.shuffle(pairs)
        before, after = pairs[number % len(pairs)]
        kind = [*KINDS][number % len(KINDS)]
        kept, expected = self._whole(kind, before)
        self.clear()
        shutil.copytree(kept, self.stored / "checkpoints/step-3")
        ranks = after[0] * after[1] * after[2]
        ended = self.run(self._arguments(kind, after), ranks=ranks)
        what = f"{kind}, {before} to {after}"
        verdict = answered(ended, named="values that share a scale" in ended.text)
        if verdict.word == "accepted":
            verdict = self._verdict(kind, expected, same_mesh=before == after)
        return what, verdict, ended.seconds

    def _verdict(self, kind: str, expected: dict[int, float], *, same_mesh: bool) -> Verdict:
        found = self._losses()
        pairs = [(found.get(step, float("nan")), expected[step]) for step in (4, 5, 6)]
        if all(one == other for one, other in pairs):
            return Verdict("equal")
        off = max(abs(one - other) / abs(other) for one, other in pairs)
        is_close = not same_mesh and off <= KINDS[kind][1]
        return Verdict("close" if is_close else "lost", f"losses differ by {off:.1e}")


class Soak(Campaign):
    """A run that steps, saves (in the background too) and validates for long: the memory, open
    files and threads of its ranks are at the end what they were after a third.
    """

    def case(self, number: int) -> tuple[str, Verdict, float]:
        draw = self.draw(number)
        mode = ["async", "disabled"][number % 2]
        self.clear()
        gauge = Gauge(self.soak_seconds)
        settings = [
            "--training.steps=1000000",
            f"--checkpoint.interval={draw.randint(5, 15)}",
            "--validation.enable=true",
            "--validation.interval=20",
            "--checkpoint.export=false",
            f"--checkpoint.async_mode={mode}",
            "--parallelism.sequence_parallel_degree=2",
        ]
        ended = self.run(settings, ranks=2, meddle=gauge, timeout=self.soak_seconds + self.timeout)
        what = f"2 ranks, async_mode {mode}, {self.soak_seconds:.0f} s: {gauge.describe()}"
        if verdict := failed(ended):
            return what, verdict, ended.seconds
        verdict = Verdict("flat" if gauge.is_flat() else "grows", gauge.describe())
        return what, verdict, ended.seconds


class Gauge:
    """Reads memory, open files and threads of a rank, and sends SIGTERM when the time is over."""

    def __init__(self, seconds: float) -> None:
        self._until, self._next = time.perf_counter() + seconds, 0.0
        self._every = seconds / 60
        self._read: list[tuple[float, int, int]] = []
        self._told = False

    def __call__(self, pids: list[int]) -> None:
        now = time.perf_counter()
        if now > self._until:
            for pid in pids if not self._told else ():
                os.kill(pid, signal.SIGTERM)
            self._told = True
        elif now > self._next:
            self._next = now + self._every
            with contextlib.suppress(OSError, StopIteration):
                self._read.append(self._of(pids[0]))

    @staticmethod
    def _of(pid: int) -> tuple[float, int, int]:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        resident = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
        threads = next(int(line.split()[1]) for line in lines if line.startswith("Threads"))
        return resident / 1024, len(os.listdir(f"/proc/{pid}/fd")), threads

    def _thirds(self) -> tuple[list[float], list[float]]:
        """Return the medians of the second third and of the last."""
        size = len(self._read) // 3
        parts = self._read[size : 2 * size], self._read[2 * size :]
        middle, last = ([median(column) for column in zip(*part, strict=True)] for part in parts)
        return middle, last

    def is_flat(self) -> bool:
        if len(self._read) < 9:
            return False
        middle, last = self._thirds()
        return last[0] <= 1.02 * middle[0] + 4 and all(
            after <= before + 1 for before, after in zip(middle[1:], last[1:], strict=True)
        )

    def describe(self) -> str:
        if len(self._read) < 9:
            return f"only {len(self._read)} readings"
        (memory, files, threads), (memory_2, files_2, threads_2) = self._thirds()
        return (
            f"{memory:.0f} then {memory_2:.0f} MiB, {files:.0f} then {files_2:.0f} files, "
            f"{threads:.0f} then {threads_2:.0f} threads"
        )
