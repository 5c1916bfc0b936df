"""Finds and reads the files that a path stands for, in the same order on every machine and rank."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from hashlib import blake2b
from pathlib import Path

from titan_ulysses.config.paths import data_is_absent
from titan_ulysses.distributed.errors import UserError

RAW_BYTES = "bytes"
# All ranks must see the same documents, and installed packages and caches differ between machines.
SKIPPED_FOLDERS = {"__pycache__", "site-packages"}


def section_of(setting: str) -> str:
    """Return the section that holds the keys of the source whose path is set by `setting`.

    Held-out data is read with the keys of [data].
    """
    own = setting.removesuffix(".path")
    return "data" if own in ("validation", "validation.split: data") else own


def find_files(
    path: str | Path, *, extensions: Sequence[str], setting: str = "data.path"
) -> dict[str, Path]:
    """Return {name: file} for the files under `path` that are not empty, sorted by name.

    `path` is a file, a folder, or a pattern such as `books/**/*.txt`. A folder is walked
    recursively, without hidden files and folders, `__pycache__`, `site-packages` and links to
    folders; a name is the POSIX path relative to the folder. Only the files of a folder are
    filtered by `extensions`, which are compared case-insensitively; ".md" and "md" are the same.

    Raise `UserError`, which names `setting`, if the path does not exist, no file matches, or all
    files are empty.
    """
    root = Path(path)
    if root.is_file():
        files = {root.name: root}
    elif root.is_dir():
        files = _files_of_folder(root, extensions, setting)
    elif matches := sorted(
        file for file in map(Path, glob(str(path), recursive=True)) if file.is_file()
    ):
        files = {file.as_posix(): file for file in matches}
    else:
        raise UserError(data_is_absent(setting, str(path)))
    files = {name: file for name, file in files.items() if file.stat().st_size > 0}
    if not files:
        raise UserError(
            f'{setting} = "{path}" contains only empty files: give a file or folder with text in it'
        )
    return files


def _files_of_folder(root: Path, extensions: Sequence[str], setting: str) -> dict[str, Path]:
    """Return {relative POSIX path: file} of those with an extension, sorted by code point.

    The order of `os.walk` depends on the file system.
    """

    def refuse(error: OSError) -> None:
        raise UserError(
            f"{setting}: cannot read the folder {error.filename} ({error.strerror})"
        ) from error

    files: list[Path] = []
    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = [
            name for name in subfolders if not name.startswith(".") and name not in SKIPPED_FOLDERS
        ]
        visible = (Path(folder, name) for name in names if not name.startswith("."))
        files += filter(Path.is_file, visible)  # without sockets and broken links
    wanted = tuple(sorted({"." + extension.lower().lstrip(".") for extension in extensions}))
    matching = [file for file in files if file.name.lower().endswith(wanted)]
    if not matching:
        found = Counter(file.suffix.lower() or "without extension" for file in sorted(files))
        there = (
            ", ".join(f"{count} {suffix}" for suffix, count in found.most_common(8))
            or "no files at all"
        )
        raise UserError(
            f'{setting} = "{root}" has no file that ends in {" ".join(wanted)} (found: {there}): '
            f"change {section_of(setting)}.extensions or the path"
        )
    return dict(sorted((file.relative_to(root).as_posix(), file) for file in matching))


def digest(files: dict[str, Path]) -> str:
    """Return one hash of the names and contents of the files.

    Contents are read, so that a change is found even if size and modification time stay the same.
    """
    with ThreadPoolExecutor() as threads:  # hashing releases the GIL
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
    """Return the text of the file, or its bytes if `encoding` is "bytes".

    Raise `UserError` if the file cannot be read, or is not valid in `encoding`.
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
    """Raise `UserError` if Python has no such text codec."""
    if encoding == RAW_BYTES:
        return
    try:
        b" ".decode(encoding)  # not b"": Python would not look up the codec
    except LookupError as error:
        raise UserError(
            f'{section_of(setting)}.encoding = "{encoding}" is not a text codec that Python knows: '
            'use "utf-8", "latin-1" ... or "bytes"'
        ) from error
    except UnicodeError:
        pass  # the codec exists, but its units are wider than a byte (utf-16)
