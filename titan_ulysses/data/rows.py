"""Opens the rows of a source: text files, files of records, or a Hugging Face data set."""

from __future__ import annotations

from pathlib import Path

from titan_ulysses.config.schema import SourceSettings
from titan_ulysses.data.datasets import DatasetRows, is_saved_dataset
from titan_ulysses.data.files import check_codec
from titan_ulysses.data.sources import RECORD_EXTENSIONS, RecordRows, Rows, TextRows
from titan_ulysses.data.tokens import TOKEN_EXTENSIONS
from titan_ulysses.distributed.errors import UserError


def open_rows(source: SourceSettings, setting: str = "data.path") -> Rows:
    """Return the rows of `source`, whose path is called `setting` in messages.

    Raise `UserError` for what is wrong before the first row is read: a missing path, data set,
    split or field, or an unknown codec.
    """
    check_codec(source.encoding, setting)
    if source.source == "text":
        return TextRows(source, setting)
    if source.source == "hf" or is_saved_dataset(source.path):
        return DatasetRows(source, setting)
    if source.source != "jsonl" and not _has_files(source.path):
        return DatasetRows(source, setting)
    for key, value in {"split": source.split, "subset": source.subset}.items():
        if value != SourceSettings.model_fields[key].default:
            raise UserError(
                f'{setting} = "{source.path}" are files, which have no {key} "{value}": give a '
                "data set"
            )
    return RecordRows(source, setting)


def _has_files(path: str) -> bool:
    """Return whether a path of chats, pairs or tokens stands for files, not for the name of a data
    set.

    A path that looks like a file or a pattern is never the name of a data set.
    """
    return (
        Path(path).exists()
        or any(sign in path for sign in "*?[")
        or path.lower().endswith((*RECORD_EXTENSIONS, *TOKEN_EXTENSIONS))
    )
