"""Judges the claims of a plan by its results: ratios of cells with bounds.

A claim is a `[[claims]]` table of the plan: which cells, divided by which, and a lower or upper
bound of the ratio. "At least 0.97" holds if the whole 95 % interval of the ratio over blocks is
above 0.97. It does not hold if the whole interval is below. Otherwise the verdict is unclear. A
claim without a bound only states the ratio.

What decides was laid down before the data, in the plan's table `[preregistration]`: the estimator,
the seed, the number of blocks, and the revision that the claims are about. The campaign stored it
before its first trial, with the digest of the plan's file, and is judged by what it stored. Ratios
by the other estimator stand beside it. If controls of the campaign (`analysis.controls`) fail,
nothing was measured, whatever the ratios are. Only stored data are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from rich.console import Group
from rich.table import Table
from rich.text import Text

from testbed.model.cells import Cell
from testbed.plan import ESTIMATORS, Claim, claims_of, preregistration_of
from testbed.reports.words import interval, names, plain, size_of
from testbed.results.analysis import (
    controls,
    quantities,
)
from testbed.results.order import grouped
from testbed.results.results import Results
from testbed.results.statistics import Estimate, estimate, pseudomedian
from testbed.results.store import Campaign


class Verdict(StrEnum):
    """Verdict on a claim, for one cell."""

    HOLDS = "holds"
    FAILS = "does not hold"
    UNCLEAR = "can't tell"
    UNMEASURED = "could not measure"
    """The campaign's controls failed."""
    STATED = "stated"
    """The claim has no bound."""


ESTIMATE: Mapping[str, Callable[[Iterable[float]], Estimate]] = dict(
    zip(ESTIMATORS, (pseudomedian, estimate), strict=True)
)
"""Estimator → its function of the ratios within blocks."""
MEANS = {
    "signed-rank": "pseudomedians with intervals by signed ranks",
    "t": "geometric means with t-intervals",
}


@dataclass(frozen=True)
class Found:
    """A claim, one of its cells, the divisor, the measured ratio and the verdict."""

    claim: Claim
    cell: Cell
    to: Cell
    ratio: Estimate
    """By the estimator that decides."""
    other: Estimate
    """By the other one."""
    verdict: Verdict

    @property
    def quantity(self) -> str:
        return self.claim.quantity


class _Control(NamedTuple):
    """What `analysis.controls` asks of a control."""

    cell: Cell
    quantity: str
    ratio: Estimate


def judge(results: Results, of: Campaign | None = None) -> list[Found]:
    """Judge every claim of the campaign's plan, for every cell that it is about.

    With `of`, the claims of that campaign, as it laid them down, by these results.
    """
    laid_down = of or results.campaign
    decides = estimator_of(laid_down)
    (other,) = set(ESTIMATORS) - {decides}
    controlled = controls(_controls(results, decides))
    passed = controlled is None or controlled.passed
    found = []
    for claim in claims_of(laid_down.plan):
        for cell in map(Cell.parse, laid_down.cells):
            to = _divisor(cell, claim, results)
            if to is None or to == cell or to.id not in laid_down.cells:
                continue
            if not fnmatchcase(cell.id, claim.cells):
                continue
            ratios = results.ratios(cell, to, claim.quantity).values()
            ratio = ESTIMATE[decides](ratios)
            verdict = verdict_of(claim, ratio)
            if claim.bounded and not passed:
                verdict = Verdict.UNMEASURED
            found.append(Found(claim, cell, to, ratio, ESTIMATE[other](ratios), verdict))
    return found


def estimator_of(campaign: Campaign) -> str:
    """The estimator that decides about the claims of a campaign."""
    stated = preregistration_of(campaign.plan)
    return stated.estimator if stated else ESTIMATORS[0]


def departures(campaign: Campaign) -> list[str]:
    """In what a campaign is not what its plan laid down: a text for each."""
    stated = preregistration_of(campaign.plan)
    found: list[str] = []
    if stated is None:
        return found
    if campaign.seed != stated.seed:
        found.append(f"its seed is {campaign.seed}, not {stated.seed}")
    if campaign.blocks != stated.blocks:
        found.append(f"it has {campaign.blocks} blocks, not {stated.blocks}")
    if campaign.revision.endswith("-dirty"):
        found.append("its tree had uncommitted changes")
    return found


def _controls(results: Results, estimator: str) -> Iterator[_Control]:
    """The campaign's controls, by the estimator that decides about its claims."""
    for cell in map(Cell.parse, results.campaign.cells):
        if cell.variant and (to := results.reference(cell)):
            for quantity in quantities(cell.metric):
                ratios = results.ratios(cell, to, quantity).values()
                yield _Control(cell, quantity, ESTIMATE[estimator](ratios))


def _divisor(cell: Cell, claim: Claim, results: Results) -> Cell | None:
    """The cell that a claim divides `cell` by: as the claim says, or its reference."""
    return replace(cell, **claim.to) if claim.to else results.reference(cell)


def verdict_of(claim: Claim, ratio: Estimate) -> Verdict:
    """The verdict on a claim by an estimate of its ratio."""
    if not claim.bounded:
        return Verdict.STATED
    low, high = claim.at_least or 0.0, claim.at_most or math.inf
    if math.isnan(ratio.low):
        return Verdict.UNCLEAR
    if ratio.high < low or ratio.low > high:
        return Verdict.FAILS
    return Verdict.HOLDS if low <= ratio.low and ratio.high <= high else Verdict.UNCLEAR


def exit_status(found: Sequence[Found]) -> int:
    """Exit status: 0 all claims hold, 1 some do not hold, 3 no claims, or no verdict on some."""
    verdicts = {row.verdict for row in found}
    if Verdict.FAILS in verdicts:
        return 1
    return 3 if not found or verdicts & {Verdict.UNCLEAR, Verdict.UNMEASURED} else 0


def data(found: Sequence[Found], campaign: Campaign) -> list[dict[str, Any]]:
    """The verdicts as plain data for JSON."""
    decides = estimator_of(campaign)
    return [
        {
            "cell": row.cell.id,
            "to": row.to.id,
            "verdict": row.verdict,
            "claim": asdict(row.claim),
            "estimator": decides,
            "ratio": plain(asdict(row.ratio)),
            "other": plain(asdict(row.other)),
            "departures": departures(campaign),
        }
        for row in found
    ]


def table(found: Sequence[Found], campaign: Campaign) -> Group:
    """The verdicts for a terminal: a table for each claim, with a line for each cell."""
    decides = estimator_of(campaign)
    (other,) = set(ESTIMATORS) - {decides}
    tables = []
    for claim, rows in grouped(found, lambda row: row.claim.text).items():
        shown = Table(
            title=Text(claim, style="bold"),
            title_justify="left",
            box=None,
            show_header=False,
            expand=True,
            padding=(0, 1, 0, 0),
        )
        shown.add_column(ratio=1, overflow="fold")
        for width in (8, 27, 4, 17):
            shown.add_column(width=width)
        for row in rows:
            mine, others = (
                interval(each, 1, wide=True) if each.blocks else "not measured"
                for each in (row.ratio, row.other)
            )
            shown.add_row(
                f"  {what(row, campaign.guest)}",
                bound(row.claim),
                Text(mine).append(f"\n{other}: {others}", style="dim"),
                str(row.ratio.blocks),
                Text(row.verdict, style=_COLORS[row.verdict]),
            )
        tables.append(shown)
    counted = [f"{n} {v}" for v in Verdict if (n := sum(row.verdict is v for row in found))]
    legend = f"Ratios within a block, and how many: {MEANS[decides]} (95 %) decide."
    lines = (f"{', '.join(counted)}. {legend}", *laid_down(campaign))
    return Group(*tables, *(Text(line) for line in lines))


def laid_down(campaign: Campaign) -> Iterator[str]:
    """What was laid down before the data, and in what the campaign departs from it: lines."""
    if stated := preregistration_of(campaign.plan):
        yield (
            f"Laid down before the first trial of {campaign.started}, about revision "
            f"{stated.revision}, in the plan with SHA-256 {campaign.plan['sha256']}."
        )
    elif any(claim.bounded for claim in claims_of(campaign.plan)):
        yield "Nothing was laid down before the data: the estimator was chosen later."
    if found := departures(campaign):
        yield f"Not as it was laid down: {'; '.join(found)}."


_COLORS = {
    Verdict.HOLDS: "green",
    Verdict.FAILS: "bold red",
    Verdict.UNCLEAR: "yellow",
    Verdict.UNMEASURED: "yellow",
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
