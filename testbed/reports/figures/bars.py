"""Bars: means of a metric by pair and family, a bar per datapath."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory

from testbed.model.cells import Pair
from testbed.model.metrics import Metric
from testbed.model.terms import Family
from testbed.model.trials import Status
from testbed.reports.figures.select import kind_of, traffic
from testbed.reports.figures.style import (
    SMALL_PT,
    WIDTH_IN,
    Drawing,
    absences,
    circumstances,
    functional,
    keys_of,
    patch_key,
    title_of,
)
from testbed.reports.words import UDP_RATE, UDP_RATE_MEANS, absence, names, number, unit_of
from testbed.results.analysis import Breakdown, Summary
from testbed.results.order import present
from testbed.results.results import Results


def figures(results: Results) -> Iterator[tuple[str, Drawing]]:
    """`throughput-tcp`, `connections-tcp`, and with the parameters where there are several."""
    for name, rows in traffic(results):
        if rows[0].cell.metric is not Metric.LATENCY:
            yield name, bars_figure(rows, results)


def bars_figure(rows: Sequence[Summary], results: Results) -> Drawing:
    """Means as bars with interval whiskers, by pair and datapath, panels per family.

    The kernel's own loopback is an order of magnitude above any guest, so it has a scale of its
    own rather than a logarithmic one, on which bars would say nothing.
    """
    families = present(Family, (row.cell.family for row in rows))
    native = [row for row in rows if row.cell.pair is Pair.NATIVE_NATIVE]
    parts = [part for part in (native, [row for row in rows if row not in native]) if part]
    slots = [slots_of(part, results) for part in parts]
    own = rows[0].cell.guest
    guest = own or results.campaign.guest
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
    return Drawing(
        figure,
        title_of(rows[0].cell),
        keys_of(rows, patch_key, results),
        [f"{circumstances(results, own)} {how}", *absences(rows)],
        functional(results, rows),
    )


def slots_of(
    rows: Sequence[Summary] | Sequence[Breakdown], results: Results
) -> list[tuple[Pair, str] | None]:
    """Places along the x axis: the datapaths of each pair, an empty place between pairs."""
    slots: list[tuple[Pair, str] | None] = []
    for pair in present(Pair, (row.cell.pair for row in rows)):
        here = {row.cell.datapath: None for row in rows if row.cell.pair is pair}
        slots += [None, *((pair, datapath) for datapath in sorted(here, key=results.rank))]
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
    scale = unit_of(rows[0].cell.metric).scale
    means = [row.estimate.mean / scale for row in rows if row.status is Status.OK]
    most = 1.5 * max(means, default=1)  # so far up whiskers are drawn, and end with an arrow
    tops = [row.estimate.high / scale for row in rows if row.status is Status.OK]
    axes.set_ylim(0, 1.2 * min(most, max((t for t in tops if t > 0), default=most / 1.5)))
    axes.set_xlim(-0.8, len(slots) - 0.2)
    axes.grid(axis="y")
    axes.set_xticks([])
    if not means:
        axes.set_yticks([])
    across = blended_transform_factory(axes.transData, axes.transAxes)
    for pair in present(Pair, (row.cell.pair for row in rows)):
        middle = [at for at, slot in enumerate(slots) if slot and slot[0] is pair]
        label = pair.label(guest).replace("→", "\n→ ")
        axes.text(sum(middle) / len(middle), -0.03, label, transform=across, ha="center", va="top")
    for row in (row for row in rows if row.cell.family is family):
        at = slots.index((row.cell.pair, row.cell.datapath))
        if row.status is not Status.OK:
            axes.bar(
                at,
                0.2,
                width=0.86,
                color="white",
                hatch="////",
                edgecolor="#aaaaaa",
                transform=across,
            )
            axes.text(
                at,
                0.1,
                absence(row.status),
                transform=across,
                ha="center",
                va="center",
                fontsize=SMALL_PT,
                rotation=90,
                bbox={"fc": "white", "ec": "none", "pad": 0.6},
            )
            continue
        style = results.look(row.cell.datapath)
        mean, low, high = (
            x / scale for x in (row.estimate.mean, row.estimate.low, row.estimate.high)
        )
        axes.bar(at, mean, width=0.86, color=style.color, hatch=style.hatch, edgecolor="black")
        top = mean if math.isnan(high) else min(high, most)
        if not math.isnan(low):
            axes.errorbar(
                at, mean, [[mean - low], [top - mean]], color="black", lw=0.8, capsize=1.5
            )
            if top < high:
                axes.plot(at, top, "^", color="black", ms=2.5)
        axes.annotate(
            number(mean, mean),
            (at, top),
            (0, 1.5),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=SMALL_PT,
            annotation_clip=False,
            rotation=0 if upright and len(slots) <= 8 else 90,
            bbox={"fc": "white", "ec": "none", "pad": 0.2, "alpha": 0.8},
        )
