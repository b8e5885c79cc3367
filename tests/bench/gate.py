"""Gate of benchmark sessions: the fixture `ratio`, which every benchmark uses, and the exit status.

A benchmark names an operation and a reference: something simple that runs on the same machine, in
turn with the operation. Their times go to pytest-benchmark, and their ratio is compared with the
bands of this CPU in `bands.toml`, or with an earlier run (`--against`). A ratio above its band
fails. A benchmark that could not be measured is skipped, and makes the exit status 3 unless another
one fails. A time above its goal is reported but does not fail, because machines differ. `verdicts`
judges the ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from testbed.host import facts

from .verdicts import (
    BANDS,
    SHARE,
    Band,
    Measured,
    Verdict,
    bands,
    bands_of_run,
    judge,
    measured,
)

CPU = facts.cpu_model()
"""Ratios of programs differ by half between models."""

LIMIT_S = 60
"""Time in which a benchmark on a noisy machine doubles its rounds again and again."""

COULD_NOT_MEASURE = 3
"""Exit status if something could not be measured, as in `testbed`. pytest has 1 failed, 4 usage."""


@dataclass(frozen=True)
class Row:
    """Result of one benchmark; times in seconds."""

    name: str
    time_s: float
    reference_s: float
    ratio: Measured
    band: Band | None
    verdict: Verdict
    goal_s: float | None

    def as_json(self) -> dict[str, Any]:
        """The row as plain data, for pytest-benchmark's JSON."""
        return {
            "time_s": self.time_s,
            "reference_s": self.reference_s,
            "goal_s": self.goal_s,
            "ratio": self.ratio.median,
            "low": self.ratio.low,
            "high": self.ratio.high,
            "stored": self.band and [self.band.ratio, self.band.share],
            "verdict": self.verdict,
        }


ROWS = pytest.StashKey[list[Row]]()
UNKNOWN = pytest.StashKey[list[str]]()

Call = Callable[[], object]
Ratio = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--against",
        type=Path,
        metavar="RUN.json",
        help="hold benchmarks against an earlier run on this machine (--benchmark-json), "
        f"in place of {BANDS.name}",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS], config.stash[UNKNOWN] = [], []


@pytest.fixture(scope="session")
def known(request: pytest.FixtureRequest) -> dict[str, Band]:
    """What ratios are held against."""
    run = request.config.getoption("--against")
    return bands_of_run(run) if run else bands(BANDS, CPU)


@pytest.fixture
def ratio(
    benchmark: BenchmarkFixture, known: dict[str, Band], request: pytest.FixtureRequest
) -> Ratio:
    """Measures an operation against a reference.

    Reference and operation follow each other `rounds` times, with `setup` before and `teardown`
    after each round, untimed. One that returns a float has timed itself, in seconds.
    """

    def measure(
        name: str,
        operation: Call,
        reference: Call,
        *,
        rounds: int = 15,
        goal_s: float | None = None,
        setup: Call = lambda: None,
        teardown: Call = lambda: None,
    ) -> None:
        rounds_of = _Rounds(operation, reference, setup, teardown)
        benchmark.name, began = name, perf_counter()
        benchmark.pedantic(  # type: ignore[no-untyped-call]
            rounds_of.run_operation,
            setup=rounds_of.run_reference,
            teardown=teardown,
            rounds=rounds,
            warmup_rounds=1,
        )
        rounds_of.forget_first()
        band = known.get(name)
        while True:
            found = rounds_of.ratio()
            verdict, why = judge(found, band)
            too_long = 2 * (perf_counter() - began) > LIMIT_S
            if verdict is not Verdict.UNKNOWN or not band or too_long:
                break
            rounds_of.double()
        row = Row(
            name,
            median(rounds_of.times),
            median(rounds_of.references),
            found,
            band,
            verdict,
            goal_s,
        )
        request.config.stash[ROWS].append(row)
        benchmark.extra_info |= row.as_json()
        _end_test(row, why)

    return measure


@dataclass
class _Rounds:
    """Rounds of a benchmark: runs reference and operation in turn, and collects their times."""

    operation: Call
    reference: Call
    setup: Call
    teardown: Call
    times: list[float] = field(default_factory=list)
    references: list[float] = field(default_factory=list)

    def run_reference(self) -> None:
        """Start a round: set up, and time the reference."""
        self.setup()
        self.references.append(_timed(self.reference))

    def run_operation(self) -> None:
        """Time the operation."""
        self.times.append(_timed(self.operation))

    def forget_first(self) -> None:
        """Remove the first round, which is the warm-up."""
        del self.times[0], self.references[0]

    def double(self) -> None:
        """Run as many rounds again. To judge after each round would find changes by chance."""
        for _ in range(len(self.times)):
            self.run_reference()
            self.run_operation()
            self.teardown()

    def ratio(self) -> Measured:
        """Ratio of operation to reference over all rounds."""
        pairs = zip(self.times, self.references, strict=True)
        return measured([time / reference for time, reference in pairs])


def _end_test(row: Row, why: str) -> None:
    """Fail the test if the benchmark is worse, skip it if its verdict is unknown."""
    if row.verdict is Verdict.WORSE:
        assert row.band
        pytest.fail(
            f"{row.name}: {row.ratio.median:.3g} times its reference (at least "
            f"{row.ratio.low:.3g}), and it was {row.band.ratio:.3g}: more than "
            f"{row.band.share:.0%} slower",
            pytrace=False,
        )
    if row.verdict is Verdict.UNKNOWN:
        pytest.skip(f"{row.name}: {why}")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.skipped and item.get_closest_marker("bench"):
        item.config.stash[UNKNOWN].append(item.nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == pytest.ExitCode.OK and session.config.stash[UNKNOWN]:
        session.exitstatus = COULD_NOT_MEASURE


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    say = terminalreporter
    say.section("benchmarks, by their references")
    width = max(len(row.name) for row in rows)
    say.line(f"{'':{width}} {'time':>9} {'reference':>9} {'ratio':>7} {'95 %':>15} {'stored':>14}")
    colors = {Verdict.WORSE: "red", Verdict.BETTER: "green", Verdict.UNKNOWN: "yellow"}
    for row in rows:
        stored = f"{row.band.ratio:.3g} ±{row.band.share:.0%}" if row.band else "none"
        interval = f"{row.ratio.low:.3g} to {row.ratio.high:.3g}"
        color = {colors[row.verdict]: True} if row.verdict in colors else {}
        say.line(
            f"{row.name:{width}} {_time(row.time_s)} {_time(row.reference_s)} "
            f"{row.ratio.median:7.3g} {interval:>15} {stored:>14} {row.verdict}",
            **color,
        )
    counts = {v: sum(row.verdict is v for row in rows) for v in Verdict}
    say.line(", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count))
    for row in rows:
        if row.goal_s and row.time_s > row.goal_s:
            say.line(f"beyond its goal of {_time(row.goal_s).strip()}: {row.name}")
    changed = [row for row in rows if row.verdict is not Verdict.WITHIN]
    if changed:
        say.line(f'To accept these as they are now, in {BANDS.name} below ["{CPU}"]:')
    for row in changed:
        share = row.band.share if row.band else SHARE
        say.line(f'"{row.name}" = {{ ratio = {row.ratio.median:.3g}, band = {share} }}')


def _timed(call: Call) -> float:
    began = perf_counter()
    own = call()
    return own if isinstance(own, float) else perf_counter() - began


def _time(seconds: float) -> str:
    units = ((1.0, "s "), (1e3, "ms"), (1e6, "µs"))
    scale, unit = next(((s, u) for s, u in units if seconds * s >= 1), (1e9, "ns"))
    return f"{seconds * scale:6.3g} {unit}"
