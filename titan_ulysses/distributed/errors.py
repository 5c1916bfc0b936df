"""The exception whose message a user sees instead of a traceback, and how all ranks raise it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch.distributed as dist


class UserError(Exception):
    """Bad input, whose message names the setting, its value and what to do.

    `train.py` prints the message and exits with `exit_code`: 2 for a command line or a TOML file
    that cannot be used, 1 for an error that is found later.
    """

    def __init__(self, message: str, *, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


class UsageError(UserError):
    """Bad input of a command line or a TOML file: exit code 2."""

    def __init__(self, message: str):
        super().__init__(message, exit_code=2)


class RefusedRow(ValueError):
    """Raised with the reason if a row of the data cannot become a document.

    It becomes a `BadRow` in the caller, which knows the place of the row.
    """


def first_failure(reason: str | None, *, group: dist.ProcessGroup | None = None) -> str | None:
    """Return, on every rank, the reason of the first rank that has one; None if no rank has one.

    Collective over all ranks, in the group if it is given. All ranks can then stop together where
    one of them must. Without a process group there is one rank, whose reason is returned.
    """
    return next(filter(None, of_all_ranks(reason, group=group)), None)


@contextmanager
def failing_together(
    *kinds: type[BaseException],
    error: Callable[[str], Exception],
    words: Callable[[BaseException], str] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Iterator[None]:
    """Raise error(reason), on every rank, if such an exception is raised here on one of them.

    Otherwise the other ranks would wait for the one that has failed. words: says what is wrong
    (None: `one_line`). Collective at the end, as `first_failure`.
    """
    failure = None
    try:
        yield
    except kinds as raised:
        failure = (words or one_line)(raised)
    if reason := first_failure(failure, group=group):
        raise error(reason)


def of_all_ranks(value: Any, *, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return the value of each rank, on every rank; only this one's without a process group.

    Collective over all ranks, in the group if it is given.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def one_line(error: BaseException) -> str:
    """Return what an exception says, on one line and short enough to stand inside a message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + " ..."
