"""Parts of a computation along the sequence, one after the other: tiles, chunks, blocks of keys."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, TypeVar

T = TypeVar("T")
CostTrend = Literal["even", "growing", "shrinking"]
"""Whether the parts of a computation cost the same, or evenly more or less from part to part."""


def with_next(parts: Sequence[T]) -> list[tuple[T, T | None]]:
    """Return each part with the one after it; None after the last."""
    return [*zip(parts, [*parts[1:], None], strict=False)]  # parts may be empty


Visit = Callable[[list, CostTrend], Iterable[tuple[Any, Any]]]
_visit: ContextVar[Visit] = ContextVar("_visit", default=lambda parts, cost: with_next(parts))


def visited_with_next(parts: list[T], cost: CostTrend = "even") -> Iterable[tuple[T, T | None]]:
    """Return the parts of a computation that are to be computed, each with the one that follows:
    all parts, unless overridden.
    """
    return _visit.get()(parts, cost)


def visited(parts: list[T], cost: CostTrend = "even") -> Iterable[T]:
    """Return the parts of a computation that are to be computed: all, unless overridden."""
    return (part for part, _ in visited_with_next(parts, cost))


@contextmanager
def override_parts(visit: Visit) -> Iterator[None]:
    """Let visit choose, from all parts, those to compute, in this contextvars context.

    This is for callers that need no values, such as the planner.
    """
    token = _visit.set(visit)
    try:
        yield
    finally:
        _visit.reset(token)
