"""Campaigns of chaos.py whose storage fails: publish, storage."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import re
import select
import shutil
import socket
import struct
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import chaos_cases as cases
from chaos_campaigns import Campaign, Verdict, failed


class _Stored(Campaign):
    """Runs of 6 steps and 3 checkpoints, whose stored files are looked at when they have ended."""

    def flaw(self) -> str | None:
        """Return what is half-written or damaged in the run's folder, or None."""
        from titan_ulysses.checkpoint.folder import STEP_FILE
        from titan_ulysses.checkpoint.manifest import read_sealed_folder

        if left := [*self.stored.rglob(".*.partial")]:
            return f"{left[0].name} is left"
        for step in self.stored.glob("checkpoints/step-*"):
            if flaw := _flaw_of(step):
                return f"{step.name}: {flaw}"
        export = self.stored / "export"
        if export.exists() and read_sealed_folder(export, STEP_FILE) is None:
            return "export/ is not whole"
        return None

    def after(self, ranks: int, word: str) -> Verdict:
        """As in every campaign, and it must have left nothing half-written."""
        flaw = self.flaw()
        return Verdict("half", flaw) if flaw else super().after(ranks, word)


def _flaw_of(step: Path) -> str | None:
    """Return why a checkpoint is not whole, or None. Reads all of it."""
    from titan_ulysses.checkpoint.manifest import Damage, check_piece, digest, pieces_by_place
    from titan_ulysses.checkpoint.run_file import read_run_file

    try:
        files = read_run_file(step)["files"]
        known = pieces_by_place(files)
        for (name, offset), (length, _) in known.items():
            data = (step / name).read_bytes()[offset : offset + length]
            check_piece(name, offset, data, known)
        for name, entry in files.items():
            if "xxh3" in entry and digest((step / name).read_bytes()) != entry["xxh3"]:
                return f"{name} has other bytes"
    except (Damage, OSError) as error:
        return str(error)
    return None


# --- publish --------------------------------------------------------------------------------------


class Publish(_Stored):
    """The file of one rank is gone, short or an older one when a checkpoint is to be published: it
    is not, and the older ones stay. One checkpoint is kept, so that a wrong one would cost all.
    """

    settings = ("--checkpoint.interval=2", "--checkpoint.keep_latest_k=1")

    def case(self, number: int) -> tuple[str, Verdict, float]:
        draw = self.draw(number)
        ranks, kind = draw.choice([2, 2, 4]), ["missing", "short", "stale"][number % 3]
        rank, step, mode = draw.randrange(ranks), draw.choice([4, 6]), draw.choice(["async", "off"])
        mode = {"off": "disabled"}.get(mode, mode)
        what = f"{ranks} ranks, async_mode {mode}: the file of rank {rank} of step {step} {kind}"
        self.undisturbed(ranks)
        lose = _Lose(self.stored / "checkpoints", kind, f"__{rank}_0.distcp", step)
        ended = self.play(ranks, f"--checkpoint.async_mode={mode}", prepare=lose.prepare)
        return what, self._verdict(ended, ranks, lose), ended.seconds

    def _verdict(self, ended: Any, ranks: int, lose: _Lose) -> Verdict:
        text = cases.last_lines(ended.text)
        if verdict := failed(ended):
            return verdict
        there = sorted(path.name for path in lose.checkpoints.iterdir())
        if f"step-{lose.step}" in there:
            return Verdict("undetected", text)
        if there != [f"step-{lose.step - 2}"]:
            return Verdict("lost", f"{there} is left: {text}")
        if ended.codes != [1] * ranks or lose.file not in ended.text:
            return Verdict("unnamed", f"{ended.codes}: {text}")
        return self.after(ranks, "ended")


class _Lose(NamedTuple):
    """Takes a rank's file from a checkpoint before it is published, each time."""

    checkpoints: Path
    kind: str
    file: str
    step: int

    def prepare(self, rank: int) -> None:
        from titan_ulysses.checkpoint import manifest, writing

        manifest._VIEW_SECONDS = 0.2
        publish = writing.publish

        def without(partial: Path, final: Path, *rest: Any, **more: Any) -> None:
            if final.name == f"step-{self.step}":
                self._act(partial / self.file)
            publish(partial, final, *rest, **more)

        writing.publish = without

    def _act(self, file: Path) -> None:
        if self.kind == "missing":
            file.unlink()
        elif self.kind == "short":
            os.truncate(file, file.stat().st_size * 2 // 3)
        else:
            shutil.copyfile(self.checkpoints / f"step-{self.step - 2}" / self.file, file)


# --- storage --------------------------------------------------------------------------------------

ERRORS = ("EIO", "ENOSPC", "EDQUOT", "EROFS", "ESTALE", "EACCES")


class Call(NamedTuple):
    """A call to the system that changes a file of the run."""

    kind: str
    place: str
    """The file below the run's folder, with N for numbers."""


class Storage(_Stored):
    """The n-th write, fsync or rename of a kind of file fails, once or from then on. The run ends
    with a message and exit code 1, or says that a log lacks something or that it tries again. The
    checkpoints that were there are there, nothing is half-written, and the same command goes on.
    """

    settings = ("--checkpoint.interval=2", "--checkpoint.keep_latest_k=0")
    ranks = 2

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.counts: dict[str, Counter[Call]] = {}

    def _counted(self, mode: str) -> Counter[Call]:
        """Return how often an undisturbed run makes each call."""
        if mode not in self.counts:
            self.expected.clear()
            faults = Faults(self.stored)
            self.undisturbed(self.ranks, f"--checkpoint.async_mode={mode}", **faults.options())
            self.counts[mode] = faults.seen
        return self.counts[mode]

    def case(self, number: int) -> tuple[str, Verdict, float]:
        draw = self.draw(number)
        mode = ["disabled", "async"][draw.randrange(2)]
        counts = self._counted(mode)
        # Each kind of call in turn: the files that are written most would take most cases.
        kind = ("write", "fsync", "rename")[number % 3]
        call = draw.choice(sorted(call for call in counts if call.kind == kind))
        fault = Fault(call, draw.randint(1, counts[call]), draw.choice(ERRORS), draw.random() < 0.5)
        what = f"async_mode {mode}, {fault.describe()}"
        self.undisturbed(self.ranks)
        faults = Faults(self.stored, fault)
        ended = self.play(self.ranks, f"--checkpoint.async_mode={mode}", **faults.options())
        return what, self._verdict(ended, fault, faults), ended.seconds

    def _verdict(self, ended: Any, fault: Fault, faults: Faults) -> Verdict:
        text = cases.last_lines(ended.text)
        if verdict := failed(ended):
            return verdict
        steps = {path.name for path in self.stored.glob("checkpoints/step-*")}
        if gone := faults.there - steps:
            return Verdict("lost", f"{sorted(gone)} is gone: {text}")
        why = os.strerror(getattr(errno, fault.error))
        named = any(word in ended.text for word in (why, "checkpoint.folder", "job.dump_folder"))
        if ended.codes == [1] * self.ranks:
            return self.after(self.ranks, "ended") if named else Verdict("unnamed", text)
        if any(ended.codes):
            return Verdict("unnamed", f"{ended.codes}: {text}")
        if not faults.hit:
            return self.after(self.ranks, "harmless")  # another order of calls: it never came
        is_said = "WARNING" in ended.text and named
        return self.after(self.ranks, "recovered") if is_said else Verdict("unnoticed", text)


class Fault(NamedTuple):
    call: Call
    number: int
    error: str
    stays: bool

    def describe(self) -> str:
        how = "from then on, all calls" if self.stays else "once"
        return f"{self.error} at {self.call.kind} {self.number} of {self.call.place}, {how}"


_NUMBERS: dict[str, tuple[int, dict[int, str]]] = {
    "x86_64": (
        317,
        dict.fromkeys((1, 18, 20, 40, 296, 326, 328), "write")
        | dict.fromkeys((74, 75), "fsync")
        | dict.fromkeys((82, 264, 316), "rename"),
    ),
    "aarch64": (
        277,
        dict.fromkeys((64, 66, 68, 70, 71, 285, 287), "write")
        | dict.fromkeys((82, 83), "fsync")
        | dict.fromkeys((38, 276), "rename"),
    ),
}
"""The number of seccomp; of write, pwrite64, writev, sendfile, pwritev, copy_file_range, pwritev2;
of fsync, fdatasync; of rename, renameat, renameat2. Memory maps of files are not among them.
"""
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_CONTINUE = 1


class Faults:
    """Decides each call of the ranks that changes a file of the run.

    The kernel asks (seccomp's user notification), so that no library can write past it, whatever
    it is written in. Linux 5.5 or newer. Without a fault, calls are only counted.
    """

    def __init__(self, run: Path, fault: Fault | None = None) -> None:
        self._run, self._fault = f"{run.resolve()}/", fault
        self._number, self._kinds = _NUMBERS[platform.machine()]
        self._ours, self._theirs = socket.socketpair()
        self._ours.setblocking(False)
        self._listeners = select.poll()
        self.seen: Counter[Call] = Counter()
        self.hit = False
        self.there: set[str] = set()
        """The checkpoints that were there when it failed."""

    def options(self) -> dict[str, Any]:
        """Return the options of run_ranks."""
        return {"prepare": self._ask, "meddle": self._answer}

    def _ask(self, rank: int) -> None:
        """In a rank: let the kernel ask before such calls from now on."""
        libc = ctypes.CDLL(None, use_errno=True)
        notify, allow, load, equal, give = 0x7FC00000, 0x7FFF0000, 0x20, 0x15, 0x06
        calls = [*self._kinds]
        lines = [(load, 0, 0, 0)]
        lines += [(equal, len(calls) - at, 0, number) for at, number in enumerate(calls)]
        lines += [(give, 0, 0, allow), (give, 0, 0, notify)]
        code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in lines))
        program = struct.pack("HxxxxxxQ", len(lines), ctypes.addressof(code))
        libc.prctl(38, 1, 0, 0, 0)  # no new privileges, so that it needs none
        listener = libc.syscall(self._number, 1, 1 << 3, ctypes.create_string_buffer(program))
        if listener < 0:
            raise OSError(ctypes.get_errno(), "seccomp")
        socket.send_fds(self._theirs, [b"."], [listener])
        os.close(listener)

    def _answer(self, pids: list[int]) -> None:
        """In the process that has forked the ranks: answer what the kernel asks, for a moment."""
        with suppress(BlockingIOError):
            for listener in socket.recv_fds(self._ours, 1, 1)[1]:
                self._listeners.register(listener, select.POLLIN)
        for _ in range(200):
            ready = self._listeners.poll(2)
            for listener, event in ready:
                if event & select.POLLIN:
                    self._decide(listener)
                else:  # all that it is about have ended
                    self._listeners.unregister(listener)
                    os.close(listener)
            if not ready:
                return

    def _decide(self, listener: int) -> None:
        asked = bytearray(80)
        try:
            fcntl.ioctl(listener, _RECEIVE, asked)
            number, thread, _, call = struct.unpack_from("QIIi", asked)
            error = self._error(
                thread, self._kinds[call], struct.unpack_from("6Q", asked, 32), call
            )
            told = struct.pack("QqiI", number, 0, -error, 0 if error else _CONTINUE)
            fcntl.ioctl(listener, _SEND, bytearray(told))
        except FileNotFoundError:
            return  # it was killed meanwhile

    def _error(self, thread: int, kind: str, arguments: tuple[int, ...], call: int) -> int:
        """Return the number of the error with which a call ends, or 0."""
        try:
            path = self._path(thread, kind, arguments, call)
        except OSError:
            return 0
        if not path.startswith(self._run):
            return 0
        # safetensors writes to .tmp and six letters or digits, then renames.
        made = Call(kind, re.sub(r"(?<=\.tmp)\w+|\d+", "N", path.removeprefix(self._run)))
        self.seen[made] += 1
        fault = self._fault
        if fault is None or (self.hit and not fault.stays):
            return 0
        if not self.hit and not (made == fault.call and self.seen[made] == fault.number):
            return 0
        if not self.hit:
            steps = Path(self._run).glob("checkpoints/step-*")
            self.there = {step.name for step in steps}
        self.hit = True
        return getattr(errno, fault.error)

    def _path(self, thread: int, kind: str, arguments: tuple[int, ...], call: int) -> str:
        if kind != "rename":
            return os.readlink(f"/proc/{thread}/fd/{arguments[0]}")
        is_plain = platform.machine() == "x86_64" and call == 82
        with open(f"/proc/{thread}/mem", "rb", buffering=0) as memory:
            memory.seek(arguments[0 if is_plain else 1])
            name = os.fsdecode(memory.read(4096).split(b"\0", 1)[0])
        return os.path.join(os.readlink(f"/proc/{thread}/cwd"), name)
