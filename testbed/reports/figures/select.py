"""Selects the rows of a campaign that are drawn in one figure, and names the figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from testbed.model.cells import Cell
from testbed.model.metrics import Metric
from testbed.model.terms import Transport
from testbed.reports.words import Row
from testbed.results.analysis import Breakdown, Summary
from testbed.results.order import grouped
from testbed.results.results import Results


class Axis(NamedTuple):
    """A parameter of cells that a figure can have as its x axis."""

    name: str
    field: str
    label: str


AXES = (
    Axis("size", "size_bytes", "message size, bytes"),
    Axis("streams", "streams", "streams"),
    Axis("rate", "rate_per_s", "requests per second"),
)


def along(rows: Sequence[Summary], axis: Axis) -> list[Summary]:
    """The rows of cells that differ in this parameter only, if it has three values or more."""

    def others(row: Summary) -> Cell:
        changes: Any = {axis.field: 0}
        return replace(row.cell, **changes)

    rows = [row for row in rows if getattr(row.cell, axis.field)]  # rate 0 means no fixed rate
    sets = grouped(rows, lambda r: (others(r), r.quantity))
    return [row for found in sets.values() if len(found) > 2 for row in found]


def kind_of(row: Row | Breakdown) -> tuple[Metric, Transport, str]:
    """Metric, transport and named guest, which are the same in all rows of a figure."""
    return row.cell.metric, row.cell.transport, row.cell.guest


def is_crowd(cell: Cell) -> bool:
    """Whether the cell has several guests or pods at the same time."""
    return cell.guests > 1 or cell.pods > 1


def of_guest(guest: str) -> str:
    """Suffix of a figure's name, if its cells name their guests."""
    return f"-{guest}" if guest else ""


def traffic(results: Results) -> Iterator[tuple[str, list[Summary]]]:
    """(name, rows) of figures with one metric, transport and size each: `throughput-tcp`.

    If a parameter has three values or more, only the rows with the most frequent parameters.
    """
    for (metric, transport, guest), rows in _kinds(results):
        of_params = grouped(rows, lambda r: replace(r.cell, guest="").params)
        if any(along(rows, axis) for axis in AXES):
            params = max(of_params, key=lambda params: _weight(of_params[params]))
            of_params = {params: of_params[params]}
        for params, group in of_params.items():
            suffix = f"-{params}" if len(of_params) > 1 else ""
            yield f"{metric}-{transport}{of_guest(guest)}{suffix}", group


def swept(results: Results) -> Iterator[tuple[str, Axis, list[Summary]]]:
    """(name, axis, rows) for each parameter with three values or more: `throughput-tcp-by-size`."""
    for (metric, transport, guest), rows in _kinds(results):
        for axis in AXES:
            if found := along(rows, axis):
                yield f"{metric}-{transport}{of_guest(guest)}-by-{axis.name}", axis, found


def _kinds(results: Results) -> Iterator[tuple[tuple[Metric, Transport, str], list[Summary]]]:
    rows = [
        row
        for row in results.summaries
        if not (row.cell.variant or row.cell.metric.of_building or is_crowd(row.cell))
        and not row.cell.application
    ]
    yield from grouped(rows, kind_of).items()


def _weight(rows: Sequence[Summary]) -> tuple[int, int]:
    """Sort key: number of rows; then large messages for throughput, small ones for times."""
    size = rows[0].cell.size_bytes
    return len(rows), size if rows[0].cell.metric is Metric.THROUGHPUT else -size
