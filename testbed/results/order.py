"""Order of rows: pairs, transports and families as people read them, datapaths side by side."""

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
    """Pairs, transports, families; in them datapaths side by side, small messages first.

    `rank` sorts datapaths.
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
        quantity,
    )


def present(kinds: Iterable[T], found: Iterable[T]) -> list[T]:
    """Those of `kinds` that were found, in the order of `kinds`."""
    known = set(found)
    return [kind for kind in kinds if kind in known]


def grouped(rows: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Rows by `key`, in order of first appearance."""
    groups: dict[K, list[T]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups
