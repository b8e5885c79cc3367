"""Nox sessions of this project; `nox -l` lists them.

All sessions use the `.venv` that `bootstrap` makes. Environments made by nox could not import bcc,
which is a package of the system's Python. This file has only the commands; the code is in the
package and in tests/.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import nox

ROOT = Path(__file__).parent
BIN = ROOT / ".venv/bin"
INTERRUPT_GRACE_S = 60
SCHEMAS = {
    "github-workflows": ".github/workflows/ci.yml",
    "github-actions": ".github/actions/conformance/action.yml",
    "citation-file-format": "CITATION.cff",
}
"""Schema that check-jsonschema contains → the file that it checks."""
MANIFESTS = (
    "deploy/daemonset.yaml",
    "deploy/guests/web.yaml",
    "deploy/namespace.yaml",
    "deploy/removal.yaml",
    "deploy/runtimeclass.yaml",
    "deploy/web.yaml",
)
"""What Kubernetes reads, by the schemas that kubernetes-validate contains."""

nox.needs_version = ">=2024.3"
nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "tests"]


def tool_of(session: nox.Session, name: str) -> str:
    """Path of a tool in `.venv`, also if nox itself is elsewhere."""
    if not (BIN / name).exists():
        session.error(f"{name} is not in .venv; type: ./bootstrap nox -s {session.name}")
    return str(BIN / name)


def run(session: nox.Session, tool: str, *args: str) -> None:
    """Run a tool. After an interrupt it has time to take down what it made."""
    session.run(tool_of(session, tool), *args, interrupt_timeout=INTERRUPT_GRACE_S)


def become(session: nox.Session, tool: str, *args: str) -> None:
    """Replace nox by a tool (exec), to keep the tool's exit status; that of nox is only 0 or 1."""
    command = [tool_of(session, tool), *args]
    session.log(shlex.join(command))
    os.chdir(ROOT)
    os.execv(command[0], command)


def check_c(session: nox.Session) -> None:
    """Check the format of all C, and that programs, of eBPF too, compile without warnings."""
    formatted = ("agent", "bpf", "deploy", "osv", "tests")
    sources = [str(p) for d in formatted for p in sorted((ROOT / d).rglob("*.[ch]"))]
    run(session, "clang-format", "--dry-run", "--Werror", *sources)
    strict = ("-std=gnu17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only")
    compiled = ("agent", "deploy", "osv/linux")
    programs = [str(file) for name in compiled for file in (ROOT / name).glob("*.c")]
    session.run("cc", *strict, *programs, external=True)
    run(session, "python", "-m", "tests.bpf.syntax")


def groups(session: nox.Session, *names: str) -> None:
    """Install the missing packages of groups in packages.txt."""
    session.run(str(ROOT / "bootstrap"), *(f"--{name}" for name in names), "true")


@nox.session
def experiments(session: nox.Session) -> None:
    """Build pods, measure, draw figures, take all down (-- --plan quick, -- --hosts FILE)."""
    run(session, "testbed", "run", *session.posargs)


@nox.session
def figures(session: nox.Session) -> None:
    """Draw the figures of a stored campaign again, without root (-- DIR)."""
    run(session, "testbed", "figures", *session.posargs)


@nox.session
def paper(session: nox.Session) -> None:
    """Build paper/main.pdf from a stored campaign, after ./bootstrap --tex (-- DIR)."""
    run(session, "testbed", "paper", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Test all but speed; without root, only what needs none (-- arguments for pytest)."""
    groups(session, "tests", "tex")
    several = ("-n3", "--dist=loadfile", "--no-loadscope-reorder", "--durations=25")
    run(session, "pytest", "-m", "not bench", *several, *session.posargs)


@nox.session
def fresh(session: nox.Session) -> None:
    """Test a commit in new Debian roots, which have nothing but git (-- --suite trixie)."""
    groups(session, "machines")
    become(session, "python", "-m", "tests.machines", "fresh", *session.posargs)


@nox.session
def kernels(session: nox.Session) -> None:
    """Run programs, cells and checks on Debian's kernels in VMs (-- --kernel 5.10 --jobs 2)."""
    groups(session, "machines")
    become(session, "python", "-m", "tests.machines", "kernels", *session.posargs)


@nox.session
def kvm(session: nox.Session) -> None:
    """Run guests by KVM and vhost-net, here or on an emulated machine (-- arguments for pytest)."""
    become(session, "python", "-m", "tests.machines", "kvm", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Hold speed against tests/bench/bands.toml; exit status 1: worse, 3: could not measure."""
    options = ("--benchmark-quiet", "--benchmark-autosave")
    become(session, "pytest", "-m", "bench", *options, *session.posargs)


@nox.session
def history(session: nox.Session) -> None:
    """Draw how benchmarks went over time, from stored runs (-- FILE.png JSON|FOLDER…)."""
    stored = session.posargs or ["build/history.png", ".benchmarks"]
    (ROOT / "build").mkdir(exist_ok=True)
    run(session, "python", "-m", "tests.bench.history", *stored)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, types, that imports go down only, CI's workflows, the citation and deploy/."""
    run(session, "ruff", "check")
    run(session, "ruff", "format", "--check")
    run(session, "mypy")
    run(session, "lint-imports", "--no-cache")
    check_c(session)
    for schema, file in SCHEMAS.items():
        run(session, "check-jsonschema", "--builtin-schema", f"vendor.{schema}", str(ROOT / file))
    run(session, "kubernetes-validate", "--strict", "--quiet", *(str(ROOT / f) for f in MANIFESTS))
    run(session, "zizmor", "--quiet", "--offline", str(ROOT / ".github"))
