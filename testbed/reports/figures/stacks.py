"""Stacked bar charts: host CPU time of traffic, steps of a start, owners of memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from testbed.model.metrics import Metric
from testbed.model.terms import Family, Runtime
from testbed.reports.figures.select import is_crowd, kind_of, traffic
from testbed.reports.figures.slots import grid_of, set_height, set_slots, write_value
from testbed.reports.figures.style import (
    Drawing,
    circumstances,
    disturbances,
    functional,
    whisker,
    whiskers_of,
)
from testbed.reports.words import names, number, size_of, unit_of
from testbed.results.analysis import Breakdown
from testbed.results.order import grouped, present
from testbed.results.results import Results


class Part(NamedTuple):
    """Style and name of a part of a bar."""

    color: str
    hatch: str
    name: str


PARTS = {
    "softirq": Part("#333333", "", "softirq"),
    "system": Part("#888888", "////", "system"),
    "user": Part("#ffffff", "", "user"),
    "guest": Part("#cccccc", "", "guests' QEMU"),
}
"""Kinds of CPU time, from the bottom of the bars up. They are grey: colors mean datapaths."""
STEPS = {
    "image": Part("#333333", "", "image"),
    "links": Part("#777777", "////", "links"),
    "datapath": Part("#ffffff", "", "datapath"),
    "launch": Part("#aaaaaa", "\\\\\\\\", "launch"),
    "boot": Part("#dddddd", "", "boot"),
    "answer": Part("#ffffff", "xxxx", "answer"),
}
OWNERS = {
    "processes": Part("#cccccc", "", "processes"),
    "kernel": Part("#555555", "////", "kernel"),
}


_UNITS = {
    Metric.THROUGHPUT: "gigabyte",
    Metric.LATENCY: "million round trips",
    Metric.CONNECTIONS: "million connections",
}
"""Units of traffic that CPU time is divided by."""


def figures(results: Results) -> Iterator[tuple[str, Drawing]]:
    """Figures `cpu-throughput-tcp`, … (CPU time of traffic), `startup-tcp` and `memory-tcp`."""
    spent = [cost for cost in results.costs if not cost.cell.variant]
    for name, rows in traffic(results):
        cells = {row.cell for row in rows}
        if alike := [cost for cost in spent if cost.cell in cells]:
            yield f"cpu-{name}", spent_figure(alike, results)
    built = [part for part in results.breakdowns if not is_crowd(part.cell)]
    for (metric, transport), parts in grouped(built, lambda p: kind_of(p)[:2]).items():
        yield f"{metric}-{transport}", built_figure(parts, results)


def spent_figure(rows: Sequence[Breakdown], results: Results) -> Drawing:
    """Host CPU time of traffic, as bars of its parts by pair and datapath, a panel per family."""
    cell = rows[0].cell
    per = _UNITS.get(cell.metric, "million transactions")
    how = (
        "Bars, and numbers above them: geometric means over blocks of the CPU time that the trial "
        f"took of the host during traffic, by the traffic; {whiskers_of(results)}."
    )
    panels = {
        names(family): [row for row in rows if row.cell.family is family]
        for family in present(Family, (row.cell.family for row in rows))
    }
    figure = draw_panels(panels, results, PARTS, "CPU seconds", alike=True)
    return Drawing(
        figure,
        f"Host CPU time per {per}, {names(cell.transport)}, {size_of(cell)} messages",
        keys_of_parts(PARTS, rows),
        [f"{circumstances(results, cell.guest)} {how}", *disturbed_rows(rows, results)],
        functional(results, rows),
    )


def built_figure(rows: Sequence[Breakdown], results: Results) -> Drawing:
    """Time or memory of building pods, as bars of its parts by pair and datapath.

    Pods with virtual machines have panels and a scale of their own.
    """
    starts = rows[0].cell.metric is Metric.STARTUP
    parts = STEPS if starts else OWNERS
    title = (
        "From nothing to the first answer at localhost"
        if starts
        else "Memory of a pod after its first answer"
    )
    how = f"Bars, and numbers above them: geometric means over blocks; {whiskers_of(results)}. " + (
        "Images and programs are in the cache; launch: until the program, or the virtual "
        "machine, runs; boot: until it answers at its own address; answer: the first request "
        "to localhost."
        if starts
        else "Processes: proportional set size; kernel: what its memory grew by."
    )
    groups = grouped(rows, lambda r: (r.cell.family, _has_virtual_machine(r, results)))
    panels = {
        f"{names(family)}, {'' if virtual else 'no '}virtual machines": groups[family, virtual]
        for family, virtual in sorted(groups)
    }
    unit = unit_of(rows[0].cell.metric)
    figure = draw_panels(panels, results, parts, unit.name, alike=False)
    return Drawing(
        figure,
        title,
        keys_of_parts(parts, rows),
        [f"{circumstances(results)} {how}", *disturbed_rows(rows, results)],
        functional(results, rows),
    )


def disturbed_rows(rows: Iterable[Breakdown], results: Results) -> list[str]:
    """Which of the rows are of disturbed trials, for a footer."""
    return disturbances(((row.cell, row.total) for row in rows), results)


def _has_virtual_machine(row: Breakdown, results: Results) -> bool:
    """Whether there is a virtual machine, which takes much more than everything else."""
    guest = Runtime(row.cell.guest or results.campaign.guest)
    return row.cell.pair.guests > 0 and guest.is_machine


def keys_of_parts(parts: Mapping[str, Part], rows: Iterable[Breakdown]) -> list[tuple[Any, str]]:
    """Entries of the key, for the parts that some of the rows have."""
    rows = list(rows)
    return [
        (Patch(fc=part.color, hatch=part.hatch * 2, ec="black"), part.name)
        for name, part in parts.items()
        if any(row.shares.get(name) for row in rows)
    ]


def draw_panels(
    panels: Mapping[str, Sequence[Breakdown]],
    results: Results,
    parts: Mapping[str, Part],
    unit: str,
    alike: bool,
    columns: int = 1,
) -> Figure:
    """Draw a panel for each title; with `alike`, all panels have the same scale.

    They are in one line, or `columns` in each if it is crowded.
    """
    every = [row for rows in panels.values() for row in rows]
    means = (row.total.mean / _scale(row) for row in every)
    grid = grid_of(list(panels.items()), columns, means, 2.3, results)
    for axes, rows, slots in zip(grid.panels, panels.values(), grid.slots, strict=True):
        set_slots(axes, slots, named=True)
        set_height(axes, [row.total for row in (every if alike else rows)], _scale(rows[0]))
        for row in rows:
            at = slots.index((row.cell.label(results.campaign.guest), row.cell.datapath))
            _stack(axes, row, at, parts, grid.upright)
    for axes in grid.lefts:
        axes.set_ylabel(unit)
    return grid.figure


def _scale(row: Breakdown) -> float:
    return unit_of(row.cell.metric).scale if row.cell.metric.of_building else 1


def _stack(axes: Axes, row: Breakdown, at: int, parts: Mapping[str, Part], upright: bool) -> None:
    """Draw one bar of its parts, with the interval of the whole."""
    mean, low, high = (x / _scale(row) for x in astuple(row.total)[:3])
    bottom = 0.0
    for name, part in parts.items():
        height = mean * row.shares[name]
        axes.bar(at, height, 0.86, bottom, color=part.color, hatch=part.hatch, edgecolor="black")
        bottom += height
    whisker(
        axes,
        at,
        mean,
        low,
        high,
        path_effects=[withStroke(linewidth=2.2, foreground="white")],
    )
    write_value(axes, at, number(mean, mean), upright)
