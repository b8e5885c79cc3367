"""Bar charts: means of a metric by pair and family, one bar per datapath."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple

from matplotlib.axes import Axes

from testbed.model.cells import Pair
from testbed.model.metrics import Metric
from testbed.model.terms import Family
from testbed.model.trials import Status
from testbed.reports.figures.select import kind_of, traffic
from testbed.reports.figures.slots import (
    Slots,
    grid_of,
    set_height,
    set_slots,
    write_value,
)
from testbed.reports.figures.style import (
    Drawing,
    captioned,
    keys_of,
    patch_key,
    title_of,
    whisker,
    whiskers_of,
)
from testbed.reports.words import UDP_RATE, UDP_RATE_MEANS, absence, names, number, unit_of
from testbed.results.analysis import Summary
from testbed.results.order import present
from testbed.results.results import Results
from testbed.results.statistics import Estimate

APART = 2
"""Factor between the longest bars of two groups above which each has a scale of its own."""


def figures(results: Results) -> Iterator[tuple[str, Drawing]]:
    """Figures `throughput-tcp`, `connections-tcp`, …; with parameters in the name if needed."""
    for name, rows in traffic(results):
        if rows[0].cell.metric is not Metric.LATENCY:
            yield name, bars_figure(rows, results)


def bars_figure(rows: Sequence[Summary], results: Results) -> Drawing:
    """Means as bars with interval whiskers, by pair and datapath, with panels per family.

    If the kernel's own loopback is much faster than any guest, it has a scale of its own. A
    logarithmic scale would make the lengths of bars meaningless.
    """
    families = present(Family, (row.cell.family for row in rows))
    parts = _parts(rows)
    groups = [
        (names(family) + ("" if part is parts[0] else ", other scale"), _of_family(part, family))
        for family in families
        for part in parts
    ]
    scale = unit_of(rows[0].cell.metric).scale
    means = (of.mean / scale for of in shown(rows))
    grid = grid_of(groups, len(parts), means, 1.9, results)
    for axes, (_, own), part, slots in zip(
        grid.panels, groups, len(families) * parts, grid.slots, strict=True
    ):
        set_height(axes, shown(part), scale)
        draw_bars(axes, own, slots, results, grid.upright)
    metric = rows[0].cell.metric
    named = {Metric.THROUGHPUT: "goodput, Gbit/s", Metric.CONNECTIONS: "connections, 10³/s"}
    for axes in grid.lefts:
        axes.set_ylabel(named.get(metric, f"{metric}, {unit_of(metric).name}"))
    how = (
        "Bars, and numbers above them: geometric means over blocks; "
        + whiskers_of(results)
        + ("; traffic without guests has a scale of its own." if len(parts) > 1 else ".")
        + (f" {UDP_RATE_MEANS}." if kind_of(rows[0])[:2] == UDP_RATE else "")
    )
    keys = keys_of(rows, patch_key, results)
    return captioned(grid.figure, title_of(rows[0].cell), rows, keys, results, how)


def _of_family(rows: Sequence[Summary], family: Family) -> list[Summary]:
    return [row for row in rows if row.cell.family is family]


def _parts(rows: Sequence[Summary]) -> list[Sequence[Summary]]:
    """The rows without guests and the others, if their values are far apart; else all together."""
    native = [row for row in rows if row.cell.pair is Pair.NATIVE_NATIVE]
    others = [row for row in rows if row not in native]
    tops = [max((of.mean for of in shown(part)), default=0) for part in (native, others)]
    return [native, others] if min(tops) > 0 and max(tops) > APART * min(tops) else [rows]


def shown(rows: Sequence[Summary]) -> list[Estimate]:
    """Estimates of the rows that have one."""
    return [row.estimate for row in rows if row.status is Status.OK]


def draw_bars(
    axes: Axes, rows: Sequence[Summary], slots: Slots, results: Results, upright: bool
) -> None:
    """Draw bars in a panel whose y axis is set."""
    set_slots(axes, slots, named=False)
    if not shown(rows):
        axes.set_yticks([])
    for row in rows:
        at = slots.index((row.cell.label(results.campaign.guest), row.cell.datapath))
        look = results.look(row.cell.datapath)
        if row.status is Status.OK:
            scale = unit_of(row.cell.metric, row.quantity).scale
            mean, low, high = (x / scale for x in astuple(row.estimate)[:3])
            axes.bar(at, mean, 0.86, color=look.color, hatch=look.hatch, edgecolor="black")
            whisker(axes, at, mean, low, high)
            mark = "*" if row.limited else ""
            write_value(axes, at, number(mean, mean) + mark, upright)
        else:
            axes.bar(
                at,
                0.2,
                0.86,
                color="white",
                edgecolor=look.color,
                hatch="////",
                transform=axes.get_xaxis_transform(),
            )
            write_value(axes, at, absence(row.status), upright)
