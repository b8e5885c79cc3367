"""From trials to numbers that stand in a paper: means over blocks, ratios, intervals.

A block is the unit of replication: within it pods and guests are built afresh, so one value per
block is all that counts, however many packets stand behind it. Everything here is a function of the
tidy table (`testbed.results.store.frame`) or of plain numbers; nothing is read, measured or drawn.

Times and rates are positive and spread by factors, hence logarithms: means are geometric, intervals
are Student's t on the logarithms of block values (95 %). A ratio is taken within each block, where
both cells saw the same machine, and its interval is that of the logarithms of block ratios. Between
campaigns nothing is shared, so there the two sets of blocks are independent samples. Of many blocks
some are hit by what else the machine does: a claim about them rests on ranks (`pseudomedian`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import inf, nan

import pandas as pd
from scipy.special import bdtr

from testbed.model.cells import AGAIN, SLOW, Cell, Pair
from testbed.model.metrics import TAIL, Metric
from testbed.model.trials import Status, Trial, percentile
from testbed.results.statistics import (
    CONFIDENCE,
    NOTHING,
    Estimate,
    estimate,
)

EXCEEDANCES = 100
"""So many samples must lie above a percentile of the tail, or it is an anecdote."""


def reference(datapath: str, pair: Pair, references: Mapping[str, str]) -> str | None:
    """The datapath that a cell is divided by, if it has one.

    Native to native is the kernel's own loopback in every datapath, so that is what it is held to;
    but a variant, to what it is a variant of.
    """
    if pair.shape is Pair.NATIVE_NATIVE and "~" not in datapath:
        return "loopback"
    return references.get(datapath)


@dataclass(frozen=True)
class Summary:
    """One quantity of one cell over all blocks, and against its reference datapath."""

    cell: Cell
    quantity: str
    """Column of the tidy table, one of `quantities`; or `TAIL`."""
    status: Status
    """`ok` if any block was."""
    reason: str | None
    """Of the blocks that were not ok, with how many they are if others were."""
    estimate: Estimate
    reference: str | None
    ratio: Estimate
    no_ratio: str | None
    """Why there is no ratio."""


def quantities(metric: Metric) -> list[str]:
    """Columns of the tidy table that are summarised over blocks."""
    return [column for column in metric.measure.columns if column != TAIL]


def summarise(trials: pd.DataFrame, references: Mapping[str, str]) -> list[Summary]:
    """One summary per cell and quantity, in the order in which cells first appear.

    `trials` is the table of `testbed.results.store.frame`, `references` a campaign's.
    """
    summaries = []
    tables = {Cell.parse(str(id)): table for id, table in trials.groupby("cell", sort=False)}
    for cell, table in tables.items():
        divisor = reference(cell.datapath, cell.pair, references)
        other = tables.get(replace(cell, datapath=divisor)) if divisor else None
        for quantity in quantities(cell.metric):
            values = block_values(table, quantity)
            ratio, no_ratio = _ratio(values, divisor, other, quantity)
            summaries.append(
                Summary(
                    cell=cell,
                    quantity=quantity,
                    status=_status(table, values),
                    reason=_reason(table, values),
                    estimate=estimate(values.values()),
                    reference=divisor,
                    ratio=ratio,
                    no_ratio=no_ratio,
                )
            )
    return summaries


def tails(trials: Iterable[Trial]) -> list[Summary]:
    """Of each latency cell that has the samples for it, the 99.9th percentile.

    A block alone has too few, so those of all blocks are one sample: no interval, and no ratio. A
    cell of fewer than 1,000 · `EXCEEDANCES` samples has none, and is left out.
    """
    found = []
    kept = [t for t in trials if t.status is Status.OK and t.histogram_us]
    for id in dict.fromkeys(trial.cell for trial in kept):
        cell = Cell.parse(id)
        blocks = [trial.histogram_us for trial in kept if trial.cell == id]
        samples = [bucket for block in blocks for bucket in block]
        enough = sum(count for _, count in samples) >= 1000 * EXCEEDANCES
        if cell.metric is Metric.LATENCY and enough:
            value = Estimate(percentile(samples, 99.9), nan, nan, len(blocks))
            found.append(Summary(cell, TAIL, Status.OK, None, value, None, NOTHING, None))
    return found


def widest(summaries: Iterable[Summary]) -> float:
    """How far, of all ratios, an interval reaches from its mean at most, as a share of the mean.

    Of rates and median times; the tail (p99) is not waited for. Infinite if an interval is missing
    where there is a ratio.
    """
    widths = [
        row.ratio.high / row.ratio.mean - 1
        for row in summaries
        if row.ratio.blocks and row.reference != row.cell.datapath and row.quantity != "p99_us"
    ]
    return max((inf if width != width else width for width in widths), default=0.0)


@dataclass(frozen=True)
class Controls:
    """Whether a campaign finds what is there, and nothing where there is nothing."""

    same: int
    """Ratios of a datapath to itself (A/A)."""
    differing: int
    """Of these, how many have an interval that excludes 1."""
    bound: int
    """More than so many would be by chance once in a hundred campaigns."""
    slow: int
    """Median times with servers whose delay is known."""
    found: int
    """Of these, how many have a ratio whose interval lies above 1."""

    @property
    def passed(self) -> bool:
        return self.differing <= self.bound and self.found == self.slow


def controls(summaries: Iterable[Summary]) -> Controls | None:
    """How the controls came out; None if the campaign has none, or too few blocks to tell.

    The bound is the 99th percentile of the binomial distribution with the share of intervals that
    miss the truth, 1 in 20; that two percentiles of one trial go together is left out of account.
    """
    known = [row for row in summaries if row.ratio.blocks > 1]
    same = [row for row in known if row.cell.variant == AGAIN]
    slow = [row for row in known if row.cell.variant == SLOW and row.quantity == "p50_us"]
    if not same and not slow:
        return None
    differing = sum(not row.ratio.low <= 1 <= row.ratio.high for row in same)
    within = (n for n in range(len(same) + 1) if bdtr(n, len(same), 1 - CONFIDENCE) >= 0.99)
    found = sum(row.ratio.low > 1 for row in slow)
    return Controls(len(same), differing, next(within), len(slow), found)


CPU = ("softirq", "system", "user", "guest")
"""What a host's CPU time is spent on (`testbed.host.facts.busy`)."""


@dataclass(frozen=True)
class Breakdown:
    """A cell's value over all blocks, and what it is the sum of."""

    cell: Cell
    total: Estimate
    shares: Mapping[str, float]
    """What of the total is each part; together 1."""


def costs(trials: pd.DataFrame) -> list[Breakdown]:
    """What traffic costs the host, for every cell whose trials say so, as they first appear.

    Host CPU seconds per gigabyte of payload (throughput) or million transactions (others), by what
    they are spent on (`CPU`).

    All that the host did while there was traffic is counted, on all CPUs: CPU seconds per second
    by the rate that was measured. An idle host's own business is in it; on a quiet one, little.
    """
    found = []
    for id, table in trials[trials.status == "ok"].groupby("cell", sort=False):
        if cost := cost_values(table):
            parts = table[[f"machine.{part}_s" for part in CPU]].clip(lower=0).mean()
            shares = {part: float(parts[f"machine.{part}_s"] / parts.sum()) for part in CPU}
            found.append(Breakdown(Cell.parse(str(id)), estimate(cost.values()), shares))
    return found


def breakdowns(trials: pd.DataFrame) -> list[Breakdown]:
    """Of every cell whose trials have parts: starts in their steps, memory by whose it is."""
    found = []
    for id, table in trials[trials.status == "ok"].groupby("cell", sort=False):
        cell = Cell.parse(str(id))
        if cell.metric.of_building:
            parts = table.filter(regex="^parts[.]").dropna(axis=1).mean().clip(lower=0)
            shares = {str(name)[6:]: float(part / parts.sum()) for name, part in parts.items()}
            found.append(Breakdown(cell, estimate(block_values(table, "value").values()), shares))
    return found


def cost_values(table: pd.DataFrame) -> dict[int, float]:
    """Block → what traffic cost in one cell's trials that are ok and say so (`costs`)."""
    metric = Metric(str(table.metric.iloc[0]))
    if "machine.softirq_s" not in table or metric.of_building:
        return {}
    rows = table[table.status == "ok"]
    done = rows.payload_bytes / 1e9
    if metric is not Metric.THROUGHPUT:
        done = rows.transactions / 1e6
    cost = rows["machine.cpu_s"] / rows["machine.active_s"] / (done / rows.duration_s)
    return {int(b): float(c) for b, c in zip(rows.block, cost, strict=True) if 0 < c < inf}


def block_values(table: pd.DataFrame, quantity: str) -> dict[int, float]:
    """Block → value of one cell's trials that are ok and have a positive, finite one."""
    rows = table[(table.status == "ok") & (table[quantity] > 0) & (table[quantity] < inf)]
    return {
        int(block): float(value) for block, value in zip(rows.block, rows[quantity], strict=True)
    }


def _ratio(
    values: Mapping[int, float], divisor: str | None, other: pd.DataFrame | None, quantity: str
) -> tuple[Estimate, str | None]:
    """Ratio to the reference over the blocks that have both, or why there is none."""
    if divisor is None:
        return NOTHING, "no reference datapath"
    if other is None:
        return NOTHING, f"{divisor} has no such cell in this campaign"
    others = block_values(other, quantity)
    if values and not others:
        return NOTHING, f"{divisor}: {_reason(other, others)}"
    both = sorted(values.keys() & others.keys())
    if values and not both:
        return NOTHING, f"no block has both this and {divisor}"
    return estimate(values[block] / others[block] for block in both), None


def _status(table: pd.DataFrame, values: Mapping[int, float]) -> Status:
    if values:
        return Status.OK
    return Status.UNSUPPORTED if (table.status == "unsupported").all() else Status.FAILED


def _reason(table: pd.DataFrame, values: Mapping[int, float]) -> str | None:
    """Why blocks have no value: the commonest reason, led by how many blocks if some have one."""
    without = table[~table.block.isin(list(values))]
    if without.empty:
        return None
    reasons = without.reason.where(without.status != "ok").fillna("no value measured")
    text = " ".join(str(reasons.mode().iloc[0]).split())
    return text if not values else f"{len(without)} of {len(table)} blocks failed: {text}"
