"""Compares two campaigns cell by cell: which cells became faster or slower, or are equivalent.

The earlier campaign is the divisor. Compared are values, or, as another machine is faster or slower
as a whole, ratios to the reference within a block. Two campaigns share no blocks, so their block
values are independent samples. With many cells some would seem changed by chance, so the verdicts
control the false-discovery rate (`testbed.results.statistics`). A cell is never called faster or
slower if its interval includes 1. A change that is certainly within the band is called equivalent,
even if it is significant. Only stored data are read. This module does not judge whether a machine
is fit for a comparison, but reports circumstances that differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from testbed.model.cells import Cell
from testbed.reports.words import (
    FUNCTIONAL,
    blocks_of,
    disturbed_of,
    guests_of,
    interval,
    names,
    plain,
    shown_columns,
    size_of,
    superscript,
    unit_of,
)
from testbed.results.analysis import marked, quantities, reference_cell
from testbed.results.order import grouped
from testbed.results.results import Results
from testbed.results.statistics import Difference, Estimate, difference, discoveries

BAND = 0.05
"""Default band of equivalence: smaller relative changes are of no interest."""


class Change(StrEnum):
    """Verdict on a cell: the later campaign compared with the earlier."""

    FASTER = "faster"
    SLOWER = "slower"
    EQUIVALENT = "equivalent"
    UNCLEAR = "can't tell"


@dataclass(frozen=True)
class Comparison:
    """One quantity of one cell in two campaigns."""

    cell: Cell
    quantity: str
    to: Cell | None
    """The cell that values of this one are divided by, if ratios are compared."""
    before: Estimate
    after: Estimate
    ratio: Estimate
    """Ratio, later by earlier. Its interval is that of this cell alone."""
    verdict: Change
    reason: str | None
    """Why the two cannot be compared."""
    lost: bool
    """Whether the earlier campaign has a value, and the later one planned the cell but has none."""


def compare(
    before: Results, after: Results, band: float = BAND, ratios: bool = False
) -> list[Comparison]:
    """Compare every cell that either campaign has, in reading order.

    With `ratios`, compare its ratio to its reference; cells without one are left out.
    """
    values_before, values_after = _values(before, ratios), _values(after, ratios)
    keys = sorted(values_before | values_after, key=lambda key: after.reading_order(*key))
    found: list[tuple[tuple[Cell, str], Difference, str | None]] = []
    for key in keys:
        a, b = values_before.get(key, {}), values_after.get(key, {})
        reason = _incomparable(before, a, "earlier", key) or _incomparable(after, b, "later", key)
        found.append((key, difference(a.values(), b.values(), band), reason))
    different = discoveries([change.p_different for _, change, _ in found])
    equivalent = discoveries([change.p_equivalent for _, change, _ in found])
    rows = []
    for (key, change, reason), is_different, is_equivalent in zip(
        found, different, equivalent, strict=True
    ):
        to = _reference(key[0], before, after) if ratios else None
        cells = (key[0], to) if to else (key[0],)
        a, b = values_before.get(key, {}), values_after.get(key, {})
        earlier, later = (
            marked(values, results.disturbed(*cells))
            for results, values in ((before, a), (after, b))
        )
        rows.append(
            Comparison(
                cell=key[0],
                quantity=key[1],
                to=to,
                before=earlier,
                after=later,
                ratio=replace(change.ratio, disturbed=earlier.disturbed + later.disturbed),
                verdict=_verdict(*key, change, is_different, is_equivalent),
                reason=reason,
                lost=bool(a and key in values_after and not b),
            )
        )
    return rows


def exit_status(rows: Sequence[Comparison]) -> int:
    """Exit status: 0 none slower, 1 some slower, 3 nothing to compare or values are lost."""
    if any(row.verdict is Change.SLOWER for row in rows):
        return 1
    nothing = all(row.reason for row in rows)
    return 3 if nothing or any(row.lost for row in rows) else 0


def circumstances(before: Results, after: Results) -> dict[str, tuple[Any, Any]]:
    """Circumstances that differ and may explain a change: name → (earlier, later)."""
    names = (
        "kernel",
        "cpu",
        "governor",
        "host",
        "congestion_control",
        "offloads",
    )
    pairs = {
        name: (getattr(before.campaign, name), getattr(after.campaign, name)) for name in names
    }
    for key in ("warmup_s", "duration_s"):
        pairs[key] = before.campaign.plan.get(key), after.campaign.plan.get(key)
    pairs = {"guest": (guests_of(before.campaign), guests_of(after.campaign)), **pairs}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def data(
    rows: Sequence[Comparison], before: Results, after: Results, band: float
) -> dict[str, Any]:
    """The comparison as plain data for JSON; null for missing values."""
    return {
        "before": str(before.path),
        "after": str(after.path),
        "revisions": [before.campaign.revision, after.campaign.revision],
        "band": band,
        "functional": before.campaign.functional or after.campaign.functional,
        "circumstances": circumstances(before, after),
        "exit_status": exit_status(rows),
        "verdicts": _counts(rows),
        "cells": [{"id": row.cell.id, **plain(asdict(row))} for row in rows],
    }


def table(
    rows: Sequence[Comparison], before: Results, after: Results, band: float, width: int
) -> Group:
    """The comparison for a terminal of `width` columns; from 116 on with both ends of ratios.

    Counts and differing circumstances stand below.
    """
    guest, wide = after.campaign.guest, width >= 116
    shown = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1 if wide else 0, 0, 0),
    )
    shown.add_column("datapath", no_wrap=True)
    for name in ("quantity", "earlier", "later", "ratio", "verdict"):
        shown.add_column(name, overflow="fold")
    notes: dict[str, int] = {}

    def note(reason: str | None) -> str:
        return superscript(notes.setdefault(reason, len(notes) + 1)) if reason else ""

    sized = len({size_of(row.cell) for row in rows}) > len({row.cell.metric for row in rows})
    titles = {(metric, quantity): title for metric, quantity, title in shown_columns()}
    places = grouped(rows, lambda r: (r.cell.label(guest), r.cell.transport, r.cell.family))
    for (pair, transport, family), place in places.items():
        label = f"{pair}\n{names(family, transport)}"
        shown.add_row(Text(label, style="bold"))
        for row in place:
            unit = unit_of(row.cell.metric, row.quantity)
            of, scale = ([titles[row.cell.metric, row.quantity], unit.name], unit.scale)
            if row.to:
                of, scale = [f"{titles[row.cell.metric, row.quantity]} : {row.to.datapath}"], 1
            of += [size_of(row.cell)] if sized else []
            shown.add_row(
                row.cell.datapath,
                ", ".join(of) if wide else "\n".join([of[0], ", ".join(of[1:])]).rstrip(),
                _shown(row.before, scale) + note(disturbed_of(row.before)),
                _shown(row.after, scale) + note(disturbed_of(row.after)),
                _shown(row.ratio, 1, wide),
                Text(row.verdict + note(row.reason), style=_COLORS[row.verdict]),
            )
        shown.add_section()
    counted = ", ".join(f"{count} {verdict}" for verdict, count in _counts(rows).items() if count)
    what = "Ratios of geometric means, "
    if any(row.to for row in rows):
        what = "Ratios to the reference within a block, of each campaign; the ratio of the two is "
    legend = (
        f"{counted}. {what}later by earlier, 95 % Welch t-intervals; verdicts "
        f"at a false-discovery rate of 5 % over {len(rows)} rows; equivalent: within {band:.0%}."
    )
    differing = (
        Text(f"{name} differs: {old} | {new}", style="yellow")
        for name, (old, new) in circumstances(before, after).items()
    )
    footnotes = (Text(f"{superscript(n)} {reason}") for reason, n in notes.items())
    return Group(_headline(before, after), shown, Text(legend), *differing, *footnotes)


_COLORS = {
    Change.FASTER: "green",
    Change.SLOWER: "bold red",
    Change.EQUIVALENT: "default",
    Change.UNCLEAR: "dim",
}


def _reference(cell: Cell, *campaigns: Results) -> Cell | None:
    """The cell that a cell is divided by in the first of the campaigns that says so."""
    found = (reference_cell(cell, results.campaign.references) for results in campaigns)
    return next(filter(None, found), None)


def _values(results: Results, ratios: bool) -> dict[tuple[Cell, str], dict[int, float]]:
    """(cell, quantity) → block values or ratios, for every cell of the plan that has them."""
    found = {}
    for cell in map(Cell.parse, results.campaign.cells):
        to = reference_cell(cell, results.campaign.references)
        for quantity in quantities(cell.metric):
            if not ratios:
                found[cell, quantity] = results.values(cell, quantity)
            elif to:
                found[cell, quantity] = results.ratios(cell, to, quantity)
    return found


def _incomparable(
    results: Results, values: Mapping[int, float], which: str, key: tuple[Cell, str]
) -> str | None:
    """Why these values cannot be compared, or None."""
    if key[0].id not in results.campaign.cells:
        return f"not in the {which} campaign"
    if len(values) > 1:
        return None
    if values:
        return f"one block in the {which} campaign says nothing of its spread"
    reasons = [t.reason for t in results.trials if t.cell == key[0].id and t.reason]
    return f"{which}: {reasons[-1] if reasons else 'not measured'}"


def _verdict(
    cell: Cell, quantity: str, change: Difference, different: bool, equivalent: bool
) -> Change:
    if equivalent:
        return Change.EQUIVALENT
    if not different:
        return Change.UNCLEAR
    better = (change.ratio.mean > 1) is cell.metric.measure.is_better_higher(quantity)
    return Change.FASTER if better else Change.SLOWER


def _counts(rows: Sequence[Comparison]) -> dict[str, int]:
    return {verdict: sum(row.verdict is verdict for row in rows) for verdict in Change}


def _shown(of: Estimate, scale: float, wide: bool = False) -> str:
    return "" if math.isnan(of.mean) else interval(of, scale, wide)


def _headline(before: Results, after: Results) -> Text:
    text = Text(f"{after.path} ({_of(after)}) against {before.path} ({_of(before)})")
    if before.campaign.functional or after.campaign.functional:
        text.append(f"\n{FUNCTIONAL}", style="bold yellow")
    return text


def _of(results: Results) -> str:
    campaign = results.campaign
    return f"{campaign.revision}, {blocks_of(campaign)}, {guests_of(campaign)}"
