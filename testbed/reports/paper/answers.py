"""Answers the macros of the paper's text: numbers of a campaign with units, as LaTeX."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from fnmatch import fnmatchcase
from functools import cached_property
from math import isnan, nan
from typing import Any

from testbed import paths
from testbed.model.cells import SLOW_US, Cell
from testbed.model.errors import Error
from testbed.model.metrics import CPU_QUANTITY
from testbed.model.trials import Status
from testbed.plan import Estimator, preregistration_of
from testbed.reports import claims
from testbed.reports.claims import Found
from testbed.reports.words import Unit, number, unit_of
from testbed.results.analysis import Summary, controls, marked
from testbed.results.results import Results, read
from testbed.results.statistics import CONFIDENCE, Estimate
from testbed.results.store import Campaign


class Answers:
    """Numbers and facts of a campaign as LaTeX. Calling it raises KeyError with a reason if there
    is no answer.

    Ratios of cells that the campaign of the claims (`proof`) has, too, are from there: it has many
    blocks. What begins with the name of another kept campaign, as `applications/claims`, is asked
    of that.
    """

    def __init__(self, results: Results, proof: Results | None = None) -> None:
        self.results, self.proof = results, proof or results
        self._of_proof = Answers(proof) if proof else None
        self.others: dict[str, Answers] = {}
        """Answers of other kept campaigns that were asked, by name."""
        plan = results.campaign.plan
        decides = claims.estimator_of(results.campaign) if preregistration_of(plan) else Estimator.T
        self._estimate = claims.FUNCTIONS[decides]
        self.rows = list(results.summaries)
        self.cells: dict[str, list[Summary]] = {}
        for row in self.rows:
            self.cells.setdefault(self.id_of(row.cell), []).append(row)

    @cached_property
    def claims(self) -> list[Found]:
        """The judged claims of the proof."""
        return claims.judge(self.proof)

    @cached_property
    def conformance(self) -> list[dict[str, str]]:
        """Results of checks, one for each case."""
        return _conformance(self.results)

    @cached_property
    def facts(self) -> dict[str, str]:
        """Name → LaTeX of all facts."""
        return dict(_facts(self))

    def id_of(self, cell: Cell) -> str:
        """The id of a cell with its guests named."""
        guest = (cell.guest or self.results.campaign.guest) if cell.pair.guests else ""
        return replace(cell, guest=guest).id

    def __call__(self, kind: str, quantity: str, asked: str) -> str:
        kept, _, rest = asked.partition("/")
        if (paths.REFERENCE / kept / "campaign.json").exists():
            return self.kept(kept)(kind, quantity, rest)
        if kind == "fact":
            if asked not in self.facts:
                raise KeyError("no such fact")
            return self.facts[asked]
        if kind in ("ratios", "tally"):
            return self._of_many(kind, asked)
        if self._of_proof and kind in _OF_RATIO:
            with suppress(KeyError):
                return self._of_proof(kind, quantity, asked)
        id, _, other = asked.partition(" to ")
        row = self._known(id, "" if kind == "of" else quantity)
        if kind == "of":
            return _parameter(row.cell, quantity)
        if kind in _OF_CELL:
            return _OF_CELL[kind](row)
        if other:
            row = self._divided(row, self._known(other, quantity).cell)
        elif row.no_ratio:
            raise KeyError(row.no_ratio)
        elif row.reference:
            row = self._divided(row, replace(row.cell, datapath=row.reference))
        return _OF_RATIO[kind](row.ratio)

    def kept(self, name: str) -> Answers:
        """Answers of another kept campaign."""
        if name not in self.others:
            self.others[name] = Answers(read(paths.REFERENCE / name))
        return self.others[name]

    def _known(self, id: str, quantity: str) -> Summary:
        row = self.row(id, quantity)
        if row is None:
            raise KeyError("no such cell in this campaign")
        if row.status is not Status.OK:
            raise KeyError(f"{row.status}: {row.reason}")
        return row

    def row(self, id: str, quantity: str = "") -> Summary | None:
        """Summary of a cell: of the quantity that starts so (`p99`), of CPU time, or its first."""
        rows = self.cells.get(id, ())
        if quantity == CPU_QUANTITY:
            return self._cost(rows[0]) if rows else None
        return next((row for row in rows if row.quantity.startswith(quantity)), None)

    def _cost(self, row: Summary) -> Summary:
        """Summary of the host CPU time of a cell's traffic."""
        row = replace(row, quantity=CPU_QUANTITY)
        values = self.results.values(row.cell, CPU_QUANTITY)
        row = replace(row, estimate=marked(values, self.results.disturbed(row.cell)))
        return self._divided(row, replace(row.cell, datapath=row.reference or row.cell.datapath))

    def _divided(self, row: Summary, to: Cell) -> Summary:
        """The row with the ratio to another cell, over the blocks that have both, by the estimator
        that the campaign's plan laid down, else as all ratios.
        """
        ratios = self.results.ratios(row.cell, to, row.quantity)
        disturbed = self.results.disturbed(row.cell, to)
        return replace(row, ratio=marked(ratios, disturbed, self._estimate))

    def _of_many(self, kind: str, glob: str) -> str:
        """Range of all ratios of cells that match; or how many of them are below and above one."""
        found = [
            row.ratio
            for id, rows in self.cells.items()
            if fnmatchcase(id, glob)
            for row in rows[:1]
            if row.ratio.blocks > 1 and row.reference != row.cell.datapath
        ]
        if not found:
            raise KeyError("no such ratios in this campaign")
        if kind == "ratios":
            means = sorted(ratio.mean for ratio in found)
            return f"{number(means[0], 1)} to {number(means[-1], 1)}"
        below, above = (sum(r.high < 1 for r in found), sum(r.low > 1 for r in found))
        return f"{below} of {len(found)} below one, {above} above"


def latex_unit(row: Summary) -> Unit:
    """Unit of a row's values."""
    return COST if row.quantity == CPU_QUANTITY else unit_of(row.cell.metric, row.quantity)


COST = Unit(1, "CPU s")
"""Unit of CPU time, per gigabyte (throughput) or million transactions (other metrics)."""


def latex_interval(of: Estimate, unit: Unit) -> str:
    """Mean and interval with unit, as LaTeX."""
    mean, low, high = (
        number(x / unit.scale, of.mean / unit.scale) for x in (of.mean, of.low, of.high)
    )
    shown = mean if isnan(of.low) else f"{mean} [{low}, {high}]"
    return shown + (rf"\,{escape(unit.name)}" if unit.name else "")


def _parameter(cell: Cell, name: str) -> str:
    """A parameter of a cell: message size, or number of streams, guests or pods."""
    if name != "size":
        return str(getattr(cell, name))
    kib, rest = divmod(cell.size_bytes, 1024)
    return rf"{cell.size_bytes}\,bytes" if rest else rf"{kib}\,KiB"


def _verdict(ratio: Estimate) -> str:
    if ratio.low > 1:
        return "above"
    return "below" if ratio.high < 1 else "not distinguishable from"


_OF_CELL: Mapping[str, Callable[[Summary], str]] = {
    "mean": lambda row: latex_interval(replace(row.estimate, low=nan), latex_unit(row)),
    "interval": lambda row: latex_interval(row.estimate, latex_unit(row)),
}
_OF_RATIO: Mapping[str, Callable[[Estimate], str]] = {
    "ratio": lambda ratio: latex_interval(ratio, Unit(1, "")),
    "low": lambda ratio: number(ratio.low, ratio.mean),
    "high": lambda ratio: number(ratio.high, ratio.mean),
    "verdict": _verdict,
}


# --- facts ----------------------------------------------------------------------------------


def _how_claims_are_judged(answers: Answers) -> str:
    """When it was laid down what decides about the claims, and what the other estimator says."""
    campaign = answers.proof.campaign
    decides = claims.estimator_of(campaign)
    others = Counter(claims.verdict_of(row.claim, row.other) for row in answers.claims)
    said = ", ".join(f"{n} {verdict}" for verdict, n in others.items())
    other = "$t$" if decides.other is Estimator.T else "signed ranks"
    if preregistration_of(campaign.plan):
        when = "Bounds, blocks, estimator and seed were laid down before the data"
    else:
        when = "Bounds and blocks were laid down before the data, the estimator after them"
    return f"{when}; by {other} the verdicts are: {escape(said)}."


def _facts(answers: Answers) -> Iterator[tuple[str, str]]:
    """(name, LaTeX) of all facts that the text may ask for by the macro `fact`."""
    results, campaign = answers.results, answers.results.campaign
    trials, log = results.trials, results.log
    yield "digest", results.digest
    others = (kept.results for kept in answers.others.values())
    cited = (results, answers.proof, *others)
    yield "digests", " ".join(dict.fromkeys(each.digest for each in cited))
    yield "digest/short", results.digest[: len("sha256:") + 16]
    for name in ("revision", "kernel", "cpu", "governor", "congestion_control"):
        yield name, escape(str(getattr(campaign, name)))
    if campaign.started:
        yield "date", _date(campaign.started)
    times = sorted(datetime.fromisoformat(trial.started) for trial in log if trial.started)
    if times:
        yield "duration", f"{(times[-1] - times[0]).total_seconds() / 60:.0f}~minutes"
    yield "cells", str(len(campaign.cells))
    yield "blocks", str(len(results.blocks))
    yield "trials", str(len(log))
    yield "trials/disturbed", str(sum(trial.disturbed is not None for trial in log))
    ended = Counter(trial.status for trial in trials)
    for status in Status:
        yield f"trials/{status}", str(ended[status])
    for name in ("duration", "warmup"):
        yield f"plan/{name}", rf"{campaign.plan.get(f'{name}_s', 0):g}\,s"
    yield "confidence", rf"{CONFIDENCE:.0%}".replace("%", r"\,\%")
    yield "slow", rf"{SLOW_US['slow']:g}\,\textmu{{}}s"
    guests = {
        campaign.guest: {"kernel": campaign.guest_kernel, "accelerator": campaign.accelerator}
    }
    for name, guest in (guests | dict(campaign.guests)).items():
        for key, value in guest.items():
            yield f"guest/{name}/{key}", escape(value)
    for name, version in campaign.versions.items():
        yield f"version/{name}", escape(version)
    for row in answers.claims:
        if row.ratio.blocks:
            yield (
                f"claims/{row.claim.quantity}/{row.cell.id}",
                latex_interval(row.ratio, Unit(1, "")),
            )
    judged = Counter(row.verdict for row in answers.claims)
    yield "claims", str(judged.total())
    yield "claims/blocks", str(len(answers.proof.blocks))
    yield from _proof(answers.proof.campaign)
    for verdict in claims.Verdict:
        yield f"claims/{verdict}", str(judged[verdict])
    yield "claims/how", _how_claims_are_judged(answers)
    yield from _controls("", answers.results)
    yield from _controls("claims/", answers.proof)
    if answers.conformance:
        yield "checks", str(len({r["check"] for r in answers.conformance}))
        for head, counts in case_counts(answers.conformance).items():
            name = "/".join(part for part in head if part)
            for key, count in counts.items():
                yield f"conformance/{name}/{key}", str(count)


def _proof(campaign: Campaign) -> Iterator[tuple[str, str]]:
    """Facts of the campaign of the claims."""
    for name in ("revision", "kernel", "cpu", "congestion_control"):
        yield f"claims/{name}", escape(str(getattr(campaign, name)))
    if campaign.started:
        yield "claims/date", _date(campaign.started)
    variants = [Cell.parse(id).variant for id in campaign.cells]
    for us in sorted({SLOW_US[variant] for variant in variants if variant in SLOW_US}):
        yield "claims/slow", rf"{us:g}\,\textmu{{}}s"


def _date(started: str) -> str:
    began = datetime.fromisoformat(started)
    return f"{began.day}~{began:%B %Y}"


def _controls(prefix: str, results: Results) -> Iterator[tuple[str, str]]:
    """Facts of what came of a campaign's controls."""
    if found := controls(results.summaries):
        yield f"{prefix}aa/ratios", str(found.same)
        yield f"{prefix}aa/differing", str(found.differing)
        yield f"{prefix}aa/bound", str(found.bound)
        yield f"{prefix}slow/cells", str(found.slow)
        yield f"{prefix}slow/found", str(found.found)


def _conformance(results: Results) -> list[dict[str, str]]:
    """Results of conformance checks: those of the campaign, or else the archived ones."""
    file = results.path / "conformance.json"
    try:
        if file.exists():
            found: list[dict[str, str]] = json.loads(file.read_text())
        else:
            found = []
            for file in sorted(KEPT.glob("*.json")):
                found += _kept(json.loads(file.read_text()), file.stem)
        case_counts(found)  # checks the format
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise Error(f"{file}: not results of checks ({e})") from e
    return found


KEPT = paths.REFERENCE / "conformance"
"""Folder of archived conformance results, `DATAPATH-GUEST.json` (`testbed conformance --keep`)."""


def _kept(results: Mapping[str, Any], name: str) -> Iterator[dict[str, str]]:
    """The cases of a file of `KEPT`. The file's name says which OSv kernel it was."""
    head = {"datapath": results["datapath"], "guest": name.partition("-")[2]}
    for check, came in results["checks"].items():
        counts = {"pass": came["passed"]} | {
            status: sum(map(len, came[key].values()))
            for status, key in (("fail", "failed"), ("unsupported", "unsupported"))
        }
        for status, count in counts.items():
            yield from [{**head, "check": check, "status": status}] * count


def case_counts(results: Iterable[Mapping[str, str]]) -> dict[tuple[str, str], dict[str, int]]:
    """(datapath, guest) → number of cases that passed, failed, were tried, or are unsupported."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for r in results:
        counts.setdefault((r["datapath"], r["guest"]), Counter())[r["status"]] += 1
    return {
        head: {
            "passed": c["pass"],
            "failed": c["fail"],
            "tried": c["pass"] + c["fail"],
            "unsupported": c["unsupported"],
            "cases": c.total(),
        }
        for head, c in counts.items()
    }


def escape(text: str) -> str:
    """Text with LaTeX's special characters escaped."""
    text = re.sub(r"([#$%&_{}])", r"\\\1", text.replace("\\", "/"))
    return (
        text.replace("~", r"\textasciitilde{}")
        .replace("^", r"\textasciicircum{}")
        .replace("→", r"$\to$")
        .replace("µ", r"\textmu{}")
    )
