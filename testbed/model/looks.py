"""Look: order, color, hatch, line and marker of a datapath in figures and tables. Frozen data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Look:
    """Order and style of a datapath, the same in every figure."""

    rank: int
    """Rows and bars are sorted by rank, then by name."""
    color: str
    """Color of lines and bars, as `#RRGGBB`."""
    hatch: str = ""
    """Hatch of bars (matplotlib), so that they differ in black and white."""
    line: str | tuple[float, ...] = "-"
    """Line style: matplotlib's `-`, `--`, `-.`, or lengths of dash, gap, … in points."""
    marker: str = "o"
    """Marker of points (matplotlib)."""
