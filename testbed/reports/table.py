"""Table of a campaign's results, for a terminal and as plain data for JSON.

It is made from the stored campaign alone, on any machine and without privileges. A cell that could
not be measured is in the table as `unsupported` or `failed`, with the reason. A number is a
geometric mean over blocks with its 95 % interval. A ratio is to the reference datapath, within a
block (`testbed.results.analysis`). This module only formats numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rich import box
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
    """The table for a terminal of `width` columns; from 116 on with both ends of intervals."""
    campaign, rows = results.campaign, results.summaries
    columns = columns_of(rows)
    sizes = {
        metric: {size_of(r.cell) for r in rows if r.cell.metric is metric} for metric in Metric
    }
    wide = width >= 116
    shown = Table(
        title=_headline(results),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1 if wide else 0, 0, 0),
    )
    shown.add_column("pair", no_wrap=True)
    shown.add_column("datapath", no_wrap=True)
    for metric, _, name in columns:
        size = next(iter(sizes[metric])) if len(sizes[metric]) == 1 else ""
        shown.add_column(f"{name}\n{unit_of(metric).name}\n{size}", overflow="fold")
    notes: dict[str, int] = {}
    places = grouped(
        rows, lambda r: (r.cell.label(campaign.guest), r.cell.transport, r.cell.family)
    )
    for (pair, transport, family), place in places.items():
        label = f"{pair}\n{names(family, transport)}"
        for datapath, group in grouped(place, lambda r: r.cell.datapath).items():
            entries = []
            for metric, quantity, _ in columns:
                matching = [r for r in group if (r.cell.metric, r.quantity) == (metric, quantity)]
                texts = (_entry(r, wide, len(sizes[metric]) > 1, notes) for r in matching)
                entries.append(Text("\n").join(texts))
            shown.add_row(label, datapath, *entries)
            label = ""
        shown.add_section()
    lines = [_legend(campaign, rows), *meanings_of(rows), *controls_of(rows)]
    footnotes = (Text(f"{superscript(n)} {reason}") for reason, n in notes.items())
    return Group(shown, *map(Text, lines), *footnotes)


def _entry(row: Summary, wide: bool, sized: bool, notes: dict[str, int]) -> Text:
    """Mean and ratio, each with its interval, on a line each. Missing values get a footnote."""

    def note(reason: str | None) -> str:
        return superscript(notes.setdefault(reason, len(notes) + 1)) if reason else ""

    text = Text(f"{size_of(row.cell)}\n" if sized else "")
    if row.status is not Status.OK:
        return text.append(row.status + note(row.reason), style="yellow")
    value = interval(row.estimate, unit_of(row.cell.metric).scale, wide)
    text.append(value + note(row.reason) + note(disturbed_of(row.estimate)))
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
