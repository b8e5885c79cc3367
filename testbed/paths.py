"""Folders of this project's clone that the package reads."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
AGENT = ROOT / "agent"
BPF = ROOT / "bpf"
EXPERIMENTS = ROOT / "experiments"
OSV = ROOT / "osv"
PAPER = ROOT / "paper"
REFERENCE = ROOT / "results/reference"
