"""Whether the files that a config names are there, as far as that can be said at once.

What is a name on the hub, and what the files hold, is found later, by those who read them.
"""

from __future__ import annotations

from glob import iglob
from pathlib import Path

from titan_ulysses.config.rules import tables
from titan_ulysses.config.schema import Config, SourceSettings, ValidationSet
from titan_ulysses.config.toml import to_toml
from titan_ulysses.distributed.errors import UserError

GIVE_A_MODEL = (
    "Give a folder with config.json and *.safetensors, or the name of a model on the hub."
)


def path_problems(config: Config) -> list[str]:
    """Return one line for each path of [model], [data], [checkpoint], [loss] and [validation] that
    is not there.
    """
    sources = [
        (f"{place}.path", table.source, table.path)
        for place, table in tables(config)
        if isinstance(table, SourceSettings)
        and (config.validation.enable or not isinstance(table, ValidationSet))
    ]
    if config.validation.enable:
        sources.append(("validation.path", config.data.source, config.validation.path))
    problems = [
        data_is_absent(setting, path)
        for setting, kind, path in sources
        if (kind in ("text", "jsonl") or is_no_hub_name(path)) and path and not _is_there(path)
    ]
    for setting, path in {
        "model.path": config.model.path,
        "model.tokenizer": config.model.tokenizer,
        "checkpoint.initial_load_path": config.checkpoint.initial_load_path,
        "loss.reference": config.loss.reference,
        "loss.teacher": config.loss.teacher,
    }.items():
        # Anything else may be the name of a model on the hub.
        if is_no_hub_name(path) and not _is_there(path):
            problems.append(f"{setting} = {to_toml(path)}: no such folder")
    return problems


def is_no_hub_name(path: str) -> bool:
    """Return whether a path can be nothing but a file or folder: no hub is asked for it."""
    return path.startswith(("/", "./", "../")) or path in (".", "..")


def check_model_path(path: str, *, setting: str = "model.path") -> None:
    """UserError for the path of a model that is not there and can be no name on the hub."""
    if is_no_hub_name(path) and not Path(path).exists():
        raise UserError(f'{setting} = "{path}": no such folder. {GIVE_A_MODEL}')


def data_is_absent(setting: str, path: str) -> str:
    """Return the message for a path of data that stands for nothing."""
    return (
        f'{setting} = "{path}" does not exist: give a file, a folder, or a pattern that matches '
        "files"
    )


def _is_there(path: str) -> bool:
    if "://" in path:  # looked for when it is read
        return True
    try:
        # Megatron's files are named without their endings, as its own option takes them.
        if Path(path).exists() or Path(f"{path}.idx").exists():
            return True
        return next(iglob(path, recursive=True), None) is not None
    except OSError:  # a name that is too long
        return False
