"""Order of rows in tables and figures, and grouping of rows."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

from testbed.model.cells import Cell, Pair
from testbed.model.metrics import Metric

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


def reading_order(
    cell: Cell, quantity: str, rank: Callable[[str], tuple[int, str]]
) -> tuple[Any, ...]:
    """Sort key of a row: pair, guest, transport, family, then datapath, metric and parameters.

    `rank` is the sort key of a datapath.
    """
    return (
        list(Pair).index(cell.pair),
        cell.guest,
        cell.transport,
        cell.family,
        rank(cell.datapath),
        list(Metric).index(cell.metric),
        cell.size_bytes,
        cell.streams,
        cell.rate_per_s,
        cell.guests,
        cell.pods,
        cell.application,
        quantity,
    )


def present(kinds: Iterable[T], found: Iterable[T]) -> list[T]:
    """The members of `kinds` that are in `found`, in the order of `kinds`."""
    known = set(found)
    return [kind for kind in kinds if kind in known]


def grouped(rows: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Rows grouped by `key`, in order of first appearance."""
    groups: dict[K, list[T]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups
