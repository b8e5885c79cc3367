"""Interactive figures of the HTML report, by bokeh: hover, datapaths on and off, a cell's blocks.

For each quantity there is a figure of means with intervals, one of ratios to the reference, and one
of the values of blocks; for each metric with histograms, one of distributions. A click on a mark
chooses the place (pair, family, transport, parameters) whose blocks and distributions are shown. A
click on a name in the key hides a datapath in all figures of the metric. Numbers are those of
`Results`, rounded. The HTML contains bokeh's JavaScript: it fetches nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from bokeh.embed import components
from bokeh.events import LegendItemClick
from bokeh.models import (
    BasicTickFormatter,
    CDSView,
    ColumnDataSource,
    CustomJS,
    GroupFilter,
    HoverTool,
    LogTickFormatter,
    NoOverlap,
    Range1d,
    TapTool,
)
from bokeh.models.annotations import Legend, LegendItem, Span
from bokeh.models.glyphs import MultiLine, Scatter, Segment, Text
from bokeh.plotting import figure
from bokeh.resources import Resources

from testbed.model.looks import Look
from testbed.model.metrics import TAIL, Metric
from testbed.model.trials import Status
from testbed.reports.words import (
    FUNCTIONAL,
    absence,
    better_of,
    columns_of,
    conclusive,
    interval,
    names,
    notes_of,
    size_of,
    unit_of,
)
from testbed.results.analysis import Summary
from testbed.results.order import grouped
from testbed.results.results import Histogram, Results
from testbed.results.statistics import NOTHING, Estimate

REPLACES = ("applications", "bars", "curves", "forest")
"""Modules of `testbed.reports.figures` whose pictures these figures replace in the report."""
POINTS = 100
"""Largest number of points of a distribution."""
DIGITS = 4
"""Significant digits of numbers in the file."""
LINE_PX = 16
"""Height of a line, in figures with a line for each cell."""
PANEL_PX = 260
"""Height of the other figures."""
INK = "#333333"
"""Color of texts and intervals."""
CUT = 1.5
"""The axis goes beyond all means by at most this factor; intervals that go further are cut off."""
MARKERS = {
    "o": "circle",
    "v": "inverted_triangle",
    "^": "triangle",
    "<": "triangle_pin",
    ">": "square_pin",
    "s": "square",
    "D": "diamond",
    "d": "diamond_dot",
    "P": "plus",
    "X": "square_x",
    "*": "star",
    "h": "hex",
    "p": "hex_dot",
}
"""Marker of a look, as matplotlib calls it → as bokeh does."""
DASHES = {"-": "solid", "--": "dashed", "-.": "dotdash"}
"""Line of a look, likewise."""

Lines = Mapping[int, str | Summary]
"""Line of a figure, from 1 → the place that is its heading, or one of the rows of that place."""


def section(results: Results) -> str:
    """HTML of the figures of all metrics, and bokeh's JavaScript; empty if no cell has a value."""
    measured = [row for row in results.summaries if row.status is Status.OK]
    metrics = dict.fromkeys(metric for metric, _, _ in columns_of(measured))
    plots = {metric: MetricFigures(metric, results).figures() for metric in metrics}
    if not plots:
        return ""
    script, divs = components(
        {f"{metric}-{n}": plot for metric, of in plots.items() for n, plot in enumerate(of)}
    )
    parts = []
    for metric, of in plots.items():
        panels = (f'<div class="panel">{divs[f"{metric}-{n}"]}</div>' for n in range(len(of)))
        parts.append(f"<h3>{escape(metric.capitalize())}</h3>")
        parts.append('<div class="panels">' + "\n".join(panels) + "</div>")
    library = Resources(mode="inline", components=["bokeh"]).render_js()
    return "\n".join([library, renumbered("\n".join([*parts, script]))])


def renumbered(text: str) -> str:
    """The text with bokeh's random and running ids replaced: the same figures, the same bytes."""
    ids = r"""(?<=["'])p\d{4,}(?=["'])|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"""
    found: dict[str, str] = {}
    return re.sub(ids, lambda match: found.setdefault(match[0], f"id{len(found)}"), text)


class MetricFigures:
    """Makes the figures of one metric, which share a key and the place that is chosen."""

    def __init__(self, metric: Metric, results: Results) -> None:
        self.results = results
        self.rows = [row for row in results.summaries if row.cell.metric is metric]
        self.measured = [row for row in self.rows if row.status is Status.OK]
        self.places = list(dict.fromkeys(map(self.place_of, self.measured)))
        self.chosen = GroupFilter(column_name="place", group="0")
        self.choose, self.hide = CustomJS(code=_CHOOSE), CustomJS(code=_HIDE)
        self.renderers: dict[str, list[Any]] = {}
        """Datapath → what a click on its name hides."""

    def place_of(self, row: Summary) -> str:
        """Pair, family, transport and parameters: what cells that are compared have in common."""
        cell, guest = row.cell, self.results.campaign.guest
        return f"{cell.label(guest)}, {names(cell.family, cell.transport)}, {size_of(cell)}"

    def index_of(self, row: Summary) -> str:
        """The place of a row in `places`: short, as it stands at each block."""
        return str(self.places.index(self.place_of(row)))

    def figures(self) -> list[Any]:
        """For each quantity: means, ratios, and blocks. Then the distributions."""
        plots, of_place = [], []
        for metric, quantity, name in columns_of(self.measured):
            title = f"{name}, {unit_of(metric, quantity).name}"
            better = better_of(metric, quantity)
            rows = [row for row in self.rows if row.quantity == quantity]
            lines = self.lines(rows)
            sources = self.sources(lines)
            plots.append(self.intervals("value", f"{title}   {better}", lines, sources))
            if any(row.is_divided for row in rows):
                plots.append(self.intervals("ratio", f"ratio   {better}", lines, sources))
            if quantity != TAIL:  # which no block has by itself
                of_place.append(self.blocks(quantity, title))
                plots.append(of_place[-1])
        if any(row.cell in self.results.histograms for row in self.measured):
            of_place.append(self.distributions())
            plots.append(of_place[-1])
        titles = [plot.title for plot in of_place]
        self.choose.args = {"chosen": self.chosen, "places": self.places, "titles": titles}
        self.hide.args = {"renderers": self.renderers}
        for plot in plots:
            plot.add_layout(self.key(plot), "above")
        return plots

    def lines(self, rows: Sequence[Summary]) -> Lines:
        """The rows of each place, below its name."""
        found: list[str | Summary] = []
        for place, of in grouped(rows, self.place_of).items():
            found += [place, *of]
        return dict(enumerate(found, 1))

    def sources(self, lines: Lines) -> dict[str, ColumnDataSource]:
        """Datapath → its rows that have a value, as the columns of its marks."""
        rows = [(y, row) for y, row in lines.items() if not isinstance(row, str)]
        measured = [(y, row) for y, row in rows if row.status is Status.OK]
        return {
            datapath: _source([self.mark(y, row) for y, row in of])
            for datapath, of in grouped(measured, lambda at: at[1].cell.datapath).items()
        }

    def mark(self, y: int, row: Summary) -> dict[str, Any]:
        """What is drawn and said of a row."""
        cell, unit = row.cell, unit_of(row.cell.metric, row.quantity)
        functional = self.results.campaign.is_functional(cell)
        color = self.results.look(cell.datapath).color
        sound = not (functional or row.limited or row.estimate.shaken)
        ratio = row.ratio if row.is_divided else NOTHING
        divided = f"{interval(ratio, 1, wide=True)} to {row.reference}" if ratio.blocks else ""
        return {
            "y": y,
            "place": self.index_of(row),
            "cell": self.place_of(row),
            "value_said": f"{interval(row.estimate, unit.scale, wide=True)} {unit.name}",
            "ratio_said": divided,
            "blocks": row.estimate.blocks,
            "note": "; ".join(filter(None, (notes_of(row), FUNCTIONAL if functional else ""))),
            "value_fill": color if sound else "white",
            "ratio_fill": color if conclusive(row, self.results.campaign) else "white",
            **_numbers("value", row.estimate, unit.scale),
            **_numbers("ratio", ratio, 1),
        }

    def intervals(
        self, what: str, title: str, lines: Lines, sources: Mapping[str, ColumnDataSource]
    ) -> Any:
        """Means or ratios (`what`: `value` or `ratio`) with intervals, a line for each cell."""
        plot = _plot(
            title,
            LINE_PX * len(lines),
            x_axis_type="log",
            x_axis_location="above",  # below, it would be out of sight in a long figure
            x_range=_span(what, sources.values()),
            y_range=Range1d(start=len(lines) + 0.7, end=0.3),
        )
        if what == "ratio":
            plot.add_layout(Span(location=1, dimension="height", line_width=0.7))
        _write(plot, what, lines)
        marks = []
        for datapath, source in sources.items():
            look = self.results.look(datapath)
            line = Segment(x0=f"{what}_low", x1=f"{what}_high", y0="y", y1="y", line_color=INK)
            self.add(plot, datapath, source, line)
            mark = Scatter(x=what, y="y", fill_color=f"{what}_fill", size=8, **_mark(look))
            marks.append(self.add(plot, datapath, source, mark))
        said = {"datapath": "$name", "cell": "@cell", "value": "@value_said"}
        said |= {"ratio": "@ratio_said", "blocks": "@blocks", "note": "@note"}
        plot.add_tools(_hover(marks, said))
        plot.add_tools(TapTool(renderers=marks, callback=self.choose))
        return plot

    def blocks(self, quantity: str, title: str) -> Any:
        """The values of blocks in the chosen place; hollow: the trial was disturbed."""
        plot = _plot(self.places[0], PANEL_PX, x_axis_label="block", y_axis_label=title)
        plot.xaxis.ticker.min_interval = 1
        rows = [row for row in self.measured if row.quantity == quantity]
        marks = []
        for datapath, of in grouped(rows, lambda row: row.cell.datapath).items():
            source = _source([point for row in of for point in self.points(row)])
            look = self.results.look(datapath)
            fill: dict[str, Any] = {"fill_color": look.color, "fill_alpha": "sound"}
            mark = Scatter(x="block", y="value", size=6, **fill, **_mark(look))
            marks.append(self.add(plot, datapath, source, mark, of_place=True))
        said = {"datapath": "$name", "block": "@block", "value": "@value"}
        plot.add_tools(_hover(marks, said | {"disturbed": "@disturbed"}))
        return plot

    def points(self, row: Summary) -> list[dict[str, Any]]:
        """The values of a cell's blocks."""
        scale = unit_of(row.cell.metric, row.quantity).scale
        place, disturbed = self.index_of(row), self.results.disturbed(row.cell)
        return [
            {
                "place": place,
                "block": block,
                "value": _rounded(value / scale),
                "disturbed": "yes" if block in disturbed else "no",
                "sound": int(block not in disturbed),
            }
            for block, value in self.results.values(row.cell, row.quantity).items()
        ]

    def distributions(self) -> Any:
        """The share of times above each time, in the chosen place, of all blocks together."""
        plot = _plot(
            self.places[0],
            PANEL_PX,
            x_axis_type="log",
            y_axis_type="log",
            x_axis_label="time, µs",
            y_axis_label="share of times above",
        )
        plot.yaxis.formatter = LogTickFormatter()
        once = {row.cell: row for row in self.measured if row.cell in self.results.histograms}
        curves = []
        for datapath, of in grouped(once.values(), lambda row: row.cell.datapath).items():
            found = [(row, *distribution(self.results.histograms[row.cell])) for row in of]
            lines = [{"place": self.index_of(r), "us": us, "share": s} for r, us, s in found]
            line = MultiLine(xs="us", ys="share", **_line(self.results.look(datapath)))
            curves.append(self.add(plot, datapath, _source(lines), line, of_place=True))
        said = {"datapath": "$name", "share": "$snap_y{0.000000}", "above": "$snap_x µs"}
        plot.add_tools(_hover(curves, said))
        return plot

    def add(
        self, plot: Any, datapath: str, source: ColumnDataSource, glyph: Any, of_place: bool = False
    ) -> Any:
        """Add marks or lines of a datapath to a figure; all, or those `of_place` that is chosen."""
        view = CDSView(filter=self.chosen) if of_place else CDSView()
        made = plot.add_glyph(source, glyph, view=view, name=datapath, nonselection_glyph=None)
        self.renderers.setdefault(datapath, []).append(made)
        return made

    def key(self, plot: Any) -> Legend:
        """The key of a figure: a click on a datapath hides it in all figures, and shows it."""
        own = [renderer for renderer in plot.renderers if renderer.name]
        items = [
            LegendItem(label=datapath, renderers=of)
            for datapath, of in grouped(own, lambda renderer: renderer.name).items()
        ]
        items.sort(key=lambda item: self.results.rank(str(item.renderers[0].name)))
        small: dict[str, Any] = {"glyph_width": 14, "glyph_height": 14, "margin": 2, "padding": 0}
        small |= {"label_text_font_size": "11px", "border_line_color": None}
        key = Legend(items=items, click_policy="hide", location="top_left", ncols=2, **small)
        key.js_on_event(LegendItemClick, self.hide)
        return key


_CHOOSE = """
const {data, selected} = cb_data.source, row = selected.indices[0];
chosen.group = data.place[row];
for (const title of titles) title.text = places[data.place[row]];
"""
"""Shows the blocks and distributions of the place of the mark that was clicked."""
_HIDE = """
const own = cb_obj.item.renderers;
const others = renderers[own[0].name].filter(renderer => !own.includes(renderer));
for (const renderer of others) renderer.visible = !renderer.visible;
"""
"""Hides a datapath in the other figures of the metric, or shows it; the key does so in its own."""


def distribution(blocks: Sequence[Histogram]) -> tuple[list[float], list[float]]:
    """Times, and the share of samples above each, of all blocks together.

    At most `POINTS` upper bounds of buckets: half of them spread over shares, half over the
    logarithms of shares, for the tail. The largest time is left out, as no share is above it.
    """
    buckets = sorted(bucket for block in blocks for bucket in block)
    uppers, counts = np.array(buckets).T
    seen = counts.cumsum()
    last = np.append(uppers[1:] != uppers[:-1], True) & (seen < seen[-1])
    times, shares = uppers[last], 1 - seen[last] / seen[-1]
    if not len(shares):
        return [], []
    spread = (1 - shares) + np.log(shares) / np.log(shares[-1])
    places = np.linspace(spread[0], spread[-1], POINTS)
    kept = np.unique(np.searchsorted(spread, places).clip(max=len(spread) - 1))
    return list(map(_rounded, times[kept])), list(map(_rounded, shares[kept]))


def _plot(title: str, frame_height: int, **more: Any) -> Any:
    """An empty figure as wide as its place. Dragging scrolls the page until a tool is chosen."""
    plot: Any = figure(
        title=title,
        frame_height=frame_height,
        sizing_mode="stretch_width",
        tools="box_zoom,reset",
        active_drag=None,
        **more,
    )
    plot.toolbar.autohide = True
    plot.toolbar.logo = None
    plot.title.text_font_size = "12px"
    plot.axis.axis_label_text_font_size = plot.axis.major_label_text_font_size = "11px"
    plot.axis.axis_label_text_font_style = "normal"
    plot.grid.grid_line_color = "#e5e5e5"
    plot.axis.minor_tick_line_color = None
    for axis in plot.axis:
        axis.formatter = BasicTickFormatter(use_scientific=False)
    plot.xaxis.major_label_policy = NoOverlap()
    return plot


def _hover(renderers: Sequence[Any], said: Mapping[str, str]) -> HoverTool:
    """What is said of a mark or a line that is pointed at, above or below it."""
    return HoverTool(renderers=list(renderers), tooltips=list(said.items()), attachment="vertical")


def _write(plot: Any, what: str, lines: Lines) -> None:
    """Write names of datapaths beside the lines, and headings and why marks are missing in them."""
    rows = {y: line for y, line in lines.items() if not isinstance(line, str)}
    plot.yaxis.ticker = list(rows)
    plot.yaxis.major_label_overrides = {y: row.cell.datapath for y, row in rows.items()}
    plot.yaxis.major_tick_line_color = plot.ygrid.grid_line_color = None
    plot.yaxis.major_tick_out = 0
    missing = {y: _missing(what, row) for y, row in rows.items()}
    words = [
        {"y": y, "text": text, "style": style}
        for texts, style in ((lines, "bold"), (missing, "normal"))
        for y, text in texts.items()
        if isinstance(text, str) and text
    ]
    plot.extra_x_ranges = {"frame": Range1d(start=1, end=10)}  # from the left edge to the right one
    text = Text(x=1, x_offset=4, y="y", text="text", text_baseline="middle")
    text.update(text_font_size="11px", text_font_style="style", text_color=INK)
    plot.add_glyph(_source(words), text, x_range_name="frame")


def _missing(what: str, row: Summary) -> str:
    """What stands in a line without a mark."""
    if row.status is not Status.OK:
        return absence(row.status)
    if what == "value" or row.is_divided:
        return ""
    return "reference" if row.reference == row.cell.datapath else "no ratio"


def _span(what: str, sources: Iterable[ColumnDataSource]) -> Range1d:
    """The range of an axis: all means, and intervals unless they are much wider (`CUT`)."""
    columns: list[Any] = [source.data for source in sources]
    means = [x for data in columns for x in data[what] if not math.isnan(x)]
    means += [1.0] if what == "ratio" else []
    ends = [x for data in columns for end in ("low", "high") for x in data[f"{what}_{end}"]]
    ends = [x for x in (*means, *ends) if not math.isnan(x)]
    low, high = max(min(ends), min(means) / CUT), min(max(ends), max(means) * CUT)
    return Range1d(start=low / 1.03, end=high * 1.03)


def _source(lines: Sequence[Mapping[str, Any]]) -> ColumnDataSource:
    """Lines as columns."""
    return ColumnDataSource({name: [line[name] for line in lines] for name in lines[0]})


def _numbers(name: str, of: Estimate, scale: float) -> dict[str, float]:
    """The columns `name`, `name_low` and `name_high` of an estimate."""
    ends = {name: of.mean, f"{name}_low": of.low, f"{name}_high": of.high}
    return {column: _rounded(x / scale) for column, x in ends.items()}


def _rounded(x: float) -> float:
    return float(f"{x:.{DIGITS}g}")


def _mark(look: Look) -> dict[str, Any]:
    """Marker and outline of a look, as arguments of `Scatter`."""
    return {"marker": MARKERS.get(look.marker, "circle"), "line_color": look.color}


def _line(look: Look) -> dict[str, Any]:
    """Line of a look, as arguments of `MultiLine`."""
    of = look.line
    dash = DASHES[of] if isinstance(of, str) else [max(1, round(2 * length)) for length in of]
    return {"line_color": look.color, "line_dash": dash, "line_width": 2}
