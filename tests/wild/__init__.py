"""Manifests as people write them. The first line of each is what becomes of it."""

from __future__ import annotations

from pathlib import Path

MANIFESTS = sorted(Path(__file__).parent.glob("*.yaml"))
STARTS = "starts"


def verdict(file: Path) -> str:
    """`starts`, `needs an image: NAME`, or `refused: MESSAGE`."""
    return file.read_text().partition("\n")[0].removeprefix("# ")
