"""Figures of a campaign, drawn from what it stored alone, on any machine and without privileges.

Made for a two-column paper at full width: they read in black and white (hatches, line styles,
markers), to the colour-blind (Okabe and Ito's palette), a datapath looks the same in all of them,
and the same trials give the same bytes. What could not be measured is there, with the reason. The
numbers are `testbed.analysis`'s; nothing is computed here but how they look.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, NullLocator
from matplotlib.transforms import blended_transform_factory

from testbed.analysis import Cost, Estimate, Summary, costs, distribution
from testbed.model import Cell, Error, Family, Metric, Pair, Status
from testbed.report import (
    COLUMNS,
    FUNCTIONAL,
    UNITS,
    absence,
    blocks_of,
    grouped,
    guest_of,
    names,
    number,
    present,
    rank,
    size_of,
    summaries,
)
from testbed.store import Store, frame

Blocks = Sequence[Sequence[tuple[float, int]]]
"""Histograms of a cell's blocks."""


class Style(NamedTuple):
    """How a datapath looks, the same in every figure."""

    color: str
    hatch: str
    line: Any
    marker: str


class Part(NamedTuple):
    """How a part of a bar looks."""

    color: str
    hatch: str
    name: str


STYLES = {
    "loopback": Style("#999999", "", "-", "o"),
    "direct": Style("#56B4E9", "....", (0, (1, 1)), "s"),
    "bridge": Style("#E69F00", "////", "--", "^"),
    "tcredirect": Style("#882255", "xxxx", (0, (3, 1, 1, 1, 1, 1)), "<"),
    "capture": Style("#D55E00", "\\\\\\\\", "-", "D"),
    "steer": Style("#0072B2", "----", "-", "v"),
    "dnat": Style("#009E73", "++++", "-.", "P"),
    "proxy": Style("#F0E442", "ooo", (0, (5, 1)), "X"),
    "passt": Style("#CC79A7", "||||", (0, (3, 1, 1, 1)), ">"),
    "tun": Style("#555555", "", (0, (1, 3)), "*"),
    "broadcast": Style("#000000", "", (0, (8, 2)), "h"),
}
"""In the order of bars and rows. Okabe and Ito's eight colours, two greys and a wine."""

NOVEL = Style("#CCCCCC", "OO", (0, (2, 2)), "d")
"""A datapath that has no style yet."""

_RC: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same on every machine
    "font.size": 7,
    "axes.titlesize": 7.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "hatch.linewidth": 0.4,
    "patch.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "pdf.fonttype": 42,  # TrueType: what publishers' checks accept
    "savefig.dpi": 300,
}
_WIDTH_IN = 7.1
"""Text width of a two-column page."""
_FOOTER_PT = 6
_SMALL_PT = 5.5


def draw(store: Store) -> list[Path]:
    """Draw all figures of a campaign into its `figures/`, as PNG and PDF; say which they are.

    One figure per metric, transport and message size: `throughput-tcp.png`, and with the size in
    the name where there are several. Likewise what it cost the host: `cpu-throughput-tcp.png`. All
    ratios to reference datapaths: `ratios-tcp.png`.
    """
    rows, histograms, files = summaries(store), dict[Cell, list[Any]](), []
    for trial in store.trials():
        if trial.status is Status.OK and trial.histogram_us:
            histograms.setdefault(Cell.parse(trial.cell), []).append(trial.histogram_us)
    folder = store.path / "figures"
    with mpl.rc_context(_RC):
        kinds = grouped(rows, lambda r: (r.cell.metric, r.cell.transport))
        for (metric, transport), kind in kinds.items():
            sizes = grouped(kind, lambda r: f"-{r.cell.params}")
            for size, group in sizes.items():
                if metric is Metric.LATENCY:
                    figure = _curves(group, histograms, store)
                else:
                    figure = _bars(group, store)
                name = f"{metric}-{transport}{size if len(sizes) > 1 else ''}"
                files += _save(figure, folder, name)
        spent = grouped(costs(frame(store.trials())), lambda c: (c.cell.metric, c.cell.transport))
        for (metric, transport), costly in spent.items():
            by_size = grouped(costly, lambda c: f"-{c.cell.params}")
            for size, alike in by_size.items():
                name = f"cpu-{metric}-{transport}{size if len(by_size) > 1 else ''}"
                files += _save(_spent(alike, store), folder, name)
        divided = [row for row in rows if row.reference != row.cell.datapath]
        for transport, group in grouped(divided, lambda r: r.cell.transport).items():
            if any(row.ratio.blocks for row in group):
                files += _save(_ratios(group, store), folder, f"ratios-{transport}")
    return files


def draw_comparison(
    rows: Sequence[Ratio], before: Store, after: Store, band: float, folder: Path
) -> list[Path]:
    """Draw ratios of one campaign to another, `against-<before>.png` and its PDF, into `folder`."""
    shown = [row for row in rows if row.ratio.blocks]
    with mpl.rc_context(_RC):
        figure = _forest(shown, after.campaign.guest, band)
        how = (
            "Ratio of geometric means, later by earlier, with 95 % Welch t-intervals; filled: the "
            f"interval excludes 1. Gray: the band of equivalence, {band:.0%}."
        )
        paragraphs = [f"Earlier: {circumstances(before)}", f"Later: {circumstances(after)}", how]
        _surround(
            figure, f"{after.path.name} against {before.path.name}",
            _keys(shown, _point), paragraphs,
            before.campaign.functional or after.campaign.functional,
        )  # fmt: skip
        return _save(figure, folder, f"against-{before.path.resolve().name}")


def _save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """As PNG and PDF; without dates and versions, so that the same trials give the same bytes."""
    png, pdf = folder / f"{name}.png", folder / f"{name}.pdf"
    try:
        folder.mkdir(exist_ok=True)
        figure.savefig(png, metadata={"Software": None})
        figure.savefig(pdf, metadata={"CreationDate": None})
    except OSError as e:
        raise Error(f"{e.filename or folder}: {e.strerror}", "figures go into the campaign") from e
    return [png, pdf]


def _bars(rows: Sequence[Summary], store: Store) -> Figure:
    """Means as bars with interval whiskers, by pair and datapath, panels per family.

    The kernel's own loopback is an order of magnitude above any guest, so it has a scale of its
    own rather than a logarithmic one, on which bars would say nothing.
    """
    families = present(Family, (row.cell.family for row in rows))
    native = [row for row in rows if row.cell.pair is Pair.NATIVE_NATIVE]
    parts = [part for part in (native, [row for row in rows if row not in native]) if part]
    slots = [_slots(part) for part in parts]
    figure = Figure(figsize=(_WIDTH_IN, 2.2))
    how = (
        "Bars: geometric means over blocks; "
        + ("whiskers: 95 % t-intervals" if store.campaign.blocks > 1 else "no interval from one")
        + ("; native and guest pairs on scales of their own." if len(parts) > 1 else ".")
    )
    _surround(
        figure, _title(rows[0].cell), _keys(rows, _patch),
        [f"{circumstances(store)} {how}", *_absences(rows)], store.campaign.functional,
    )  # fmt: skip
    panels = figure.subplots(
        1, len(families) * len(parts), squeeze=False,
        width_ratios=[len(s) + 1 for s in slots] * len(families),
    )[0]  # fmt: skip
    for n, axes in enumerate(panels):
        family, part = families[n // len(parts)], parts[n % len(parts)]
        if n % len(parts) == 0:
            axes.set_title(names(family), loc="left", fontweight="bold")
        _bar_panel(axes, part, family, slots[n % len(parts)], store.campaign.guest)
    named = {Metric.THROUGHPUT: "goodput, Gbit/s", Metric.CONNECTIONS: "connections, 10³/s"}
    panels[0].set_ylabel(named[rows[0].cell.metric])
    return figure


def _slots(rows: Sequence[Summary] | Sequence[Cost]) -> list[tuple[Pair, str] | None]:
    """Places along the x axis: the datapaths of each pair, an empty place between pairs."""
    slots: list[tuple[Pair, str] | None] = []
    for pair in present(Pair, (row.cell.pair for row in rows)):
        here = {row.cell.datapath: None for row in rows if row.cell.pair is pair}
        slots += [None, *((pair, datapath) for datapath in sorted(here, key=rank))]
    return slots[1:]


def _bar_panel(
    axes: Axes, rows: Sequence[Summary], family: Family, slots: Sequence[Any], guest: str
) -> None:
    scale = UNITS[rows[0].cell.metric].scale
    means = [row.estimate.mean / scale for row in rows if row.status is Status.OK]
    axes.set_ylim(0, 1.3 * max(means, default=1))
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
            axes.bar(at, 0.2, width=0.86, color="white", hatch="////", edgecolor="#aaaaaa",
                     transform=across)  # fmt: skip
            axes.text(at, 0.1, absence(row.status), transform=across, ha="center", va="center",
                      fontsize=_SMALL_PT, rotation=90,
                      bbox={"fc": "white", "ec": "none", "pad": 0.6})  # fmt: skip
            continue
        style = STYLES.get(row.cell.datapath, NOVEL)
        mean, low, high = (
            x / scale for x in (row.estimate.mean, row.estimate.low, row.estimate.high)
        )
        axes.bar(at, mean, width=0.86, color=style.color, hatch=style.hatch, edgecolor="black")
        if not math.isnan(low):
            axes.errorbar(
                at, mean, [[mean - low], [high - mean]], color="black", lw=0.8, capsize=1.5
            )
        top = mean if math.isnan(high) else min(high, 1.15 * max(means))
        axes.annotate(number(mean, mean), (at, top), (0, 1.5), textcoords="offset points",
                      ha="center", va="bottom", fontsize=_SMALL_PT, annotation_clip=False,
                      rotation=90 if len(slots) > 14 else 0,
                      bbox={"fc": "white", "ec": "none", "pad": 0.2, "alpha": 0.8})  # fmt: skip


PARTS = {
    "softirq": Part("#333333", "", "softirq"),
    "system": Part("#888888", "////", "system"),
    "user": Part("#ffffff", "....", "user"),
    "guest": Part("#cccccc", "", "guests' QEMU"),
}
"""What CPU time is spent on, from the bottom of the bars up. No colors: those are datapaths'."""


def _spent(rows: Sequence[Cost], store: Store) -> Figure:
    """Host CPU time as bars of its parts, by pair and datapath, a panel per family."""
    cell, guest = rows[0].cell, store.campaign.guest
    families = present(Family, (row.cell.family for row in rows))
    slots = _slots(rows)
    figure = Figure(figsize=(_WIDTH_IN, 2.4))
    per = "gigabyte" if cell.metric is Metric.THROUGHPUT else "million transactions"
    how = (
        "Bars: geometric means over blocks of all that the host's CPUs did during traffic, by the "
        "traffic; whiskers: 95 % t-intervals of the whole."
    )
    keys = [
        (Patch(fc=part.color, hatch=part.hatch * 2, ec="black"), part.name)
        for part in PARTS.values()
    ]
    _surround(
        figure, f"Host CPU per {per}: {_title(cell)}", keys, [f"{circumstances(store)} {how}"],
        store.campaign.functional,
    )  # fmt: skip
    panels = figure.subplots(1, len(families), squeeze=False, sharey=True)[0]
    for axes, family in zip(panels, families, strict=True):
        axes.set_title(names(family), loc="left", fontweight="bold")
        axes.set_xlim(-0.8, len(slots) - 0.2)
        axes.grid(axis="y")
        ticks = {at: slot[1] for at, slot in enumerate(slots) if slot}
        axes.set_xticks(list(ticks), list(ticks.values()), rotation=90, fontsize=_SMALL_PT)
        for pair in present(Pair, (row.cell.pair for row in rows)):
            middle = [at for at, slot in enumerate(slots) if slot and slot[0] is pair]
            axes.text(sum(middle) / len(middle), 1.0, pair.label(guest).replace("→", "\n→ "),
                      transform=axes.get_xaxis_transform(), ha="center", va="top",
                      fontsize=_SMALL_PT, bbox={"fc": "white", "ec": "none", "pad": 0.6},
                      zorder=4)  # fmt: skip
        for row in (row for row in rows if row.cell.family is family):
            _stack(axes, row, slots.index((row.cell.pair, row.cell.datapath)))
    tops = [max(c.total.mean, min(c.total.high, 1.5 * c.total.mean)) for c in rows]
    panels[0].set_ylim(0, 1.25 * max(tops))
    panels[0].set_ylabel(f"CPU seconds per {per}")
    return figure


def _stack(axes: Axes, row: Cost, at: int) -> None:
    """One bar of its parts, with the interval of the whole."""
    mean, low, high, _ = astuple(row.total)
    bottom = 0.0
    for name, part in PARTS.items():
        height = mean * row.shares[name]
        axes.bar(at, height, 0.86, bottom, color=part.color, hatch=part.hatch, edgecolor="black")
        bottom += height
    if not math.isnan(low):
        axes.errorbar(at, mean, [[mean - low], [high - mean]], color="black", lw=0.8, capsize=1.5,
                      path_effects=[withStroke(linewidth=2.2, foreground="white")])  # fmt: skip


def _curves(rows: Sequence[Summary], histograms: Mapping[Cell, Blocks], store: Store) -> Figure:
    """Cumulative distributions of round-trip times, a panel per family (down) and pair (across)."""
    families = present(Family, (row.cell.family for row in rows))
    pairs = present(Pair, (row.cell.pair for row in rows))
    figure = Figure(figsize=(_WIDTH_IN, 0.45 + 1.3 * len(families)))
    how = "All blocks with the same weight; marks: median and 99th percentile."
    _surround(
        figure, _title(rows[0].cell), _keys(rows, _line),
        [f"{circumstances(store)} {how}", *_absences(rows)], store.campaign.functional,
    )  # fmt: skip
    panels = figure.subplots(len(families), len(pairs), sharex=True, sharey=True, squeeze=False)
    ends = []
    for line, family in zip(panels, families, strict=True):
        line[0].set_ylabel(f"{names(family)}\nshare of round trips")
        for axes, pair in zip(line, pairs, strict=True):
            axes.grid(visible=True)
            if family is families[0]:
                axes.set_title(pair.label(store.campaign.guest))
            if family is families[-1]:
                axes.set_xlabel("round-trip time, µs")
            absent = []
            for row in rows:
                if (row.cell.family, row.cell.pair, row.quantity) != (family, pair, "p50_us"):
                    continue
                if row.status is Status.OK:
                    style = STYLES.get(row.cell.datapath, NOVEL)
                    ends.append(_curve(axes, style, histograms[row.cell]))
                else:
                    absent.append(f"{row.cell.datapath}: {absence(row.status)}")
            axes.text(0.96, 0.05, "\n".join(absent), transform=axes.transAxes, ha="right",
                      bbox={"fc": "white", "ec": "none", "pad": 1})  # fmt: skip
    corner = panels[0][0]
    corner.set_ylim(0, 1.04)
    corner.set_xscale("log")
    corner.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    if ends:
        corner.set_xlim(min(low for low, _ in ends) / 1.3, max(high for _, high in ends) * 1.3)
    return figure


def _curve(axes: Axes, style: Style, blocks: Blocks) -> tuple[float, float]:
    """One datapath's curve; returns the 0.1th and the 99.9th percentile in µs."""
    points = distribution(blocks)
    x, y = [points[0][0], *(x for x, _ in points)], [0.0, *(y for _, y in points)]
    axes.plot(x, y, drawstyle="steps-post", color=style.color, ls=style.line, lw=1.2)
    p01, p50, p99, p999 = (
        next((x for x, y in points if y >= p), points[-1][0]) for p in (0.001, 0.5, 0.99, 0.999)
    )
    axes.plot([p50, p99], [0.5, 0.99], ls="none", color=style.color, zorder=3, **_mark(style))
    return p01, p999


def _keys(rows: Iterable[Ratio], key: Callable[[Style], Any]) -> list[tuple[Any, str]]:
    """The key of the datapaths that rows have, each with its mark."""
    datapaths = sorted({row.cell.datapath for row in rows}, key=rank)
    return [(key(STYLES.get(datapath, NOVEL)), datapath) for datapath in datapaths]


def _point(style: Style) -> Line2D:
    return Line2D([], [], ls="none", color=style.color, **_mark(style))


def _line(style: Style) -> Line2D:
    return Line2D([], [], color=style.color, ls=style.line, **_mark(style))


def _patch(style: Style) -> Patch:
    return Patch(fc=style.color, hatch=style.hatch * 2, ec="black")


def _mark(style: Style) -> dict[str, Any]:
    return {"marker": style.marker, "ms": 3.5, "mec": "black", "mew": 0.4}


class Ratio(Protocol):
    """What a forest plot has a row for: a summary, or a comparison of campaigns."""

    @property
    def cell(self) -> Cell: ...
    @property
    def quantity(self) -> str: ...
    @property
    def ratio(self) -> Estimate: ...


def _ratios(rows: Sequence[Summary], store: Store) -> Figure:
    """Every ratio to a reference datapath in one figure."""
    shown = [row for row in rows if row.ratio.blocks]
    figure = _forest(shown, store.campaign.guest)
    divisors = dict.fromkeys((r.cell.datapath, r.reference) for r in shown)
    how = (
        "Geometric means of ratios within a block, 95 % t-intervals; filled: the interval excludes "
        "1. Divided: " + ", ".join(f"{one} by {other}" for one, other in divisors) + "."
    )
    missing = {f"No ratio of {r.cell.datapath}: {r.no_ratio}": None for r in rows if r.no_ratio}
    absent = [*_absences(rows), *missing]
    _surround(
        figure, f"Ratio to the reference datapath, {names(rows[0].cell.transport)}",
        _keys(shown, _point), [f"{circumstances(store)} {how}", *absent],
        store.campaign.functional,
    )  # fmt: skip
    return figure


def _forest(rows: Sequence[Ratio], guest: str, band: float = 0.0) -> Figure:
    """Ratios with intervals: a line per pair, family and datapath, a panel per quantity."""
    columns = [c for c in COLUMNS if any((r.cell.metric, r.quantity) == c[:2] for r in rows)]
    sized = len({size_of(row.cell) for row in rows}) > len({row.cell.metric for row in rows})

    def line_of(row: Ratio) -> tuple[str, str]:
        place = f"{row.cell.pair.label(guest)}, {names(row.cell.family, row.cell.transport)}"
        return place, row.cell.datapath + (f", {size_of(row.cell)}" if sized else "")

    lines = list(dict.fromkeys(map(line_of, rows)))
    heights, at = {}, 0.0
    for n, line in enumerate(lines):
        at += 1.0 if n and lines[n - 1][0] == line[0] else 2.1
        heights[line] = at
    figure = Figure(figsize=(_WIDTH_IN, 0.5 + 0.115 * at))
    panels = figure.subplots(1, len(columns), sharex=True, sharey=True, squeeze=False)[0]
    low, high = _span([row.ratio for row in rows], band)
    for axes, (metric, quantity, name) in zip(panels, columns, strict=True):
        better = "→ better" if metric.higher_is_better else "better ←"
        axes.set_title(f"{name}   {better}", loc="left")
        axes.axvspan(1 / (1 + band), 1 + band, color="#dddddd", lw=0)
        axes.axvline(1, color="black", lw=0.6)
        for row in rows:
            if (row.cell.metric, row.quantity) == (metric, quantity) and row.ratio.blocks:
                _interval_line(axes, row, heights[line_of(row)], (low, high))
    corner = panels[0]
    corner.set_ylim(at + 0.8, 0.2)
    corner.set_yticks(list(heights.values()), [label for _, label in heights], fontsize=_SMALL_PT)
    for place in dict.fromkeys(place for place, _ in lines):
        first = min(height for line, height in heights.items() if line[0] == place)
        for axes in panels:
            axes.axhline(first - 1.55, color="#dddddd", lw=0.5)
            axes.tick_params(axis="y", length=0)
        corner.text(-0.02, first - 0.95, place, ha="right", va="center", fontweight="bold",
                    fontsize=_SMALL_PT, transform=corner.get_yaxis_transform())  # fmt: skip
    corner.set_xscale("log")
    corner.set_xlim(low, high)
    steps = _NEAR if high / low < 3 else _FAR
    ticks = [x for x in steps if low < x < high]
    corner.set_xticks(ticks, [f"{x:g}" for x in ticks], minor=False)
    corner.xaxis.set_minor_locator(NullLocator())
    return figure


_NEAR = (0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2)
_FAR = (0.01, 0.03, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 100)
"""Ticks of an axis of ratios: of a narrow one and of others."""


def _span(ratios: Iterable[Estimate], band: float) -> tuple[float, float]:
    """Ends of the axis: every mean, and intervals unless they are much wider than that."""
    known = [ratio for ratio in ratios if ratio.blocks]
    low, high = min(r.mean for r in known), max(r.mean for r in known)
    low, high = min(low / 1.1, 1 / (1.2 + band)), max(high * 1.1, 1.2 + band)
    ends = [x for r in known for x in (r.low, r.high) if not math.isnan(x)]
    return max(low / 1.5, min([low, *ends])) / 1.03, min(high * 1.5, max([high, *ends])) * 1.03


def _interval_line(axes: Axes, row: Ratio, at: float, span: tuple[float, float]) -> None:
    """One ratio: mark and whisker; an arrow head where the whisker leaves the panel."""
    mean, low, high, _ = astuple(row.ratio)
    style = STYLES.get(row.cell.datapath, NOVEL)
    if not math.isnan(low):
        axes.plot([max(low, span[0]), min(high, span[1])], [at, at], color="black", lw=0.7)
        for end, beyond, head in ((span[0], low < span[0], "<"), (span[1], high > span[1], ">")):
            if beyond:
                axes.plot(end, at, head, color="black", ms=2.5, clip_on=False)
    conclusive = low > 1 or high < 1
    axes.plot(mean, at, style.marker, ms=3.8, mew=0.7, mec="black" if conclusive else style.color,
              mfc=style.color if conclusive else "white", zorder=3)  # fmt: skip


def _absences(rows: Sequence[Summary]) -> list[str]:
    """Why cells are missing in a figure, each reason once."""
    absent = {f"{absence(row.status)}: {row.reason}": None
              for row in rows if row.status is not Status.OK}  # fmt: skip
    return [textwrap.shorten(reason, 280, placeholder=" …") for reason in absent]


def _title(cell: Cell) -> str:
    return f"{cell.metric.capitalize()}, {names(cell.transport)}, {size_of(cell)} messages"


def circumstances(store: Store) -> str:
    """What a figure's footer says of its campaign."""
    campaign = store.campaign
    return (
        f"Guest {guest_of(campaign)}. Host {campaign.host}: kernel {campaign.kernel}, "
        f"{campaign.cpu}. Campaign {store.path.name}, {blocks_of(campaign)}."
    )


def _surround(
    figure: Figure,
    title: str,
    keys: Sequence[tuple[Any, str]],
    paragraphs: Sequence[str],
    functional: bool,
) -> None:
    """Title, key and footer, for which the figure grows beyond its panels."""
    footer = [line for paragraph in paragraphs for line in textwrap.wrap(paragraph, 152)]
    key_lines = math.ceil(len(keys) / 8)
    key_in = 0.17 * key_lines
    head_in, foot_in = 0.2 + key_in, (len(footer) + 0.8) * _FOOTER_PT * 1.25 / 72
    width, panels_in = figure.get_size_inches()
    height = panels_in + head_in + foot_in
    figure.set_size_inches(width, height)
    figure.set_layout_engine("constrained", rect=(0, foot_in / height, 1, panels_in / height))
    top = 1 - 0.05 / height
    figure.text(0.01, top, title, fontsize=8, fontweight="bold", va="top")
    if functional:
        figure.text(0.99, top, FUNCTIONAL, fontsize=8, fontweight="bold", va="top", ha="right")
    figure.legend(
        [mark for mark, _ in keys], [name for _, name in keys],
        loc="upper left", bbox_to_anchor=(0.0, 1 - 0.17 / height),
        ncols=math.ceil(len(keys) / key_lines), frameon=False,
        handlelength=2.8, columnspacing=1.2, borderpad=0.3, labelspacing=0.3,
    )  # fmt: skip
    figure.text(0.01, foot_in / height - 0.02 / height, "\n".join(footer), fontsize=_FOOTER_PT,
                color="#333333", va="top", linespacing=1.25)  # fmt: skip
