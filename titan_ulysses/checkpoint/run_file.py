"""`run.json` of a checkpoint: what is not a tensor, and the manifest of the files with the tensors.

step        the optimizer steps done; the folder's name has the same number
loader      the position in the data; of a training loop of one's own: loop, what it gave
rng         {"seed": training.seed}, from which the random numbers of every step follow; null
            in a checkpoint that was converted
data        the settings that decide which sequence comes next; of a run of train.py
content     a hash of the documents that were read, by source; of a run of train.py
skipped     how many steps were skipped because they were not finite; of a run of train.py
best        the best validation so far, and its step; of a run of train.py that validates
optimizer   the format of the optimizer's state; null if there is none
parameters  the shape of each parameter by name
frozen      a fingerprint of what is frozen; 0 if nothing is
save_id     the same in every part of one save, and in no other
files       size and hashes of each file, see manifest.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from titan_ulysses.checkpoint.manifest import (
    Damage,
    Pieces,
    check_sizes,
    describe_written,
    read_sealed,
    write_sealed,
)
from titan_ulysses.distributed.atomic import publish_folder

RUN_FILE = "run.json"


def publish(
    partial: Path, final: Path, state: dict[str, Any], pieces: Pieces, *, save_id: str
) -> None:
    """Turn the folder `partial` that DCP has written into the checkpoint `final`.

    Write run.json, and rename the folder when the disk has all of it. Raise `Damage` or OSError if
    it does not hold the `pieces` that the ranks have written.
    """
    files = describe_written(partial, pieces)
    write_sealed(partial / RUN_FILE, {**state, "save_id": save_id, "files": files})
    publish_folder(partial, final)


def read_run_file(folder: Path) -> dict[str, Any]:
    """Return the contents of run.json of a checkpoint.

    That of an earlier version, which has no hashes, has no save_id. Raise `Damage` if run.json is
    not what was written, lacks a field or is that of another step, or if a file is missing or has
    another size. Tensors are not read. Raise OSError if run.json cannot be read.
    """
    try:
        state, is_sealed = read_sealed(folder / RUN_FILE)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Damage(f"{RUN_FILE} is missing") from error
    except IsADirectoryError as error:
        raise Damage(f"{RUN_FILE} is not a file") from error
    if not is_sealed:
        state.setdefault("frozen", 0)
    _expect_fields(state)
    # A file of an earlier version has sizes only. What has lost its checksum is not one.
    if is_sealed != all(isinstance(entry, dict) for entry in state["files"].values()):
        raise Damage(f"{RUN_FILE}: checksum is missing")
    number = folder.name.removeprefix("step-")
    if number != folder.name and number.isdecimal() and int(number) != state["step"]:
        raise Damage(f"{RUN_FILE}: step is {state['step']}, and the folder is named {folder.name}")
    check_sizes(folder, state["files"])
    return state


def expect_fields(state: dict[str, Any], *names: str) -> None:
    """Raise `Damage` if run.json lacks one of these fields."""
    for name in names:
        if name not in state:
            raise Damage(f"{RUN_FILE}: {name} is missing")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_file(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return _is_count(entry)
    if not _is_count(entry.get("bytes")):
        return False
    pieces = entry.get("pieces")
    if pieces is None:
        return isinstance(entry.get("xxh3"), str)
    return isinstance(pieces, list) and all(
        isinstance(piece, list)
        and len(piece) == 3
        and _is_count(piece[0])
        and _is_count(piece[1])
        and isinstance(piece[2], str)
        for piece in pieces
    )


def _table_of(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(is_right, value.values()))


_REQUIRED: dict[str, Callable[[Any], bool]] = {
    "step": _is_count,
    "optimizer": lambda value: value is None or isinstance(value, str),
    "parameters": _table_of(lambda shape: isinstance(shape, list) and all(map(_is_count, shape))),
    "frozen": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "files": lambda value: bool(value) and _table_of(_is_file)(value),
}
_OPTIONAL: dict[str, Callable[[Any], bool]] = {
    "loader": lambda value: (
        isinstance(value, dict)
        and _is_count(value.get("sequences_consumed"))
        and isinstance(value.get("position", {}), dict)
    ),
    "rng": lambda value: (
        isinstance(value, dict) and (value.get("seed", "") is None or _is_count(value.get("seed")))
    ),
    "data": lambda value: isinstance(value, dict),
    "content": _table_of(lambda value: isinstance(value, str)),
    "skipped": _is_count,
    "best": lambda value: (
        isinstance(value, dict)
        and all(_is_count(value.get(key)) for key in ("step", "waited"))
        and isinstance(value.get("value"), float)
        and isinstance(value.get("metric"), str)
        and isinstance(value.get("keep"), bool)
    ),
    "loop": lambda value: isinstance(value, dict),
    "save_id": lambda value: isinstance(value, str),
    "hosts": _table_of(lambda part: isinstance(part, dict) and isinstance(part["ranks"], list)),
}


def _expect_fields(state: dict[str, Any]) -> None:
    expect_fields(state, *_REQUIRED)
    for name, is_right in (_REQUIRED | _OPTIONAL).items():
        if name in state and not is_right(state[name]):
            raise Damage(f"{RUN_FILE}: {name} is {str(state[name])[:60]}, which it cannot be")
