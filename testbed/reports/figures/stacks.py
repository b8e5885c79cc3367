"""Stacked bar charts: host CPU time of traffic, steps of a start, owners of memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from testbed.model.metrics import Metric
from testbed.model.terms import Family, Runtime
from testbed.reports.figures.bars import slots_of
from testbed.reports.figures.select import is_crowd, kind_of, traffic
from testbed.reports.figures.style import (
    SMALL_PT,
    WIDTH_IN,
    Drawing,
    circumstances,
    functional,
    title_of,
)
from testbed.reports.words import names, unit_of
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
    "user": Part("#ffffff", "..", "user"),
    "guest": Part("#cccccc", "", "guests' QEMU"),
}
"""Kinds of CPU time, from the bottom of the bars up. They are grey: colors mean datapaths."""
STEPS = {
    "image": Part("#333333", "", "image"),
    "links": Part("#777777", "////", "links"),
    "datapath": Part("#ffffff", "..", "datapath"),
    "launch": Part("#aaaaaa", "\\\\\\\\", "launch"),
    "boot": Part("#dddddd", "", "boot"),
    "answer": Part("#ffffff", "xxxx", "answer"),
}
OWNERS = {
    "processes": Part("#cccccc", "", "processes"),
    "kernel": Part("#555555", "////", "kernel"),
}


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
    families = present(Family, (row.cell.family for row in rows))
    slots, guest = slots_of(rows, results), cell.guest or results.campaign.guest
    figure = Figure(figsize=(WIDTH_IN, 2.4))
    per = "gigabyte" if cell.metric is Metric.THROUGHPUT else "million transactions"
    how = (
        "Bars: geometric means over blocks of all that the host's CPUs did during traffic, by the "
        "traffic; whiskers: 95 % t-intervals of the whole."
    )
    panels = figure.subplots(1, len(families), squeeze=False, sharey=True)[0]
    for axes, family in zip(panels, families, strict=True):
        axes.set_title(names(family), loc="left", fontweight="bold")
        labels = [slot and (slot[0].label(guest), slot[1]) for slot in slots]
        shown = [row for row in rows if row.cell.family is family]
        at = [slots.index((row.cell.pair, row.cell.datapath)) for row in shown]
        _stacks(axes, shown, at, labels, PARTS)
    _fit(panels[0], rows)
    panels[0].set_ylabel(f"CPU seconds per {per}")
    return Drawing(
        figure,
        f"Host CPU: {title_of(cell)}",
        _keys(PARTS),
        [f"{circumstances(results, cell.guest)} {how}"],
        functional(results, rows),
    )


def built_figure(rows: Sequence[Breakdown], results: Results) -> Drawing:
    """Time or memory of building pods, as bars of its parts by pair and datapath.

    Pods with virtual machines have panels of their own.
    """
    metric, unit = rows[0].cell.metric, unit_of(rows[0].cell.metric)
    starts = metric is Metric.STARTUP
    parts = STEPS if starts else OWNERS
    title = (
        "From nothing to the first answer at localhost"
        if starts
        else "Memory of a pod after its first answer"
    )
    how = "Bars: geometric means over blocks; whiskers: 95 % t-intervals of the whole. " + (
        "Images and programs are in the cache; launch: until the program, or the virtual "
        "machine, runs; boot: until it answers at its own address; answer: the first request "
        "to localhost."
        if starts
        else "Processes: proportional set size; kernel: what its memory grew by."
    )
    groups = grouped(rows, lambda r: (r.cell.family, _boots(r, results)))
    places = sorted(groups)
    slots = [_labels(groups[place], results) for place in places]
    figure = Figure(figsize=(WIDTH_IN, 2.4))
    panels = figure.subplots(
        1, len(places), squeeze=False, width_ratios=[len(labels) + 1 for labels in slots]
    )[0]
    for axes, place, labels in zip(panels, places, slots, strict=True):
        shown, kind = groups[place], "virtual machines" if place[1] else "no virtual machines"
        axes.set_title(f"{names(place[0])}, {kind}", loc="left", fontweight="bold")
        at = [labels.index((r.cell.label(results.campaign.guest), r.cell.datapath)) for r in shown]
        _stacks(axes, shown, at, labels, parts)
        _fit(axes, shown, unit.scale)
    panels[0].set_ylabel(unit.name)
    return Drawing(
        figure, title, _keys(parts), [f"{circumstances(results)} {how}"], functional(results, rows)
    )


def _boots(row: Breakdown, results: Results) -> bool:
    """Whether there is a virtual machine, which takes much more than everything else."""
    guest = Runtime(row.cell.guest or results.campaign.guest)
    return row.cell.pair.guests > 0 and guest is not Runtime.STANDIN


def _labels(rows: Sequence[Breakdown], results: Results) -> list[tuple[str, str] | None]:
    """Positions along the x axis: (pair, datapath), with None (a gap) between pairs."""
    of_pair = grouped(rows, lambda r: r.cell.label(results.campaign.guest))
    labels: list[tuple[str, str] | None] = []
    for pair, of in of_pair.items():
        datapaths = sorted({row.cell.datapath for row in of}, key=results.rank)
        labels += [None, *((pair, datapath) for datapath in datapaths)]
    return labels[1:]


def _keys(parts: Mapping[str, Part]) -> list[tuple[Any, str]]:
    return [
        (Patch(fc=part.color, hatch=part.hatch * 2, ec="black"), part.name)
        for part in parts.values()
    ]


def _stacks(
    axes: Axes,
    rows: Sequence[Breakdown],
    at: Sequence[int],
    labels: Sequence[tuple[str, str] | None],
    parts: Mapping[str, Part],
) -> None:
    """Draw bars of parts at positions along the x axis, whose labels are (group, bar)."""
    axes.set_xlim(-1.2, len(labels) + 0.2)
    axes.grid(axis="y")
    ticks = {at: label[1] for at, label in enumerate(labels) if label}
    axes.set_xticks(list(ticks), list(ticks.values()), rotation=90, fontsize=SMALL_PT)
    for group in dict.fromkeys(label[0] for label in labels if label):
        middle = [at for at, label in enumerate(labels) if label and label[0] == group]
        axes.text(
            sum(middle) / len(middle),
            1.0,
            group.replace("→", "\n→ "),
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="top",
            fontsize=SMALL_PT,
            bbox={"fc": "white", "ec": "none", "pad": 0.6},
            zorder=4,
        )
    for row, place in zip(rows, at, strict=True):
        _stack(
            axes,
            row,
            place,
            parts,
            unit_of(row.cell.metric).scale if row.cell.metric.of_building else 1,
        )


def _fit(axes: Axes, rows: Sequence[Breakdown], scale: float = 1) -> None:
    tops = [max(c.total.mean, min(c.total.high, 1.5 * c.total.mean)) for c in rows]
    axes.set_ylim(0, 1.25 * max(tops) / scale)


def _stack(axes: Axes, row: Breakdown, at: int, parts: Mapping[str, Part], scale: float) -> None:
    """Draw one bar of its parts, with the interval of the whole."""
    mean, low, high = (x / scale for x in astuple(row.total)[:3])
    bottom = 0.0
    for name, part in parts.items():
        height = mean * row.shares[name]
        axes.bar(at, height, 0.86, bottom, color=part.color, hatch=part.hatch, edgecolor="black")
        bottom += height
    if not math.isnan(low):
        axes.errorbar(
            at,
            mean,
            [[mean - low], [high - mean]],
            color="black",
            lw=0.8,
            capsize=1.5,
            path_effects=[withStroke(linewidth=2.2, foreground="white")],
        )
