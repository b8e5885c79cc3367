"""Folders of this project's clone that the package reads, and the clone's revision."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
AGENT = ROOT / "agent"
BPF = ROOT / "bpf"
DEPLOY = ROOT / "deploy"
EXPERIMENTS = ROOT / "experiments"
OSV = ROOT / "osv"
PAPER = ROOT / "paper"
REFERENCE = ROOT / "results/reference"
BUNDLED_AGENT = AGENT / "static"
"""The compiled agent, where this is an unpacked bundle (`testbed.conformance.bundle`)."""


def is_bundle() -> bool:
    """Whether this is an unpacked bundle of the conformance suite, and no clone."""
    return BUNDLED_AGENT.exists() and not (ROOT / "pyproject.toml").exists()


def revision() -> str:
    """Git revision of this clone, with `-dirty` for uncommitted changes; `unknown` without git."""
    import subprocess  # not above: every command imports this module

    done = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or "unknown"
