"""Order of rows: pairs, transports and families as people read them, datapaths side by side."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

from testbed.model.cells import Cell, Metric, Pair

DATAPATHS = (
    "loopback",
    "direct",
    "bridge",
    "tcredirect",
    "capture",
    "steer",
    "dnat",
    "proxy",
    "passt",
    "tun",
    "broadcast",
    "routed",
)
"""In the order of bars and rows."""


T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


def rank(datapath: str) -> tuple[int, str]:
    """Known datapaths in the order of `DATAPATHS`, others after them by name."""
    base = datapath.partition("~")[0]
    known = DATAPATHS.index(base) if base in DATAPATHS else len(DATAPATHS)
    return known, datapath


def reading_order(cell: Cell, quantity: str) -> tuple[Any, ...]:
    """Pairs, transports, families; in them datapaths side by side, small messages first."""
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
