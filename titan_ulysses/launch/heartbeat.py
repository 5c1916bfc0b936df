"""What each rank is in: it tells torchrun's store every second, so that a hang can be named.

A rank that hangs cannot say so. The others ask the store: whose heart has stopped, what was it in,
and what did the others wait for.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from titan_ulysses.launch import run_store

if TYPE_CHECKING:
    from torch.distributed import TCPStore

_WAITS = "torch/distributed/"
"""Part of the paths of code that waits for other ranks."""
_GIVES_UP = "launch/failure.py"
"""Part of the path of the code that a rank runs after it has timed out."""
_MOST_NAMED = 4

_PACKAGE = str(Path(__file__).resolve().parents[1])
_beats = itertools.count()


class _ThisRank:
    """This process: the part of the run that it is in, and where it leaves its stacks."""

    part = "the start"
    stacks: Path | None = None


def enter(part: str) -> None:
    """Note which part of the run this rank enters, such as "step 7"."""
    _ThisRank.part = part or "the end"


def keep_stacks_in(folder: Path) -> None:
    """Note the folder where the stacks of the ranks go if the run hangs."""
    _ThisRank.stacks = folder


def beat(store: TCPStore, rank: int) -> None:
    """Tell the store that this rank is alive, and what its main thread is in."""
    alive = {"beat": next(_beats), "host": run_store.host_name(), "part": _ThisRank.part}
    run_store.put(store, f"alive/{rank}", alive | _place())


def read(store: TCPStore, ranks: int) -> list[dict[str, Any]]:
    """Return the last beat of each rank; {} of one that has none."""
    keys = [run_store.key(f"alive/{rank}") for rank in range(ranks)]
    if store.check(keys):
        return [json.loads(value) for value in store.multi_get(keys)]
    return [json.loads(store.get(key)) if store.check([key]) else {} for key in keys]


def describe_silent(beat_: dict[str, Any]) -> str:
    """Return what a rank that is silent was in, as " (it was in step 3, in ...)"."""
    return f" (it was in {beat_['part']}, {beat_['place']})" if beat_ else ""


def describe_dead(seconds: float) -> str:
    """Return which ranks are silent, on which hosts and in what, as "rank 2 on b (it was in step 3,
    in ...)"; empty if none is. Asks the store twice. Raise ConnectionError if it does not answer.
    """
    silent, now = _silent(seconds)
    named = [
        f"rank {rank} on {now[rank].get('host', 'its host')}{describe_silent(now[rank])}"
        for rank in silent[:_MOST_NAMED]
    ]
    if len(silent) > _MOST_NAMED:
        named.append(f"{len(silent) - _MOST_NAMED} more")
    return " and ".join(named)


def describe_hang(error: BaseException, seconds: float) -> str:
    """Return who does not answer, what it was in, and what this rank waited for; empty: unknown.

    error: that of the collective that has given up. Asks the store twice. A rank whose beat has
    stopped is stopped or cut off. Otherwise those are meant that are alive, and neither wait for
    others nor have given up themselves. Raise ConnectionError if the store does not answer.
    """
    own, size = run_store.rank_and_size()
    silent, now = _silent(seconds)
    busy = [rank for rank in range(size) if rank != own and not now[rank].get("waits", True)]
    if not (guilty := silent or busy):
        return ""
    what = "gives no sign of life" if silent else "is at work on something else"
    unknown = {"host": "its host", "part": "the start", "place": "a place unknown"}
    named = [
        "rank {} on {host} {}: it is in {part}, {place}".format(rank, what, **unknown | now[rank])
        for rank in guilty[:_MOST_NAMED]
    ]
    if len(guilty) > _MOST_NAMED:
        named.append(f"and {len(guilty) - _MOST_NAMED} more")
    frames = [*traceback.walk_tb(error.__traceback__)][::-1]
    waited = f", {_names(frames)}" if frames else ""
    return f"{'; '.join(named)}. Rank {own} waited for it in {_ThisRank.part}{waited}"


def _silent(seconds: float) -> tuple[list[int], list[dict[str, Any]]]:
    """Return the other ranks whose beat has stopped for so long, and the last beat of each rank.

    Raise ConnectionError if the store does not answer.
    """
    own, size = run_store.rank_and_size()

    def ask() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        store = run_store.connect()
        first = read(store, size)
        time.sleep(seconds)
        return first, read(store, size)

    answer = run_store.within(seconds + 3.0, ask)
    if answer is None:
        raise ConnectionError
    before, now = answer
    return [rank for rank in range(size) if rank != own and before[rank] == now[rank]], now


def write_stacks() -> Path | None:
    """Write the stacks of all threads of this rank to a file, and return its folder.

    In an `except` block the traceback comes first: the stack where the error was is gone.
    """
    folder = _ThisRank.stacks
    if folder is None:
        return None
    with suppress(OSError, ValueError):
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"rank-{run_store.rank_and_size()[0]}.txt", "w") as file:
            if sys.exc_info()[0]:
                file.write(traceback.format_exc() + "\n")
                file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        return folder
    return None


def _place() -> dict[str, Any]:
    """Return where the main thread is, in words, and whether it waits there for other ranks."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    frames = [*traceback.walk_stack(frame)] if frame else []
    if not frames:
        return {"place": "unknown", "waits": False}
    files = [one.f_code.co_filename for one, _ in frames]
    waits = _WAITS in files[0] or any(_GIVES_UP in file for file in files)
    return {"place": _names(frames), "waits": waits}


def _names(frames: list[tuple[FrameType, int]]) -> str:
    """Name the innermost frame, and the innermost one of this package if that is another."""
    own = next((one for one in frames if _PACKAGE in one[0].f_code.co_filename), frames[0])
    called_by = f", called by {_name(*own)}" if own is not frames[0] else ""
    return _name(*frames[0]) + called_by


def _name(frame: FrameType, line: int) -> str:
    path = Path(frame.f_code.co_filename)
    return f"{frame.f_code.co_name} ({'/'.join(path.parts[-2:])}:{line})"
