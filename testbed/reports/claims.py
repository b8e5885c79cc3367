"""Judges the claims of a plan by its results: ratios of cells with bounds.

A claim is a `[[claims]]` table of the plan: which cells, divided by which, and a lower or upper
bound of the ratio. "At least 0.97" holds if the whole 95 % interval of the ratio over blocks is
above 0.97. It does not hold if the whole interval is below. Otherwise the verdict is unclear. A
claim without a bound only states the ratio. Ratio and interval are by ranks
(`statistics.pseudomedian`), because a claim needs hundreds of short trials, and other tenants of
the hardware disturb some of them. Only stored data are read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from testbed.model.cells import Cell
from testbed.plan import CPU_QUANTITY, Claim
from testbed.reports.words import interval, names, plain, size_of
from testbed.results.analysis import block_values, cost_values, reference
from testbed.results.results import Results
from testbed.results.statistics import Estimate, pseudomedian


class Verdict(StrEnum):
    """Verdict on a claim, for one cell."""

    HOLDS = "holds"
    FAILS = "does not hold"
    UNCLEAR = "can't tell"
    STATED = "stated"
    """The claim has no bound."""


@dataclass(frozen=True)
class Found:
    """A claim, one of its cells, the divisor, the measured ratio and the verdict."""

    claim: Claim
    cell: Cell
    to: Cell
    ratio: Estimate
    verdict: Verdict


def judge(results: Results) -> list[Found]:
    """Judge every claim of the campaign's plan, for every cell that it is about."""
    campaign, tables = results.campaign, results.tables

    def values(cell: Cell, quantity: str) -> dict[int, float]:
        if cell.id not in tables:
            return {}
        if quantity == CPU_QUANTITY:
            return cost_values(tables[cell.id])
        return block_values(tables[cell.id], quantity)

    found = []
    for claim in (Claim(**claim) for claim in campaign.plan.get("claims", ())):
        for cell in map(Cell.parse, campaign.cells):
            to = divisor(cell, claim, campaign.references)
            if not fnmatchcase(cell.id, claim.cells) or to == cell or to.id not in campaign.cells:
                continue
            mine, others = values(cell, claim.quantity), values(to, claim.quantity)
            ratio = pseudomedian(mine[b] / others[b] for b in sorted(mine.keys() & others.keys()))
            found.append(Found(claim, cell, to, ratio, _verdict(claim, ratio)))
    return found


def divisor(cell: Cell, claim: Claim, references: Mapping[str, str]) -> Cell:
    """The cell that a claim divides `cell` by: as the claim says, or its reference."""
    changes: dict[str, Any] = dict(claim.to)
    if not changes:
        own = cell.datapath
        changes["datapath"] = reference(own, cell.pair, references) or own
    return replace(cell, **changes)


def _verdict(claim: Claim, ratio: Estimate) -> Verdict:
    if claim.at_least is None and claim.at_most is None:
        return Verdict.STATED
    low, high = claim.at_least or 0.0, claim.at_most or math.inf
    if math.isnan(ratio.low):
        return Verdict.UNCLEAR
    if ratio.high < low or ratio.low > high:
        return Verdict.FAILS
    return Verdict.HOLDS if low <= ratio.low and ratio.high <= high else Verdict.UNCLEAR


def exit_status(found: Sequence[Found]) -> int:
    """Exit status: 0 all claims hold, 1 some do not hold, 3 no claims or some are unclear."""
    if any(row.verdict is Verdict.FAILS for row in found):
        return 1
    return 3 if not found or any(row.verdict is Verdict.UNCLEAR for row in found) else 0


def data(found: Sequence[Found]) -> list[dict[str, Any]]:
    """The verdicts as plain data for JSON."""
    return [
        {
            "cell": row.cell.id,
            "to": row.to.id,
            "verdict": row.verdict,
            "claim": asdict(row.claim),
            "ratio": plain(asdict(row.ratio)),
        }
        for row in found
    ]


def table(found: Sequence[Found], guest: str) -> Group:
    """The verdicts as a table for a terminal: a line for each cell below the text of its claim."""
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for name in ("claim", "bound", "ratio", "blocks", "verdict"):
        shown.add_column(name, overflow="fold")
    last = None
    for row in found:
        if row.claim is not last:
            shown.add_row(Text(row.claim.text, style="bold"), "", "", "", "")
            last = row.claim
        ratio = interval(row.ratio, 1, wide=True) if row.ratio.blocks else "not measured"
        shown.add_row(
            f"  {what(row, guest)}",
            bound(row.claim),
            ratio,
            str(row.ratio.blocks),
            Text(row.verdict, style=_COLORS[row.verdict]),
        )
    counted = [f"{n} {v}" for v in Verdict if (n := sum(row.verdict is v for row in found))]
    legend = "Pseudomedians of ratios within a block, with 95 % intervals by signed ranks."
    return Group(shown, Text(f"{', '.join(counted)}. {legend}"))


_COLORS = {
    Verdict.HOLDS: "green",
    Verdict.FAILS: "bold red",
    Verdict.UNCLEAR: "yellow",
    Verdict.STATED: "default",
}


def bound(claim: Claim) -> str:
    """The bounds of a claim, such as `≥ 0.97`; or empty."""
    bounds = [f"≥ {claim.at_least:g}"] if claim.at_least is not None else []
    return " and ".join(bounds + ([f"≤ {claim.at_most:g}"] if claim.at_most is not None else []))


def what(row: Found, guest: str) -> str:
    """The cell and its divisor in words. The divisor is described by what differs."""
    cell, to = row.cell, row.to
    words = f"{cell.datapath}, {cell.label(guest)}, {names(cell.family, cell.transport)}"
    if to.datapath != cell.datapath:
        return f"{words}, {size_of(cell)} : {to.datapath}"
    return f"{words}, {size_of(cell)} : {size_of(to)}"
