"""Which files a path stands for, in the same order on every machine and rank, and what is in
them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from hashlib import blake2b
from pathlib import Path

from titan_ulysses.distributed.errors import UserError

RAW_BYTES = "bytes"
# Installed packages and caches differ from machine to machine; ranks must all see the same
# documents.
SKIPPED_FOLDERS = {"__pycache__", "site-packages"}


def section_of(setting: str) -> str:
    """Where the keys of the source are whose path is `setting`; held-out data is read as [data]
    says.
    """
    return "data" if setting.startswith("validation") else setting.removesuffix(".path")


def find_files(
    path: str | Path, *, extensions: Sequence[str], setting: str = "data.path"
) -> dict[str, Path]:
    """Name -> file for each file under `path` that is not empty, sorted by the name, its POSIX path
    below `path`.

    `path` is a file, a pattern such as `books/**/*.txt` (then whatever the extension), or a folder,
    walked recursively without hidden files and folders, `__pycache__`, `site-packages` and links to
    folders. `extensions` are compared without case, ".md" and "md" alike.

    Raises `UserError`, naming `setting`: no such path, no matching file, only empty files.
    """
    root = Path(path)
    if root.is_file():
        files = {root.name: root}
    elif root.is_dir():
        files = _matching_files(root, extensions, setting)
    elif matches := sorted(
        file for file in map(Path, glob(str(path), recursive=True)) if file.is_file()
    ):
        files = {file.as_posix(): file for file in matches}
    else:
        raise UserError(
            f'{setting} = "{path}" is not there: give a file, a folder, or a pattern that matches '
            "files"
        )
    files = {name: file for name, file in files.items() if file.stat().st_size > 0}
    if not files:
        raise UserError(
            f'{setting} = "{path}" has nothing but empty files: give a file or folder with text in '
            "it"
        )
    return files


def _matching_files(root: Path, extensions: Sequence[str], setting: str) -> dict[str, Path]:
    wanted = {"." + extension.lower().lstrip(".") for extension in extensions}
    files = _walk(root, setting)
    matching = {
        name: file for name, file in files.items() if file.name.lower().endswith(tuple(wanted))
    }
    if not matching:
        found = Counter(file.suffix.lower() or "without extension" for file in files.values())
        there = (
            ", ".join(f"{count} {suffix}" for suffix, count in found.most_common(8))
            or "no files at all"
        )
        raise UserError(
            f'{setting} = "{root}" has no file that ends in {" ".join(sorted(wanted))} (found: '
            f"{there}): change {section_of(setting)}.extensions or the path"
        )
    return matching


def _walk(root: Path, setting: str) -> dict[str, Path]:
    """Relative POSIX path -> file, sorted by code point (`os.walk` goes in the file system's
    order).
    """

    def refuse(error: OSError) -> None:
        raise UserError(
            f"{setting}: cannot read the folder {error.filename} ({error.strerror})"
        ) from error

    files = {}
    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = [
            name for name in subfolders if not name.startswith(".") and name not in SKIPPED_FOLDERS
        ]
        for file in (Path(folder, name) for name in names if not name.startswith(".")):
            if file.is_file():  # not a socket, not a dangling link
                files[file.relative_to(root).as_posix()] = file
    return dict(sorted(files.items()))


def digest(files: dict[str, Path]) -> str:
    """One hash of names and contents: a file that changes without its size or time gets another
    one.
    """
    with ThreadPoolExecutor() as threads:  # hashing does not hold Python's lock
        contents = threads.map(_digest_of_file, files.values())
        return blake2b(
            repr([*zip(files, contents, strict=True)]).encode(), digest_size=16
        ).hexdigest()


def _digest_of_file(file: Path) -> str:
    found = blake2b(digest_size=16)
    with open(file, "rb") as opened:
        while block := opened.read(2**22):
            found.update(block)
    return found.hexdigest()


def read_text(file: Path, encoding: str, setting: str) -> str | bytes:
    """The file's text, or its bytes where `encoding` is "bytes". UserError where it is not valid in
    `encoding`.
    """
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise UserError(
            f"{setting}: {file} cannot be read ({error.strerror}): repair it, or leave it out"
        ) from error
    if encoding == RAW_BYTES:
        return raw
    try:
        return raw.decode(encoding)
    except UnicodeError as error:
        offset, key = getattr(error, "start", 0), f"{section_of(setting)}.encoding"
        raise UserError(
            f'{setting}: {file} is not {encoding} text at byte {offset} ({key} = "{encoding}"): '
            f'set {key} to the right codec, or to "bytes" with model.tokenizer = "bytes", or '
            "convert the file"
        ) from error


def check_codec(encoding: str, setting: str) -> None:
    """UserError where Python has no such text codec."""
    if encoding == RAW_BYTES:
        return
    try:
        b" ".decode(encoding)  # one byte: Python does not look the codec up for none
    except LookupError as error:
        raise UserError(
            f'{section_of(setting)}.encoding = "{encoding}" is not a text codec that Python knows: '
            'use "utf-8", "latin-1" ... or "bytes"'
        ) from error
    except UnicodeError:
        pass  # a codec of wider units, such as utf-16
