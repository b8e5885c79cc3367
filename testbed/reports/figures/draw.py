"""Draws all figures of a campaign, from stored data alone, on any machine and without privileges.

The same trials give the same bytes. A cell that could not be measured is shown with the reason. The
numbers come from `testbed.results.analysis`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from importlib import import_module, metadata
from pathlib import Path

import matplotlib as mpl

from testbed.reports.figures.forest import forest
from testbed.reports.figures.style import (
    RC,
    Drawing,
    Ratio,
    circumstances,
    keys_of,
    point_key,
    save,
)
from testbed.results.results import Results

KINDS = ("bars", "curves", "stacks", "sweeps", "forest")
"""Modules of this package, whose `figures(results)` yields (name, drawing)."""
ORDER = ("throughput", "latency", "connections", "scaling", "startup", "memory", "ratios")
"""First words of names, in the order of figures. Figures with other words come after these."""


def draw(
    results: Results,
    folder: Path | None = None,
    kinds: Collection[str] = ("png", "pdf"),
    bare: bool = False,
) -> list[Path]:
    """Draw all figures of a campaign into its `figures/`, or into `folder`; returns the files.

    `kinds` are file types. With `bare`, figures have no title and footer, for the paper. Guests
    that cells name have figures of their own, with the guest in the figure's name. Another Python
    distribution adds figures by an entry point of group `testbed.figures` that names a function
    like `figures` of the modules in `KINDS`.
    """
    makers = [import_module(f"testbed.reports.figures.{name}").figures for name in KINDS]
    makers += [entry.load() for entry in metadata.entry_points(group="testbed.figures")]
    target = folder or results.path / "figures"
    files = []
    with mpl.rc_context(RC):
        drawings = [found for make in makers for found in make(results)]
        for name, drawing in sorted(drawings, key=lambda found: _order(found[0])):
            files += save(drawing, target, name, results.digest, kinds, bare)
    return files


def _order(name: str) -> int:
    word = name.removeprefix("cpu-").partition("-")[0]
    return ORDER.index(word) if word in ORDER else len(ORDER)


def draw_comparison(
    rows: Sequence[Ratio], before: Results, after: Results, band: float, folder: Path
) -> list[Path]:
    """Draw the ratios of two campaigns as `against-<before>.png` and PDF into `folder`."""
    shown = [row for row in rows if row.ratio.blocks]
    with mpl.rc_context(RC):
        figure = forest(shown, after, band)
        how = (
            "Ratio of geometric means, later by earlier, with 95 % Welch t-intervals; filled: the "
            f"interval excludes 1. Gray: the band of equivalence, {band:.0%}."
        )
        paragraphs = [f"Earlier: {circumstances(before)}", f"Later: {circumstances(after)}", how]
        drawing = Drawing(
            figure,
            f"{after.path.name} against {before.path.name}",
            keys_of(shown, point_key, after),
            paragraphs,
            before.campaign.functional or after.campaign.functional,
        )
        name = f"against-{before.path.resolve().name}"
        return save(drawing, folder, name, f"{after.digest} against {before.digest}")
