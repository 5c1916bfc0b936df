"""Sources in object stores, s3:// and gs:// and all that fsspec reads: copied to this host once."""

from __future__ import annotations

import json
import os
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import Any

from titan_ulysses.distributed.atomic import whole_file
from titan_ulysses.distributed.errors import UserError, one_line

_WILD = "*?["


def is_remote(path: str) -> bool:
    """Return whether a path is a URL, such as s3://bucket/folder."""
    return "://" in path


def fetched(url: str, setting: str) -> str:
    """Return the local copy of what a URL names: a file, or the folder of a folder or pattern.

    A file is copied if it is not there, or if the store says that it is another one than last time
    (by its checksum, size or time). The ranks of a host wait for the one that copies. UserError if
    the store cannot be read.
    """
    from filelock import FileLock

    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "titan_ulysses"
    folder = home / "remote" / blake2b(url.encode(), digest_size=16).hexdigest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            return str(_copy(url, folder))
    except ImportError as error:
        raise UserError(
            f'{setting} = "{url}": {one_line(error)} (pip install "titan-ulysses[cloud]" has s3fs '
            "and gcsfs)"
        ) from error
    except Exception as error:  # of any kind, depending on the store
        raise UserError(
            f'{setting} = "{url}" cannot be read ({type(error).__name__}: {one_line(error)}): '
            "check the name, the network and the credentials of this host"
        ) from error


def _copy(url: str, folder: Path) -> Path:
    import fsspec

    store, place = fsspec.core.url_to_fs(url)
    is_pattern = any(sign in place for sign in _WILD)
    is_folder = is_pattern or store.isdir(place)
    root = place
    if is_pattern:
        while any(sign in root for sign in _WILD):
            root = str(PurePosixPath(root).parent)
        names = [name for name in store.glob(place) if not store.isdir(name)]
    else:
        names = store.find(place) if is_folder else [place]
    if not names:
        raise FileNotFoundError("nothing is there")
    note, files = folder / "copied.json", folder / "files"
    known: dict[str, str] = json.loads(note.read_text()) if note.exists() else {}
    states = {name: str(store.ukey(name)) for name in sorted(names)}
    root = root if is_folder else str(PurePosixPath(place).parent)
    copies = {name: files / PurePosixPath(name).relative_to(root).as_posix() for name in states}
    for name, local in copies.items():
        if known.get(name) != states[name] or not local.exists():
            _download(store, name, local)
    for file in [*files.rglob("*")]:  # what the store has no more
        if file.is_file() and file not in copies.values():
            file.unlink()
    with whole_file(note) as partial:
        partial.write_text(json.dumps(states))
    return files if is_folder else copies[place]


def _download(store: Any, name: str, local: Path) -> None:
    local.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(local) as partial:
        store.get_file(name, str(partial))
