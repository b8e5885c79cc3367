"""Forest plots: many ratios with their intervals in one figure, one line each.

The ratios are those of cells to their reference datapaths, or of a campaign to an earlier one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from testbed.model.looks import Look
from testbed.reports.figures.select import is_crowd, of_guest
from testbed.reports.figures.style import (
    NO_INTERVAL,
    SMALL_PT,
    WIDTH_IN,
    Drawing,
    circumstances,
    disturbances,
    functional,
)
from testbed.reports.words import UNSHAKEN, better_of, columns_of, conclusive, names, size_of
from testbed.results.analysis import Ratio, Summary
from testbed.results.order import grouped
from testbed.results.results import Results
from testbed.results.statistics import Estimate


def figures(results: Results) -> Iterator[tuple[str, Drawing]]:
    """Figures `ratios-tcp`, …: ratios of all cells to reference datapaths, controls included.

    Those of applications are in `ratios-requests`.
    """
    divided = [
        row
        for row in results.summaries
        if row.reference != row.cell.datapath
        and not (row.cell.metric.of_building or is_crowd(row.cell))
    ]
    for (_, guest), rows in grouped(divided, lambda r: (_subject(r), r.cell.guest)).items():
        if any(row.ratio.blocks for row in rows):
            yield f"ratios-{_subject(rows[0])}{of_guest(guest)}", ratios(rows, results)


def _subject(row: Summary) -> str:
    """What a figure of ratios is about, in its name."""
    return row.cell.metric if row.cell.application else row.cell.transport


def ratios(rows: Sequence[Summary], results: Results) -> Drawing:
    """All ratios to reference datapaths in one figure."""
    shown = [row for row in rows if row.ratio.blocks]
    divisors = dict.fromkeys((r.cell.datapath, r.reference) for r in shown)
    divided = ", ".join(f"{one} by {other}" for one, other in divisors)
    how = (
        f"Geometric means of ratios within a block; {meaning_of_marks(shown, results)}. "
        f"Divided: {divided}."
    )
    return Drawing(
        forest(shown, results),
        f"Ratio to the reference datapath, {names(rows[0].cell.transport)}",
        [],
        [
            f"{circumstances(results, rows[0].cell.guest)} {how}",
            *disturbances(((row.cell, row.ratio) for row in shown), results),
            *_without(rows, results),
        ],
        functional(results, rows),
    )


def meaning_of_marks(
    rows: Sequence[Ratio], results: Results, intervals: str = "95 % t-intervals"
) -> str:
    """What lines and filled marks mean, for a footer.

    Nothing is said of filled marks if all guests are emulated: none is filled then.
    """
    if all(math.isnan(row.ratio.low) for row in rows):
        return NO_INTERVAL
    if all(results.campaign.is_functional(row.cell) for row in rows):
        return intervals
    disturbed = any(row.ratio.disturbed for row in rows)
    return f"{intervals}; filled: the interval excludes 1{f', and {UNSHAKEN}' if disturbed else ''}"


def _without(rows: Sequence[Summary], results: Results) -> list[str]:
    """Which rows have no ratio, and why: a line for each datapath and reason.

    A pair is named alone if all its rows of that datapath have no ratio; else metrics are, too.
    """
    guest = results.campaign.guest
    divided = {(row.cell.datapath, row.cell.pair) for row in rows if row.ratio.blocks}
    found: dict[tuple[str, str], dict[str, None]] = {}
    for row in rows:
        if not row.ratio.blocks:
            cell = row.cell
            what = cell.label(guest)
            if (cell.datapath, cell.pair) in divided:
                what += f" {names(cell.family)} {cell.metric} {size_of(cell)}"
            reason = row.no_ratio or row.reason or "no block has both"
            found.setdefault((cell.datapath, reason), {})[what] = None
    return [
        f"No ratio of {datapath} for {'; '.join(of)}: {reason}."
        for (datapath, reason), of in found.items()
    ]


def forest(rows: Sequence[Ratio], results: Results, band: float = 0.0) -> Figure:
    """Ratios with intervals, a line per pair, family and datapath, a panel per quantity."""
    columns = columns_of(rows)
    sized = len({size_of(row.cell) for row in rows}) > len({row.cell.metric for row in rows})
    sized |= any(row.cell.application for row in rows)

    def line_of(row: Ratio) -> tuple[str, str]:
        pair = row.cell.label(results.campaign.guest)
        place = f"{pair}, {names(row.cell.family, row.cell.transport)}"
        return place, row.cell.datapath + (f", {size_of(row.cell)}" if sized else "")

    lines = list(dict.fromkeys(map(line_of, rows)))
    heights, at = {}, 0.0
    for n, line in enumerate(lines):
        at += 1.0 if n and lines[n - 1][0] == line[0] else 2.1
        heights[line] = at
    figure = Figure(figsize=(WIDTH_IN, 0.5 + 0.115 * at))
    panels = figure.subplots(1, len(columns), sharex=True, sharey=True, squeeze=False)[0]
    gap = "   " if len(columns) < 4 else "\n"
    low, high = _span([row.ratio for row in rows], band)
    for axes, (metric, quantity, name) in zip(panels, columns, strict=True):
        axes.set_title(f"{name}{gap}{better_of(metric, quantity)}", loc="left")
        axes.axvspan(1 / (1 + band), 1 + band, color="#dddddd", lw=0)
        axes.axvline(1, color="black", lw=0.6)
        for row in rows:
            if (row.cell.metric, row.quantity) == (metric, quantity) and row.ratio.blocks:
                style = results.look(row.cell.datapath)
                filled = conclusive(row, results.campaign)
                _interval_line(axes, row, style, heights[line_of(row)], (low, high), filled)
    corner = panels[0]
    corner.set_ylim(at + 0.8, 0.2)
    corner.set_yticks(list(heights.values()), [label for _, label in heights], fontsize=SMALL_PT)
    for place in dict.fromkeys(place for place, _ in lines):
        first = min(height for line, height in heights.items() if line[0] == place)
        for axes in panels:
            axes.axhline(first - 1.55, color="#dddddd", lw=0.5)
            axes.tick_params(axis="y", length=0)
        corner.text(
            -0.02,
            first - 0.95,
            place,
            ha="right",
            va="center",
            fontweight="bold",
            fontsize=SMALL_PT,
            transform=corner.get_yaxis_transform(),
        )
    corner.set_xscale("log")
    corner.set_xlim(low, high)
    ticks = _ticks(low, high, PANELS_IN / len(columns))
    corner.set_xticks(ticks, [f"{x:g}" for x in ticks], minor=False)
    corner.xaxis.set_minor_locator(NullLocator())
    return figure


PANELS_IN = 0.8 * WIDTH_IN
"""Width of all panels together, beside the labels of lines."""
TICK_IN = 0.3
"""Least distance of ticks, so that their labels have room."""
_TICKS = (
    *(1, 0.1, 10, 0.01, 100),
    *(0.5, 2, 0.2, 5, 0.05, 20, 0.02, 50),
    *(0.3, 3, 0.7, 1.5, 0.8, 1.2, 0.9, 1.1, 0.95, 1.05),
)
"""Ticks of an axis of ratios, the more important ones first."""


def _ticks(low: float, high: float, width_in: float) -> list[float]:
    """Ticks of a logarithmic axis of this width: all of `_TICKS` that have room."""
    chosen: list[float] = []
    for tick in _TICKS:
        room = (abs(math.log(tick / other)) for other in chosen)
        if low < tick < high and all(
            gap / math.log(high / low) * width_in >= TICK_IN for gap in room
        ):
            chosen.append(tick)
    return sorted(chosen)


def _span(ratios: Iterable[Estimate], band: float) -> tuple[float, float]:
    """Ends of the axis. It contains every mean, and intervals unless they are much wider."""
    known = [ratio for ratio in ratios if ratio.blocks]
    low, high = min(r.mean for r in known), max(r.mean for r in known)
    low, high = min(low / 1.1, 1 / (1.2 + band)), max(high * 1.1, 1.2 + band)
    ends = [x for r in known for x in (r.low, r.high) if not math.isnan(x)]
    return max(low / 1.5, min([low, *ends])) / 1.03, min(high * 1.5, max([high, *ends])) * 1.03


def _interval_line(
    axes: Axes, row: Ratio, style: Look, at: float, span: tuple[float, float], filled: bool
) -> None:
    """Draw one ratio: mark and whisker, with an arrow head if the whisker leaves the panel."""
    mean, low, high = astuple(row.ratio)[:3]
    if not math.isnan(low):
        axes.plot([max(low, span[0]), min(high, span[1])], [at, at], color="black", lw=0.7)
        for end, beyond, head in ((span[0], low < span[0], "<"), (span[1], high > span[1], ">")):
            if beyond:
                axes.plot(end, at, head, color="black", ms=2.5, clip_on=False)
    axes.plot(
        mean,
        at,
        style.marker,
        ms=3.8,
        mew=0.7,
        mec="black" if filled else style.color,
        mfc=style.color if filled else "white",
        zorder=3,
    )
