"""Output of conformance results: a matrix for the terminal, JSON, JUnit XML, TAP."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any
from xml.etree import ElementTree as ET

from rich.table import Table

from testbed.conformance.check import Check, Result, Status


def columns(results: Iterable[Result]) -> list[tuple[str, str]]:
    """(datapath, guest) of the results, in order of appearance."""
    return list(dict.fromkeys((r.datapath, r.guest) for r in results))


def matrix(results: Sequence[Result]) -> Table:
    """Table of checks by datapaths: how many cases there are, and how many of each status."""
    cells: dict[tuple[str, str, str], Counter[Status]] = {}
    for r in results:
        cells.setdefault((r.check, r.datapath, r.guest), Counter())[r.status] += 1
    table = Table(title="What a program may rely on at localhost", title_justify="left")
    table.add_column("check", overflow="fold")
    table.add_column("cases", justify="right")
    heads = columns(results)
    counts = Counter(r.check for r in results)
    for datapath, guest in heads:
        table.add_column(f"{datapath}\n{guest}", justify="right")
    for name, count in counts.items():
        table.add_row(
            name, f"{count}", *(_cell(cells.get((name, *head), Counter())) for head in heads)
        )
    totals: dict[tuple[str, str], Counter[Status]] = {head: Counter() for head in heads}
    for r in results:
        totals[r.datapath, r.guest][r.status] += 1
    table.add_section()
    table.add_row("all", f"{len(results)}", *(_cell(totals[head]) for head in heads))
    return table


def _cell(counts: Counter[Status]) -> str:
    """`8 pass`, `2 FAIL, 6 pass`, `4 unsupported`; empty if the check does not apply."""
    said = []
    if counts[Status.FAIL]:
        said.append(f"[bold red]{counts[Status.FAIL]} FAIL[/]")
    if counts[Status.PASS]:
        said.append(f"[green]{counts[Status.PASS]} pass[/]")
    if counts[Status.UNSUPPORTED]:
        said.append(f"[dim]{counts[Status.UNSUPPORTED]} unsupported[/]")
    return ", ".join(said)


def reasons(results: Iterable[Result], status: Status) -> list[str]:
    """One line per reason of this status, with the cases that have it."""
    by_reason: dict[tuple[str, str, str, str], list[str]] = {}
    for r in results:
        if r.status is status:
            key = (r.datapath, r.guest, r.check, r.reason)
            by_reason.setdefault(key, []).append(f"{r.pair} {r.family} {r.transport}")
    return [
        f"{datapath}/{guest} {check}: {reason} [{'; '.join(where)}]"
        for (datapath, guest, check, reason), where in by_reason.items()
    ]


def listing(chosen: Iterable[Check]) -> Table:
    """Table of checks: what each proves, and the standard that it comes from."""
    table = Table("check", "proves", "stands for")
    for check in chosen:
        table.add_row(check.name, check.proves, check.standard)
    return table


def check_as_json(check: Check) -> dict[str, str]:
    """A row of `listing` as plain data."""
    return {"check": check.name, "proves": check.proves, "stands_for": check.standard}


def as_json(results: Iterable[Result]) -> list[dict[str, Any]]:
    """Results as plain data, one object per case."""
    return [dict(vars(r)) for r in results]


def tap(results: Sequence[Result]) -> str:
    """Results as TAP, version 14 (testanything.org): one test point per case, skipped ones too."""
    lines = ["TAP version 14", f"1..{len(results)}"]
    for n, r in enumerate(results, 1):
        said = "not ok" if r.status is Status.FAIL else "ok"
        guest = f" ({r.guest})" if r.guest else ""
        line = f"{said} {n} - {r.datapath}{guest} {r.check} {r.pair} {r.family} {r.transport}"
        if r.status is Status.UNSUPPORTED:
            line += f" # SKIP {' '.join(r.reason.split())}"
        lines.append(line)
        if r.status is Status.FAIL:
            lines += ["  ---", f"  message: {json.dumps(r.reason)}", "  ..."]
    return "".join(f"{line}\n" for line in lines)


def junit(results: Sequence[Result]) -> bytes:
    """Results as JUnit XML: one suite per datapath and guest, one test case per case."""
    top = ET.Element("testsuites")
    for datapath, guest in columns(results):
        own = [r for r in results if (r.datapath, r.guest) == (datapath, guest)]
        counts = Counter(r.status for r in own)
        suite = ET.SubElement(
            top,
            "testsuite",
            name=f"{datapath} ({guest})",
            tests=str(len(own)),
            failures=str(counts[Status.FAIL]),
            skipped=str(counts[Status.UNSUPPORTED]),
            time=f"{sum(r.duration_s for r in own):.3f}",
        )
        for r in own:
            name = f"{r.check} {r.pair} {r.family} {r.transport}"
            case = ET.SubElement(
                suite, "testcase", classname=datapath, name=name, time=f"{r.duration_s:.3f}"
            )
            if r.status is Status.FAIL:
                ET.SubElement(case, "failure", message=r.reason)
            elif r.status is Status.UNSUPPORTED:
                ET.SubElement(case, "skipped", message=r.reason)
    data: bytes = ET.tostring(top, encoding="utf-8", xml_declaration=True)
    return data
