"""Results of a stored campaign: its trials, tables, summaries and looks, each computed once.

Tables, claims, figures and HTML pages are made from this. Nothing is written to the store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from testbed.model.cells import Cell
from testbed.model.looks import Look
from testbed.model.metrics import CPU_QUANTITY
from testbed.model.trials import Status, Trial
from testbed.results import analysis, store
from testbed.results.analysis import Breakdown, Summary
from testbed.results.order import reading_order
from testbed.results.store import Campaign, Store

Histogram = Sequence[tuple[float, int]]

PALETTE = (
    Look(0, "#0072B2", hatch="----", marker="v"),
    Look(1, "#D55E00", hatch="\\\\\\\\", marker="D"),
    Look(2, "#56B4E9", hatch="..", line=(1, 1), marker="s"),
    Look(3, "#E69F00", hatch="////", line="--", marker="^"),
    Look(4, "#009E73", hatch="++++", line="-.", marker="P"),
    Look(5, "#CC79A7", hatch="||||", line=(3, 1, 1, 1), marker=">"),
    Look(6, "#F0E442", hatch="o", line=(5, 1), marker="X"),
    Look(7, "#999999"),
    Look(8, "#882255", hatch="xxxx", line=(3, 1, 1, 1, 1, 1), marker="<"),
    Look(9, "#555555", line=(1, 3), marker="*"),
    Look(10, "#000000", line=(8, 2), marker="h"),
    Look(11, "#AAAA00", hatch="**", line=(6, 1, 1, 1), marker="p"),
)
"""Looks of datapaths in campaigns that store none (before 2026-11-29), in order of appearance.

The first colors are the palette of Okabe and Ito; the others are greys, wine and olive."""
UNKNOWN = Look(1000, "#CCCCCC", hatch="OO", line=(2, 2), marker="d")
"""Look of a datapath that is not in the campaign."""


class Results:
    """A stored campaign and everything that is computed from its trials."""

    def __init__(self, stored: Store) -> None:
        self.store = stored

    @property
    def path(self) -> Path:
        return self.store.path

    @property
    def campaign(self) -> Campaign:
        return self.store.campaign

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the campaign's files that are not derived (`Store.digest`)."""
        return self.store.digest()

    @cached_property
    def log(self) -> list[Trial]:
        """Every trial, in the order in which they were run."""
        return self.store.log()

    @cached_property
    def trials(self) -> list[Trial]:
        """The trials that count: one for each cell and block (`store.counted`)."""
        return store.counted(self.log)

    @cached_property
    def table(self) -> pd.DataFrame:
        """The tidy table of `trials` (`store.frame`)."""
        return store.frame(self.trials)

    @cached_property
    def tables(self) -> dict[str, pd.DataFrame]:
        """Cell id → its rows of `table`."""
        return {str(id): rows for id, rows in self.table.groupby("cell")} if self.trials else {}

    @cached_property
    def histograms(self) -> dict[Cell, list[Histogram]]:
        """Cell → the histograms of its blocks."""
        found: dict[Cell, list[Histogram]] = {}
        for trial in self.trials:
            if trial.status is Status.OK and trial.histogram_us:
                found.setdefault(Cell.parse(trial.cell), []).append(trial.histogram_us)
        return found

    @cached_property
    def summaries(self) -> list[Summary]:
        """Summaries of all cells in reading order; cells that were not run yet count as failed."""
        missing = set(self.campaign.cells) - {trial.cell for trial in self.trials}
        trials = [
            *self.trials,
            *(Trial(cell, 0, 0, Status.FAILED, reason="not run yet") for cell in missing),
        ]
        table = store.frame(trials) if missing else self.table
        found = analysis.summarise(table, self.campaign.references) + analysis.tails(trials)
        return sorted(found, key=lambda row: self.reading_order(row.cell, row.quantity))

    def values(self, cell: Cell, quantity: str) -> dict[int, float]:
        """Block → value of a cell: of a column of `table`, or of the host's CPU time (`cpu`)."""
        table = self.tables.get(cell.id)
        if table is None:
            return {}
        if quantity == CPU_QUANTITY:
            return analysis.cost_values(table)
        return analysis.block_values(table, quantity)

    @property
    def blocks(self) -> set[int]:
        """Numbers of the blocks of which there are trials."""
        return {trial.block for trial in self.trials}

    def disturbed(self, *cells: Cell) -> set[int]:
        """Blocks in which the trial of one of the cells was disturbed."""
        tables = (self.tables[cell.id] for cell in cells if cell.id in self.tables)
        return set().union(*map(analysis.disturbed_blocks, tables))

    def ratios(self, cell: Cell, to: Cell, quantity: str) -> dict[int, float]:
        """Block → ratio of the values of two cells, for blocks that have both."""
        mine, others = self.values(cell, quantity), self.values(to, quantity)
        return {block: mine[block] / others[block] for block in sorted(mine.keys() & others.keys())}

    @cached_property
    def costs(self) -> list[Breakdown]:
        """Host CPU time per unit of traffic (`analysis.costs`)."""
        return analysis.costs(self.table)

    @cached_property
    def breakdowns(self) -> list[Breakdown]:
        """Parts of startup and memory (`analysis.breakdowns`)."""
        return analysis.breakdowns(self.table)

    def look(self, datapath: str) -> Look:
        """The look of a datapath, the same for all its variants."""
        return self._looks.get(datapath.partition("~")[0], UNKNOWN)

    def rank(self, datapath: str) -> tuple[int, str]:
        """Sort key of datapaths: a variant comes after the datapath that it is a variant of."""
        return self.look(datapath).rank, datapath

    def reading_order(self, cell: Cell, quantity: str) -> tuple[Any, ...]:
        """Sort key of cells and quantities (`order.reading_order`)."""
        return reading_order(cell, quantity, self.rank)

    @cached_property
    def _looks(self) -> Mapping[str, Look]:
        names = dict.fromkeys(Cell.parse(id).datapath.partition("~")[0] for id in self._cells)
        looks = {n: replace(PALETTE[k % len(PALETTE)], rank=k) for k, n in enumerate(names)}
        return looks | {name: Look(**look) for name, look in self.campaign.looks.items()}

    @property
    def _cells(self) -> Sequence[str]:
        return (*self.campaign.cells, *(trial.cell for trial in self.trials))


def read(path: Path) -> Results:
    """Read the campaign at `path`. Raises `Error` if there is none, or it cannot be read."""
    return Results(store.open(path))
