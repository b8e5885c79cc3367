"""What people read of a campaign: one table on a terminal, the same as plain data, and the words.

All of it comes from the stored campaign alone, on any machine and without privileges. What could
not be measured is never left out silently: it says `unsupported` or `failed`, with the reason. A
number is a geometric mean over blocks with its 95 % interval, and a ratio is to the reference
datapath within a block (`testbed.results.analysis`); nothing is computed here but how it looks.
Figures and the page (`testbed.reports.html`) take their words from here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import asdict
from typing import Any, NamedTuple, TypeVar

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from testbed.model.cells import SLOW_US, UDP_LOSS, Cell, Metric, Pair
from testbed.model.terms import Transport
from testbed.model.trials import Status, Trial
from testbed.results.analysis import (
    EXCEEDANCES,
    TAIL,
    Estimate,
    Summary,
    controls,
    summarise,
    tails,
)
from testbed.results.store import Campaign, Store, frame

UDP_RATE = (Metric.THROUGHPUT, Transport.UDP)
UDP_RATE_MEANS = f"UDP: the highest rate at which at most {UDP_LOSS:.1%} of datagrams are lost"
FUNCTIONAL = "emulated guest: functional, not a speed claim"

DATAPATHS = (
    "loopback", "direct", "bridge", "tcredirect", "capture", "steer", "dnat", "proxy", "passt",
    "tun", "broadcast", "routed",
)  # fmt: skip
"""In the order of bars and rows."""


class Unit(NamedTuple):
    scale: float
    name: str


UNITS = {
    Metric.THROUGHPUT: Unit(1e9, "Gbit/s"),
    Metric.LATENCY: Unit(1, "µs"),
    Metric.CONNECTIONS: Unit(1e3, "k/s"),
    Metric.STARTUP: Unit(1, "ms"),
    Metric.MEMORY: Unit(2**20, "MiB"),
}


def summaries(store: Store) -> list[Summary]:
    """All cells of a campaign in reading order, those that were not run yet as failed."""
    trials = store.trials()
    missing = set(store.campaign.cells) - {trial.cell for trial in trials}
    trials += [Trial(cell, 0, 0, Status.FAILED, reason="not run yet") for cell in missing]
    found = summarise(frame(trials), store.campaign.references) + tails(trials)
    return sorted(found, key=lambda row: reading_order(row.cell, row.quantity))


def data(store: Store) -> dict[str, Any]:
    """The table as plain data for JSON: units as in the store, null for what there is not."""
    campaign = {k: v for k, v in vars(store.campaign).items() if k != "cells"}
    return {
        "directory": str(store.path),
        "campaign": campaign | {"functional": store.campaign.functional},
        "cells": [
            {
                "id": row.cell.id,
                "functional": store.campaign.is_functional(row.cell),
                **plain(asdict(row)),
            }
            for row in summaries(store)
        ],
    }


def plain(value: Any) -> Any:
    """The same with None for NaN, which strict JSON does not know."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


# --- table ----------------------------------------------------------------------------------

COLUMNS = (
    (Metric.THROUGHPUT, "value", "throughput"),
    (Metric.LATENCY, "p50_us", "latency p50"),
    (Metric.LATENCY, "p99_us", "latency p99"),
    (Metric.LATENCY, TAIL, "latency p99.9"),
    (Metric.CONNECTIONS, "value", "connections"),
    (Metric.STARTUP, "value", "first answer"),
    (Metric.MEMORY, "value", "memory"),
)


def table(store: Store, width: int) -> Group:
    """The table for a terminal of `width` columns: intervals in brackets from 116, else as ±."""
    campaign, rows = store.campaign, summaries(store)
    columns = [c for c in COLUMNS if any((row.cell.metric, row.quantity) == c[:2] for row in rows)]
    sizes = {
        metric: {size_of(r.cell) for r in rows if r.cell.metric is metric} for metric in Metric
    }
    wide = width >= 116
    shown = Table(title=_headline(campaign), title_justify="left", box=box.SIMPLE_HEAD,
                  show_edge=False, padding=(0, 1 if wide else 0, 0, 0))  # fmt: skip
    shown.add_column("pair", no_wrap=True)
    shown.add_column("datapath", no_wrap=True)
    for metric, _, name in columns:
        size = next(iter(sizes[metric])) if len(sizes[metric]) == 1 else ""
        shown.add_column(f"{name}\n{UNITS[metric].name}\n{size}", overflow="fold")
    notes: dict[str, int] = {}
    places = grouped(
        rows, lambda r: (r.cell.label(campaign.guest), r.cell.transport, r.cell.family)
    )
    for (pair, transport, family), place in places.items():
        label = f"{pair}\n{names(family, transport)}"
        for datapath, group in grouped(place, lambda r: r.cell.datapath).items():
            entries = []
            for metric, quantity, _ in columns:
                here = [r for r in group if (r.cell.metric, r.quantity) == (metric, quantity)]
                texts = (_entry(r, wide, len(sizes[metric]) > 1, notes) for r in here)
                entries.append(Text("\n").join(texts))
            shown.add_row(label, datapath, *entries)
            label = ""
        shown.add_section()
    lines = [_legend(campaign, rows), *meanings_of(rows), *controls_of(rows)]
    footnotes = (Text(f"{superscript(n)} {reason}") for reason, n in notes.items())
    return Group(shown, *map(Text, lines), *footnotes)


def _entry(row: Summary, wide: bool, sized: bool, notes: dict[str, int]) -> Text:
    """Mean and ratio, each with its interval, a line each; what is not there, with a footnote."""

    def note(reason: str | None) -> str:
        return superscript(notes.setdefault(reason, len(notes) + 1)) if reason else ""

    text = Text(f"{size_of(row.cell)}\n" if sized else "")
    if row.status is not Status.OK:
        return text.append(row.status + note(row.reason), style="yellow")
    text.append(interval(row.estimate, UNITS[row.cell.metric].scale, wide) + note(row.reason))
    if row.quantity == TAIL:
        return text
    if row.no_ratio:
        ratio = "no ratio" + note(row.no_ratio)
    elif row.reference == row.cell.datapath:
        ratio = "reference"
    else:
        ratio = "×" + interval(row.ratio, 1, wide)
    return text.append(f"\n{ratio}", style="dim")


def interval(of: Estimate, scale: float, wide: bool) -> str:
    """`3.21 [3.10, 3.33]`, or `3.21 ±4%` by the wider side; the mean alone without an interval."""
    mean, low, high = (number(x / scale, of.mean / scale) for x in (of.mean, of.low, of.high))
    if math.isnan(of.low):
        return mean
    if wide:
        return f"{mean} [{low}, {high}]"
    side = 100 * (of.high / of.mean - 1)
    return f"{mean} ±{side:.0f}%" if side < 999.5 else f"{mean} >±999%"


def _headline(campaign: Campaign) -> Text:
    text = Text(f"{campaign.name}: {blocks_of(campaign)}, guest {guest_of(campaign)}")
    return text.append(f"\n{warning_of(campaign)}", style="bold yellow")


def warning_of(campaign: Campaign) -> str:
    """That guests are emulated, if so, and which where there are others too."""
    guests = {campaign.guest: campaign.functional} if campaign.guest else {}
    guests |= {name: is_["accelerator"] == "tcg" for name, is_ in campaign.guests.items()}
    emulated = [name for name, is_ in guests.items() if is_]
    which = f"{', '.join(emulated)}: " if 0 < len(emulated) < len(guests) else ""
    return which + FUNCTIONAL if emulated else ""


def _legend(campaign: Campaign, rows: Iterable[Summary]) -> str:
    pairs = dict.fromkeys((r.cell.datapath, r.reference) for r in rows)
    divided = ", ".join(f"{one} by {other}" for one, other in pairs if other not in (None, one))
    interval = "95 % intervals over blocks" if campaign.blocks > 1 else "one block: no intervals"
    return f"Geometric means, {interval}." + (f" × ratio in a block: {divided}." if divided else "")


def meanings_of(rows: Iterable[Summary]) -> list[str]:
    """What of a campaign's quantities does not go without saying."""
    rows, lines = list(rows), []
    if any(row.quantity == TAIL for row in rows):
        lines.append(f"p99.9: of all blocks together, where {EXCEEDANCES} samples or more lie "
                     "above it.")  # fmt: skip
    if any((r.cell.metric, r.cell.transport) == UDP_RATE for r in rows):
        lines.append(f"{UDP_RATE_MEANS}.")
    return lines


def controls_of(rows: Iterable[Summary]) -> list[str]:
    """How the campaign's controls came out, a line for each kind that it has."""
    found, lines = controls(rows), []
    if found and found.same:
        verdict = "as it should be" if found.differing <= found.bound else "too many"
        lines.append(f"A/A: {found.differing} of {found.same} intervals exclude 1, at most "
                     f"{found.bound} would by chance: {verdict}.")  # fmt: skip
    if found and found.slow:
        verdict = "as it should be" if found.found == found.slow else "this campaign is too coarse"
        lines.append(f"Servers that wait {SLOW_US:g} µs: found in {found.found} of {found.slow} "
                     f"cells: {verdict}.")  # fmt: skip
    return lines


def superscript(number: int) -> str:
    return str(number).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


# --- words and order ------------------------------------------------------------------------

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


def number(value: float, like: float) -> str:
    """A number with as many decimals as give `like` three significant digits."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(like)))}f}"


def absence(status: Status) -> str:
    return "n/a" if status is Status.UNSUPPORTED else str(status)


def names(*words: str) -> str:
    return " ".join(w.replace("ipv", "IPv") if w.startswith("ipv") else w.upper() for w in words)


def guest_of(campaign: Campaign, named: str = "") -> str:
    """The campaign's guest, or the one that cells name."""
    guest, kernel, accelerator = campaign.guest, campaign.guest_kernel, campaign.accelerator
    if named:
        found = campaign.guests.get(named, {})
        guest, kernel = named, found.get("kernel", "")
        accelerator = found.get("accelerator", "none")
    return f"{guest}{f' ({kernel})' if kernel else ''}, accelerator {accelerator}"


def blocks_of(campaign: Campaign) -> str:
    least = "at least " if campaign.plan.get("target_width") else ""
    return f"{least}{campaign.blocks} block{'s' if campaign.blocks > 1 else ''}"


def size_of(cell: Cell) -> str:
    kib, rest = divmod(cell.size_bytes, 1024)
    size = f"{cell.size_bytes} B" if rest else f"{kib} KiB"
    size += f", {cell.streams} streams" if cell.streams > 1 else ""
    size += f", {cell.rate_per_s}/s" if cell.rate_per_s else ""
    size += f", {cell.guests} guests" if cell.guests > 1 else ""
    return size + (f", {cell.pods} pods" if cell.pods > 1 else "")


def rank(datapath: str) -> tuple[int, str]:
    """Known datapaths in the order of `DATAPATHS`, others after them by name."""
    base = datapath.partition("~")[0]
    known = DATAPATHS.index(base) if base in DATAPATHS else len(DATAPATHS)
    return known, datapath


def reading_order(cell: Cell, quantity: str) -> tuple[Any, ...]:
    """Pairs, transports, families; in them datapaths side by side, small messages first."""
    return (
        list(Pair).index(cell.pair), cell.guest, cell.transport, cell.family, rank(cell.datapath),
        list(Metric).index(cell.metric), cell.size_bytes, cell.streams, cell.rate_per_s,
        cell.guests, cell.pods, quantity,
    )  # fmt: skip


def present(kinds: Iterable[T], found: Iterable[T]) -> list[T]:
    """Those of `kinds` that were found, in the order of `kinds`."""
    known = set(found)
    return [kind for kind in kinds if kind in known]


def grouped(rows: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Rows by `key`, in order of first appearance."""
    groups: dict[K, list[T]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups
