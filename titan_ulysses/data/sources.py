"""Where documents come from. A source yields (name, text), in the same order on every machine and rank."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from glob import glob
from pathlib import Path

from titan_ulysses.errors import UserError

RAW_BYTES = "bytes"
# Installed packages and caches differ from machine to machine; ranks must all see the same documents.
SKIPPED_FOLDERS = {"__pycache__", "site-packages"}


def text_documents(
    path: str | Path, *, extensions: Sequence[str], encoding: str = "utf-8", setting: str = "data.path"
) -> Iterator[tuple[str, str | bytes]]:
    """Each file under `path` as a document: (its POSIX path relative to `path`, its text), sorted by that path.

    `path` is a file, a pattern such as `books/**/*.txt` (then whatever the extension), or a folder, walked recursively
    without hidden files and folders, `__pycache__`, `site-packages` and links to folders. `extensions` are compared
    without case, ".md" and "md" alike. Empty files are left out. `encoding` is a Python codec, or "bytes" for the
    files' raw bytes.

    Raises `UserError`, naming `setting`, before the first document: no such path, no matching file, only empty files,
    an unknown codec; at its turn: a file that is not valid in `encoding`.
    """
    root = Path(path)
    _check_codec(encoding)
    if root.is_file():
        files = {root.name: root}
    elif root.is_dir():
        files = _matching_files(root, extensions, setting)
    elif matches := sorted(file for file in map(Path, glob(str(path), recursive=True)) if file.is_file()):
        files = {file.as_posix(): file for file in matches}
    else:
        raise UserError(f'{setting} = "{path}" is not there: give a file, a folder, or a pattern that matches files')
    files = {name: file for name, file in files.items() if file.stat().st_size > 0}
    if not files:
        raise UserError(f'{setting} = "{path}" has nothing but empty files: give a file or folder with text in it')
    return ((name, _read(file, encoding, setting)) for name, file in files.items())


def _matching_files(root: Path, extensions: Sequence[str], setting: str) -> dict[str, Path]:
    wanted = {"." + extension.lower().lstrip(".") for extension in extensions}
    files = _walk(root, setting)
    matching = {name: file for name, file in files.items() if file.suffix.lower() in wanted}
    if not matching:
        found = Counter(file.suffix.lower() or "without extension" for file in files.values())
        there = ", ".join(f"{count} {suffix}" for suffix, count in found.most_common(8)) or "no files at all"
        raise UserError(
            f'{setting} = "{root}" has no file that ends in {" ".join(sorted(wanted))} (found: {there}): '
            "change data.extensions or the path"
        )
    return matching


def _walk(root: Path, setting: str) -> dict[str, Path]:
    """Relative POSIX path -> file, sorted by code point (`os.walk` goes in the file system's order)."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{setting}: cannot read the folder {error.filename} ({error.strerror})") from error

    files = {}
    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in SKIPPED_FOLDERS]
        for file in (Path(folder, name) for name in names if not name.startswith(".")):
            if file.is_file():  # not a socket, not a dangling link
                files[file.relative_to(root).as_posix()] = file
    return dict(sorted(files.items()))


def _read(file: Path, encoding: str, setting: str) -> str | bytes:
    raw = file.read_bytes()
    if encoding == RAW_BYTES:
        return raw
    try:
        return raw.decode(encoding)
    except UnicodeError as error:
        offset = getattr(error, "start", 0)
        raise UserError(
            f'{setting}: {file} is not {encoding} text at byte {offset} (data.encoding = "{encoding}"): '
            'set data.encoding to the right codec, or to "bytes" with model.tokenizer = "bytes", or convert the file'
        ) from error


def _check_codec(encoding: str) -> None:
    if encoding == RAW_BYTES:
        return
    try:
        b" ".decode(encoding)  # one byte: Python does not look the codec up for none
    except LookupError as error:
        raise UserError(
            f'data.encoding = "{encoding}" is not a text codec that Python knows: use "utf-8", "latin-1" ... or "bytes"'
        ) from error
    except UnicodeError:
        pass  # a codec of wider units, such as utf-16
