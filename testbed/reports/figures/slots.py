"""Slots: positions of bars along the x axis, by pair and datapath, and what is drawn around bars.

The mean of a bar is written above the panel, where no whisker and no other bar can cross it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from statistics import median
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from testbed.reports.figures.style import LABEL_PT, SMALL_PT, WIDTH_IN, text_in
from testbed.reports.words import number
from testbed.results.analysis import Breakdown, Summary
from testbed.results.order import grouped
from testbed.results.results import Results
from testbed.results.statistics import Estimate

Slots = Sequence[tuple[str, str] | None]
"""(pair, datapath) for each bar, and None for each gap."""

PANELS_IN = 0.88 * WIDTH_IN
"""Width of all panels of a line together, without the scales beside them."""
CROWDED = 48
"""Number of slots above which panels do not all stand in one line."""
CUT = 1.5
"""Height of a panel at most, as a multiple of the longest bar that is not `FAR`."""
FAR = 20
"""Bars above this multiple of the median bar are cut off: beside them no other could be read."""


def slots_of(rows: Iterable[Summary | Breakdown], results: Results, share: float = 1) -> Slots:
    """Slots of the rows' bars in reading order, with a gap between pairs.

    `share` is the panel's share of the figure's width. A pair with few bars gets gaps at both sides
    too, so that its label has room.
    """
    guest = results.campaign.guest
    ordered = sorted(rows, key=lambda r: results.reading_order(r.cell, ""))
    pairs = grouped(ordered, lambda r: r.cell.label(guest))
    bars = {
        pair: sorted({r.cell.datapath for r in of}, key=results.rank) for pair, of in pairs.items()
    }
    least = dict.fromkeys(pairs, 0)
    for _ in range(3):  # more gaps make slots narrower, and then labels need more of them
        count = sum(max(len(bars[pair]), least[pair]) + 1 for pair in pairs)
        slot_in = share * PANELS_IN / max(1, count)
        least = {pair: math.ceil(_label_in(pair) / slot_in) - 1 for pair in pairs}
    slots: list[tuple[str, str] | None] = []
    for pair, datapaths in bars.items():
        spare = max(0, least[pair] - len(datapaths))
        before, after = [None] * (spare // 2), [None] * (spare - spare // 2)
        slots += [None, *before, *((pair, datapath) for datapath in datapaths), *after]
    return slots[1:]


def _label_in(pair: str) -> float:
    return max(text_in(line, LABEL_PT) for line in _label(pair).split("\n"))


def _label(pair: str) -> str:
    return pair.replace("→", "\n→ ")


def set_slots(axes: Axes, slots: Slots, named: bool) -> None:
    """Label the x axis by pair; if `named`, also each slot by its datapath."""
    axes.set_xlim(-0.9, len(slots) - 0.1)
    axes.grid(axis="y")
    ticks = {at: slot[1] for at, slot in enumerate(slots) if slot and named}
    axes.set_xticks(list(ticks), list(ticks.values()), rotation=90, fontsize=SMALL_PT)
    below_pt = 8 + 72 * max(text_in(name, SMALL_PT) for name in ticks.values()) if ticks else 4
    for pair in dict.fromkeys(slot[0] for slot in slots if slot):
        own = [at for at, slot in enumerate(slots) if slot and slot[0] == pair]
        axes.annotate(
            _label(pair),
            (sum(own) / len(own), 0),
            (0, -below_pt),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=LABEL_PT,
        )


def set_height(axes: Axes, shown: Iterable[Estimate], scale: float) -> None:
    """Set the y axis from zero. Long intervals (`CUT`) and very long bars (`FAR`) are cut off."""
    shown = list(shown) or [Estimate(scale, math.nan, math.nan, 0)]
    middle = median(of.mean for of in shown)
    shown = [of for of in shown if of.mean <= FAR * middle]
    tops = [of.high if of.high > 0 else of.mean for of in shown]  # NaN: no interval
    axes.set_ylim(0, 1.03 * min(max(tops), CUT * max(of.mean for of in shown)) / scale)


class Grid(NamedTuple):
    """Panels with slots, in lines."""

    figure: Figure
    panels: Sequence[Axes]
    """All panels, line by line."""
    lefts: Sequence[Axes]
    """The first panel of each line."""
    slots: Sequence[Slots]
    """Slots of each panel."""
    upright: bool
    """Whether the numbers above bars are written upright, and not turned."""


def grid_of(
    groups: Sequence[tuple[str, Sequence[Summary | Breakdown]]],
    together: int,
    means: Iterable[float],
    line_in: float,
    results: Results,
) -> Grid:
    """A panel for each group (title, rows): in one line, or `together` of them if it is crowded.

    It is if there are too many slots, or a title is wider than its panel. `means` are all numbers
    to be written above bars, `line_in` is the height of a line in inches.
    """
    crowded = sum(len(slots_of(rows, results)) for _, rows in groups) > CROWDED
    crowded |= len(groups) * max(text_in(title, LABEL_PT) for title, _ in groups) > PANELS_IN
    columns = together if crowded else len(groups)
    slots = [slots_of(rows, results, 1 / columns) for _, rows in groups]
    lines = [slots[n : n + columns] for n in range(0, len(slots), columns)]
    figure = Figure(figsize=(WIDTH_IN, line_in * len(lines)))
    widths = [max(map(len, column)) + 1 for column in zip_longest(*lines, fillvalue=())]
    grid = figure.subplots(len(lines), columns, squeeze=False, width_ratios=widths)
    number_in = max((text_in(number(mean, mean), SMALL_PT) for mean in means), default=0)
    upright = 1.3 * number_in < PANELS_IN / sum(widths)
    panels, spare = list(grid.flat)[: len(groups)], list(grid.flat)[len(groups) :]
    for axes in spare:
        axes.remove()
    for axes, (title, _) in zip(panels, groups, strict=True):
        pad_pt = 12 if upright else 6 + 72 * number_in
        axes.set_title(title, loc="left", fontweight="bold", pad=pad_pt)
    return Grid(figure, panels, list(grid[:, 0]), slots, upright)


def write_value(axes: Axes, at: float, text: str, upright: bool) -> None:
    """Write the value of a bar above the panel."""
    axes.annotate(
        text,
        (at, 1),
        (0, 3),
        xycoords=axes.get_xaxis_transform(),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=SMALL_PT,
        rotation=0 if upright else 90,
    )
