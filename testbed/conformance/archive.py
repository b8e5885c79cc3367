"""Archive of conformance results: one JSON file per run, and the pages that are made from them.

A run is a datapath with one kind of guest and one kind of native. For each check the file has the
number of passes, and every case that did not pass, with the reason. `docs/conformance.md` is the
matrix of checks by runs. README.md has its sums, between two comments. Both pages are written from
the files alone.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from testbed import datapaths, paths
from testbed.conformance import checks
from testbed.conformance.check import Check, Result, Status
from testbed.host import facts
from testbed.model.errors import Error
from testbed.model.terms import Runtime
from testbed.runtimes.interface import Description

FOLDER = paths.REFERENCE / "conformance"
PAGE = paths.ROOT / "docs/conformance.md"
README = paths.ROOT / "README.md"
BEGIN, END = "<!-- conformance: testbed conformance --pages -->", "<!-- end of conformance -->"

GUESTS = (Runtime.STANDIN, Runtime.GVISOR, Runtime.LINUX, Runtime.OSV)
"""Guests, in the order of columns."""

PROGRAMS = (paths.BPF, paths.ROOT / "testbed/bpf", paths.ROOT / "testbed/datapaths")
_C = re.compile(r"/\*.*?\*/", re.DOTALL)
COMMENTS = {
    ".c": _C,
    ".h": _C,
    ".py": re.compile(r'^[ \t]*(?:#[^\n]*|""".*?""")$', re.DOTALL | re.MULTILINE),
}
"""Suffix of files of programs → what is no code in them."""

INTRODUCTION = """\
# What a program may rely on at `localhost`

Each check runs through every pair of workloads, family and transport that it is about and the
datapath carries; a cell counts those cases. A number alone passed, **✗** failed, and what is in
brackets is unsupported, with the number of its reason below. An empty cell: the check is about no
pair that the datapath carries. Natives are processes, or WASI components where a column says WASM.
The program in a guest knows the pod's `localhost` by the hosts patch alone, so that the patch is
checked. In OSv guests where a column says shim, it has the shim as well, as programs do by default.

This page is written by `testbed conformance --pages` from `results/reference/conformance`, where
`testbed conformance --keep` puts its results.
"""

Reasons = dict[str, list[str]]
"""Reason → the cases that ended with it."""


@dataclass(frozen=True)
class Outcome:
    """Results of all cases of one check."""

    passed: int
    unsupported: Reasons
    failed: Reasons

    def count(self, status: Status) -> int:
        """Number of cases with this status."""
        if status is Status.PASS:
            return self.passed
        reasons = self.unsupported if status is Status.UNSUPPORTED else self.failed
        return sum(map(len, reasons.values()))


@dataclass(frozen=True)
class Run:
    """Results of a datapath with one kind of guest and one kind of native."""

    datapath: str
    guest: str
    kernel: str
    """Flavor and version; empty for guests without a kernel of their own."""
    native: str
    """`wasm` if natives were WASI components, else `process`."""
    checks: dict[str, Outcome]
    revision: str = ""
    """Of the clone that was tested."""
    programs: str = ""
    """Digest of what makes `localhost` work in that clone, by this datapath (`programs`)."""
    date: str = ""
    """Of the start: UTC, ISO 8601."""
    host_kernel: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of other software, by name."""
    accelerator: str = ""
    """`kvm` or `tcg`; empty for guests that are no virtual machines."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of the guest's image and kernel, by name."""
    shim: bool = False
    """Whether the traffic agent in an OSv guest had the shim."""

    @property
    def name(self) -> str:
        """Name of its file, such as `steer-osv-ipv6` or `steer-wasm-standin`."""
        flavor = self.kernel.split()[:1] if self.guest == Runtime.OSV else []
        native = self.native if self.native != Runtime.PROCESS else ""
        shim = "shim" if self.shim else ""
        return "-".join(filter(None, (self.datapath, native, self.guest, *flavor, shim)))

    def total(self, status: Status) -> int:
        """Number of cases of all checks with this status."""
        return sum(outcome.count(status) for outcome in self.checks.values())


def programs(datapath: str) -> str:
    """Digest (SHA-256) of what makes `localhost` work by a datapath in this clone (`PROGRAMS`),
    without comments, and without the files that are another datapath's own.

    Results are stale if it has changed since.
    """
    others = set(datapaths.names()) - {datapath}
    digest = hashlib.sha256()
    for folder in PROGRAMS:
        for file in sorted(each for each in folder.rglob("*.*") if each.suffix in COMMENTS):
            if file.stem in others:
                continue
            code = COMMENTS[file.suffix].sub("", file.read_text())
            digest.update(f"{file.relative_to(paths.ROOT)} {' '.join(code.split())}\n".encode())
    return digest.hexdigest()


def circumstances() -> dict[str, Any]:
    """What is known of all runs from now on: fields of `Run`, of which `programs` is a dictionary
    by datapath.
    """
    return {
        "revision": paths.revision(),
        "programs": {name: programs(name) for name in datapaths.names()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "host_kernel": platform.release(),
        "versions": facts.versions(),
    }


def runs_of(results: Iterable[Result], guest: Description | None = None, **known: Any) -> list[Run]:
    """One run for each datapath, in the order of its first result.

    `guest` describes the guests, if there were any; `known` are `circumstances`.
    """
    runs: dict[tuple[str, str, str, str], dict[str, Outcome]] = {}
    for r in results:
        native = Runtime.WASM if Runtime.WASM in r.pair else Runtime.PROCESS
        found = runs.setdefault((r.datapath, r.guest, r.kernel, native), {})
        outcome = found.get(r.check, Outcome(0, {}, {}))
        if r.status is Status.PASS:
            outcome = Outcome(outcome.passed + 1, outcome.unsupported, outcome.failed)
        else:
            reasons = outcome.failed if r.status is Status.FAIL else outcome.unsupported
            reasons.setdefault(r.reason, []).append(f"{r.pair} {r.family} {r.transport}")
        found[r.check] = outcome
    of_guest: dict[str, Any] = {}
    if guest:
        of_guest = {"accelerator": guest.accelerator, "digests": guest.digests}
    digests = known.pop("programs", {})
    return [
        replace(
            Run(*names, outcomes, programs=digests.get(names[0], "")),
            **known,
            **(of_guest if names[1] else {}),
        )
        for names, outcomes in runs.items()
    ]


def keep(run: Run, folder: Path = FOLDER) -> Path:
    """Write the run's file, and replace an older one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{run.name}.json"
    path.write_text(json.dumps(asdict(run), indent=1) + "\n")
    return path


def read(folder: Path = FOLDER) -> list[Run]:
    """Read all archived runs, in the order of columns. Raises `Error` if there are none."""
    runs = []
    for path in folder.glob("*.json"):
        data = json.loads(path.read_text())
        outcomes = {name: Outcome(**outcome) for name, outcome in data.pop("checks").items()}
        runs.append(Run(checks=outcomes, **data))
    if not runs:
        raise Error(f"{folder} has no results", hint="testbed conformance --keep")
    return sorted(runs, key=_column)


def _column(run: Run) -> tuple[int, str, int, str, bool]:
    guest = GUESTS.index(Runtime(run.guest)) if run.guest else -1
    return datapaths.names().index(run.datapath), run.native, guest, run.kernel, run.shim


# --- pages ----------------------------------------------------------------------------------


def write_pages() -> list[Path]:
    """Write both pages from the archived runs; returns their files."""
    runs = read()
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(runs, checks.matching()))
    README.write_text(with_sums(README.read_text(), runs))
    return [PAGE, README]


def with_sums(text: str, runs: Sequence[Run]) -> str:
    """The text with the sums between its two comments. Raises `Error` if it lacks the comments."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise Error("README.md lacks the place for the sums", hint=f"put there {BEGIN} and {END}")
    before, _, rest = text.partition(BEGIN)
    return "\n".join((f"{before}{BEGIN}", *_sums(runs), f"{END}{rest.partition(END)[2]}"))


def _sums(runs: Sequence[Run]) -> list[str]:
    rows = [
        (
            run.datapath,
            _workloads(run),
            *(str(run.total(status)) for status in (Status.PASS, Status.FAIL, Status.UNSUPPORTED)),
            run.revision or "–",
        )
        for run in runs
    ]
    heads = ("datapath", "workloads", "pass", "fail", "unsupported", "revision")
    return _table(heads, rows, "llrrrl")


def page(runs: Sequence[Run], all_checks: Iterable[Check]) -> str:
    """The page: a matrix of checks by runs, and a list of all reasons below it."""
    notes = _Notes()
    rows = []
    for check in all_checks:
        cells = [_cell(run.checks.get(check.name), notes) for run in runs]
        rows.append((f"**{check.name}** {check.proves}", *cells))
    heads = [
        "<br>".join(filter(None, (run.datapath, _workloads(run), run.revision))) for run in runs
    ]
    lines = [
        INTRODUCTION,
        *_table(("check", *heads), rows, "l" + "r" * len(runs)),
        "",
        "## Unsupported, and why",
        "",
        *(f"{n}. {reason}" for reason, n in notes.numbers.items()),
        "",
        "## Failed, and how",
        "",
    ]
    for run in runs:
        failures = [
            f"- {name} ({outcome.count(Status.FAIL)}): {next(iter(outcome.failed))}"
            for name, outcome in run.checks.items()
            if outcome.failed
        ]
        if failures:
            lines += [f"### {run.datapath}, {_workloads(run)}", "", *failures, ""]
    return "\n".join(lines).rstrip("\n") + "\n"


class _Notes:
    """Numbers reasons in the order in which they appear."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def number(self, reason: str) -> int:
        """Number of a reason. Reasons that differ only in the workload's number are the same."""
        return self.numbers.setdefault(_general(reason), len(self.numbers) + 1)


def _general(reason: str) -> str:
    return re.sub(r"\b(guest|native)[12]\b", r"the \1", reason)


def _cell(outcome: Outcome | None, notes: _Notes) -> str:
    if outcome is None:
        return ""
    said = []
    if outcome.passed:
        said.append(str(outcome.passed))
    if outcome.failed:
        said.append(f"**✗{outcome.count(Status.FAIL)}**")
    if outcome.unsupported:
        numbers = sorted({notes.number(reason) for reason in outcome.unsupported})
        why = ",".join(map(str, numbers))
        said.append(f"({outcome.count(Status.UNSUPPORTED)})<sup>{why}</sup>")
    return " ".join(said)


def _workloads(run: Run) -> str:
    if run.guest == Runtime.OSV:
        guest = f"OSv {run.kernel.split()[0]}" + (", shim" if run.shim else "")
    else:
        names = {"standin": "stand-ins", "gvisor": "gVisor", "linux": "Linux"}
        guest = {"": "processes", **names}[run.guest]
    return f"WASM, {guest}" if run.native == Runtime.WASM else guest


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], align: str) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    rule = ["---" if a == "l" else "---:" for a in align]
    return [line(heads), line(rule), *map(line, rows)]
