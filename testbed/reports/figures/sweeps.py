"""Line charts along a parameter: message size, streams, rate, number of guests, number of pods.

There is one line per datapath. The parameters are found from the campaign's cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, replace

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from testbed.model.cells import Pair
from testbed.model.looks import Look
from testbed.model.metrics import TAIL
from testbed.model.terms import Family, Transport
from testbed.reports.figures.select import Axis, along, is_crowd, of_guest, swept
from testbed.reports.figures.style import (
    RC,
    WIDTH_IN,
    Drawing,
    captioned,
    keys_of,
    line_key,
    line_of,
    mark_of,
    text_in,
    whisker,
    whiskers_of,
)
from testbed.reports.words import columns_of, names, unit_of
from testbed.results.analysis import Summary
from testbed.results.order import grouped, present
from testbed.results.results import Results

SCALES = (
    Axis("guests", "guests", "guests in a pod, all at work"),
    Axis("pods", "pods", "pods on the host, all at work"),
)
"""Parameters of the figure `scaling`."""


def figures(results: Results) -> Iterator[tuple[str, Drawing]]:
    """Figures `throughput-tcp-by-size`, …, and `scaling-tcp` by numbers of guests and pods."""
    for name, axis, rows in swept(results):
        yield name, sweep(rows, axis, results)
    rows = [row for row in results.summaries if not row.cell.variant]
    crowds = [row for row in rows if is_crowd(row.cell)]
    for (pair, family, transport, guest), group in grouped(rows, _place).items():
        if drawing := scaling(group, results):
            others = {_place(row) for row in crowds if _place(row)[2:] == (transport, guest)}
            suffix = f"-{pair}-{family}" if len(others) > 1 else ""
            yield f"scaling-{transport}{of_guest(guest)}{suffix}", drawing


def _place(row: Summary) -> tuple[Pair, Family, Transport, str]:
    return row.cell.pair, row.cell.family, row.cell.transport, row.cell.guest


def sweep(rows: Sequence[Summary], axis: Axis, results: Results) -> Drawing:
    """Means with intervals along a parameter, by pair (across), family and quantity (down)."""
    cell = rows[0].cell
    pairs = present(Pair, (row.cell.pair for row in rows))
    downs = list(dict.fromkeys((row.cell.family, row.quantity) for row in rows))
    figure = Figure(figsize=(WIDTH_IN, 0.45 + 1.3 * len(downs)))
    fixed = [f"{cell.size_bytes} B"] if axis.field != "size_bytes" else []
    fixed += [f"{cell.streams} streams"] if axis.field != "streams" and cell.streams > 1 else []
    title = ", ".join([f"{cell.metric.capitalize()} by {axis.name}", names(cell.transport), *fixed])
    how = f"Geometric means over blocks; {whiskers_of(results)}."
    if axis.field == "rate_per_s":
        how += " Each request is sent when it is due, and timed from then."
    panels = figure.subplots(len(downs), len(pairs), sharex=True, sharey="row", squeeze=False)
    unit = unit_of(cell.metric)
    for across, (family, quantity) in zip(panels, downs, strict=True):
        label = {"p50_us": "median, ", "p99_us": "p99, ", TAIL: "p99.9, "}.get(quantity, "")
        across[0].set_ylabel(f"{names(family)}\n{label}{unit.name}")
        for axes, pair in zip(across, pairs, strict=True):
            place = (family, quantity, pair)
            group = [r for r in rows if (r.cell.family, r.quantity, r.cell.pair) == place]
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.grid(visible=True)
            _set_y(axes, [r for r in rows if (r.cell.family, r.quantity) == place[:2]], unit.scale)
            for datapath, line in grouped(group, lambda r: r.cell.datapath).items():
                _sweep_line(axes, line, axis, results.look(datapath), unit.scale)
    for axes, pair in zip(panels[0], pairs, strict=True):
        axes.set_title(replace(cell, pair=pair).label(results.campaign.guest))
    for axes in panels[-1]:
        _set_x(axes, rows, axis, WIDTH_IN / len(pairs) - 0.6)
    keys = keys_of((row for row in rows if row.estimate.blocks), line_key, results)
    return captioned(figure, title, rows, keys, results, how)


def _set_x(axes: Axes, rows: Sequence[Summary], axis: Axis, width_in: float) -> None:
    ticks = sorted({getattr(row.cell, axis.field) for row in rows})
    labels = [f"{tick}" for tick in ticks]
    fit = text_in(" ".join(labels), RC["font.size"]) < width_in
    axes.set_xlabel(axis.label)
    axes.set_xticks(ticks, labels, rotation=0 if fit else 90)
    axes.xaxis.set_minor_locator(NullLocator())


def _set_y(axes: Axes, rows: Sequence[Summary], scale: float) -> None:
    """Set the y axis so that all means are in it: from zero if they differ by less than 20 times.

    Intervals that are much wider are cut off.
    """
    means = [row.estimate.mean / scale for row in rows if row.estimate.blocks]
    if not means:
        return
    low, high = min(means) / 1.5, max(means) * 1.5
    if high / low < 20:
        axes.set_yscale("linear")
        axes.set_ylim(0, high)
    else:
        axes.set_ylim(low, high)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 2000 else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_locator(NullLocator())


def scaling(rows: Sequence[Summary], results: Results) -> Drawing | None:
    """All quantities (across) by guests in a pod and by pods on the host (down)."""
    downs = [(axis, found) for axis in SCALES if (found := along(rows, axis))]
    if not downs:
        return None
    shown = [row for _, found in downs for row in found]
    acrosses = columns_of(row for row in shown if row.quantity != TAIL)
    figure = Figure(figsize=(WIDTH_IN, 0.2 + 1.35 * len(downs)))
    panels = figure.subplots(len(downs), len(acrosses), squeeze=False)
    for line, (axis, found) in zip(panels, downs, strict=True):
        for axes, (metric, quantity, title) in zip(line, acrosses, strict=True):
            unit = unit_of(metric)
            group = [r for r in found if (r.cell.metric, r.quantity) == (metric, quantity)]
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.grid(visible=True)
            if axis is downs[0][0]:
                axes.set_title(f"{title}, {unit.name}")
            if not group:
                axes.set_axis_off()
                continue
            _set_y(axes, group, unit.scale)
            for datapath, of in grouped(group, lambda r: r.cell.datapath).items():
                _sweep_line(axes, of, axis, results.look(datapath), unit.scale)
            _set_x(axes, group, axis, WIDTH_IN / len(acrosses) - 0.6)
            axes.set_xlabel(axis.label if axes is line[len(acrosses) // 2] else "")
    cell = shown[0].cell
    title = f"Scaling, {cell.label(results.campaign.guest)}, {names(cell.family, cell.transport)}"
    how = (
        "Rates are those of all together, times those of all round trips, memory is per pod. "
        f"Geometric means over blocks; {whiskers_of(results)}."
    )
    keys = keys_of((row for row in shown if row.estimate.blocks), line_key, results)
    return captioned(figure, title, shown, keys, results, how)


def _sweep_line(axes: Axes, rows: Sequence[Summary], axis: Axis, style: Look, scale: float) -> None:
    """Draw the line of one datapath, with a gap where it has no value."""
    rows = sorted(rows, key=lambda r: int(getattr(r.cell, axis.field)))
    x = [getattr(row.cell, axis.field) for row in rows]
    mean = [row.estimate.mean / scale for row in rows]
    axes.plot(x, mean, color=style.color, ls=line_of(style), lw=1.2, **mark_of(style))
    for row, at in zip(rows, x, strict=True):
        if row.limited:
            hollow = mark_of(style) | {"mfc": "white", "mec": style.color, "mew": 0.8}
            axes.plot(at, row.estimate.mean / scale, **hollow)
        mean, low, high = (value / scale for value in astuple(row.estimate)[:3])
        whisker(axes, at, mean, low, high, color=style.color)
