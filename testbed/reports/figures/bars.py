"""Bar charts: means of a metric by pair and family, one bar per datapath."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory

from testbed.model.cells import Pair
from testbed.model.looks import Look
from testbed.model.metrics import Metric
from testbed.model.terms import Family
from testbed.model.trials import Status
from testbed.reports.figures.select import kind_of, traffic
from testbed.reports.figures.style import (
    SMALL_PT,
    WIDTH_IN,
    Drawing,
    captioned,
    patch_key,
    title_of,
)
from testbed.reports.words import UDP_RATE, UDP_RATE_MEANS, absence, names, number, unit_of
from testbed.results.analysis import Breakdown, Summary
from testbed.results.order import present
from testbed.results.results import Results
from testbed.results.statistics import Estimate


def figures(results: Results) -> Iterator[tuple[str, Drawing]]:
    """Figures `throughput-tcp`, `connections-tcp`, …; with parameters in the name if needed."""
    for name, rows in traffic(results):
        if rows[0].cell.metric is not Metric.LATENCY:
            yield name, bars_figure(rows, results)


def bars_figure(rows: Sequence[Summary], results: Results) -> Drawing:
    """Means as bars with interval whiskers, by pair and datapath, with panels per family.

    The kernel's own loopback is an order of magnitude faster than any guest, so it has a scale of
    its own. A logarithmic scale would make the lengths of bars meaningless.
    """
    families = present(Family, (row.cell.family for row in rows))
    native = [row for row in rows if row.cell.pair is Pair.NATIVE_NATIVE]
    parts = [part for part in (native, [row for row in rows if row not in native]) if part]
    slots = [slots_of(part, results) for part in parts]
    guest = rows[0].cell.guest or results.campaign.guest
    narrow = sum(map(len, slots)) > 24  # families side by side would leave no room for labels
    lines = len(families) if narrow else 1
    figure = Figure(figsize=(WIDTH_IN, 2.2 if lines == 1 else 1.7 * lines))
    how = (
        "Bars: geometric means over blocks; "
        + ("whiskers: 95 % t-intervals" if results.campaign.blocks > 1 else "no interval from one")
        + ("; native and guest pairs on scales of their own." if len(parts) > 1 else ".")
        + (f" {UDP_RATE_MEANS}." if kind_of(rows[0])[:2] == UDP_RATE else "")
    )
    panels = figure.subplots(
        lines,
        len(families) * len(parts) // lines,
        squeeze=False,
        width_ratios=[len(s) + 1 for s in slots] * (len(families) // lines),
    )
    for n, axes in enumerate(panels.flat):
        family, part = families[n // len(parts)], parts[n % len(parts)]
        if n % len(parts) == 0:
            axes.set_title(names(family), loc="left", fontweight="bold")
        _bar_panel(axes, part, results, family, slots[n % len(parts)], guest, upright=not narrow)
    metric = rows[0].cell.metric
    named = {Metric.THROUGHPUT: "goodput, Gbit/s", Metric.CONNECTIONS: "connections, 10³/s"}
    for line in panels:
        line[0].set_ylabel(named.get(metric, f"{metric}, {unit_of(metric).name}"))
    return captioned(figure, title_of(rows[0].cell), rows, patch_key, results, how)


def slots_of(
    rows: Sequence[Summary] | Sequence[Breakdown], results: Results
) -> list[tuple[Pair, str] | None]:
    """Positions along the x axis: (pair, datapath), with None (a gap) between pairs."""
    slots: list[tuple[Pair, str] | None] = []
    for pair in present(Pair, (row.cell.pair for row in rows)):
        found = {row.cell.datapath: None for row in rows if row.cell.pair is pair}
        slots += [None, *((pair, datapath) for datapath in sorted(found, key=results.rank))]
    return slots[1:]


def _bar_panel(
    axes: Axes,
    rows: Sequence[Summary],
    results: Results,
    family: Family,
    slots: Sequence[Any],
    guest: str,
    upright: bool,
) -> None:
    """Draw the bars of one family. The scale is that of all `rows`, the same for both families."""
    scale = unit_of(rows[0].cell.metric).scale
    most = _set_axes(axes, rows, scale, len(slots))
    for pair in present(Pair, (row.cell.pair for row in rows)):
        middle = [at for at, slot in enumerate(slots) if slot and slot[0] is pair]
        label = pair.label(guest).replace("→", "\n→ ")
        across = _across(axes)
        axes.text(sum(middle) / len(middle), -0.03, label, transform=across, ha="center", va="top")
    for row in (row for row in rows if row.cell.family is family):
        at = slots.index((row.cell.pair, row.cell.datapath))
        if row.status is Status.OK:
            top = _bar(axes, at, row.estimate, results.look(row.cell.datapath), scale, most)
            mean = row.estimate.mean / scale
            _value(axes, at, top, number(mean, mean), 0 if upright and len(slots) <= 8 else 90)
        else:
            _absent(axes, at, absence(row.status))


def _set_axes(axes: Axes, rows: Sequence[Summary], scale: float, slots: int) -> float:
    """Set limits and ticks. Returns the height above which whiskers end with an arrow."""
    shown = [row.estimate for row in rows if row.status is Status.OK]
    most = 1.5 * max((of.mean / scale for of in shown), default=1)
    tops = (of.high / scale for of in shown)
    axes.set_ylim(0, 1.2 * min(most, max((top for top in tops if top > 0), default=most / 1.5)))
    axes.set_xlim(-0.8, slots - 0.2)
    axes.grid(axis="y")
    axes.set_xticks([])
    if not shown:
        axes.set_yticks([])
    return most


def _across(axes: Axes) -> Any:
    """Coordinates with x in bars and y as a share of the panel's height."""
    return blended_transform_factory(axes.transData, axes.transAxes)


def _absent(axes: Axes, at: int, text: str) -> None:
    """Draw a hatched box with a text in the place of a bar."""
    across = _across(axes)
    axes.bar(
        at, 0.2, width=0.86, color="white", hatch="////", edgecolor="#aaaaaa", transform=across
    )
    axes.text(
        at,
        0.1,
        text,
        transform=across,
        ha="center",
        va="center",
        fontsize=SMALL_PT,
        rotation=90,
        bbox={"fc": "white", "ec": "none", "pad": 0.6},
    )


def _bar(axes: Axes, at: int, of: Estimate, look: Look, scale: float, most: float) -> float:
    """Draw a bar with its whisker. Returns the height of the upper end."""
    mean, low, high = (x / scale for x in (of.mean, of.low, of.high))
    axes.bar(at, mean, width=0.86, color=look.color, hatch=look.hatch, edgecolor="black")
    top = mean if math.isnan(high) else min(high, most)
    if not math.isnan(low):
        axes.errorbar(at, mean, [[mean - low], [top - mean]], color="black", lw=0.8, capsize=1.5)
        if top < high:
            axes.plot(at, top, "^", color="black", ms=2.5)
    return top


def _value(axes: Axes, at: int, top: float, text: str, rotation: int) -> None:
    """Write a value above the end of a bar."""
    axes.annotate(
        text,
        (at, top),
        (0, 1.5),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=SMALL_PT,
        annotation_clip=False,
        rotation=rotation,
        bbox={"fc": "white", "ec": "none", "pad": 0.2, "alpha": 0.8},
    )
