"""Results for people (a matrix) and for machines (JSON, JUnit's XML)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any
from xml.etree import ElementTree as ET

from rich.table import Table

from testbed.conformance.check import Check, Result, Status


def columns(results: Iterable[Result]) -> list[tuple[str, str]]:
    """(datapath, guest) in the order of their first results."""
    return list(dict.fromkeys((r.datapath, r.guest) for r in results))


def matrix(results: Sequence[Result]) -> Table:
    """Checks by datapaths: how many of a check's cases passed, failed, or could not be made."""
    cells: dict[tuple[str, str, str], Counter[Status]] = {}
    for r in results:
        cells.setdefault((r.check, r.datapath, r.guest), Counter())[r.status] += 1
    table = Table("check", title="What a program may rely on at localhost", title_justify="left")
    heads = columns(results)
    for datapath, guest in heads:
        table.add_column(f"{datapath}\n{guest}", justify="right")
    for name in dict.fromkeys(r.check for r in results):
        table.add_row(name, *(_cell(cells.get((name, *head), Counter())) for head in heads))
    totals: dict[tuple[str, str], Counter[Status]] = {head: Counter() for head in heads}
    for r in results:
        totals[r.datapath, r.guest][r.status] += 1
    table.add_section()
    table.add_row("all", *(_cell(totals[head]) for head in heads))
    return table


def _cell(counts: Counter[Status]) -> str:
    """`8 pass`, `FAIL 2, 6 pass`, `unsupported`, or nothing where the check does not apply."""
    said = []
    if counts[Status.FAIL]:
        said.append(f"[bold red]{counts[Status.FAIL]} FAIL[/]")
    if counts[Status.PASS]:
        said.append(f"[green]{counts[Status.PASS]} pass[/]")
    if counts[Status.UNSUPPORTED]:
        said.append(f"[dim]{counts[Status.UNSUPPORTED]} unsupported[/]")
    return ", ".join(said)


def reasons(results: Iterable[Result], status: Status) -> list[str]:
    """One line per reason, with the cases that it is about."""
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
    """Every check, what it proves, and what it stands for."""
    table = Table("check", "proves", "stands for")
    for check in chosen:
        table.add_row(check.name, check.proves, check.standard)
    return table


def as_json(results: Iterable[Result]) -> list[dict[str, Any]]:
    """Plain data, one object a case."""
    return [dict(vars(r)) for r in results]


def junit(results: Sequence[Result]) -> bytes:
    """JUnit's XML: a suite per datapath, a case per case."""
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
