"""Claims against their bounds: ratios that a plan claims, with blocks, intervals and verdicts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from testbed.reports.claims import WORDS, Found, Verdict, estimator_of, judge, sizes
from testbed.reports.figures.style import (
    SMALL_PT,
    WIDTH_IN,
    Drawing,
    circumstances,
    disturbances,
    keys_of,
    line_key,
    mark_of,
)
from testbed.results.order import grouped
from testbed.results.results import Results

LINE_IN = 0.16
"""Height of a line."""
JITTER = 0.3
"""Blocks lie within this distance of their line, in lines."""
MARGIN = 0.25
"""Share of the span of intervals and bounds that the axis goes beyond it, at each end."""


NEAR = 1.5
"""Claims about ratios that are farther from 1, as a factor, have a panel of their own."""

Groups = Mapping[str, Sequence[Found]]
"""Text of a claim → its rows."""


def figures(results: Results) -> Iterator[tuple[str, Drawing]]:
    """A figure `claims-DATAPATH` for each datapath of which the plan claims what was measured."""
    rows = [row for row in judge(results) if row.ratio.blocks and row.claim.bounded]
    for datapath, of in grouped(rows, lambda row: row.cell.datapath).items():
        yield f"claims-{datapath}", claims(datapath, of, results)


def claims(datapath: str, rows: Sequence[Found], results: Results) -> Drawing:
    """Claims with a bound, one line for each cell below the text of its claim."""
    groups = grouped(rows, lambda row: row.claim.text)
    far = {text for text, group in groups.items() if max(map(_factor, group)) > NEAR}
    parts = [{t: g for t, g in groups.items() if (t in far) is apart} for apart in (False, True)]
    panels = [part for part in parts if part]
    heights = [sum(len(group) + 1.3 for group in part.values()) + 0.5 for part in panels]
    figure = Figure(figsize=(WIDTH_IN, 0.35 * len(panels) + LINE_IN * sum(heights)))
    for axes, part in zip(
        figure.subplots(len(panels), height_ratios=heights, squeeze=False).flat, panels, strict=True
    ):
        _panel(axes, part, results)
    how = (
        f"Ratios within a block: {WORDS[estimator_of(results.campaign)]} (95 %). Points: blocks, "
        "as far as they lie on the axis. A claim holds if the whole interval is clear of the gray."
    )
    return Drawing(
        figure,
        f"Claims of {datapath} against their bounds",
        keys_of(rows, line_key, results),
        [
            f"{circumstances(results, rows[0].cell.guest)} {how}",
            *disturbances(((row.cell, row.ratio) for row in rows), results),
        ],
        any(results.campaign.is_functional(row.cell) for row in rows),
    )


def _factor(row: Found) -> float:
    """How far a ratio is from 1."""
    return max(row.ratio.mean, 1 / row.ratio.mean)


def _panel(axes: Axes, groups: Groups, results: Results) -> None:
    """Draw claims below each other."""
    low, high = _span([row for group in groups.values() for row in group])
    at, ticks = 0.0, {}
    for text, group in groups.items():
        at += 1.3
        axes.text(0.005, at, text, transform=axes.get_yaxis_transform(), **_TITLE)
        _bound(axes, group[0], (at + 0.6, at + len(group) + 0.4), (low, high))
        for row in group:
            at += 1
            ticks[at] = f"{row.cell.label(results.campaign.guest)}, {sizes(row)}"
            _line(axes, row, at, results)
            axes.text(1.01, at, row.verdict, transform=axes.get_yaxis_transform(), **_VERDICT)
    axes.axvline(1, color="black", lw=0.6)
    axes.set_xlim(low, high)
    axes.set_ylim(at + 0.8, 0.5)
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=SMALL_PT)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(8))


_TITLE: dict[str, Any] = {"ha": "left", "va": "center", "fontsize": SMALL_PT, "fontweight": "bold"}
_VERDICT: dict[str, Any] = {"ha": "left", "va": "center", "fontsize": SMALL_PT}


def _span(rows: Sequence[Found]) -> tuple[float, float]:
    """Ends of the axis: all intervals and bounds, 1, and some room."""
    ends = [1.0]
    for row in rows:
        ends += [row.ratio.mean, row.ratio.low, row.ratio.high]
        ends += [bound for bound in (row.claim.at_least, row.claim.at_most) if bound is not None]
    known = [end for end in ends if not math.isnan(end)]
    room = MARGIN * (max(known) - min(known)) + 0.005
    return min(known) - room, max(known) + room


def _bound(axes: Axes, row: Found, lines: tuple[float, float], span: tuple[float, float]) -> None:
    """Shade what lies beyond the bounds of a claim."""
    for bound, beyond in ((row.claim.at_least, span[0]), (row.claim.at_most, span[1])):
        if bound is not None:
            axes.fill_betweenx(lines, bound, beyond, color="#e4e4e4", lw=0)
            axes.plot([bound, bound], lines, color="#666666", lw=1)


def _line(axes: Axes, row: Found, at: float, results: Results) -> None:
    """Draw one ratio: its blocks, its interval and its mark, filled if there is a verdict."""
    look = results.look(row.cell.datapath)
    blocks = list(results.ratios(row.cell, row.to, row.claim.quantity).values())
    heights = [at + JITTER * (2 * (n * _GOLDEN % 1) - 1) for n in range(len(blocks))]
    axes.plot(blocks, heights, ".", color=look.color, ms=1.5, mew=0, alpha=0.5, zorder=1)
    axes.plot([row.ratio.low, row.ratio.high], [at, at], color="black", lw=1, zorder=3)
    decided = row.verdict in (Verdict.HOLDS, Verdict.FAILS)
    fill = look.color if decided else "white"
    axes.plot([row.ratio.mean], [at], ls="", **{**mark_of(look), "mfc": fill}, zorder=4)


_GOLDEN = (5**0.5 - 1) / 2
"""Its multiples, modulo 1, are spread evenly: the same figure each time."""
