"""Tests on Debian's kernels: boots each kernel in a virtual machine, with this clone in it.

A row is a kernel, the Debian suite whose compiler makes the bytecode, and the set-up of the
machine. Its steps are `testbed doctor`, the tests of the eBPF programs, measuring cells, and
conformance checks. The table of docs/machines.md shows the results. A row that is green is not run
again, unless a commit changes the files on which it depends whether a kernel and compiler will do.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from testbed.host.cache import cache_folder
from testbed.model.errors import Error
from tests.machines import linux, roots, vm

RESULTS = roots.REPOSITORY / "build/kernels"
KEPT = roots.REPOSITORY / "results/reference/kernels.json"
"""Last result of each row, also of other machines: name → contents of its row.json."""
PAGE = roots.REPOSITORY / "docs/machines.md"
BEGIN, END = "<!-- kernels: nox -s kernels -->", "<!-- end of kernels -->"

TESTED = (
    "bpf",
    "testbed/bpf",
    "testbed/datapaths",
    "testbed/host",
    "tests/bpf",
    "tests/hostile/test_process.py",
)
"""Files and folders on which it depends whether a kernel and a compiler will do: the programs, what
attaches them, and what tests both. Everything else is the same on every kernel.
"""

COMPILERS = ("bookworm", "trixie")
"""Debian suites whose compiler is tried with each kernel."""
NEWEST = "sid"
"""That with the newest compiler, which is tried with the newest kernel."""

ENVIRONMENT = "PYTHONUNBUFFERED=1 TESTBED_SLOWNESS=8"

DATAPATHS = ("steer", "capture")
CHECKS = (
    "connect",
    "refused",
    "listen-loopback",
    "half-close",
    "reset",
    "both-ways-at-once",
    "datagram",
    "datagram-refused",
    "datagram-names",
    "resolves",
    "client-names",
    "accept-names",
    "forged-source-of-guest",
    "pods-are-apart",
    "server-killed",
)
"""Conformance checks: some of each kind, among the quick ones."""

PROCESS = (
    "test_it_binds_no_port_of_a_guest_at_another_device",
    "test_it_sends_nothing_in_a_guests_name",
)
"""Tests of a hostile process that kernels may answer differently."""

WARNINGS = "tests/bpf/test_sets.py::test_bccs_compiler_has_no_warning"
"""A test of the compiler alone, which takes most of the time of tests/bpf: done in advance."""

HOUR_S = 3600.0
"""Limit of a step. A step takes minutes on a busy machine that emulates."""


@dataclass(frozen=True)
class Step:
    """A command that is run in the machine, in the clone's folder."""

    name: str
    command: str
    limit_s: float
    status: int = 0
    """The exit status that it must have."""
    says: str = ""
    """Regular expression that its output must match."""


def doctor(status: int = 0, says: str = "") -> Step:
    """Step that runs the doctor, without trials: they would say how slow emulation is."""
    return Step("doctor", ".venv/bin/testbed doctor --fast", HOUR_S, status, says)


def bpf() -> Step:
    """Step that runs the tests of the eBPF programs, and of what the kernel lets a process do."""
    tests = ("tests/bpf", *(f"tests/hostile/test_process.py::{name}" for name in PROCESS))
    options = f"-q -p no:cacheprovider --deselect {WARNINGS}"
    return Step("tests/bpf", f".venv/bin/pytest {options} {' '.join(tests)}", HOUR_S)


def cells(which: str = "*") -> Step:
    """Step that measures cells."""
    globs = " ".join(f"--cells '{name}/{which}'" for name in DATAPATHS)
    return Step(
        "cells",
        f".venv/bin/testbed run --plan quick --blocks 1 --guest standin {globs}"
        " --out /results/cells",
        HOUR_S,
    )


def checks(options: str = "") -> Step:
    """Step that runs conformance checks."""
    globs = " ".join(f"--check {name}" for name in CHECKS)
    return Step(
        "conformance",
        f".venv/bin/testbed conformance --guest standin --datapath {' '.join(DATAPATHS)} {globs}"
        f" {options} --junit /results/conformance.xml",
        HOUR_S,
    )


ALL = (doctor(), bpf(), cells(), checks())
COLUMNS = tuple(step.name for step in ALL)


@dataclass(frozen=True)
class Row:
    """A machine, and the steps that must pass on it."""

    kernel: str
    """A name in `linux.SUITES`."""
    compiler: str
    """The Debian suite of the root file system."""
    variant: str = ""
    """How it differs from other machines with this kernel, as text for the table."""
    setup: str = "true"
    """Shell command before the steps."""
    steps: tuple[Step, ...] = ALL
    machine: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `vm.Machine`."""
    arch: str = roots.architecture()
    """Debian's name of the architecture."""

    @property
    def name(self) -> str:
        """Name of the row, for --row and for its folder."""
        arch = "" if self.arch == roots.architecture() else self.arch
        words = (self.kernel, self.compiler, arch, re.sub(r"\W+", "-", self.variant).strip("-"))
        return "-".join(filter(None, words))


ROWS = (
    *(Row(kernel, compiler) for kernel in linux.SUITES for compiler in COMPILERS),
    Row("newest", NEWEST, steps=(doctor(), bpf())),
    Row(
        "6.1",
        "bookworm",
        "IPv6 off by `ipv6.disable=1`, as if compiled out",
        steps=(
            doctor(says="degraded +IPv6 .*ipv6.disable"),
            cells("*/ipv4/*"),
            checks("--family ipv4"),
        ),
        machine={"append": "ipv6.disable=1"},
    ),
    Row(
        "6.1",
        "bookworm",
        "IPv6 off by sysctl",
        setup="sysctl -w net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1",
        steps=(doctor(), checks()),
    ),
    Row(
        "6.1",
        "bookworm",
        "no cgroup2 mounted",
        steps=(doctor(1, "missing +cgroup2 .*mount -t cgroup2"),),
        machine={"cgroups": "none"},
    ),
    Row(
        "6.1",
        "bookworm",
        "cgroups of both versions (hybrid)",
        steps=(doctor(says="fine +cgroup2 +at /sys/fs/cgroup/unified"), checks()),
        machine={"cgroups": "hybrid"},
    ),
    Row(
        "6.1",
        "bookworm",
        "no BTF of the kernel",
        steps=(doctor(), checks()),
        machine={"btf": False},
    ),
    *(
        Row(
            "6.1",
            "bookworm",
            arch=arch,
            steps=(doctor(), bpf(), cells("native-guest/ipv4/tcp/latency/*")),
        )
        for arch in roots.MACHINES
        if arch != roots.architecture()
    ),
)


@dataclass
class Outcome:
    """Result of a step."""

    passed: bool
    text: str
    took_s: float


def main(args: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m tests.machines kernels", description=__doc__)
    parser.add_argument("--kernel", nargs="+", choices=linux.SUITES, help="default: each")
    parser.add_argument("--compiler", nargs="+", choices=(*COMPILERS, NEWEST), help="default: each")
    parser.add_argument("--row", nargs="+", metavar="NAME", help="only these (--list)")
    parser.add_argument("--list", action="store_true", help="list the rows, and run none")
    parser.add_argument("--jobs", type=int, default=1, help="machines at a time (default: 1)")
    parser.add_argument("--again", action="store_true", help="also run rows that are green already")
    options = parser.parse_args(args)

    rows = [
        row
        for row in ROWS
        if row.kernel in (options.kernel or linux.SUITES)
        and row.compiler in (options.compiler or [row.compiler])
        and row.name in (options.row or [row.name])
    ]
    if options.list or not rows:
        print(*(row.name for row in (rows or ROWS)), sep="\n")
        return 0 if options.list else 2
    commit = roots.git("rev-parse", "HEAD")
    say(roots.git("log", "-1", "--format=commit %h, %s"))
    if roots.git("status", "--porcelain"):
        say("uncommitted changes are not in it")
    todo = [row for row in rows if options.again or not green(row, commit)]
    if len(todo) < len(rows):
        say(f"{len(rows) - len(todo)} of {len(rows)} rows are green already")
    for arch in dict.fromkeys(row.arch for row in todo):  # roots of other architectures take long
        batch = [row for row in todo if row.arch == arch]
        for name in dict.fromkeys(row.kernel for row in batch):
            say(f"kernel {name}, {arch}: {linux.kernel(name, arch).release}")
        ready = {suite: warm(suite, arch) for suite in dict.fromkeys(r.compiler for r in batch)}
        run_all(batch, ready, commit, options.jobs)
        write_page()
    red = [row.name for row in rows if not green(row, commit)]
    say(f"{len(rows) - len(red)} rows green, {len(red)} red{': ' if red else ''}{', '.join(red)}")
    return int(bool(red))


def run_all(rows: Iterable[Row], ready: Mapping[str, Path], commit: str, jobs: int) -> None:
    """Run rows, each in a process of its own, at most `jobs` at the same time."""
    left, running = list(rows), list[multiprocessing.Process]()
    try:
        while left or running:
            while left and len(running) < jobs:
                row = left.pop(0)
                process = multiprocessing.Process(
                    target=run, args=(row, ready[row.compiler], commit), name=row.name
                )
                process.start()
                running.append(process)
            wait([process.sentinel for process in running])
            running = [process for process in running if process.is_alive()]
    finally:
        for process in running:
            process.terminate()  # the process takes its machine down
        for process in running:
            process.join()


def run(row: Row, root: Path, commit: str) -> None:
    """Boot the machine of a row, run its steps, and write their results to the row's folder."""
    folder = RESULTS / row.name
    shutil.rmtree(folder, ignore_errors=True)
    shared = folder / "results"
    shared.mkdir(parents=True)
    kernel = linux.kernel(row.kernel, row.arch)
    outcomes: dict[str, Outcome] = {}

    def write() -> None:
        now = datetime.now(UTC)
        (folder / "row.json").write_text(
            json.dumps(
                {
                    "commit": commit,
                    "date": now.strftime("%Y-%m-%d"),
                    "time": now.isoformat(timespec="seconds"),
                    "release": kernel.release,
                    "compiler": compiler(root),
                    "steps": {name: asdict(outcome) for name, outcome in outcomes.items()},
                },
                indent=1,
            )
        )

    say(f"{row.name}: boots Linux {kernel.release}")
    shares = {"/results": shared}
    if row.arch != roots.architecture():  # `warm` compiles no programs for it: keep them in a cache
        shares["/root/.cache/testbed/bpf"] = cache_folder() / f"bpf-{row.arch}"
        shares["/root/.cache/testbed/bpf"].mkdir(parents=True, exist_ok=True)
    machine = vm.Machine(kernel, root, arch=row.arch, shares=shares, **row.machine)
    start = time.monotonic()
    try:
        with vm.boot(machine, folder / "console.log") as guest:
            say(f"{row.name}: booted in {time.monotonic() - start:.0f} s")
            for step in (Step("setup", row.setup, 60), *row.steps):
                outcome = take(step, guest, folder, shared)
                if step.name != "setup":
                    outcomes[step.name] = outcome
                elif not outcome.passed:
                    raise Error(f"the machine cannot be set up: {outcome.text}")
                write()
                word = "passed" if outcome.passed else f"FAILED, see {log_of(step, folder)}"
                say(f"{row.name}: {step.name} {word} ({outcome.text}, {outcome.took_s:.0f} s)")
    except Error as e:
        write()
        say(f"{row.name}: {e}")
    except KeyboardInterrupt:
        say(f"{row.name}: interrupted")


def take(step: Step, guest: vm.Guest, folder: Path, shared: Path) -> Outcome:
    """Run a step; its output goes to its log."""
    start = time.monotonic()
    log = log_of(step, folder)
    command = f"cd /{roots.CLONE} && export {ENVIRONMENT} && {step.command}"
    with log.open("wb") as output:
        status = guest.run(command, output, limit_s=step.limit_s)
    text = log.read_text(errors="replace")
    said = not step.says or re.search(step.says, text, re.MULTILINE) is not None
    words = [summary(step, text, shared)]
    if status != step.status:
        words.append(f"exit status {status}")
    if not said:
        words.append(f"no line with {step.says!r}")
    passed = status == step.status and said
    return Outcome(passed, ", ".join(filter(None, words)), time.monotonic() - start)


def summary(step: Step, log: str, shared: Path) -> str:
    """Summary of a step in a few words, from its output."""
    if step.name == "tests/bpf":
        last = re.findall(r"^(\d+ .*) in [\d.:]+s", log, re.MULTILINE)
        return last[-1].split(" in ")[0] if last else "no summary"
    if step.name == "cells":
        file = shared / "cells/trials.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        trials = [json.loads(line) for line in lines]
        outcomes = {trial["cell"]: trial["status"] for trial in trials}  # the last run counts
        return ", ".join(f"{number} {kind}" for kind, number in Counter(outcomes.values()).items())
    if step.name == "conformance":
        file = shared / "conformance.xml"
        suites = ET.parse(file).getroot() if file.exists() else ()
        total, failed, skipped = (
            sum(int(suite.get(name, "0")) for suite in suites)
            for name in ("tests", "failures", "skipped")
        )
        counts = {"passed": total - failed - skipped, "failed": failed, "unsupported": skipped}
        return ", ".join(f"{number} {kind}" for kind, number in counts.items() if number)
    if step.name == "doctor":
        missing = re.findall(r"^missing +(\w+)", log, re.MULTILINE)
        return f"missing: {', '.join(missing)}" if missing else "ready"
    return ""


# Work that is done in advance, because this machine is faster than an emulated one: bytecode of
# Python, the traffic agent, the index of fonts; and eBPF bytecode, with the compiler's warnings,
# except for another architecture, because bcc creates maps while it compiles, and QEMU's user mode
# has no bpf(2).
WARM = """
set -e
.venv/bin/pytest -q -p no:cacheprovider --collect-only tests/bpf || true # may see others' links
.venv/bin/python -m compileall -q testbed tests
.venv/bin/python -c '
import matplotlib.font_manager
from testbed import agent
agent.build()
'
"""
WARM_PROGRAMS = f"""
.venv/bin/python -c '
from testbed.bpf import bytecode
from tests.bpf.test_verifier import SETS, TRACED
for name in ("probe", *SETS, *TRACED):
    bytecode.get(name)
'
.venv/bin/pytest -q -p no:cacheprovider --noconftest {WARNINGS} # no look at others' links
"""


def warm(suite: str, arch: str = roots.architecture()) -> Path:
    """The prepared root of a suite, with everything compiled in advance. It must not be changed."""
    root = roots.prepared(suite, arch)
    done = root / roots.CLONE / "build/warm"
    script = WARM + (WARM_PROGRAMS if arch == roots.architecture() else "")
    with roots.lock(f"warm-{suite}-{arch}"), roots.foreign(arch):
        if not done.exists():
            said: list[str] = []
            if roots.run(root, ["sh", "-c", script], cwd=f"/{roots.CLONE}", on_line=said.append):
                raise Error(f"in a {suite} root: {' '.join(said[-5:])}")
            done.parent.mkdir(exist_ok=True)
            done.touch()
    say(f"root of {suite}, {arch}: {compiler(root)}")
    return root


def compiler(root: Path) -> str:
    """Debian release of a root, and the LLVM that its bcc library uses: "Debian 12, LLVM 14"."""
    release = re.search(r'^VERSION_ID="?(\d+)', (root / "etc/os-release").read_text(), re.MULTILINE)
    (library,) = root.glob("usr/lib/*/libbcc.so.?.*")
    llvm = re.search(rb"libLLVM\D*(\d+)", library.read_bytes())
    assert llvm
    return f"Debian {release[1] if release else 'unstable'}, LLVM {llvm[1].decode()}"


def green(row: Row, commit: str) -> bool:
    """Whether all steps of a row passed, at this commit or at one with the same tested files."""
    found = result(row)
    steps = found.get("steps", {})
    passed = all(steps.get(step.name, {}).get("passed") for step in row.steps)
    return passed and (found["commit"] == commit or same(found["commit"], commit))


def same(one: str, other: str) -> bool:
    """Whether two commits differ in no file of `TESTED`."""
    try:
        return not roots.git("diff", "--name-only", one, other, "--", *TESTED)
    except Error:  # a commit that no longer exists
        return False


def result(row: Row) -> dict[str, Any]:
    """Newest results of a row, of this machine or kept ones; empty if it was never run."""
    file = RESULTS / row.name / "row.json"
    kept: dict[str, Any] = json.loads(KEPT.read_text()).get(row.name, {})
    own: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return max(kept, own, key=_when)


def _when(result: Mapping[str, Any]) -> str:
    """When results were got, as text that sorts. Older ones have a date only."""
    return str(result.get("time", result.get("date", "")))


def write_page() -> None:
    """Keep the results of all rows that were run, and write their table into docs/machines.md."""
    found = {row.name: result(row) for row in ROWS if result(row)}
    KEPT.write_text(json.dumps(found, indent=1) + "\n")
    head, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    PAGE.write_text("\n".join((head + BEGIN, *table(), END + tail)))


def table() -> list[str]:
    """Lines of the table of all rows that were run."""
    return [
        f"| kernel | compiler | {' | '.join(COLUMNS)} | took | commit, date |",
        "| --- " * (len(COLUMNS) + 4) + "|",
        *(line(row) for row in ROWS if result(row)),
    ]


def line(row: Row) -> str:
    """The table's line of a row."""
    found = result(row)
    wanted = {step.name for step in row.steps}
    texts, took = [], 0.0
    for name in COLUMNS:
        step = found["steps"].get(name)
        if step:
            took += step["took_s"]
            texts.append(step["text"] if step["passed"] else f"**{step['text']}**")
        else:
            texts.append("**not reached**" if name in wanted else "–")
    variant = f", {row.variant}" if row.variant else ""
    where = (f"{found['release']}{variant}", found["compiler"])
    when = (f"{took / 60:.0f} min", f"{found['commit'][:7]}, {found['date']}")
    return f"| {' | '.join((*where, *texts, *when))} |"


def log_of(step: Step, folder: Path) -> Path:
    return folder / f"{step.name.replace('/', '-')}.log"


def say(what: str) -> None:
    print(f"kernels: {what}", flush=True)
