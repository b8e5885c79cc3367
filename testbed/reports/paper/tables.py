"""The paper's tables, as LaTeX."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from string import ascii_lowercase
from typing import Any, NamedTuple

from testbed.model import addresses
from testbed.model.cells import Pair
from testbed.model.errors import Error
from testbed.model.metrics import CPU_QUANTITY
from testbed.model.terms import Family
from testbed.model.trials import Status
from testbed.reports import claims
from testbed.reports.claims import Found
from testbed.reports.paper.answers import (
    KEPT,
    Answers,
    case_counts,
    escape,
    latex_interval,
    latex_unit,
)
from testbed.reports.words import Unit, absence, names, number
from testbed.results.analysis import Summary
from testbed.results.order import grouped


class Column(NamedTuple):
    """A column of the table of results."""

    head: str
    pair: Pair
    cell: str
    """Transport, metric and parameters of the cell's id."""
    quantity: str = ""


COLUMNS = (
    Column("Gbit/s", Pair.NATIVE_GUEST, "tcp/throughput/65536x1"),
    Column("Gbit/s", Pair.GUEST_NATIVE, "tcp/throughput/65536x1"),
    Column("CPU\\,s per GB", Pair.NATIVE_GUEST, "tcp/throughput/65536x1", CPU_QUANTITY),
    Column(r"TCP, \textmu{}s", Pair.NATIVE_GUEST, "tcp/latency/64x1"),
    Column(r"UDP, \textmu{}s", Pair.NATIVE_GUEST, "udp/latency/64x1"),
    Column("10\\textsuperscript{3}/s", Pair.NATIVE_GUEST, "tcp/connections/64x1"),
)


def _results(answers: Answers, guest: str) -> list[str]:
    """Table of results: datapaths by family (down), quantities with their ratios (across)."""
    notes: dict[str, str] = {}
    datapaths = sorted(
        {r.cell.datapath for r in answers.rows if not r.cell.variant}, key=answers.results.rank
    )
    lines = [
        r"\begin{tabular*}{\textwidth}{@{\extracolsep{\fill}}l*{6}{r@{\hspace{0.4em}}l}@{}}",
        r"\toprule",
        " & ".join(["", *(rf"\multicolumn{{2}}{{c}}{{{c.head}}}" for c in COLUMNS)]) + r" \\",
        " & ".join(["", *(rf"\multicolumn{{2}}{{c}}{{{_WAYS[c.pair]}}}" for c in COLUMNS)])
        + r" \\",
    ]
    for family in Family:
        shown = []
        for datapath in datapaths:
            ids = [f"{datapath}/{c.pair}/{family}/{c.cell},guest={guest}" for c in COLUMNS]
            rows = [answers.row(id, c.quantity) for id, c in zip(ids, COLUMNS, strict=True)]
            if any(rows):
                entries = [rf"\dpath{{{datapath}}}", *(_entry(row, notes) for row in rows)]
                shown.append(" & ".join(entries) + r" \\")
        if shown:
            heading = rf"\multicolumn{{13}}{{@{{}}l}}{{\emph{{{names(family)}}}}} \\"
            lines += [r"\midrule", heading, *shown]
    lines += [r"\bottomrule", r"\end{tabular*}"]
    said = "; ".join(f"$^{letter}$ {escape(why)}" for why, letter in notes.items())
    return [*lines, rf"\\[2pt]\parbox{{\textwidth}}{{\footnotesize {said}.}}" if said else "%"]


_WAYS = {Pair.NATIVE_GUEST: r"native$\to$guest", Pair.GUEST_NATIVE: r"guest$\to$native"}


def _entry(row: Summary | None, notes: dict[str, str]) -> str:
    """Mean, and ratio with the wider side of its interval; bold if the interval excludes 1.

    A ratio of which more than a few blocks were disturbed is not bold.
    """
    if row is None:
        return "&"
    if row.status is not Status.OK:
        letter = notes.setdefault(row.reason or str(row.status), ascii_lowercase[len(notes)])
        return rf"\multicolumn{{2}}{{c}}{{{absence(row.status)}$^{letter}$}}"
    scale = latex_unit(row).scale
    mean = number(row.estimate.mean / scale, row.estimate.mean / scale)
    if row.no_ratio or row.reference == row.cell.datapath:
        return f"{mean} &"
    side = 100 * (row.ratio.high / row.ratio.mean - 1)
    ratio = rf"$\times${number(row.ratio.mean, row.ratio.mean)}"
    if row.ratio.excludes_1 and not row.ratio.shaken:
        ratio = rf"\textbf{{{ratio}}}"
    if row.ratio.blocks > 1:
        ratio += (
            r"{\scriptsize$\,\pm\,$" + (f"{side:.0f}" if side < 999.5 else r"$>$999") + r"\,\%}"
        )
    return f"{mean} & {ratio}"


def _conformance_table(answers: Answers) -> list[str]:
    """Table of conformance: a row per datapath and guest, with counts of cases, failed checks."""
    if not answers.conformance:
        raise Error(
            f"{KEPT}: no results of checks, of which the paper has a table",
            "testbed conformance --keep",
        )
    lines = [
        r"\begin{tabular}{@{}llrrrr>{\raggedright\arraybackslash}p{0.5\textwidth}@{}}",
        r"\toprule",
        r"datapath & guest & cases & passed & failed & impossible & checks with failures \\",
        r"\midrule",
    ]
    for (datapath, guest), counts in case_counts(answers.conformance).items():
        cases = [r for r in answers.conformance if (r["datapath"], r["guest"]) == (datapath, guest)]
        failed = dict.fromkeys(r["check"] for r in cases if r["status"] == "fail")
        shown = [str(counts[key]) for key in ("cases", "passed", "failed", "unsupported")]
        which = ", ".join(rf"\texttt{{{escape(name)}}}" for name in failed) or "none"
        lines.append(" & ".join([rf"\dpath{{{datapath}}}", guest, *shown, which]) + r" \\")
    return [*lines, r"\bottomrule", r"\end{tabular}"]


def _claims_table(answers: Answers) -> list[str]:
    """Table of claims, a row for each: how many of its ratios have which verdict, and the ratio
    that is worst for it.
    """
    verdicts = [v for v in claims.Verdict if any(row.verdict is v for row in answers.claims)]
    columns = f"l{'r' * len(verdicts)}ll"
    lines = [
        rf"\begin{{tabular*}}{{\textwidth}}{{@{{\extracolsep{{\fill}}}}{columns}@{{}}}}",
        r"\toprule",
        " & ".join(["claim", *map(escape, verdicts), "worst ratio", r"of \\"]),
        r"\midrule",
    ]
    for claim, rows in grouped(answers.claims, lambda row: row.claim.text).items():
        counts = [str(sum(row.verdict is verdict for row in rows)) for verdict in verdicts]
        worst = _worst(rows)
        ratio = latex_interval(worst.ratio, Unit(1, "")) if worst.ratio.blocks else "not measured"
        cell = worst.cell
        who = f"{cell.datapath}, {cell.label(answers.proof.campaign.guest)}"
        what = f"{who}, {names(cell.family)} {names(cell.transport)}"
        lines.append(" & ".join([escape(claim), *counts, ratio, rf"{escape(what)} \\"]))
    return [*lines, r"\bottomrule", r"\end{tabular*}"]


def _worst(rows: Sequence[Found]) -> Found:
    """The row whose ratio is farthest to the side that a claim excludes."""
    sign = -1 if rows[0].claim.at_least is not None else 1
    return max(rows, key=lambda row: (bool(row.ratio.blocks), sign * row.ratio.mean))


def _addresses(answers: Answers) -> list[str]:
    """Table of the address plan (`testbed.model.addresses`)."""
    plan: dict[str, Callable[[Family], Any]] = {
        "alias": addresses.alias,
        "native source": addresses.native_source,
        "\\quad of unusual flows": addresses.native_source_odd,
        "pod on the link": addresses.pod_link,
        "guest on the link": lambda family: addresses.guest_link(family, 0),
        "guest, to guests": lambda family: addresses.guest_view(family, 0),
        "guest, to natives": lambda family: addresses.native_view(family, 0),
    }
    lines = [r"\begin{tabular}{@{}lll@{}}", r"\toprule", r"use & IPv4 & IPv6 \\", r"\midrule"]
    for use, address in plan.items():
        if use == "guest on the link":
            lines.append(r"\midrule")
        shown = [rf"\addr{{{address(family)}}}" for family in Family]
        lines.append(" & ".join([use, *shown]) + r" \\")
    return [*lines, r"\bottomrule", r"\end{tabular}"]


TABLES: Mapping[str, Callable[[Answers], list[str]]] = {
    "table-addresses": _addresses,
    "table-claims": _claims_table,
    "table-conformance": _conformance_table,
    "table-standin": lambda answers: _results(answers, "standin"),
    "table-osv": lambda answers: _results(answers, "osv"),
}
