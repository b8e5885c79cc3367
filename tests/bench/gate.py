"""The session's gate: the fixture `ratio`, which every benchmark measures with, and its outcome.

A benchmark names an operation and a reference: something plain that the same machine does, run in
turn with it. Their times go to pytest-benchmark, their ratio is held against `bands.toml`. Worse
than the band fails; what could not be measured is skipped, and makes the exit status 3 unless
something failed. A time beyond its goal is told, and fails nothing: machines differ. How ratios are
judged is in `verdicts`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from .verdicts import BANDS, Band, Measured, Verdict, bands, judge, measured

LIMIT_S = 60
"""On a machine that is too noisy a benchmark has twice as many rounds, and again, in this time."""

COULD_NOT_MEASURE = 3
"""Exit status, as `testbed`'s own. (1: something failed, 4: usage, both pytest's.)"""


@dataclass(frozen=True)
class Row:
    """What came of one benchmark; times in seconds."""

    name: str
    time_s: float
    reference_s: float
    ratio: Measured
    band: Band | None
    verdict: Verdict
    goal_s: float | None


ROWS = pytest.StashKey[list[Row]]()
UNKNOWN = pytest.StashKey[list[str]]()

Call = Callable[[], object]
Ratio = Callable[..., None]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS], config.stash[UNKNOWN] = [], []


@pytest.fixture(scope="session")
def known() -> dict[str, Band]:
    """What is in bands.toml."""
    return bands()


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
        times: list[float] = []
        references: list[float] = []

        def prepare() -> None:
            setup()
            references.append(_timed(reference))

        benchmark.name, began = name, perf_counter()
        benchmark.pedantic(  # type: ignore[no-untyped-call]
            lambda: times.append(_timed(operation)),
            setup=prepare,
            teardown=teardown,
            rounds=rounds,
            warmup_rounds=1,
        )
        del times[0], references[0]  # warm-up
        band = known.get(name)
        while True:
            of = measured([time / by for time, by in zip(times, references, strict=True)])
            verdict, why = judge(of, band)
            too_long = 2 * (perf_counter() - began) > LIMIT_S
            if verdict is not Verdict.UNKNOWN or not band or too_long:
                break
            for _ in range(len(times)):  # not one by one: to look too often is to find by chance
                prepare()
                times.append(_timed(operation))
                teardown()
        row = Row(name, median(times), median(references), of, band, verdict, goal_s)
        request.config.stash[ROWS].append(row)
        benchmark.extra_info |= {
            "time_s": row.time_s,
            "reference_s": row.reference_s,
            "goal_s": goal_s,
            "ratio": of.median,
            "low": of.low,
            "high": of.high,
            "stored": band and [band.ratio, band.share],
            "verdict": verdict,
        }
        if verdict is Verdict.WORSE:
            assert band
            pytest.fail(
                f"{name}: {of.median:.3g} times its reference (at least {of.low:.3g}), and it was "
                f"{band.ratio:.3g}: more than {band.share:.0%} slower",
                pytrace=False,
            )
        if verdict is Verdict.UNKNOWN:
            pytest.skip(f"{name}: {why}")

    return measure


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
        say.line(f"To accept these as they are now, in {BANDS.name}:")
    for row in changed:
        share = row.band.share if row.band else 0.25
        say.line(f'"{row.name}" = {{ ratio = {row.ratio.median:.3g}, band = {share} }}')


def _timed(call: Call) -> float:
    began = perf_counter()
    own = call()
    return own if isinstance(own, float) else perf_counter() - began


def _time(seconds: float) -> str:
    units = ((1.0, "s "), (1e3, "ms"), (1e6, "µs"))
    scale, unit = next(((s, u) for s, u in units if seconds * s >= 1), (1e9, "ns"))
    return f"{seconds * scale:6.3g} {unit}"
