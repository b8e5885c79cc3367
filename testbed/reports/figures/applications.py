"""Bar charts of applications, a panel for each: requests per second, times, memory, CPU time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from testbed.model.metrics import Metric
from testbed.reports.figures.bars import draw_bars, shown
from testbed.reports.figures.select import of_guest
from testbed.reports.figures.slots import grid_of, set_height
from testbed.reports.figures.stacks import PARTS, disturbed_rows, draw_panels, keys_of_parts
from testbed.reports.figures.style import (
    Drawing,
    captioned,
    circumstances,
    functional,
    keys_of,
    patch_key,
    whiskers_of,
)
from testbed.reports.words import names, size_of, unit_of
from testbed.results.analysis import Breakdown, Summary
from testbed.results.order import grouped
from testbed.results.results import Results

TITLES = {
    "value": ("requests", "Requests of applications, 10³/s"),
    "p50_us": ("requests-p50", "Time of a request of applications, median, µs"),
    "p99_us": ("requests-p99", "Time of a request of applications, 99th percentile, µs"),
    "memory_bytes": ("requests-memory", "Memory of the pod's processes after requests, MiB"),
}
"""Quantity → name and title of its figure."""
COLUMNS = 2
"""Panels in a line."""

R = TypeVar("R", Summary, Breakdown)


def figures(results: Results) -> Iterator[tuple[str, Drawing]]:
    """Figures `requests`, `requests-p50`, `requests-p99`, `requests-memory` and `cpu-requests`."""
    rows = [row for row in results.summaries if row.cell.application and not row.cell.variant]
    for guest, of in grouped(rows, lambda r: r.cell.guest).items():
        for quantity, (name, title) in TITLES.items():
            found = [row for row in of if row.quantity == quantity and _tells(row)]
            if found:
                yield f"{name}{of_guest(guest)}", bars_figure(found, title, results)
    costs = [cost for cost in results.costs if cost.cell in {row.cell for row in rows}]
    for guest, spent in grouped(costs, lambda c: c.cell.guest).items():
        yield f"cpu-{Metric.REQUESTS}{of_guest(guest)}", cpu_figure(spent, results)


def _tells(row: Summary) -> bool:
    """Whether the value says anything: at a given rate, requests per second are that rate."""
    return row.quantity != "value" or not row.cell.rate_per_s


def _panels(rows: Sequence[R]) -> dict[str, list[R]]:
    """Title of a panel → its rows: an application with its parameters, in one family."""
    ordered = sorted(rows, key=lambda r: (r.cell.application, r.cell.params, r.cell.family))
    return grouped(ordered, lambda r: f"{size_of(r.cell)}, {names(r.cell.family)}")


def bars_figure(rows: Sequence[Summary], title: str, results: Results) -> Drawing:
    """Means of a quantity as bars, by pair and datapath. Each panel has a scale of its own."""
    panels = _panels(rows)
    scale = unit_of(rows[0].cell.metric, rows[0].quantity).scale
    means = (of.mean / scale for of in shown(rows))
    grid = grid_of(list(panels.items()), COLUMNS, means, 1.9, results)
    for axes, own, slots in zip(grid.panels, panels.values(), grid.slots, strict=True):
        set_height(axes, shown(own), scale)
        draw_bars(axes, own, slots, results, grid.upright)
    how = f"Bars, and numbers above them: geometric means over blocks; {whiskers_of(results)}."
    keys = keys_of(rows, patch_key, results)
    return captioned(grid.figure, title, rows, keys, results, how)


def cpu_figure(rows: Sequence[Breakdown], results: Results) -> Drawing:
    """Host CPU time of requests, as bars of its parts, by pair and datapath."""
    how = (
        "Bars, and numbers above them: geometric means over blocks of all that the host's CPUs did "
        f"while the client ran, by its requests; {whiskers_of(results)}."
    )
    figure = draw_panels(_panels(rows), results, PARTS, "CPU seconds", alike=False, columns=COLUMNS)
    return Drawing(
        figure,
        "Host CPU time per million requests of applications",
        keys_of_parts(PARTS, rows),
        [f"{circumstances(results, rows[0].cell.guest)} {how}", *disturbed_rows(rows, results)],
        functional(results, rows),
    )
