"""A step-N folder: its name, and `run.json` in it, which has what is not a tensor and the manifest.

`checkpoints/step-N/` contains DCP's files (model and optimizer, by parameter name) and `run.json`.
It is written as `.step-N.partial` and renamed when it is complete, so that a folder `step-N` is
always a complete checkpoint, even if the run was killed while saving.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

from titan_ulysses.checkpoint.manifest import (
    Damage,
    PieceHashes,
    describe_written,
    expect_sizes,
    read_json,
    write_json,
)
from titan_ulysses.distributed.atomic import publish_folder
from titan_ulysses.distributed.errors import UserError

RUN_FILE = "run.json"

# --- its name -------------------------------------------------------------------------------------


def steps_in(folder: Path) -> list[int]:
    """Return the steps of the complete checkpoints in a folder that may be absent, in any order.

    Raise OSError if the folder cannot be listed.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    steps = map(step_named, names)
    return [step for step in steps if step is not None]


def step_named(name: str) -> int | None:
    """Return N of the name step-N, written as the trainer writes it; None for another name."""
    number = name.removeprefix("step-")
    is_step = name.startswith("step-") and number.isascii() and number.isdecimal()
    return int(number) if is_step and len(number) < 19 and number == str(int(number)) else None


def step_of(folder: Path) -> int:
    """Return N of a folder step-N. Raise `UserError` if it has another name."""
    step = step_named(folder.name)
    if step is None:
        raise UserError(f"{folder}: a checkpoint is a folder named step-N, as in step-0.")
    return step


# --- run.json -------------------------------------------------------------------------------------

Count = Annotated[int, Field(ge=0)]
_Piece = Annotated[tuple[Count, Count, str], Field(strict=False)]  # a list in JSON


class _Hashed(TypedDict):
    bytes: Count
    xxh3: str


class _InPieces(TypedDict):
    bytes: Count
    pieces: list[_Piece]


class _LoaderState(TypedDict):
    sequences_consumed: Count
    position: NotRequired[dict]


class _Seed(TypedDict):
    seed: Count | None


class _BestState(TypedDict):
    step: Count
    waited: Count
    value: float
    metric: str
    keep: bool


class _Host(TypedDict):
    ranks: list


class RunFile(TypedDict):
    """The fields of run.json. The file may have others."""

    __pydantic_config__ = ConfigDict(strict=True)  # type: ignore[misc]

    step: Count
    """the optimizer steps done; the folder's name has the same number"""
    optimizer: str | None
    """the format of the optimizer's state; null if there is none"""
    parameters: dict[str, list[Count]]
    """the shape of each parameter by name"""
    frozen: int
    """a fingerprint of what is frozen; 0 if nothing is"""
    files: Annotated[dict[str, _Hashed | _InPieces], Field(min_length=1)]
    """size and hashes of each file, see manifest.py"""
    save_id: str
    """the same in every part of one save, and in no other"""
    loader: NotRequired[_LoaderState]
    """the position in the data"""
    loop: NotRequired[dict]
    """what a custom training loop saved instead of loader"""
    rng: NotRequired[_Seed]
    """training.seed, from which the random numbers of every step follow; null in a checkpoint that
    was converted
    """
    data: NotRequired[dict]
    """the settings that decide which sequence comes next; of a run of train.py"""
    content: NotRequired[dict[str, str]]
    """a hash of the documents that were read, by source; of a run of train.py"""
    skipped: NotRequired[Count]
    """how many steps were skipped because they were not finite; of a run of train.py"""
    best: NotRequired[_BestState]
    """the best validation so far, and its step; of a run of train.py that validates"""
    hosts: NotRequired[dict[str, _Host]]
    """the ranks and files of each host, if each has a folder of its own"""


_RUN_FILE = TypeAdapter(RunFile)


def publish(
    partial: Path, final: Path, state: dict[str, Any], pieces: PieceHashes, *, save_id: str
) -> None:
    """Turn the folder `partial` that DCP has written into the checkpoint `final`.

    Write run.json, and rename the folder when the disk has all of it. Raise `Damage` or OSError if
    it does not hold the `pieces` that the ranks have written.
    """
    files = describe_written(partial, pieces)
    write_json(partial / RUN_FILE, {**state, "save_id": save_id, "files": files})
    publish_folder(partial, final)


def read_run_file(folder: Path) -> dict[str, Any]:
    """Return the contents of run.json of a checkpoint.

    Raise `Damage` if run.json is not what was written, lacks a field or is that of another step, or
    if a file is missing or has another size. Tensors are not read. Raise OSError if run.json cannot
    be read.
    """
    try:
        state = read_json(folder / RUN_FILE)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Damage(f"{RUN_FILE} is missing") from error
    except IsADirectoryError as error:
        raise Damage(f"{RUN_FILE} is not a file") from error
    try:
        _RUN_FILE.validate_python(state)
    except ValidationError as error:
        name, *inside = error.errors()[0]["loc"]
        if not inside:
            expect_fields(state, str(name))
        raise Damage(
            f"{RUN_FILE}: {name} is {str(state[str(name)])[:60]}, which is not a valid value"
        ) from error
    if step_named(folder.name) not in (None, state["step"]):
        raise Damage(f"{RUN_FILE}: step is {state['step']}, and the folder is named {folder.name}")
    expect_sizes(folder, state["files"])
    return state


def expect_fields(state: dict[str, Any], *names: str) -> None:
    """Raise `Damage` if run.json lacks one of these fields."""
    for name in names:
        if name not in state:
            raise Damage(f"{RUN_FILE}: {name} is missing")
