"""Which kind of source a path is: text files, files of records, or a data set of Hugging Face."""

from __future__ import annotations

from pathlib import Path

from titan_ulysses.config.schema import SourceSettings
from titan_ulysses.data.datasets import DatasetRows, is_saved_dataset
from titan_ulysses.data.files import check_codec
from titan_ulysses.data.sources import RECORD_EXTENSIONS, RecordRows, Rows, TextRows
from titan_ulysses.distributed.errors import UserError


def open_rows(source: SourceSettings, setting: str = "data.path") -> Rows:
    """The rows of `source`, whose path is called `setting` in messages.

    Raises `UserError` for what can be known before the first row: nothing at the path, no such data
    set, split or field, an unknown codec.
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
    """Whether the path of a chat means files, not the name of a data set: a file's name is no data
    set's.
    """
    return (
        Path(path).exists()
        or any(sign in path for sign in "*?[")
        or path.lower().endswith(tuple(RECORD_EXTENSIONS))
    )
