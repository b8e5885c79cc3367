"""Draws how benchmarks went over time, from what pytest-benchmark stored (`--benchmark-autosave`).

    python -m tests.bench.history FILE.png JSON|FOLDER…

One small plot per benchmark: its ratio to its reference with the interval of each run, by the
commit that was measured, on the band that it was held against in that run.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

COLUMNS = 4


def runs(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Every run in these files and folders, earliest first."""
    files = {f for path in paths for f in (path.rglob("*.json") if path.is_dir() else [path])}
    return sorted((json.loads(file.read_text()) for file in files), key=lambda run: run["datetime"])


def draw(stored: Sequence[dict[str, Any]], to: Path) -> None:
    """Write the figure. Raises `SystemExit` if nothing is stored."""
    from matplotlib.figure import Figure

    series: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for number, run in enumerate(stored):
        for benchmark in run["benchmarks"]:
            if "ratio" in benchmark["extra_info"]:
                series.setdefault(benchmark["name"], []).append((number, benchmark["extra_info"]))
    if not series:
        raise SystemExit("no benchmark of ours is stored there; type: nox -s bench")
    rows = math.ceil(len(series) / COLUMNS)
    figure = Figure(figsize=(4 * COLUMNS, 1.9 * rows), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False, sharex=True)
    labels = [run["commit_info"]["id"][:7] for run in stored]
    for spare in axes.flat[len(series) :]:
        spare.set_axis_off()
    for axis, (name, points) in zip(axes.flat, sorted(series.items()), strict=False):
        at = [number for number, _ in points]
        for number, info in points:
            if info["stored"]:
                ratio, share = info["stored"]
                axis.fill_between(
                    [number - 0.5, number + 0.5],
                    ratio / (1 + share),
                    ratio * (1 + share),
                    color="0.9",
                    linewidth=0,
                )
            color = {"worse": "C3", "better": "C2", "within": "C0"}.get(info["verdict"], "0.5")
            axis.plot([number, number], [info["low"], info["high"]], color=color)
        axis.plot(at, [info["ratio"] for _, info in points], "o", color="0.2", markersize=3)
        axis.set_title(name, fontsize=7)
        axis.set_ylim(bottom=0)
        axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6)
        axis.tick_params(axis="y", labelsize=6)
    figure.supylabel("time by the reference's; grey: the band", fontsize=8)
    figure.savefig(to, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(f"usage: {Path(sys.argv[0]).stem} FILE.png JSON|FOLDER…")
    draw(runs(map(Path, sys.argv[2:])), Path(sys.argv[1]))
    print(sys.argv[1])
