"""Hugging Face data sets: folders written by `save_to_disk`, and whatever `load_dataset` reads (a
folder or a name on the hub).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from titan_ulysses.config.schema import SourceSettings
from titan_ulysses.data.files import section_of
from titan_ulysses.data.sources import BadRow, Row, Rows, field_names, read_record
from titan_ulysses.distributed.errors import UserError, one_line

_SHUFFLE_ROWS = 1000


class DatasetRows(Rows):
    """The rows of one split of a data set.

    With `source.streaming` rows are read when they are needed, and nothing is written to disk.
    """

    def __init__(self, source: SourceSettings, setting: str) -> None:
        super().__init__()
        self.source, self.setting = source, setting
        with _quiet():
            self.dataset = self._open()
        if source.source == "tokens":
            self.dataset = self.dataset.with_format("numpy")  # not a Python number for each token
        names = self.dataset.column_names  # None for a stream that does not know its columns yet
        for name in field_names(source) if names is not None else []:
            if name not in names:
                raise UserError(
                    f'{setting} = "{source.path}" has no field "{name}" (it has '
                    f"{', '.join(names)}); text_field, prompt_field and completion_field, "
                    "messages_field, or chosen_field and rejected_field say which is read, and of "
                    "tokens it is input_ids"
                )
        self.total = None if source.streaming else len(self.dataset)

    def __iter__(self) -> Iterator[Row | BadRow]:
        return self._read(self.dataset, skip=0)

    def shuffled(self, seed: int, *, skip: int = 0) -> Iterator[Row | BadRow]:
        """Yield the rows of a stream in the order given by `seed`, from row `skip` on.

        The order of the files is shuffled, and the order of rows within a buffer. The rows before
        `skip` are read again, though not tokenized, because reading cannot start in the middle of a
        shuffle buffer.
        """
        return self._read(self.dataset.shuffle(seed=seed, buffer_size=_SHUFFLE_ROWS), skip=skip)

    def fingerprint(self) -> str:
        # A private attribute, but the key of the data set's own cache.
        return self.dataset._fingerprint

    def _read(self, dataset: Any, *, skip: int) -> Iterator[Row | BadRow]:
        from datasets.exceptions import DatasetsError
        from pyarrow import ArrowException

        self.done = skip
        try:
            if not self.source.streaming:
                self.dataset.data.validate(full=True)  # streams: see `_open`
            for record in islice(dataset, skip, None):
                self.done += 1
                yield read_record(record, self.source, f"row {self.done}")
        except (OSError, ValueError, ArrowException, DatasetsError) as error:
            raise self._refusal(
                f"cannot be read from row {self.done + 1} on ({one_line(error)})"
            ) from error

    def _open(self) -> Any:
        import datasets

        source = self.source
        if is_saved_dataset(source.path):
            try:
                found = datasets.load_from_disk(source.path)
            except Exception as error:  # of any kind, depending on what is damaged
                raise self._refusal(f"cannot be opened ({one_line(error)})") from error
            if isinstance(found, datasets.DatasetDict):
                if source.split not in found:
                    there = ", ".join(found)
                    raise self._refusal(
                        f'has no split "{source.split}" but {there}: set {self._key("split")}'
                    )
                found = found[source.split]
            if not source.streaming:
                return found
            rows = found.to_iterable_dataset().with_format("arrow")
            rows = rows.map(_validated, batched=True, features=found.features)
            return rows.with_format(None)
        try:
            return datasets.load_dataset(
                source.path,
                source.subset or None,
                split=source.split,
                streaming=source.streaming,
                trust_remote_code=False,  # versions of datasets before 4 would ask the user
            )
        except ConnectionError as error:
            raise self._refusal(
                f"is no folder here, and the hub cannot be reached ({one_line(error)}): on a "
                "machine with network, "
                f'datasets.load_dataset("{source.path}").save_to_disk(FOLDER), then give that '
                "folder"
            ) from error
        except Exception as error:  # of any kind, from the reader of any format
            raise self._refusal(
                f"cannot be opened ({one_line(error)}): give a folder, a name on the hub, and its "
                f"{self._key('subset')} and {self._key('split')}"
            ) from error

    def _key(self, key: str) -> str:
        """Return the name of the setting for messages.

        The split of held-out data may be set by `validation.split`, which is not in [data].
        """
        apart = key == "split" and self.setting.startswith("validation.split")
        return "validation.split" if apart else f"{section_of(self.setting)}.{key}"

    def _refusal(self, why: str) -> UserError:
        return UserError(f'{self.setting} = "{self.source.path}" {why}')


def _validated(table: Any) -> Any:
    """Return an Arrow table. Raise an `ArrowException` if it is damaged.

    A damaged offset would be read as it is, far outside of the mapped file.
    """
    table.validate(full=True)
    return table


def is_saved_dataset(path: str) -> bool:
    """Return whether `path` is a folder written by `save_to_disk`."""
    return any((Path(path) / name).is_file() for name in ("dataset_dict.json", "state.json"))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings of the hub client, and progress bars if stderr is not a terminal.

    If the hub cannot be reached, the user sees one error message instead of six warnings.
    """
    import datasets

    logger = logging.getLogger("huggingface_hub")
    level, bars = logger.level, datasets.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
