"""Judges the claims of a plan by its results: ratios of cells with bounds.

A claim is a `[[claims]]` table of the plan: which cells, divided by which, and a lower or upper
bound of the ratio. "At least 0.97" holds if the whole 95 % interval of the ratio over blocks is
above 0.97. It does not hold if the whole interval is below. Otherwise the verdict is unclear. A
claim without a bound only states the ratio.

What decides was laid down before the data, in the plan's table `[preregistration]`: the estimator,
the seed, the number of blocks, and the revision that the claims are about. The campaign stored it
before its first trial, with the digest of the plan's file, and is judged by what it stored. Ratios
by the other estimator stand beside it. If controls of the campaign (`analysis.controls`) fail,
there is no verdict, whatever the ratios are. Only stored data are read.
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
from testbed.plan import Claim, Estimator, claims_of, preregistration_of
from testbed.reports.words import interval, names, plain, size_of
from testbed.results.analysis import controls, marked, quantities, reference_cell
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


FUNCTIONS: Mapping[Estimator, Callable[[Iterable[float]], Estimate]] = {
    Estimator.SIGNED_RANK: pseudomedian,
    Estimator.T: estimate,
}
"""Estimator → its function of the ratios within blocks."""
WORDS = {
    Estimator.SIGNED_RANK: "pseudomedians with intervals by signed ranks",
    Estimator.T: "geometric means with t-intervals",
}
"""Estimator → what it is, in words."""


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
        """For keys of figures (`words.Row`)."""
        return self.claim.quantity


class _Control(NamedTuple):
    """A control, by the estimator that decides (`analysis.Ratio`)."""

    cell: Cell
    quantity: str
    ratio: Estimate


def judge(results: Results, of: Campaign | None = None) -> list[Found]:
    """Judge every claim of the campaign's plan, for every cell that it is about.

    With `of`, the claims of that campaign, as it laid them down, by these results.
    """
    claimant = of or results.campaign
    decides = estimator_of(claimant)
    passed = _controls_pass(results, claimant)
    found = []
    for claim in claims_of(claimant.plan):
        for cell in map(Cell.parse, claimant.cells):
            to = _divisor(cell, claim, claimant)
            if to is None or to == cell or to.id not in claimant.cells:
                continue
            if not fnmatchcase(cell.id, claim.cells):
                continue
            ratios = results.ratios(cell, to, claim.quantity)
            disturbed = results.disturbed(cell, to)
            ratio, other = (
                marked(ratios, disturbed, FUNCTIONS[each]) for each in (decides, decides.other)
            )
            verdict = verdict_of(claim, ratio)
            if claim.bounded and not passed:
                verdict = Verdict.UNMEASURED
            found.append(Found(claim, cell, to, ratio, other, verdict))
    return found


def estimator_of(campaign: Campaign) -> Estimator:
    """The estimator that decides about the claims of a campaign."""
    laid_down = preregistration_of(campaign.plan)
    return laid_down.estimator if laid_down else Estimator.SIGNED_RANK


def departures(results: Results) -> list[str]:
    """In what a campaign is not what its plan laid down: a text for each."""
    campaign, measured = results.campaign, results.blocks
    laid_down = preregistration_of(campaign.plan)
    found: list[str] = []
    if laid_down is None:
        return found
    if campaign.seed != laid_down.seed:
        found.append(f"its seed is {campaign.seed}, not {laid_down.seed}")
    if len(measured) != laid_down.blocks:
        found.append(f"it has {len(measured)} blocks, not {laid_down.blocks}")
    if len(campaign.cells) != laid_down.cells:
        found.append(f"it has {len(campaign.cells)} of {laid_down.cells} cells")
    if campaign.revision.endswith("-dirty"):
        found.append("its tree had uncommitted changes")
    return found


def _controls_pass(results: Results, claimant: Campaign) -> bool:
    """Whether all controls of the claimant's plan were measured, and came out as they should."""
    laid_down = preregistration_of(claimant.plan)
    if laid_down and len(claimant.cells) < laid_down.cells:
        return False  # some of what was left out may be controls
    found = list(_controls(results, claimant))
    outcome = controls(found)
    if any(math.isnan(control.ratio.low) for control in found):
        return False
    return outcome is None or outcome.passed


def _controls(results: Results, claimant: Campaign) -> Iterator[_Control]:
    """The controls of the claimant's plan, by the estimator that decides about its claims."""
    estimator = FUNCTIONS[estimator_of(claimant)]
    for cell in map(Cell.parse, claimant.cells):
        if cell.variant and (to := reference_cell(cell, claimant.references)):
            for quantity in quantities(cell.metric):
                ratios = results.ratios(cell, to, quantity).values()
                yield _Control(cell, quantity, estimator(ratios))


def _divisor(cell: Cell, claim: Claim, claimant: Campaign) -> Cell | None:
    """The cell that a claim divides `cell` by: as the claim says, or its reference."""
    return replace(cell, **claim.to) if claim.to else reference_cell(cell, claimant.references)


def verdict_of(claim: Claim, ratio: Estimate) -> Verdict:
    """The verdict on a claim by an estimate of its ratio."""
    if not claim.bounded:
        return Verdict.STATED
    low = 0.0 if claim.at_least is None else claim.at_least
    high = math.inf if claim.at_most is None else claim.at_most
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


def data(found: Sequence[Found], claimant: Results) -> list[dict[str, Any]]:
    """The verdicts on a campaign's claims as plain data for JSON."""
    decides, departs = estimator_of(claimant.campaign), departures(claimant)
    return [
        {
            "cell": row.cell.id,
            "to": row.to.id,
            "verdict": row.verdict,
            "claim": asdict(row.claim),
            "estimator": decides,
            "ratio": plain(asdict(row.ratio)),
            "other": plain(asdict(row.other)),
            "departures": departs,
        }
        for row in found
    ]


def table(found: Sequence[Found], claimant: Results) -> Group:
    """The verdicts on a campaign's claims for a terminal: a table a claim, a line a cell."""
    campaign = claimant.campaign
    decides = estimator_of(campaign)
    tables = []
    for claim, rows in grouped(found, lambda row: row.claim.text).items():
        shown = Table.grid(expand=True, padding=(0, 1, 0, 0))
        shown.title, shown.title_justify = Text(claim, style="bold"), "left"
        shown.add_column(ratio=1)
        shown.add_column(no_wrap=True)
        for row in rows:
            mine, others = (
                interval(each, 1, wide=True) if each.blocks else "not measured"
                for each in (row.ratio, row.other)
            )
            limit = f"{bound(row.claim)}: " if row.claim.bounded else ""
            numbers = Text(f"    {limit}{mine}, {row.ratio.blocks} blocks")
            shown.add_row(
                f"  {what(row, campaign.guest)}",
                Text(row.verdict, style=_COLORS[row.verdict]),
            )
            shown.add_row(numbers.append(f"; {decides.other}: {others}", style="dim"))
        tables.append(shown)
    counted = [f"{n} {v}" for v in Verdict if (n := sum(row.verdict is v for row in found))]
    legend = f"Ratios within a block, and the number of blocks; {WORDS[decides]} (95 %) decide."
    lines = [f"{', '.join(counted)}. {legend}", *preregistration_lines(claimant)]
    if disturbed := sum(bool(row.ratio.disturbed) for row in found):
        lines.append(f"{disturbed} of {len(found)} ratios have blocks that were disturbed.")
    return Group(*tables, *(Text(line) for line in lines))


def preregistration_lines(results: Results) -> Iterator[str]:
    """What was laid down before the data, and in what the campaign departs from it."""
    campaign = results.campaign
    if laid_down := preregistration_of(campaign.plan):
        yield (
            f"Laid down before the first trial of {campaign.started}, about revision "
            f"{laid_down.revision}, in the plan with SHA-256 {campaign.plan['sha256']}."
        )
    elif any(claim.bounded for claim in claims_of(campaign.plan)):
        yield "Bounds and blocks were laid down before the data; the estimator was chosen later."
    if found := departures(results):
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
    """The cell and its divisor in words."""
    return f"{row.cell.datapath}, {row.cell.label(guest)}, {sizes(row)}"


def sizes(row: Found) -> str:
    """Family, transport and size of the cell, and the divisor, described by what differs."""
    words = f"{names(row.cell.family, row.cell.transport)}, {size_of(row.cell)}"
    differs = row.to.datapath != row.cell.datapath
    return f"{words} : {row.to.datapath if differs else size_of(row.to)}"
