"""What there is to run in this project; `nox -l` lists it.

Every session works in the one `.venv` that `bootstrap` makes: environments made by nox could not
import bcc, which comes with the system's Python. What a session does is in the package and in
tests/; here are only the commands.
"""

from __future__ import annotations

from pathlib import Path

import nox

ROOT = Path(__file__).parent
BIN = ROOT / ".venv/bin"

nox.needs_version = ">=2024.3"
nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "tests"]


def run(session: nox.Session, tool: str, *args: str) -> None:
    """Run a tool of `.venv`, whichever nox this is."""
    if not (BIN / tool).exists():
        session.error(f"{tool} is not in .venv; type: ./bootstrap nox -s {session.name}")
    session.run(str(BIN / tool), *args)


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
    run(session, "pytest", "-m", "not bench", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Time the code's own costs: images, programs, links (-- arguments for pytest)."""
    run(session, "pytest", "-m", "bench", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, types, and that imports go down only."""
    run(session, "ruff", "check")
    run(session, "ruff", "format", "--check")
    run(session, "mypy")
    run(session, "lint-imports", "--no-cache")
    sources = sorted(p for d in ("agent", "bpf", "osv") for p in (ROOT / d).rglob("*.[ch]"))
    run(session, "clang-format", "--dry-run", "--Werror", *map(str, sources))
