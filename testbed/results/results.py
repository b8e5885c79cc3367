"""Results: a stored campaign, read once, and what its trials come to.

Each part is made when it is first asked for, and kept. Tables, claims, figures and pages are made
of this; nothing goes back into the store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from testbed.model.cells import Cell
from testbed.model.looks import Look
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
)
"""Okabe and Ito's colours, in turn for datapaths of which the campaign does not say how they look
(those before 2026-11-29)."""
UNKNOWN = Look(1000, "#CCCCCC", hatch="OO", line=(2, 2), marker="d")
"""Of a datapath that the campaign has not."""


class Results:
    """A campaign and its trials."""

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
        """SHA-256 of all that is not derived."""
        return self.store.digest()

    @cached_property
    def log(self) -> list[Trial]:
        """Every trial that was run, in that order."""
        return self.store.log()

    @cached_property
    def trials(self) -> list[Trial]:
        """Those that count: one for each cell and block (`store.counted`)."""
        return store.counted(self.log)

    @cached_property
    def table(self) -> pd.DataFrame:
        """The tidy table of `trials` (`store.frame`)."""
        return store.frame(self.trials)

    @cached_property
    def tables(self) -> dict[str, pd.DataFrame]:
        """Id of a cell → its rows of `table`."""
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
        """All cells in reading order, those that were not run yet as failed."""
        missing = set(self.campaign.cells) - {trial.cell for trial in self.trials}
        trials = [
            *self.trials,
            *(Trial(cell, 0, 0, Status.FAILED, reason="not run yet") for cell in missing),
        ]
        table = store.frame(trials) if missing else self.table
        found = analysis.summarise(table, self.campaign.references) + analysis.tails(trials)
        return sorted(found, key=lambda row: self.reading_order(row.cell, row.quantity))

    @cached_property
    def costs(self) -> list[Breakdown]:
        """What traffic cost the host (`analysis.costs`)."""
        return analysis.costs(self.table)

    @cached_property
    def breakdowns(self) -> list[Breakdown]:
        """What starts and memory are made of (`analysis.breakdowns`)."""
        return analysis.breakdowns(self.table)

    # --- datapaths --------------------------------------------------------------------------

    def look(self, datapath: str) -> Look:
        """How a datapath looks, whichever variant."""
        return self._looks.get(datapath.partition("~")[0], UNKNOWN)

    def rank(self, datapath: str) -> tuple[int, str]:
        """What sorts datapaths: a variant comes after what it is a variant of."""
        return self.look(datapath).rank, datapath

    def reading_order(self, cell: Cell, quantity: str) -> tuple[Any, ...]:
        """What sorts cells and quantities (`order.reading_order`)."""
        return reading_order(cell, quantity, self.rank)

    @cached_property
    def _looks(self) -> Mapping[str, Look]:
        names = dict.fromkeys(Cell.parse(id).datapath.partition("~")[0] for id in self._cells)
        looks = {name: PALETTE[n % len(PALETTE)] for n, name in enumerate(names)}
        return looks | {name: Look(**look) for name, look in self.campaign.looks.items()}

    @property
    def _cells(self) -> Sequence[str]:
        return (*self.campaign.cells, *(trial.cell for trial in self.trials))


def read(path: Path) -> Results:
    """The campaign at `path`. Raises `Error` if there is none, or none we can read."""
    return Results(store.open(path))
