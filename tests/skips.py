"""Skipped tests: a test fails if it is skipped for a reason that `skips.toml` does not list.

The summary shows how many tests were skipped for each listed reason. Benchmarks are exempt: their
session reports what it could not measure (`bench.gate`).
"""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

LIST = Path(__file__).with_name("skips.toml")
ALLOWED: dict[str, str] = {
    entry["reason"]: entry["because"] for entry in tomllib.loads(LIST.read_text())["allowed"]
}


def allowed(reason: str) -> str | None:
    """The pattern in the list that matches a reason, or None."""
    return next((listed for listed in ALLOWED if re.fullmatch(listed, reason)), None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    return (yield from _judged(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    return (yield from _judged(item))


def _judged(item: pytest.Item) -> Iterator[None]:
    try:
        return (yield)
    except pytest.skip.Exception as e:
        if allowed(str(e)) or item.get_closest_marker("bench"):
            raise
        reason = str(e)
    pytest.fail(
        f"would be skipped: {reason}. tests/{LIST.name} does not allow that; what tests need is "
        "installed by: ./bootstrap --tests --tex",
        pytrace=False,
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(allowed(report.longrepr[2].removeprefix("Skipped: ")) for report in skipped)
    if listed := {reason: n for reason, n in reasons.most_common() if reason}:
        terminalreporter.section("not tested here")
        for reason, count in listed.items():
            terminalreporter.line(f"{count:5} skipped: {ALLOWED[reason]}")
