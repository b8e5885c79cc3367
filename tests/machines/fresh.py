"""Tests on fresh machines: clones a commit into new Debian roots, which have only git, and runs
the README's test command there. A root has the kernel, network and cgroups of this machine, so its
commands see this machine's pods, and `testbed down --all` would take them down.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import shlex
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.machines import roots

COMMAND = ("./bootstrap", "nox", "-s", "tests")
SET_UP = ("./bootstrap", "--tests", "--tex", "true")
"""What `COMMAND` does first. It is done in all roots at the same time, as it keeps one CPU busy."""
WITHOUT = ("--deselect", "tests/integration/test_scale.py::test_500_pods_of_two_guests_work")
"""A test of the kernel, which all roots share, that takes minutes: run in the first root alone."""
SUITES = {
    "bookworm": COMMAND,
    "trixie": (
        *COMMAND,
        "--",
        "tests/bpf",
        "tests/integration",
        "tests/unit",
        *WITHOUT,
    ),
}
"""Debian suite → the command that is run in it by default."""

CLOSING = re.compile(r"(?:=+ )?(\d+ \w+(?:, \d+ \w+)*) in [\d.]+s\b.*")
KINDS = ("passed", "failed", "skipped")
COUNTED_AS = {"error": "failed", "errors": "failed", "xfailed": "passed"}

CLEAN = """
status=0
"$@" || status=$?
[ ! -x .venv/bin/testbed ] || .venv/bin/testbed clean || status=1
exit "$status"
"""
"""Runs a command, then cleans up. Links and cgroups of interrupted tests belong to this machine, so
they would stay."""


def main(args: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m tests.machines fresh", description=__doc__)
    parser.add_argument("--suite", action="append", choices=SUITES, help="default: each")
    parser.add_argument("--commit", default="HEAD", help="default: HEAD")
    parser.add_argument("--keep", action="store_true", help="leave the roots there")
    parser.add_argument("command", nargs="*", help=f"default: {shlex.join(COMMAND)}")
    options = parser.parse_args(args)

    commit = roots.git("rev-parse", f"{options.commit}^{{commit}}")
    say(roots.git("log", "-1", "--format=commit %h, %s", commit))
    if roots.git("status", "--porcelain"):
        say("uncommitted changes are not in it")
    outcomes = {}
    # All roots share one kernel, so tests see what others leave in it: one root at a time.
    with roots.lock("fresh"), ExitStack() as stack:
        suites = options.suite or list(SUITES)
        made = {suite: stack.enter_context(cloned(suite, commit)) for suite in suites}
        if not options.command:
            set_up(made)
        for suite, root in made.items():
            outcomes[suite] = test(suite, root, options.command or SUITES[suite], options.keep)
    for suite, outcome in outcomes.items():
        say(f"{suite}: {outcome}")
    total = sum((outcome.counts for outcome in outcomes.values()), Counter())
    if total:
        print(closing_line(total), flush=True)
    return int(any(outcome.status for outcome in outcomes.values()))


@dataclass(frozen=True)
class Outcome:
    """Result of a command in a root; `counts` are those of pytest."""

    status: int
    counts: Counter[str]
    took_s: float

    def __str__(self) -> str:
        color = f"red (exit status {self.status})" if self.status else "green"
        counts = f", {closing_line(self.counts)}" if self.counts else ""
        return f"{color}{counts}, {self.took_s:.0f} s"


@contextmanager
def cloned(suite: str, commit: str) -> Iterator[Path]:
    """A new root with a clone of the commit, removed afterwards."""
    with step(f"{suite}: root of {roots.week()}"):
        base = roots.base(suite)
    with roots.copy(base) as root:
        roots.clone(commit, root)
        packages = len(list((root / "var/lib/dpkg/info").glob("*.list")))
        python = "no Python" if not (root / "usr/bin/python3").exists() else "Python"
        say(f"{suite}: there are {packages} packages, and {python}")
        yield root


def set_up(made: Mapping[str, Path]) -> None:
    """Set up the clones in all roots (by suite) at the same time. A failure shows in the tests."""
    processes = [
        multiprocessing.Process(target=_set_up, args=item, daemon=True) for item in made.items()
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def _set_up(suite: str, root: Path) -> None:
    with step(f"{suite}: {shlex.join(SET_UP)}"):
        roots.run(root, SET_UP, cwd=f"/{roots.CLONE}", on_line=lambda line: say(f"{suite}: {line}"))


def test(suite: str, root: Path, command: Sequence[str], keep: bool) -> Outcome:
    """Run a command in the clone in a root."""
    start = time.monotonic()
    counts: Counter[str] = Counter()

    def show(line: str) -> None:
        print(line, flush=True)
        counts.update(pytest_counts(line))

    with step(f"{suite}: {shlex.join(command)}"):
        status = roots.run(
            root, ["sh", "-c", CLEAN, "clean", *command], cwd=f"/{roots.CLONE}", on_line=show
        )
    for line in apt_history(root):
        say(f"{suite}: {line}")
    if keep:
        say(f"{suite}: kept as {roots.keep(root)}")
    return Outcome(status, counts, time.monotonic() - start)


def pytest_counts(line: str) -> Counter[str]:
    """Counts in a closing line of pytest, by `KINDS`; empty for other lines."""
    match = CLOSING.fullmatch(line)
    counts: Counter[str] = Counter()
    for number, word in re.findall(r"(\d+) (\w+)", match[1] if match else ""):
        counts[COUNTED_AS.get(word, word)] += int(number)
    return Counter({kind: counts[kind] for kind in KINDS}) if match else Counter()


def closing_line(counts: Counter[str]) -> str:
    """Counts as one line, in the form of pytest's closing line."""
    return ", ".join(f"{counts[kind]} {kind}" for kind in KINDS)


def apt_history(root: Path) -> Iterator[str]:
    """Packages that apt installed in a root, a line for each transaction."""
    log = root / "var/log/apt/history.log"
    for entry in (log.read_text() if log.exists() else "").strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in entry.splitlines() if ": " in line)
        packages = re.findall(r"([^ ,(]+):\w+ \(", fields.get("Install", ""))
        if packages:
            yield f"apt installed {len(packages)} packages: {fields.get('Commandline')}"


@contextmanager
def step(what: str) -> Iterator[None]:
    """Print what is done, and how long it took."""
    say(what)
    start = time.monotonic()
    yield
    say(f"{what}: {time.monotonic() - start:.0f} s")


def say(what: str) -> None:
    print(f"fresh: {what}", flush=True)
