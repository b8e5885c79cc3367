"""Curves: cumulative distributions of round-trip times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from testbed.model.cells import Pair
from testbed.model.looks import Look
from testbed.model.metrics import Metric
from testbed.model.terms import Family
from testbed.model.trials import Status
from testbed.reports.figures.select import traffic
from testbed.reports.figures.style import (
    WIDTH_IN,
    Drawing,
    captioned,
    keys_of,
    line_key,
    line_of,
    mark_of,
    title_of,
)
from testbed.reports.words import absence, names
from testbed.results.analysis import EXCEEDANCES, Summary
from testbed.results.order import present
from testbed.results.results import Histogram, Results
from testbed.results.statistics import distribution


def figures(results: Results) -> Iterator[tuple[str, Drawing]]:
    """Figures `latency-tcp`, …; with parameters in the name if there are several."""
    for name, rows in traffic(results):
        if rows[0].cell.metric is Metric.LATENCY:
            yield name, curves_figure(rows, results)


def curves_figure(rows: Sequence[Summary], results: Results) -> Drawing:
    """Cumulative distributions of round-trip times, by family (down) and pair (across)."""
    families = present(Family, (row.cell.family for row in rows))
    pairs = present(Pair, (row.cell.pair for row in rows))
    figure = Figure(figsize=(WIDTH_IN, 0.45 + 1.3 * len(families)))
    how = (
        "Each percentile, as those in the table, is the geometric mean over blocks of the block's "
        "own; marks: median and 99th percentile. A curve ends where fewer than "
        f"{EXCEEDANCES} samples are above it."
    )
    panels = figure.subplots(len(families), len(pairs), sharex=True, sharey=True, squeeze=False)
    ends = []
    for line, family in zip(panels, families, strict=True):
        line[0].set_ylabel(f"{names(family)}\nshare of round trips")
        for axes, pair in zip(line, pairs, strict=True):
            axes.grid(visible=True)
            if family is families[0]:
                label = replace(rows[0].cell, pair=pair).label(results.campaign.guest)
                axes.set_title(label.replace("→", "\n→ ") if len(pairs) > 5 else label)
            absent = []
            for row in rows:
                if (row.cell.family, row.cell.pair, row.quantity) != (family, pair, "p50_us"):
                    continue
                if row.status is Status.OK:
                    style = results.look(row.cell.datapath)
                    ends.append(_curve(axes, style, results.histograms[row.cell]))
                else:
                    absent.append(f"{row.cell.datapath}: {absence(row.status)}")
            axes.text(
                0.96,
                0.05,
                "\n".join(absent),
                transform=axes.transAxes,
                ha="right",
                bbox={"fc": "white", "ec": "none", "pad": 1},
            )
    panels[-1][len(pairs) // 2].set_xlabel("round trip, µs")
    corner = panels[0][0]
    corner.set_ylim(0, 1.04)
    corner.set_xscale("log")
    corner.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    if ends:
        corner.set_xlim(min(low for low, _ in ends) / 1.3, max(high for _, high in ends) * 1.3)
    keys = keys_of((row for row in rows if row.status is Status.OK), line_key, results)
    return captioned(figure, title_of(rows[0].cell), rows, keys, results, how)


def _curve(axes: Axes, style: Look, blocks: Sequence[Histogram]) -> tuple[float, float]:
    """Draw the curve of one datapath. Returns its ends in µs."""
    samples = sum(count for block in blocks for _, count in block)
    points = [
        (us, share)
        for us, share in distribution(blocks)
        if share <= 0.5 or (1 - share) * samples >= EXCEEDANCES
    ]
    x, y = zip(*points, strict=True)
    axes.plot(x, y, color=style.color, ls=line_of(style), lw=1.2)
    marked = [point for point in points if point[1] in (0.5, 0.99)]
    axes.plot(*zip(*marked, strict=True), ls="none", color=style.color, zorder=3, **mark_of(style))
    return x[0], x[-1]
