"""Draws all figures of a campaign, from stored data alone, on any machine and without privileges.

The same trials give the same bytes. A cell that could not be measured is shown with the reason. The
numbers come from `testbed.results.analysis`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextvars import ContextVar
from importlib import import_module, metadata
from multiprocessing import get_context
from pathlib import Path

import matplotlib as mpl

from testbed.reports.compare import Comparison
from testbed.reports.figures.forest import forest, meaning_of_marks
from testbed.reports.figures.style import (
    RC,
    Drawing,
    circumstances,
    disturbances,
    save,
)
from testbed.results.results import Results

KINDS = ("claims", "bars", "curves", "applications", "stacks", "sweeps", "forest")
"""Modules of this package, whose `figures(results)` yields (name, drawing)."""
ORDER = (
    "claims",
    "throughput",
    "latency",
    "connections",
    "requests",
    "scaling",
    "startup",
    "memory",
    "ratios",
)
"""First words of names, in the order of figures. Figures with other words come after these."""

PR_SET_PDEATHSIG = 1
"""linux/prctl.h."""

Maker = Callable[[Results], Iterable[tuple[str, Drawing]]]

_SHARED = ContextVar[tuple[Results, Path, Collection[str], bool, Collection[str] | None]]("shared")
"""Arguments of every `_draw_kind`. A campaign that is open cannot be sent to another process."""


def draw(
    results: Results,
    folder: Path | None = None,
    kinds: Collection[str] = ("png", "pdf"),
    bare: bool = False,
    only: Collection[str] | None = None,
    without: Collection[str] = (),
) -> list[Path]:
    """Draw all figures of a campaign into its `figures/`, or into `folder`; returns the files.

    `kinds` are file types. With `bare`, figures have no title and footer, for the paper. `only` are
    the names of figures, if not all are wanted; `without` are modules whose figures are not. Guests
    that cells name have figures of their own, with the guest in the figure's name. Another Python
    distribution adds figures by an entry point of group `testbed.figures` that names a function
    like `figures` of the modules in `KINDS`.
    """
    modules = [name for name in KINDS if name not in without]
    makers: list[Maker] = [
        *(import_module(f"testbed.reports.figures.{name}").figures for name in modules),
        *(entry.load() for entry in metadata.entry_points(group="testbed.figures")),
    ]
    _ = results.summaries  # once, before there are many processes
    target = folder or results.path / "figures"
    count = min(len(makers), len(os.sched_getaffinity(0)))
    shared = (results, target, kinds, bare, only)
    with ProcessPoolExecutor(count, get_context("fork"), _begin, (shared,)) as processes:
        found = [files for each in processes.map(_draw_kind, makers) for files in each]
    return [file for _, files in sorted(found, key=_place) for file in files]


def _begin(shared: tuple[Results, Path, Collection[str], bool, Collection[str] | None]) -> None:
    """Prepare a process of the pool."""
    _SHARED.set(shared)
    if (
        sys.platform == "linux"
    ):  # else it would wait for work for ever if the main process is killed
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _draw_kind(make: Maker) -> list[tuple[str, list[Path]]]:
    """Draw the figures of one kind; returns the name and files of each."""
    results, folder, kinds, bare, only = _SHARED.get()
    with mpl.rc_context(RC):
        return [
            (name, save(drawing, folder, name, results.digest, kinds, bare))
            for name, drawing in make(results)
            if only is None or name in only
        ]


def _place(named: tuple[str, list[Path]]) -> int:
    """Sort key of a figure with this name."""
    word = named[0].removeprefix("cpu-").partition("-")[0]
    return ORDER.index(word) if word in ORDER else len(ORDER)


def draw_comparison(
    rows: Sequence[Comparison], before: Results, after: Results, band: float, folder: Path
) -> list[Path]:
    """Draw the ratios of two campaigns as `against-<before>.png` and PDF into `folder`."""
    with mpl.rc_context(RC):
        drawing = comparison(rows, before, after, band)
        name = f"against-{before.path.resolve().name}"
        return save(drawing, folder, name, f"{after.digest} against {before.digest}")


def comparison(rows: Sequence[Comparison], before: Results, after: Results, band: float) -> Drawing:
    """Ratios of two campaigns as a forest plot."""
    shown = [row for row in rows if row.ratio.blocks]
    how = (
        "Ratio of geometric means over blocks, later by earlier; "
        f"{meaning_of_marks(shown, after, '95 % Welch t-intervals')}. "
        f"Gray: the band of equivalence, {band:.0%}."
    )
    return Drawing(
        forest(shown, after, band),
        f"{after.path.name} against {before.path.name}",
        [],
        [
            f"Earlier: {circumstances(before)}",
            *disturbances(((row.cell, row.before) for row in shown), before),
            f"Later: {circumstances(after)}",
            *disturbances(((row.cell, row.after) for row in shown), after),
            how,
        ],
        before.campaign.functional or after.campaign.functional,
    )
