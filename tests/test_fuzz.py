"""Mutants of the files that a run reads from elsewhere: none is executed, all end in a message.

`.metadata` of a checkpoint (a pickle), headers of safetensors, and their index.
"""

from __future__ import annotations

import json
import pickle
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from helpers.ranks import run_on_ranks
from helpers.runs import Settings, train, write_run
from titan_ulysses.checkpoint import safetensors as weights
from titan_ulysses.checkpoint.manifest import Damage, entry_of
from titan_ulysses.checkpoint.storage import open_checkpoint
from titan_ulysses.distributed.errors import UserError

MUTANTS = 100
"""Of each kind of file."""
FORBIDDEN = {
    "os.system",
    "subprocess.Popen",
    "exec",
    "compile",
    "os.exec",
    "os.posix_spawn",
    "import",
}
FORBIDDEN |= {"socket.connect", "shutil.rmtree", "os.remove", "os.rename", "os.mkdir"}
SETTINGS: Settings = {"training.steps": 1, "lr_scheduler.warmup_steps": 0}


def mutate(data: bytes, draw: random.Random) -> bytes:
    """Change bytes as a fuzzer does: flips, cuts, repeats, numbers that are large, and code."""
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 8])):
        at = draw.randrange(len(changed) or 1)
        length = draw.choice([1, 2, 8, 64])
        match draw.randrange(7):
            case 0:
                changed[at : at + 1] = bytes([draw.randrange(256)])
            case 1:
                del changed[at : at + length]
            case 2:
                changed[at:at] = changed[at : at + length]
            case 3:
                changed[at : at + 8] = draw.choice([b"\xff" * 8, b"\0" * 8, b"\x80" + b"\0" * 7])
            case 4:
                changed[at:at] = draw.choice(INSERTED)
            case 5:
                del changed[at:]
            case _:
                other = draw.randrange(len(changed) or 1)
                changed[at : at + length] = changed[other : other + length]
    return bytes(changed) if bytes(changed) != data else mutate(data, draw)


INSERTED = [
    b"cos\nsystem\n(S'touch executed'\ntR.",
    b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x0copen('x','w')\x85R.",
    b'cbuiltins\nexec\n(S\'open("executed","w")\'\ntR',
    b"c__builtin__\n__import__\n(S'this'\ntR",
    b"ctorch\nload\n(S'x'\ntR",
    b'"../../../etc/passwd"',
    b'{"a": ' * 50,
    b"1e999, ",
    b'"dtype":"F64","shape":[-1,99999999999],',
    b"\\ud800",
    b"[" * 3000,
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one step, with its checkpoint and export."""
    config = write_run(tmp_path_factory.mktemp("fuzzed"))
    settings = SETTINGS | {"checkpoint.export": True, "training.global_batch_size": 2}
    run_on_ranks(1, train, config, settings)
    return config.parent / "outputs" / "run"


class Heard:
    """The events of Python's audit hook that no reading of a file needs, while it listens."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.listens = False
        sys.addaudithook(self._hear)  # it stays

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.listens and event in FORBIDDEN:
            name = str(arguments[0]) if arguments else ""
            # Modules that the readers themselves import, once.
            if not (event == "import" and name.split(".")[0] in HARMLESS):
                self.events.append(f"{event} {name}"[:200])


HARMLESS = {"torch", "numpy", "transformers", "safetensors", "json", "encodings", "titan_ulysses"}
HARMLESS |= {"pickle", "_pickle", "copyreg", "collections", "traceback", "linecache", "tokenize"}


def read_all(read: Callable[[Path], Any], folder: Path, file: str, heard: Heard) -> dict[str, int]:
    """How many of the mutants of a file in the folder were read, and how many refused."""
    original, found = (folder / file).read_bytes(), {"read": 0, "refused": 0}
    size = len(original)
    if file.endswith(".safetensors"):
        size = 8 + int.from_bytes(original[:8], "little")  # the header alone is parsed
    for number in range(MUTANTS):
        draw = random.Random(f"{file}/{number}")
        (folder / file).write_bytes(mutate(original[:size], draw) + original[size:])
        heard.listens = True
        try:
            read(folder)
            found["read"] += 1
        except (UserError, Damage) as error:
            assert str(error) and "\n" not in str(error).strip(), (number, str(error))
            found["refused"] += 1
        finally:
            heard.listens = False
    (folder / file).write_bytes(original)
    return found


@pytest.fixture(scope="module")
def heard() -> Heard:
    return Heard()


def test_mutants_of_metadata(run: Path, tmp_path: Path, heard: Heard) -> None:
    """With its own hash, as in a checkpoint that was forged: the unpickler alone must hold."""

    def read(path: Path) -> Any:
        return open_checkpoint(path, {".metadata": entry_of(path / ".metadata")}, where="it")

    folder = tmp_path / "step-1"
    shutil.copytree(run / "checkpoints" / "step-1", folder)
    found = read_all(read, folder, ".metadata", heard)
    assert heard.events == []
    assert found["refused"] > MUTANTS / 2
    # That the hook hears: what these mutants would do under Python's own unpickler.
    heard.listens = True
    pickle.loads(b"cos\nsystem\n(S'true'\ntR.")
    heard.listens = False
    assert "os.system" in heard.events.pop()[:9]


@pytest.mark.parametrize("file", ["model.safetensors", "model.safetensors.index.json"])
def test_mutants_of_safetensors(file: str, run: Path, tmp_path: Path, heard: Heard) -> None:
    folder = tmp_path / "export"
    shutil.copytree(run / "export", folder)
    if file.endswith("json"):
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        with safe_open(folder / "model-00001-of-00001.safetensors", "pt") as opened:
            names = dict.fromkeys(opened.keys(), "model-00001-of-00001.safetensors")
        (folder / file).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    found = read_all(read_headers, folder, file, heard)
    assert heard.events == []
    assert found["refused"] > MUTANTS / 3, found


def read_headers(folder: Path) -> None:
    weights.find(str(folder), setting="model.path")
