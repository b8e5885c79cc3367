"""Figures of a campaign, drawn from what it stored alone, on any machine and without privileges.

The same trials give the same bytes. What could not be measured is there, with the reason. The
numbers are `testbed.results.analysis`'s; nothing is computed here but how they look.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import blended_transform_factory

from testbed.model.cells import Cell, Metric, Pair
from testbed.model.terms import Family, Runtime, Transport
from testbed.model.trials import Status
from testbed.reports.figures.forest import forest, ratios
from testbed.reports.figures.style import (
    RC,
    SMALL_PT,
    WIDTH_IN,
    Drawing,
    Ratio,
    Style,
    absences,
    circumstances,
    functional,
    keys_of,
    line_key,
    mark_of,
    patch_key,
    point_key,
    save,
    style_of,
    title_of,
)
from testbed.reports.figures.sweeps import AXES, along, scaling, sweep
from testbed.reports.table import (
    UDP_RATE,
    UDP_RATE_MEANS,
    UNITS,
    absence,
    grouped,
    names,
    number,
    present,
    rank,
    summaries,
)
from testbed.results.analysis import Breakdown, Summary, breakdowns, costs, distribution
from testbed.results.store import Store, frame

Blocks = Sequence[Sequence[tuple[float, int]]]
"""Histograms of a cell's blocks."""


class Part(NamedTuple):
    """How a part of a bar looks."""

    color: str
    hatch: str
    name: str


def draw(store: Store, folder: Path | None = None, bare: bool = False) -> list[Path]:
    """Draw all figures of a campaign into its `figures/`, as PNG and PDF; say which they are.

    Or into another `folder`; or `bare`, as PDF without title and footer, for the paper.
    One figure per metric, transport and parameters: `throughput-tcp.png`, and with the parameters
    in the name where there are several; likewise what it cost the host: `cpu-throughput-tcp.png`.
    Where one parameter takes three values or more, it has a figure of its own,
    `throughput-tcp-by-size.png`, and the others are of those parameters alone that most cells have.
    What depends on how many guests and pods there are: `scaling-tcp.png`. How long starts took and
    what memory pods have, of which parts: `startup-tcp.png`. Other ratios to reference datapaths,
    controls too: `ratios-tcp.png`. Guests that cells name have figures of their own, with the name.
    """
    every, histograms, files = summaries(store), dict[Cell, list[Any]](), []
    rows = [row for row in every if not row.cell.variant]
    crowds = [row for row in rows if _is_crowd(row.cell)]
    traffic = [row for row in rows if not (row.cell.metric.of_building or _is_crowd(row.cell))]
    for trial in store.trials():
        if trial.status is Status.OK and trial.histogram_us:
            histograms.setdefault(Cell.parse(trial.cell), []).append(trial.histogram_us)
    spent = [cost for cost in costs(frame(store.trials())) if not cost.cell.variant]
    keep = partial(save, folder=folder or store.path / "figures", digest=store.digest(), bare=bare)
    with mpl.rc_context(RC):
        for (metric, transport, guest), kind in grouped(traffic, _kind).items():
            whose = f"-{guest}" if guest else ""
            swept = [(axis, found) for axis in AXES if (found := along(kind, axis))]
            of_params = grouped(kind, lambda r: replace(r.cell, guest="").params)
            if swept:
                params = max(of_params, key=lambda params: _weight(of_params[params]))
                of_params = {params: of_params[params]}
            for params, group in of_params.items():
                name = f"{metric}-{transport}{whose}"
                name += f"-{params}" if len(of_params) > 1 else ""
                cells = {row.cell for row in group}
                alike = [cost for cost in spent if cost.cell in cells]
                if metric is Metric.LATENCY:
                    files += keep(_curves(group, histograms, store), name=name)
                else:
                    files += keep(_bars(group, store), name=name)
                if alike:
                    files += keep(_spent(alike, store), name=f"cpu-{name}")
            for axis, found in swept:
                name = f"{metric}-{transport}{whose}-by-{axis.name}"
                files += keep(sweep(found, axis, store), name=name)
        for (pair, family, transport, guest), group in grouped(rows, _place).items():
            if drawing := scaling(group, store):
                whose = f"-{guest}" if guest else ""
                name = f"scaling-{transport}{whose}"
                others = {_place(row) for row in crowds if _place(row)[2:] == (transport, guest)}
                name += f"-{pair}-{family}" if len(others) > 1 else ""
                files += keep(drawing, name=name)
        built = [part for part in breakdowns(frame(store.trials())) if not _is_crowd(part.cell)]
        for (metric, transport), parts in grouped(built, lambda p: _kind(p)[:2]).items():
            files += keep(_built(parts, store), name=f"{metric}-{transport}")
        divided = [row for row in every if row.reference != row.cell.datapath
                   and not (row.cell.metric.of_building or _is_crowd(row.cell))]  # fmt: skip
        for (transport, guest), group in grouped(divided, lambda r: _kind(r)[1:]).items():
            if any(row.ratio.blocks for row in group):
                whose = f"-{guest}" if guest else ""
                files += keep(ratios(group, store), name=f"ratios-{transport}{whose}")
    return files


def _is_crowd(cell: Cell) -> bool:
    return cell.guests > 1 or cell.pods > 1


def _weight(rows: Sequence[Summary]) -> tuple[int, int]:
    """Most cells first; of as many, large messages for throughput, and small ones for times."""
    size = rows[0].cell.size_bytes
    return len(rows), size if rows[0].cell.metric is Metric.THROUGHPUT else -size


def _kind(row: Ratio | Breakdown) -> tuple[Metric, Transport, str]:
    return row.cell.metric, row.cell.transport, row.cell.guest


def _place(row: Ratio) -> tuple[Pair, Family, Transport, str]:
    return row.cell.pair, row.cell.family, row.cell.transport, row.cell.guest


def draw_comparison(
    rows: Sequence[Ratio], before: Store, after: Store, band: float, folder: Path
) -> list[Path]:
    """Draw ratios of one campaign to another, `against-<before>.png` and its PDF, into `folder`."""
    shown = [row for row in rows if row.ratio.blocks]
    with mpl.rc_context(RC):
        figure = forest(shown, after.campaign.guest, band)
        how = (
            "Ratio of geometric means, later by earlier, with 95 % Welch t-intervals; filled: the "
            f"interval excludes 1. Gray: the band of equivalence, {band:.0%}."
        )
        paragraphs = [f"Earlier: {circumstances(before)}", f"Later: {circumstances(after)}", how]
        drawing = Drawing(
            figure, f"{after.path.name} against {before.path.name}",
            keys_of(shown, point_key), paragraphs,
            before.campaign.functional or after.campaign.functional,
        )  # fmt: skip
        name = f"against-{before.path.resolve().name}"
        return save(drawing, folder, name, f"{after.digest()} against {before.digest()}")


def _bars(rows: Sequence[Summary], store: Store) -> Drawing:
    """Means as bars with interval whiskers, by pair and datapath, panels per family.

    The kernel's own loopback is an order of magnitude above any guest, so it has a scale of its
    own rather than a logarithmic one, on which bars would say nothing.
    """
    families = present(Family, (row.cell.family for row in rows))
    native = [row for row in rows if row.cell.pair is Pair.NATIVE_NATIVE]
    parts = [part for part in (native, [row for row in rows if row not in native]) if part]
    slots = [_slots(part) for part in parts]
    own = rows[0].cell.guest
    guest = own or store.campaign.guest
    narrow = sum(map(len, slots)) > 24  # families side by side would leave no room for labels
    lines = len(families) if narrow else 1
    figure = Figure(figsize=(WIDTH_IN, 2.2 if lines == 1 else 1.7 * lines))
    how = (
        "Bars: geometric means over blocks; "
        + ("whiskers: 95 % t-intervals" if store.campaign.blocks > 1 else "no interval from one")
        + ("; native and guest pairs on scales of their own." if len(parts) > 1 else ".")
        + (f" {UDP_RATE_MEANS}." if _kind(rows[0])[:2] == UDP_RATE else "")
    )
    panels = figure.subplots(
        lines, len(families) * len(parts) // lines, squeeze=False,
        width_ratios=[len(s) + 1 for s in slots] * (len(families) // lines),
    )  # fmt: skip
    for n, axes in enumerate(panels.flat):
        family, part = families[n // len(parts)], parts[n % len(parts)]
        if n % len(parts) == 0:
            axes.set_title(names(family), loc="left", fontweight="bold")
        _bar_panel(axes, part, family, slots[n % len(parts)], guest, upright=not narrow)
    named = {Metric.THROUGHPUT: "goodput, Gbit/s", Metric.CONNECTIONS: "connections, 10³/s"}
    for line in panels:
        line[0].set_ylabel(named[rows[0].cell.metric])
    return Drawing(
        figure, title_of(rows[0].cell), keys_of(rows, patch_key),
        [f"{circumstances(store, own)} {how}", *absences(rows)], functional(store, rows),
    )  # fmt: skip


def _slots(rows: Sequence[Summary] | Sequence[Breakdown]) -> list[tuple[Pair, str] | None]:
    """Places along the x axis: the datapaths of each pair, an empty place between pairs."""
    slots: list[tuple[Pair, str] | None] = []
    for pair in present(Pair, (row.cell.pair for row in rows)):
        here = {row.cell.datapath: None for row in rows if row.cell.pair is pair}
        slots += [None, *((pair, datapath) for datapath in sorted(here, key=rank))]
    return slots[1:]


def _bar_panel(
    axes: Axes, rows: Sequence[Summary], family: Family, slots: Sequence[Any], guest: str,
    upright: bool,
) -> None:  # fmt: skip
    scale = UNITS[rows[0].cell.metric].scale
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
            axes.bar(at, 0.2, width=0.86, color="white", hatch="////", edgecolor="#aaaaaa",
                     transform=across)  # fmt: skip
            axes.text(at, 0.1, absence(row.status), transform=across, ha="center", va="center",
                      fontsize=SMALL_PT, rotation=90,
                      bbox={"fc": "white", "ec": "none", "pad": 0.6})  # fmt: skip
            continue
        style = style_of(row.cell.datapath)
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
        axes.annotate(number(mean, mean), (at, top), (0, 1.5), textcoords="offset points",
                      ha="center", va="bottom", fontsize=SMALL_PT, annotation_clip=False,
                      rotation=0 if upright and len(slots) <= 8 else 90,
                      bbox={"fc": "white", "ec": "none", "pad": 0.2, "alpha": 0.8})  # fmt: skip


PARTS = {
    "softirq": Part("#333333", "", "softirq"),
    "system": Part("#888888", "////", "system"),
    "user": Part("#ffffff", "..", "user"),
    "guest": Part("#cccccc", "", "guests' QEMU"),
}
"""What CPU time is spent on, from the bottom of the bars up. No colors: those are datapaths'."""


STEPS = {
    "image": Part("#333333", "", "image"),
    "links": Part("#777777", "////", "links"),
    "datapath": Part("#ffffff", "..", "datapath"),
    "launch": Part("#aaaaaa", "\\\\\\\\", "launch"),
    "boot": Part("#dddddd", "", "boot"),
    "answer": Part("#ffffff", "xxxx", "answer"),
}
OWNERS = {
    "processes": Part("#cccccc", "", "processes"),
    "kernel": Part("#555555", "////", "kernel"),
}


def _spent(rows: Sequence[Breakdown], store: Store) -> Drawing:
    """Host CPU time as bars of its parts, by pair and datapath, a panel per family."""
    cell = rows[0].cell
    families = present(Family, (row.cell.family for row in rows))
    slots, guest = _slots(rows), cell.guest or store.campaign.guest
    figure = Figure(figsize=(WIDTH_IN, 2.4))
    per = "gigabyte" if cell.metric is Metric.THROUGHPUT else "million transactions"
    how = (
        "Bars: geometric means over blocks of all that the host's CPUs did during traffic, by the "
        "traffic; whiskers: 95 % t-intervals of the whole."
    )
    panels = figure.subplots(1, len(families), squeeze=False, sharey=True)[0]
    for axes, family in zip(panels, families, strict=True):
        axes.set_title(names(family), loc="left", fontweight="bold")
        labels = [slot and (slot[0].label(guest), slot[1]) for slot in slots]
        here = [row for row in rows if row.cell.family is family]
        at = [slots.index((row.cell.pair, row.cell.datapath)) for row in here]
        _stacks(axes, here, at, labels, PARTS)
    _fit(panels[0], rows)
    panels[0].set_ylabel(f"CPU seconds per {per}")
    return Drawing(
        figure, f"Host CPU: {title_of(cell)}", _keys(PARTS),
        [f"{circumstances(store, cell.guest)} {how}"], functional(store, rows),
    )  # fmt: skip


def _built(rows: Sequence[Breakdown], store: Store) -> Drawing:
    """What building pods takes as bars of its parts, by pair and datapath, apart with machines."""
    metric, unit = rows[0].cell.metric, UNITS[rows[0].cell.metric]
    starts = metric is Metric.STARTUP
    parts = STEPS if starts else OWNERS
    title = ("From nothing to the first answer at localhost" if starts
             else "Memory of a pod after its first answer")  # fmt: skip
    how = (
        "Bars: geometric means over blocks; whiskers: 95 % t-intervals of the whole. "
        + ("Images and programs are in the cache; launch: until the program, or the virtual "
           "machine, runs; boot: until it answers at its own address; answer: the first request "
           "to localhost." if starts
           else "Processes: proportional set size; kernel: what its memory grew by.")
    )  # fmt: skip
    groups = grouped(rows, lambda r: (r.cell.family, _boots(r, store)))
    places = sorted(groups)
    slots = [_labels(groups[place], store) for place in places]
    figure = Figure(figsize=(WIDTH_IN, 2.4))
    panels = figure.subplots(
        1, len(places), squeeze=False, width_ratios=[len(labels) + 1 for labels in slots]
    )[0]  # fmt: skip
    for axes, place, labels in zip(panels, places, slots, strict=True):
        here, kind = groups[place], "virtual machines" if place[1] else "no virtual machines"
        axes.set_title(f"{names(place[0])}, {kind}", loc="left", fontweight="bold")
        at = [labels.index((r.cell.label(store.campaign.guest), r.cell.datapath)) for r in here]
        _stacks(axes, here, at, labels, parts)
        _fit(axes, here, unit.scale)
    panels[0].set_ylabel(unit.name)
    return Drawing(
        figure, title, _keys(parts), [f"{circumstances(store)} {how}"], functional(store, rows)
    )


def _boots(row: Breakdown, store: Store) -> bool:
    """Whether there is a virtual machine, beside which all else is small."""
    guest = Runtime(row.cell.guest or store.campaign.guest)
    return row.cell.pair.guests > 0 and guest is not Runtime.STANDIN


def _labels(rows: Sequence[Breakdown], store: Store) -> list[tuple[str, str] | None]:
    """Places along the x axis: the datapaths of each pair, an empty place between pairs."""
    of_pair = grouped(rows, lambda r: r.cell.label(store.campaign.guest))
    labels: list[tuple[str, str] | None] = []
    for pair, of in of_pair.items():
        datapaths = sorted({row.cell.datapath for row in of}, key=rank)
        labels += [None, *((pair, datapath) for datapath in datapaths)]
    return labels[1:]


def _keys(parts: Mapping[str, Part]) -> list[tuple[Any, str]]:
    return [
        (Patch(fc=part.color, hatch=part.hatch * 2, ec="black"), part.name)
        for part in parts.values()
    ]


def _stacks(
    axes: Axes, rows: Sequence[Breakdown], at: Sequence[int],
    labels: Sequence[tuple[str, str] | None], parts: Mapping[str, Part],
) -> None:  # fmt: skip
    """Bars of parts at places, whose labels are (group, bar)."""
    axes.set_xlim(-1.2, len(labels) + 0.2)
    axes.grid(axis="y")
    ticks = {at: label[1] for at, label in enumerate(labels) if label}
    axes.set_xticks(list(ticks), list(ticks.values()), rotation=90, fontsize=SMALL_PT)
    for group in dict.fromkeys(label[0] for label in labels if label):
        middle = [at for at, label in enumerate(labels) if label and label[0] == group]
        axes.text(sum(middle) / len(middle), 1.0, group.replace("→", "\n→ "),
                  transform=axes.get_xaxis_transform(), ha="center", va="top",
                  fontsize=SMALL_PT, bbox={"fc": "white", "ec": "none", "pad": 0.6},
                  zorder=4)  # fmt: skip
    for row, place in zip(rows, at, strict=True):
        _stack(axes, row, place, parts, UNITS[row.cell.metric].scale
               if row.cell.metric.of_building else 1)  # fmt: skip


def _fit(axes: Axes, rows: Sequence[Breakdown], scale: float = 1) -> None:
    tops = [max(c.total.mean, min(c.total.high, 1.5 * c.total.mean)) for c in rows]
    axes.set_ylim(0, 1.25 * max(tops) / scale)


def _stack(axes: Axes, row: Breakdown, at: int, parts: Mapping[str, Part], scale: float) -> None:
    """One bar of its parts, with the interval of the whole."""
    mean, low, high = (x / scale for x in astuple(row.total)[:3])
    bottom = 0.0
    for name, part in parts.items():
        height = mean * row.shares[name]
        axes.bar(at, height, 0.86, bottom, color=part.color, hatch=part.hatch, edgecolor="black")
        bottom += height
    if not math.isnan(low):
        axes.errorbar(at, mean, [[mean - low], [high - mean]], color="black", lw=0.8, capsize=1.5,
                      path_effects=[withStroke(linewidth=2.2, foreground="white")])  # fmt: skip


def _curves(rows: Sequence[Summary], histograms: Mapping[Cell, Blocks], store: Store) -> Drawing:
    """Cumulative distributions of round-trip times, a panel per family (down) and pair (across)."""
    families = present(Family, (row.cell.family for row in rows))
    pairs = present(Pair, (row.cell.pair for row in rows))
    figure = Figure(figsize=(WIDTH_IN, 0.45 + 1.3 * len(families)))
    how = "All blocks with the same weight; marks: median and 99th percentile."
    panels = figure.subplots(len(families), len(pairs), sharex=True, sharey=True, squeeze=False)
    ends = []
    for line, family in zip(panels, families, strict=True):
        line[0].set_ylabel(f"{names(family)}\nshare of round trips")
        for axes, pair in zip(line, pairs, strict=True):
            axes.grid(visible=True)
            if family is families[0]:
                label = replace(rows[0].cell, pair=pair).label(store.campaign.guest)
                axes.set_title(label.replace("→", "\n→ ") if len(pairs) > 5 else label)
            absent = []
            for row in rows:
                if (row.cell.family, row.cell.pair, row.quantity) != (family, pair, "p50_us"):
                    continue
                if row.status is Status.OK:
                    style = style_of(row.cell.datapath)
                    ends.append(_curve(axes, style, histograms[row.cell]))
                else:
                    absent.append(f"{row.cell.datapath}: {absence(row.status)}")
            axes.text(0.96, 0.05, "\n".join(absent), transform=axes.transAxes, ha="right",
                      bbox={"fc": "white", "ec": "none", "pad": 1})  # fmt: skip
    for axes in panels[-1]:
        axes.set_xlabel("round trip, µs")
    corner = panels[0][0]
    corner.set_ylim(0, 1.04)
    corner.set_xscale("log")
    corner.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    if ends:
        corner.set_xlim(min(low for low, _ in ends) / 1.3, max(high for _, high in ends) * 1.3)
    return Drawing(
        figure, title_of(rows[0].cell), keys_of(rows, line_key),
        [f"{circumstances(store, rows[0].cell.guest)} {how}", *absences(rows)],
        functional(store, rows),
    )  # fmt: skip


def _curve(axes: Axes, style: Style, blocks: Blocks) -> tuple[float, float]:
    """One datapath's curve; returns the 0.1th and the 99.9th percentile in µs."""
    points = distribution(blocks)
    x, y = [points[0][0], *(x for x, _ in points)], [0.0, *(y for _, y in points)]
    axes.plot(x, y, drawstyle="steps-post", color=style.color, ls=style.line, lw=1.2)
    p01, p50, p99, p999 = (
        next((x for x, y in points if y >= p), points[-1][0]) for p in (0.001, 0.5, 0.99, 0.999)
    )
    axes.plot([p50, p99], [0.5, 0.99], ls="none", color=style.color, zorder=3, **mark_of(style))
    return p01, p999
