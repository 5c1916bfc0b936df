"""What the campaigns of chaos.py do to a run: damages, configs, files of data, and kills.

Every case is drawn from a seeded generator, and says in a line what it is.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_origin

RUN_TOML = """
job.dump_folder = "FOLDER/outputs"
data = { path = "FOLDER/data", cache_folder = "FOLDER/cache" }
model.tokenizer = "bytes"
model.config = { model_type = "llama", vocab_size = 257, hidden_size = 32, intermediate_size = 48, \
num_hidden_layers = 2, num_attention_heads = 4, num_key_value_heads = 4, \
max_position_embeddings = 128, initializer_range = 0.2, bos_token_id = 256, eos_token_id = 256 }
training = { seq_len = 32, local_batch_size = 2, param_dtype = "float32" }
parallelism = { sequence_parallel_degree = "auto", data_parallel_shard_degree = 1 }
optimizer.lr = 3e-3
lr_scheduler.decay_type = "constant"
checkpoint = { interval = 2, keep_latest_k = 3 }
metrics.enable_report = false
"""


def write_run(folder: Path) -> None:
    """Write run.toml and its data: a tiny llama, 20 files of words."""
    draw = random.Random(0)
    (folder / "data").mkdir(exist_ok=True)
    for number in range(20):
        words = " ".join("".join(draw.choices("etaoinsh", k=draw.randint(1, 9))) for _ in range(30))
        (folder / "data" / f"{number:02d}.txt").write_text(words)
    (folder / "run.toml").write_text(RUN_TOML.replace("FOLDER", str(folder)))


def results(run: Path, step: int) -> Any:
    """Return the numbers of a run: (step, loss, gradient norm), and the hashes of its last tensors.

    The save's own id, and whatever else differs between two equal runs, is not in it.
    """
    found: list[Any] = []
    with contextlib.suppress(OSError):
        for line in (run / "metrics.jsonl").read_text(errors="replace").splitlines():
            values = json.loads(line)
            found.append((values["step"], values.get("loss"), values.get("grad_norm")))
    folder = run / "checkpoints" / f"step-{step}"
    if not folder.is_dir():
        return [*found, "no checkpoint"]
    told = json.loads((folder / "run.json").read_text())
    tensors = {name: entry.get("pieces") for name, entry in told["files"].items()}
    return [*found, told["loader"], tensors]


def contents(folder: Path) -> dict[str, str]:
    """Return a hash of each file in a folder, by name."""
    if not folder.is_dir():
        return {}
    return {
        file.name: hashlib.blake2b(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
        if file.is_file()
    }


def last_lines(text: str) -> str:
    return " / ".join(text.strip().splitlines()[-3:])[-400:]


# --- damage ---------------------------------------------------------------------------------------


class Damage(NamedTuple):
    what: str
    do: Callable[[], None]
    names: tuple[str, ...]
    """What the message must contain, one of them: the file, or the folder if all of it is wrong."""
    is_read: bool = True
    """Whether the run reads what is damaged. If not, it may go on without a word."""
    of_export: bool = False


def draw_damage(draw: random.Random, run: Path) -> Damage:
    """Draw a damage to a stored run that has steps 2, 4 and 6, and an export."""
    place = draw.choices(["newest", "folder", "metrics", "export", "older"], [62, 14, 8, 12, 4])[0]
    if place == "folder":
        return _of_folder(draw, run / "checkpoints")
    if place == "metrics":
        return _of_metrics(draw, run / "metrics.jsonl")
    if place == "export":
        file = draw.choice(sorted((run / "export").iterdir()))
        kind, act = _of_file(draw, file)
        return Damage(f"{kind} of export/{file.name}", act, (file.name,), of_export=True)
    step = run / "checkpoints" / ("step-6" if place == "newest" else "step-4")
    files = sorted(step.iterdir())
    # The two files of tensors are most of a checkpoint.
    weights = [6 if file.suffix == ".distcp" else 2 for file in files]
    file = draw.choices(files, weights)[0]
    if file.name == "run.json" and draw.random() < 0.6:
        kind, act = _of_run_file(draw, file)
    else:
        kind, act = _of_file(draw, file)
    return Damage(
        f"{kind} of {step.name}/{file.name}", act, (file.name,), is_read=place == "newest"
    )


def _of_file(draw: random.Random, file: Path) -> tuple[str, Callable[[], None]]:
    """Return a kind of damage to any file, and what does it."""
    size = file.stat().st_size
    at, bit = draw.randrange(size), draw.randrange(8)
    length = draw.choice([1, 16, 512, 4096])

    def change(edit: Callable[[bytearray], Any]) -> Callable[[], None]:
        def act() -> None:
            data = bytearray(file.read_bytes())
            edit(data)
            if bytes(data) == file.read_bytes():  # zeros over zeros
                data[at] ^= 0xFF
            file.write_bytes(data)

        return act

    def flip(data: bytearray) -> None:
        data[at] ^= 1 << bit

    def overwrite(data: bytearray) -> None:
        data[at : at + length] = draw.randbytes(len(data[at : at + length]))

    def clear(data: bytearray) -> None:
        first = at // length * length
        data[first : first + length] = bytes(len(data[first : first + length]))

    def cut(data: bytearray) -> None:
        del data[at:]

    def as_folder() -> None:
        file.unlink()
        file.mkdir()

    def as_link() -> None:
        file.unlink()
        file.symlink_to(file.with_name("nowhere"))

    kinds: dict[str, tuple[int, Callable[[], None]]] = {
        f"bit {bit} of byte {at} flipped": (8, change(flip)),
        f"{length} random bytes at {at}": (3, change(overwrite)),
        f"block of {length} bytes at {at} zeroed": (5, change(clear)),
        f"cut at byte {at}": (2, change(cut)),
        "a byte more at the end": (1, change(lambda data: data.append(7))),
        "two bytes exchanged": (1, change(lambda data: data.insert(at, data.pop()))),
        "emptied": (1, change(bytearray.clear)),
        "deleted": (1, file.unlink),
        "a folder in place": (1, as_folder),
        "a link to nowhere in place": (1, as_link),
    }
    kind = draw.choices([*kinds], [weight for weight, _ in kinds.values()])[0]
    return kind, kinds[kind][1]


def _of_run_file(draw: random.Random, file: Path) -> tuple[str, Callable[[], None]]:
    """Return a change of a field of run.json, as an editor makes it."""
    told = json.loads(file.read_text())
    key = draw.choice([*told])
    value = draw.choice(
        [None, {}, [], 0, -1, "", "x", 10**9, True, {"sequences_consumed": 0}, {"seed": 1}]
    )
    if value == told[key]:
        value = "another"

    def act() -> None:
        changed = {k: v for k, v in told.items() if k != key or value is not None}
        file.write_text(json.dumps(changed if value is None else changed | {key: value}))

    return f"{key} {'removed' if value is None else f'set to {value!r}'}", act


def _of_folder(draw: random.Random, folder: Path) -> Damage:
    """Return a damage to the checkpoints as folders, or to several files of one."""
    newest, older = folder / "step-6", folder / "step-4"
    tensors = sorted(file.name for file in newest.glob("*.distcp"))
    name = draw.choice([*tensors, ".metadata", "run.json"])

    def swap() -> None:
        first, second = (newest / name for name in tensors)
        data = first.read_bytes(), second.read_bytes()
        for file, other, size in ((first, data[1], len(data[0])), (second, data[0], len(data[1]))):
            file.write_bytes(other[:size].ljust(size, b"\0"))

    def renamed(target: str) -> Callable[[], None]:
        def act() -> None:
            shutil.rmtree(folder / target, ignore_errors=True)
            older.rename(folder / target)

        return act

    def as_file() -> None:
        shutil.rmtree(newest)
        newest.write_text("no folder")

    def emptied() -> None:
        for file in newest.iterdir():
            file.unlink()

    def partial() -> None:
        shutil.copytree(newest, folder / ".step-8.partial")

    def closed() -> None:
        shutil.copytree(newest, folder / "step-²")
        (folder / "step-9x").touch()

    return draw.choice(
        [
            Damage("the two files of tensors exchanged in step-6", swap, tuple(tensors)),
            Damage(
                f"{name} of step-4 in step-6",
                lambda: _copy(older / name, newest / name),
                (name, *tensors, "run.json", ".metadata"),
            ),
            Damage("step-4 renamed to step-6", renamed("step-6"), ("run.json",)),
            Damage("step-4 renamed to step-7", renamed("step-7"), ("run.json",)),
            Damage("a file in place of step-6", as_file, ("run.json",)),
            Damage("step-6 emptied", emptied, ("run.json",)),
            Damage("half a step-8 left by a dead run", partial, (), is_read=False),
            Damage("step-² and step-9x beside the others", closed, (), is_read=False),
        ]
    )


def _copy(source: Path, target: Path) -> None:
    shutil.copy(source, target)


def _of_metrics(draw: random.Random, file: Path) -> Damage:
    line = draw.choice([b"\n", b"{\n", b"[1]\n", b'{"loss": 1}\n', b'{"step": "2"}\n', b"\xff\0\n"])

    def act() -> None:
        lines = file.read_bytes().splitlines(keepends=True)
        lines.insert(draw.randrange(len(lines) + 1), line)
        file.write_bytes(b"".join(lines))

    return Damage(f"line {line!r} in metrics.jsonl", act, ("metrics.jsonl",))


# --- configs --------------------------------------------------------------------------------------

_TEXTS = [
    *("", " ", "none", "none/there", "..", ".", "/", "../x", "a//b", "a/../export", "export"),
    *("tensorboard", "auto", "x" * 300, "x/" * 2500, "é🙂", "-1", "nan", "[1", "{", '"', "\\"),
    *("os:sep", "os:", ":x", "a.b:c", "utf-16", "/dev/null", "/proc/self/mem", "$NOWHERE", "a\nb"),
]
_NUMBERS = [-2, -1, 0, 1, 3, 7, 10**12, 2**63, 10**30, 0.5, -0.0, 1e-300, 1e300]
_NUMBERS += [float("nan"), float("inf"), -float("inf")]
_OTHERS = [True, False, "many", "", [], [1], {}, {"a": 1}, "12", "1e3"]
_LLAMAS: list[dict[str, Any]] = [
    *({"hidden_size": 33}, {"num_attention_heads": 0}, {"vocab_size": -1}),
    *({"num_hidden_layers": "two"}, {"rope_parameters": {"rope_type": "none"}}),
    *({"rope_parameters": {"rope_theta": float("nan")}}, {"quantization_config": {}}),
    {"hidden_act": "none", "hidden_size": 32},
]
_TABLES: list[Any] = [
    {},
    {"model_type": "none"},
    *({"model_type": "llama"} | wrong for wrong in _LLAMAS),
    {"rope_type": "yarn", "factor": float("nan")},
    {"rope_type": "linear", "factor": 1e300},
    {"rope_type": [], "factor": 2},
    {"rope_type": "longrope", "factor": 2, "short_factor": [1], "long_factor": "x"},
    {"factor": 2},
]


def draw_config(draw: random.Random, number: int) -> dict[str, Any]:
    """Draw other values for one or two keys. The first key is each one of the schema in turn."""
    from titan_ulysses.config.schema import KEYS

    keys = [*KEYS]
    chosen = [keys[number % len(keys)]]
    if draw.random() < 0.25:
        chosen.append(draw.choice(keys))
    return {key: _value(draw, key, KEYS[key].annotation) for key in chosen}


def _value(draw: random.Random, key: str, kind: Any) -> Any:
    if draw.random() < 0.15:
        return draw.choice(_OTHERS)
    if kind in (int, float):
        return draw.choice(_NUMBERS)
    if kind is bool:
        # Compilation takes a minute, and works.
        return draw.choice([*_OTHERS[2:], *([] if key == "compile.enable" else [True, False])])
    if get_origin(kind) is list:
        return draw.choice([["*"], [""], ["none.*"], [1], "q_proj", [["a"]], [{"path": "none"}]])
    if get_origin(kind) is tuple:
        return draw.choice([[0.9], [0.9, 1.0], [0.9, "x"], [0.9, 0.9, 0.9], 0.9, [-1, 0]])
    if kind is str or get_origin(kind) is not None and kind is not None and "str" in str(kind):
        # Where it is not refused, a run would write into the root of the file system, or read it.
        is_refused = key in ("job.name", "checkpoint.folder")
        texts = [text for text in _TEXTS if text != "/" or is_refused]
        return draw.choice(texts if "dict" not in str(kind) else _TABLES)
    return draw.choice(_TABLES)


def as_arguments(mutation: dict[str, Any], folder: Path) -> list[str]:
    """Return the arguments that make this change, by a file where TOML can say it."""
    from titan_ulysses.config.toml import to_toml

    lines = [f'extends = "{folder}/run.toml"']
    for key, value in mutation.items():
        section, name = key.split(".", 1)
        lines.append(f"[{section}]\n{name} = {to_toml(value)}")
    text = "\n".join(lines)
    if len({key.split(".")[0] for key in mutation}) < len(mutation):  # a section is there once
        return [f"--{key}={to_toml(value)}" for key, value in mutation.items()]
    (folder / "changed.toml").write_text(text)
    return ["--config", str(folder / "changed.toml")]


# --- files of data --------------------------------------------------------------------------------


class Broken(NamedTuple):
    what: str
    file: str
    settings: dict[str, Any]


_WORDS = "the quick brown fox jumps over the lazy dog " * 8
_LINES: list[tuple[str, bytes]] = [
    ("an empty line", b""),
    ("half a line", b'{"text": "a'),
    ("a list", b"[1, 2]"),
    ("null", b"null"),
    ("a number with 5,000 digits", b'{"text": ' + b"1" * 5000 + b"}"),
    ("another field", b'{"txt": "a"}'),
    ("a number as text", b'{"text": 5}'),
    ("null as text", b'{"text": null}'),
    ("half a character in text", b'{"text": "\\ud800"}'),
    ("half a character in a key", b'{"\\udfff": "a"}'),
    ("bytes that are not UTF-8", b'{"text": "\xff\xfe"}'),
    ("NUL", b"\0\0\0"),
    ("10,000 brackets", b"[" * 10_000),
    ("NaN", b'{"text": NaN}'),
    ("two objects in a line", b'{"text": "a"}{"text": "b"}'),
    ("messages that are none", b'{"messages": "hello"}'),
    ("a message without a role", b'{"messages": [{"content": "a"}]}'),
    ("a role of another type", b'{"messages": [{"role": 5, "content": "a"}]}'),
    ("content of another type", b'{"messages": [{"role": "user", "content": 5}]}'),
    ("tools that are not JSON", b'{"messages": [{"role": "user", "content": "a"}], "tools": "{"}'),
    ("an empty text", b'{"text": ""}'),
    ("a prompt without completion", b'{"prompt": "a"}'),
]
_GOOD = {
    "jsonl": json.dumps({"text": _WORDS, "prompt": _WORDS, "completion": _WORDS}).encode(),
    "chat": json.dumps(
        {"messages": [{"role": role, "content": _WORDS} for role in ("user", "assistant")]}
    ).encode(),
}


def draw_data(draw: random.Random, folder: Path) -> Broken:
    """Write a file of data that is broken in a drawn way, and return the settings that read it."""
    folder.mkdir()
    source = draw.choice(["text", "jsonl", "jsonl", "jsonl", "chat"])
    settings: dict[str, Any] = {"data.source": source, "data.path": str(folder)}
    settings["data.cache_folder"] = str(folder.parent / "cache")
    if draw.random() < 0.4:
        settings["data.bad_lines"] = "skip"
    if draw.random() < 0.15:
        settings["data.packing"] = draw.choice(["none", "best_fit"])
    if source == "jsonl" and draw.random() < 0.2:
        settings |= {"data.prompt_field": "prompt", "data.completion_field": "completion"}
    if source == "chat":
        settings["data.path"] = f"{folder}/*"
    if source == "text":
        what, data = _text(draw)
        name = "a.txt"
    else:
        what, data = _records(draw, _GOOD[source])
        name = draw.choice(["a.jsonl", "a.jsonl", "a.json"])
    if draw.random() < 0.2:
        settings["data.encoding"] = draw.choice(["utf-16", "latin-1", "ascii", "utf-32-be"])
        what += f" read as {settings['data.encoding']}"
    if source != "text" and draw.random() < 0.25:
        packed, name, data = _packed(draw, name, data)
        what += f", {packed}"
    (folder / name).write_bytes(data)
    if draw.random() < 0.06:
        what += _instead_of(draw, folder / name)
    skips = " (skip)" if "data.bad_lines" in settings else ""
    return Broken(f"{source} {name}: {what}{skips}", name, settings)


def draw_flips(draw: random.Random, folder: Path) -> Broken:
    """Write a good file of data, flip bits of it, and return the settings that read it."""
    import datasets
    import pyarrow.parquet

    folder.mkdir()
    datasets.disable_progress_bars()
    texts = [_WORDS[: 20 + number % 7] for number in range(40)]
    records = [{"text": text, "input_ids": [*text.encode()], "note": [1, None]} for text in texts]
    table = pyarrow.Table.from_pylist(records)
    kind = draw.choice(["arrow file", "arrow stream", "saved", "parquet", "jsonl"])
    source = draw.choice(["hf" if kind == "saved" else "jsonl", "tokens"])
    settings: dict[str, Any] = {"data.source": source, "data.path": str(folder)}
    settings["data.cache_folder"] = str(folder.parent / "cache")
    file = folder / f"a.{kind.split()[0]}"
    match kind:
        case "saved":
            datasets.Dataset.from_list(records).save_to_disk(folder)
            file = draw.choice(sorted(folder.glob("*.arrow")) * 4 + sorted(folder.glob("*.json")))
        case "parquet":
            pyarrow.parquet.write_table(table, file, row_group_size=16)
        case "jsonl":
            file.write_text("".join(json.dumps(record) + "\n" for record in records))
        case _:
            settings["data.path"] = str(file)
            new = pyarrow.ipc.new_file if kind == "arrow file" else pyarrow.ipc.new_stream
            with new(str(file), table.schema) as opened:
                opened.write_table(table, max_chunksize=16)
    if draw.random() < 0.5:
        settings["data.bad_lines"] = "skip"
    data = bytearray(file.read_bytes())
    places = [draw.randrange(len(data)) for _ in range(draw.choice([1, 1, 2, 8]))]
    for place in places:
        data[place] ^= 1 << draw.randrange(8)
    file.write_bytes(data)
    what = f"{kind} read as {source}: bits flipped at {sorted(places)}"
    return Broken(what, file.name, settings)


def _text(draw: random.Random) -> tuple[str, bytes]:
    good = _WORDS.encode()
    return draw.choice(
        [
            ("empty", b""),
            ("blank", b" \n\n\t"),
            ("one character", b"a"),
            ("bytes that are not UTF-8", good + b"\xff" + good),
            ("UTF-16", _WORDS.encode("utf-16")),
            ("half a character at the end", good + "é".encode()[:1]),
            ("NUL", b"\0" * 1000),
            ("half of a surrogate pair", good + b"\xed\xa0\x80"),
            ("random bytes", draw.randbytes(2000)),
            ("a mark of UTF-8 alone", b"\xef\xbb\xbf"),
            ("good", good),
        ]
    )


def _records(draw: random.Random, good: bytes) -> tuple[str, bytes]:
    kind = draw.choices(["line", "cut", "whole", "array", "utf-16", "random"], [12, 2, 2, 2, 2, 1])
    lines = [good] * draw.randint(1, 4)
    what, bad = draw.choice(_LINES)
    match kind[0]:
        case "line":
            lines.insert(draw.randrange(len(lines) + 1), bad)
            return what, b"\n".join(lines) + draw.choice([b"", b"\n", b"\r\n"])
        case "cut":
            data = b"\n".join(lines)
            at = draw.randrange(len(data))
            return f"cut at byte {at}", data[:at]
        case "whole":
            return f"nothing but {what}", bad
        case "array":
            return f"an array with {what}", b"[" + b",".join([*lines, bad]) + b"]"
        case "utf-16":
            return "UTF-16", b"\n".join(lines).decode().encode(draw.choice(["utf-16", "utf-16-be"]))
    return "random bytes", draw.randbytes(3000)


def _packed(draw: random.Random, name: str, data: bytes) -> tuple[str, str, bytes]:
    packed = gzip.compress(data)
    at = draw.randrange(len(packed))
    changed = packed[:at] + bytes([packed[at] ^ 0x55]) + packed[at + 1 :]
    return draw.choice(
        [
            ("packed", f"{name}.gz", packed),
            (f"packed and cut at byte {at}", f"{name}.gz", packed[:at]),
            ("named as packed", f"{name}.gz", data),
            ("named as zstandard", f"{name}.zst", packed),
            ("named as parquet", "a.parquet", data),
            ("parquet of nothing but its mark", "a.parquet", b"PAR1" + data + b"PAR1"),
            ("packed with a byte changed", f"{name}.gz", changed),
        ]
    )


def _instead_of(draw: random.Random, file: Path) -> str:
    kind = draw.choice(["a folder", "a link to itself", "a link to nowhere", "a pipe"])
    file.unlink()
    match kind:
        case "a folder":
            file.mkdir()
        case "a link to itself":
            file.symlink_to(file)
        case "a link to nowhere":
            file.symlink_to(file.with_name("nowhere"))
        case _:
            os.mkfifo(file)
    return f", {kind} in place of it"


# --- kills ----------------------------------------------------------------------------------------


class Killer:
    """Kills one rank or all, at a drawn moment: after a time, or while something is written."""

    def __init__(self, draw: random.Random, run: Path, seconds: float) -> None:
        self._begun = time.perf_counter()
        self._moment = draw.choice(["time", "time", "save", "publish", "export", "exported"])
        self._after = draw.uniform(0.05, 1.1) * seconds
        self._delay = draw.choice([0.0, 0.0, draw.uniform(0, 0.05)])
        self._number = draw.randint(1, 4)
        self._all = draw.random() < 0.5
        self._choose = draw.choice
        self._run, self._seen, self._was_there = run, 0, False
        self._dead = 0.0
        when = f"{self._after:.2f} s"
        if self._moment != "time":
            when = self._moment + ("" if "export" in self._moment else f" {self._number}")
        self.what = f"{'all' if self._all else 'one'} at {when}"

    def __call__(self, pids: list[int]) -> None:
        now = time.perf_counter()
        if self._dead:
            # torchrun ends the others when one rank is dead.
            if now - self._dead > 5:
                self._kill(pids)
            return
        if self._is_time(now):
            time.sleep(self._delay)
            self._kill(pids if self._all else [self._choose(pids)])
            self._dead = now

    def _is_time(self, now: float) -> bool:
        checkpoints = self._run / "checkpoints"
        if self._moment == "time":
            return now - self._begun > self._after
        if self._moment == "export":
            return (self._run / ".export.partial").exists()
        if self._moment == "exported":
            return (self._run / "export").exists()
        partial = next(checkpoints.glob(".step-*.partial"), None)
        there = partial is not None
        begins, ends = there and not self._was_there, self._was_there and not there
        self._was_there = there
        self._seen += begins if self._moment == "save" else ends
        return self._seen >= self._number and (begins or ends)

    @staticmethod
    def _kill(pids: list[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
