"""Figures of a campaign, drawn from what it stored alone, on any machine and without privileges.

The same trials give the same bytes. What could not be measured is there, with the reason. The
numbers are `testbed.results.analysis`'s; nothing is computed here but how they look.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib as mpl

from testbed.model.cells import Cell, Metric, Pair
from testbed.model.terms import Family, Transport
from testbed.reports.figures.bars import bars_figure, kind_of
from testbed.reports.figures.curves import curves_figure
from testbed.reports.figures.forest import forest, ratios
from testbed.reports.figures.stacks import built_figure, spent_figure
from testbed.reports.figures.style import (
    RC,
    Drawing,
    Ratio,
    circumstances,
    keys_of,
    point_key,
    save,
)
from testbed.reports.figures.sweeps import AXES, along, scaling, sweep
from testbed.results.analysis import Summary
from testbed.results.order import grouped
from testbed.results.results import Results


def draw(
    results: Results,
    folder: Path | None = None,
    kinds: Collection[str] = ("png", "pdf"),
    bare: bool = False,
) -> list[Path]:
    """Draw all figures of a campaign into its `figures/`, or another `folder`; say which they are.

    `kinds` are those of files; `bare` is without title and footer, for the paper.
    One figure per metric, transport and parameters: `throughput-tcp.png`, and with the parameters
    in the name where there are several; likewise what it cost the host: `cpu-throughput-tcp.png`.
    Where one parameter takes three values or more, it has a figure of its own,
    `throughput-tcp-by-size.png`, and the others are of those parameters alone that most cells have.
    What depends on how many guests and pods there are: `scaling-tcp.png`. How long starts took and
    what memory pods have, of which parts: `startup-tcp.png`. Other ratios to reference datapaths,
    controls too: `ratios-tcp.png`. Guests that cells name have figures of their own, with the name.
    """
    every, files = results.summaries, []
    rows = [row for row in every if not row.cell.variant]
    crowds = [row for row in rows if _is_crowd(row.cell)]
    traffic = [row for row in rows if not (row.cell.metric.of_building or _is_crowd(row.cell))]
    spent = [cost for cost in results.costs if not cost.cell.variant]
    keep = partial(
        save,
        folder=folder or results.path / "figures",
        digest=results.digest,
        bare=bare,
        kinds=kinds,
    )
    with mpl.rc_context(RC):
        for (metric, transport, guest), kind in grouped(traffic, kind_of).items():
            whose = f"-{guest}" if guest else ""
            swept = [(axis, found) for axis in AXES if (found := along(kind, axis))]
            of_params = grouped(kind, lambda r: replace(r.cell, guest="").params)
            if swept:
                params = max(of_params, key=lambda params: _weight(of_params[params]))
                of_params = {params: of_params[params]}
            for params, group in of_params.items():
                name = f"{metric}-{transport}{whose}"
                name += f"-{params}" if len(of_params) > 1 else ""
                cells = {row.cell for row in group}
                alike = [cost for cost in spent if cost.cell in cells]
                if metric is Metric.LATENCY:
                    files += keep(curves_figure(group, results), name=name)
                else:
                    files += keep(bars_figure(group, results), name=name)
                if alike:
                    files += keep(spent_figure(alike, results), name=f"cpu-{name}")
            for axis, found in swept:
                name = f"{metric}-{transport}{whose}-by-{axis.name}"
                files += keep(sweep(found, axis, results), name=name)
        for (pair, family, transport, guest), group in grouped(rows, _place).items():
            if drawing := scaling(group, results):
                whose = f"-{guest}" if guest else ""
                name = f"scaling-{transport}{whose}"
                others = {_place(row) for row in crowds if _place(row)[2:] == (transport, guest)}
                name += f"-{pair}-{family}" if len(others) > 1 else ""
                files += keep(drawing, name=name)
        built = [part for part in results.breakdowns if not _is_crowd(part.cell)]
        for (metric, transport), parts in grouped(built, lambda p: kind_of(p)[:2]).items():
            files += keep(built_figure(parts, results), name=f"{metric}-{transport}")
        divided = [
            row
            for row in every
            if row.reference != row.cell.datapath
            and not (row.cell.metric.of_building or _is_crowd(row.cell))
        ]
        for (transport, guest), group in grouped(divided, lambda r: kind_of(r)[1:]).items():
            if any(row.ratio.blocks for row in group):
                whose = f"-{guest}" if guest else ""
                files += keep(ratios(group, results), name=f"ratios-{transport}{whose}")
    return files


def _is_crowd(cell: Cell) -> bool:
    return cell.guests > 1 or cell.pods > 1


def _weight(rows: Sequence[Summary]) -> tuple[int, int]:
    """Most cells first; of as many, large messages for throughput, and small ones for times."""
    size = rows[0].cell.size_bytes
    return len(rows), size if rows[0].cell.metric is Metric.THROUGHPUT else -size


def _place(row: Ratio) -> tuple[Pair, Family, Transport, str]:
    return row.cell.pair, row.cell.family, row.cell.transport, row.cell.guest


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
