"""Table of a campaign's results, for a terminal and as plain data for JSON.

It is made from the stored campaign alone, on any machine and without privileges. A cell that could
not be measured is in the table as `unsupported` or `failed`, with the reason. A number is a
geometric mean over blocks with its 95 % interval. A ratio is to the reference datapath, within a
block (`testbed.results.analysis`). This module only formats numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from rich import box
from rich.cells import cell_len
from rich.console import Group
from rich.table import Table
from rich.text import Text

from testbed.model.metrics import TAIL, Metric
from testbed.model.trials import Status
from testbed.reports.words import (
    blocks_of,
    columns_of,
    controls_of,
    disturbed_of,
    guests_of,
    interval,
    meanings_of,
    names,
    plain,
    size_of,
    superscript,
    unit_of,
    warnings_of,
)
from testbed.results.analysis import Summary
from testbed.results.order import grouped
from testbed.results.results import Results
from testbed.results.store import Campaign


def data(results: Results) -> dict[str, Any]:
    """The table as plain data for JSON: units as stored, null for missing values."""
    campaign = {k: v for k, v in vars(results.campaign).items() if k != "cells"}
    return {
        "directory": str(results.path),
        "campaign": campaign | {"functional": results.campaign.functional},
        "cells": [
            {
                "id": row.cell.id,
                "functional": results.campaign.is_functional(row.cell),
                **plain(asdict(row)),
            }
            for row in results.summaries
        ],
    }


def bencher(results: Results) -> dict[str, dict[str, dict[str, float]]]:
    """The numbers as Bencher's metric format: cell → quantity → value and 95 % interval.

    Units are as stored. https://bencher.dev/docs/reference/bencher-metric-format
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in results.summaries:
        names = ("value", "lower_value", "upper_value")
        numbers = (row.estimate.mean, row.estimate.low, row.estimate.high)
        known = {n: v for n, v in zip(names, numbers, strict=True) if math.isfinite(v)}
        if known:
            measure = row.cell.metric.value if row.quantity == "value" else row.quantity
            found.setdefault(row.cell.id, {})[measure] = known
    return found


def table(results: Results, width: int) -> Group:
    """The table for a terminal of `width` columns; from 116 on with both ends of intervals.

    What does not fit beside each other stands below each other, as tables of some quantities each.
    """
    campaign, rows = results.campaign, results.summaries
    wide = width >= 116
    notes: dict[str, int] = {}
    heads = _heads(rows)
    lines = list(_lines(results, heads, wide, notes))
    shown = [
        _part(lines, {column: heads[column] for column in columns}, wide)
        for columns in _fitting(lines, heads, width)
    ]
    texts = [_legend(campaign, rows), *meanings_of(rows), *controls_of(rows)]
    footnotes = (Text(f"{superscript(n)} {reason}") for reason, n in notes.items())
    return Group(_headline(results), *shown, *map(Text, texts), *footnotes)


Column = tuple[Metric, str, str]
"""Metric, column of the tidy table, heading (`words.shown_columns`)."""


class _Line(NamedTuple):
    """A line of the table: one datapath in one place."""

    place: str
    """Pair, family and transport; of an application, also what it is."""
    datapath: str
    entries: Mapping[Column, Text]


def _heads(rows: Sequence[Summary]) -> dict[Column, str]:
    """Column → its heading: name, unit, and the message size if there is only one."""
    heads = {}
    for column in columns_of(rows):
        metric, quantity, name = column
        sizes, unit = _sizes(rows, metric), unit_of(metric, quantity)
        heads[column] = f"{name}\n{unit.name}\n{sizes.pop() if len(sizes) == 1 else ''}"
    return heads


def _sizes(rows: Iterable[Summary], metric: Metric) -> set[str]:
    of = (row.cell for row in rows if row.cell.metric is metric)
    return {size_of(cell) for cell in of if not cell.application}


def _lines(
    results: Results, columns: Iterable[Column], wide: bool, notes: dict[str, int]
) -> Iterator[_Line]:
    rows, guest = results.summaries, results.campaign.guest
    sized = {metric: len(_sizes(rows, metric)) > 1 for metric in Metric}

    def place_of(row: Summary) -> str:
        cell = row.cell
        words = size_of(cell).split(", ") if cell.application else []
        return "\n".join((cell.label(guest), names(cell.family, cell.transport), *words))

    for where, place in grouped(rows, place_of).items():
        for datapath, group in grouped(place, lambda r: r.cell.datapath).items():
            entries = {}
            for column in columns:
                matching = [r for r in group if (r.cell.metric, r.quantity) == column[:2]]
                texts = (_entry(r, wide, sized[r.cell.metric], notes) for r in matching)
                entries[column] = Text("\n").join(texts)
            yield _Line(where, datapath, entries)


def _fitting(
    lines: Sequence[_Line], heads: Mapping[Column, str], width: int
) -> Iterator[list[Column]]:
    """The columns in groups, each of which fits a terminal beside pair and datapath."""
    gap = 2
    first = _width(line.place for line in lines) + _width(line.datapath for line in lines) + 2 * gap
    group: list[Column] = []
    used = first
    for column, head in heads.items():
        needed = _width([head, *(line.entries[column].plain for line in lines)]) + gap
        if group and used + needed > width:
            yield group
            group, used = [], first
        group.append(column)
        used += needed
    yield group


def _width(texts: Iterable[str]) -> int:
    return max((cell_len(line) for text in texts for line in text.splitlines()), default=0)


def _part(lines: Iterable[_Line], heads: Mapping[Column, str], wide: bool) -> Table:
    """A table of some columns, with the lines that have an entry in one of them."""
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1 if wide else 0, 0, 0))
    shown.add_column("pair", no_wrap=True)
    shown.add_column("datapath", no_wrap=True)
    for head in heads.values():
        shown.add_column(head, overflow="fold")
    held = [line for line in lines if any(line.entries[column] for column in heads)]
    for place, group in grouped(held, lambda line: line.place).items():
        for line in group:
            label = place if line is group[0] else ""
            shown.add_row(label, line.datapath, *(line.entries[column] for column in heads))
        shown.add_section()
    return shown


def _entry(row: Summary, wide: bool, sized: bool, notes: dict[str, int]) -> Text:
    """Mean and ratio, each with its interval, on a line each. Missing values get a footnote."""

    def note(reason: str | None) -> str:
        return superscript(notes.setdefault(reason, len(notes) + 1)) if reason else ""

    text = Text(f"{size_of(row.cell)}\n" if sized else "")
    if row.status is not Status.OK:
        return text.append(row.status + note(row.reason), style="yellow")
    scale = unit_of(row.cell.metric, row.quantity).scale
    value = interval(row.estimate, scale, wide)
    said = (row.reason, row.limited, disturbed_of(row.estimate))
    text.append(value + note("; ".join(filter(None, said))))
    if row.quantity == TAIL:
        return text
    if row.no_ratio:
        ratio = "no ratio" + note(row.no_ratio)
    elif row.reference == row.cell.datapath:
        ratio = "reference"
    else:
        ratio = "×" + interval(row.ratio, 1, wide) + note(disturbed_of(row.ratio))
    return text.append(f"\n{ratio}", style="dim")


def _headline(results: Results) -> Text:
    campaign = results.campaign
    text = Text(f"{campaign.name}: {blocks_of(campaign)}, {guests_of(campaign)}")
    return text.append("".join(f"\n{w}" for w in warnings_of(results)), style="bold yellow")


def _legend(campaign: Campaign, rows: Iterable[Summary]) -> str:
    pairs = dict.fromkeys((r.cell.datapath, r.reference) for r in rows)
    divided = ", ".join(f"{one} by {other}" for one, other in pairs if other not in (None, one))
    interval = "95 % intervals over blocks" if campaign.blocks > 1 else "one block: no intervals"
    return f"Geometric means, {interval}." + (f" × ratio in a block: {divided}." if divided else "")
