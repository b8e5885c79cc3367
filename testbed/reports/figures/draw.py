"""Figures of a campaign, drawn from what it stored alone, on any machine and without privileges.

The same trials give the same bytes. What could not be measured is there, with the reason. The
numbers are `testbed.results.analysis`'s; nothing is computed here but how they look.
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
"""Modules here whose `figures(results)` gives figures by their names."""
ORDER = ("throughput", "latency", "connections", "scaling", "startup", "memory", "ratios")
"""First words of names, in the order in which figures are shown; others come after these."""


def draw(
    results: Results,
    folder: Path | None = None,
    kinds: Collection[str] = ("png", "pdf"),
    bare: bool = False,
) -> list[Path]:
    """Draw all figures of a campaign into its `figures/`, or another `folder`; say which they are.

    `kinds` are those of files; `bare` is without title and footer, for the paper. Another
    distribution adds figures by an entry point of group `testbed.figures` that names a function
    like those of `KINDS`. Guests that cells name have figures of their own, with the name.
    """
    makers = [import_module(f"testbed.reports.figures.{name}").figures for name in KINDS]
    makers += [entry.load() for entry in metadata.entry_points(group="testbed.figures")]
    where = folder or results.path / "figures"
    files = []
    with mpl.rc_context(RC):
        drawings = [found for make in makers for found in make(results)]
        for name, drawing in sorted(drawings, key=lambda found: _order(found[0])):
            files += save(drawing, where, name, results.digest, kinds, bare)
    return files


def _order(name: str) -> int:
    word = name.removeprefix("cpu-").partition("-")[0]
    return ORDER.index(word) if word in ORDER else len(ORDER)


def draw_comparison(
    rows: Sequence[Ratio], before: Results, after: Results, band: float, folder: Path
) -> list[Path]:
    """Draw ratios of one campaign to another, `against-<before>.png` and its PDF, into `folder`."""
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
