"""Figures of a campaign, drawn from what it stored alone, on any machine and without privileges.

Made for a two-column paper at full width: they read in black and white (hatches, line styles,
markers), to the colour-blind (Okabe and Ito's palette), a datapath looks the same in all of them,
and the same trials give the same bytes. What could not be measured is there, with the reason. The
numbers are `testbed.analysis`'s; nothing is computed here but how they look.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import blended_transform_factory

from testbed.analysis import Summary, distribution
from testbed.model import Cell, Error, Family, Metric, Pair, Status
from testbed.report import (
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
from testbed.store import Store

Blocks = Sequence[Sequence[tuple[float, int]]]
"""Histograms of a cell's blocks."""


class Style(NamedTuple):
    """How a datapath looks, the same in every figure."""

    color: str
    hatch: str
    line: Any
    marker: str


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
    the name where there are several.
    """
    rows, histograms, files = summaries(store), dict[Cell, list[Any]](), []
    for trial in store.trials():
        if trial.status is Status.OK and trial.histogram_us:
            histograms.setdefault(Cell.parse(trial.cell), []).append(trial.histogram_us)
    folder = store.path / "figures"
    try:
        folder.mkdir(exist_ok=True)
        for (metric, transport), kind in grouped(
            rows, lambda r: (r.cell.metric, r.cell.transport)
        ).items():
            sizes = grouped(kind, lambda r: f"-{r.cell.size_bytes}x{r.cell.streams}")
            for size, group in sizes.items():
                name = f"{metric}-{transport}{size if len(sizes) > 1 else ''}"
                with mpl.rc_context(_RC):
                    if metric is Metric.LATENCY:
                        figure = _curves(group, histograms, store)
                    else:
                        figure = _bars(group, store)
                    # Without dates and versions the same trials give the same bytes.
                    figure.savefig(folder / f"{name}.png", metadata={"Software": None})
                    figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
                files += [folder / f"{name}.png", folder / f"{name}.pdf"]
    except OSError as e:
        raise Error(f"{e.filename or folder}: {e.strerror}", "figures go into the campaign") from e
    return files


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
    _surround(
        figure, rows, store,
        lambda style: Patch(fc=style.color, hatch=style.hatch * 2, ec="black"),
        "Bars: geometric means over blocks; "
        + ("whiskers: 95 % t-intervals" if store.campaign.blocks > 1 else "no interval from one")
        + ("; native and guest pairs on scales of their own." if len(parts) > 1 else "."),
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


def _slots(rows: Sequence[Summary]) -> list[tuple[Pair, str] | None]:
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


def _curves(rows: Sequence[Summary], histograms: Mapping[Cell, Blocks], store: Store) -> Figure:
    """Cumulative distributions of round-trip times, a panel per family (down) and pair (across)."""
    families = present(Family, (row.cell.family for row in rows))
    pairs = present(Pair, (row.cell.pair for row in rows))
    figure = Figure(figsize=(_WIDTH_IN, 0.45 + 1.3 * len(families)))
    _surround(
        figure, rows, store,
        lambda style: Line2D([], [], color=style.color, ls=style.line, **_mark(style)),
        "All blocks with the same weight; marks: median and 99th percentile.",
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


def _mark(style: Style) -> dict[str, Any]:
    return {"marker": style.marker, "ms": 3.5, "mec": "black", "mew": 0.4}


def _surround(
    figure: Figure, rows: Sequence[Summary], store: Store, key: Callable[[Style], Any], how: str
) -> None:
    """Title, key of datapaths and footer, for which the figure grows beyond its panels."""
    campaign, cell = store.campaign, rows[0].cell
    title = f"{cell.metric.capitalize()}, {names(cell.transport)}, {size_of(cell)} messages"
    datapaths = sorted({row.cell.datapath for row in rows}, key=rank)
    absent = {f"{absence(row.status)}: {row.reason}": None
              for row in rows if row.status is not Status.OK}  # fmt: skip
    first = f"Guest {guest_of(campaign)}. Host {campaign.host}: kernel {campaign.kernel}, "
    first += f"{campaign.cpu}. Campaign {store.path.name}, {blocks_of(campaign)}. {how}"
    paragraphs = [first]
    paragraphs += [textwrap.shorten(reason, 280, placeholder=" …") for reason in absent]
    footer = [line for paragraph in paragraphs for line in textwrap.wrap(paragraph, 152)]
    key_lines = math.ceil(len(datapaths) / 8)
    key_in = 0.17 * key_lines
    head_in, foot_in = 0.2 + key_in, (len(footer) + 0.8) * _FOOTER_PT * 1.25 / 72
    width, panels_in = figure.get_size_inches()
    height = panels_in + head_in + foot_in
    figure.set_size_inches(width, height)
    figure.set_layout_engine("constrained", rect=(0, foot_in / height, 1, panels_in / height))
    top = 1 - 0.05 / height
    figure.text(0.01, top, title, fontsize=8, fontweight="bold", va="top")
    if campaign.functional:
        figure.text(0.99, top, FUNCTIONAL, fontsize=8, fontweight="bold", va="top", ha="right")
    figure.legend(
        [key(STYLES.get(datapath, NOVEL)) for datapath in datapaths], datapaths,
        loc="upper left", bbox_to_anchor=(0.0, 1 - 0.17 / height),
        ncols=math.ceil(len(datapaths) / key_lines), frameon=False,
        handlelength=2.8, columnspacing=1.2, borderpad=0.3, labelspacing=0.3,
    )  # fmt: skip
    figure.text(0.01, foot_in / height - 0.02 / height, "\n".join(footer), fontsize=_FOOTER_PT,
                color="#333333", va="top", linespacing=1.25)  # fmt: skip
