"""Look: how a datapath appears in figures and tables. Frozen data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Look:
    """A datapath's place and style, the same in every figure."""

    rank: int
    """Rows and bars are in this order, then by name."""
    color: str
    """Of lines and bars, as `#RRGGBB`."""
    hatch: str = ""
    """Of bars (matplotlib), for black and white."""
    line: str | tuple[float, ...] = "-"
    """Of lines: matplotlib's `-`, `--`, `-.`, or lengths of dash, gap, … in points."""
    marker: str = "o"
    """Of points (matplotlib)."""
