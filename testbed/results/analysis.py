"""Analysis of a campaign's trials: means over blocks, ratios to the reference datapath, intervals.

A block is the unit of replication: pods and guests are built anew for each block. So a cell has one
value per block, however many packets that value comes from. Everything here is a function of the
tidy table (`testbed.results.store.frame`) or of plain numbers. Nothing is read, measured or drawn.

Times and rates are positive and vary by factors, so statistics are taken on logarithms: means are
geometric, and intervals are 95 % t-intervals on the logarithms of block values. A ratio is taken
within each block, where both cells ran on the same machine at about the same time; its interval is
that of the logarithms of block ratios. Two campaigns share no blocks, so their blocks are
independent samples. In a campaign of many blocks, other load on the machine disturbs a few: claims
may be judged by ranks (`pseudomedian`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import inf, nan
from typing import Any, Protocol

import pandas as pd
from scipy.special import bdtr

from testbed.model.cells import AGAIN, SLOW_US, Cell, Pair
from testbed.model.metrics import TAIL, Metric
from testbed.model.trials import Limit, Status, Trial, percentile
from testbed.results.statistics import (
    CONFIDENCE,
    NOTHING,
    Estimate,
    estimate,
)

EXCEEDANCES = 100
"""Smallest number of samples above a high percentile, in all blocks together, for that percentile
to be reported."""
P99 = "p99_us"
"""Column of the 99th percentile of each trial."""


def reference(datapath: str, pair: Pair, references: Mapping[str, str]) -> str | None:
    """The datapath that a cell is divided by, or None.

    Native-native traffic uses the kernel's own loopback under every datapath, so it is divided by
    `loopback`. A variant is divided by the datapath that it is a variant of.
    """
    if pair.shape is Pair.NATIVE_NATIVE and "~" not in datapath:
        return "loopback"
    return references.get(datapath)


def reference_cell(cell: Cell, references: Mapping[str, str]) -> Cell | None:
    """The cell that a cell is divided by (`reference`); None if there is none but itself."""
    name = reference(cell.datapath, cell.pair, references)
    return None if name in (None, cell.datapath) else replace(cell, datapath=name)


@dataclass(frozen=True)
class Summary:
    """One quantity of one cell over all blocks, and its ratio to the reference datapath."""

    cell: Cell
    quantity: str
    """Column of the tidy table, one of `quantities`; or `TAIL`."""
    status: Status
    """`ok` if any block is ok."""
    reason: str | None
    """Why blocks are not ok, with their number if other blocks are."""
    estimate: Estimate
    reference: str | None
    ratio: Estimate
    no_ratio: str | None
    """Why there is no ratio."""
    limited: str | None = None
    """What limits the values, other than the datapath, and in how many blocks (`Trial.limited`)."""

    @property
    def is_divided(self) -> bool:
        """Whether there is a ratio to another datapath."""
        return self.ratio.blocks > 0 and self.reference != self.cell.datapath


def quantities(metric: Metric) -> list[str]:
    """Columns of the tidy table that are summarised over blocks."""
    return [column for column in metric.measure.columns if column != TAIL]


def summarise(trials: pd.DataFrame, references: Mapping[str, str]) -> list[Summary]:
    """One summary per cell and quantity, in the order in which cells first appear.

    A 99th percentile with fewer than `EXCEEDANCES` samples above it is left out.
    `trials` is the table of `testbed.results.store.frame`, `references` a campaign's.
    """
    summaries = []
    tables = {Cell.parse(str(id)): table for id, table in trials.groupby("cell", sort=False)}
    for cell, table in tables.items():
        divisor = reference(cell.datapath, cell.pair, references)
        other = tables.get(replace(cell, datapath=divisor)) if divisor else None
        for quantity in quantities(cell.metric):
            if quantity == P99 and not _has_p99(table) and (table.status == "ok").any():
                continue
            values = block_values(table, quantity)
            disturbed = disturbed_blocks(table)
            ratio, no_ratio = _ratio(values, disturbed, divisor, other, quantity)
            summaries.append(
                Summary(
                    cell=cell,
                    quantity=quantity,
                    status=_status(table, values),
                    reason=_reason(table, values),
                    estimate=marked(values, disturbed),
                    reference=divisor,
                    ratio=ratio,
                    no_ratio=no_ratio,
                    limited=_limited(table, values),
                )
            )
    return summaries


def tails(trials: Iterable[Trial]) -> list[Summary]:
    """The 99.9th percentile of each latency cell that has enough samples.

    One block has too few samples, so all blocks are pooled into one sample: there is no interval
    and no ratio. A cell with fewer than 1,000 · `EXCEEDANCES` samples is left out.
    """
    found = []
    kept = [t for t in trials if t.status is Status.OK and t.histogram_us]
    for id in dict.fromkeys(trial.cell for trial in kept):
        cell = Cell.parse(id)
        blocks = [trial for trial in kept if trial.cell == id]
        samples = [bucket for trial in blocks for bucket in trial.histogram_us]
        enough = sum(count for _, count in samples) >= 1000 * EXCEEDANCES
        if cell.metric is Metric.LATENCY and enough:
            disturbed = sum(trial.disturbed is not None for trial in blocks)
            value = Estimate(percentile(samples, 99.9), nan, nan, len(blocks), disturbed)
            found.append(Summary(cell, TAIL, Status.OK, None, value, None, NOTHING, None))
    return found


def widest(summaries: Iterable[Summary]) -> float:
    """Largest distance of an interval's upper end from its mean, as a share of the mean.

    Taken over the ratios of rates and median times, without p99, whose intervals are much wider.
    Infinite if a ratio has no interval.
    """
    widths = [
        row.ratio.high / row.ratio.mean - 1
        for row in summaries
        if row.ratio.blocks and row.reference != row.cell.datapath and row.quantity != P99
    ]
    return max((inf if width != width else width for width in widths), default=0.0)


@dataclass(frozen=True)
class Controls:
    """Outcome of a campaign's controls: A/A comparisons, and servers with a known delay."""

    same: int
    """Number of A/A ratios: a datapath to itself, in another pod."""
    differing: int
    """Number of A/A ratios whose interval excludes 1."""
    bound: int
    """Largest `differing` that is plausible by chance: exceeded in at most 1 % of campaigns."""
    slow: int
    """Number of median times and rates with servers that have a known delay."""
    found: int
    """Number of those whose whole interval of the ratio is on the slow side of 1."""

    @property
    def passed(self) -> bool:
        """Whether no more A/A ratios differ than by chance, and every known delay is found."""
        return self.differing <= self.bound and self.found == self.slow


class Ratio(Protocol):
    """One quantity of a cell, with its ratio to the reference by any estimator."""

    @property
    def cell(self) -> Cell: ...
    @property
    def quantity(self) -> str: ...
    @property
    def ratio(self) -> Estimate: ...


def controls(summaries: Iterable[Ratio]) -> Controls | None:
    """Outcome of the controls; None if the campaign has none, or has only one block.

    `bound` is the 99th percentile of the binomial distribution with probability 0.05, the share of
    95 % intervals that miss the true value. The correlation of two percentiles of one trial is
    neglected.
    """
    known = [row for row in summaries if row.ratio.blocks > 1]
    same = [row for row in known if row.cell.variant == AGAIN]
    slow = [
        row for row in known if row.cell.variant in SLOW_US and row.quantity in ("p50_us", "value")
    ]
    if not same and not slow:
        return None
    differing = sum(not row.ratio.low <= 1 <= row.ratio.high for row in same)
    within = (n for n in range(len(same) + 1) if bdtr(n, len(same), 1 - CONFIDENCE) >= 0.99)
    found = sum(
        row.ratio.high < 1
        if row.cell.metric.measure.is_better_higher(row.quantity)
        else row.ratio.low > 1
        for row in slow
    )
    return Controls(len(same), differing, next(within), len(slow), found)


CPU = ("softirq", "system", "user", "guest")
"""Kinds of host CPU time (`testbed.host.facts.busy`)."""


@dataclass(frozen=True)
class Breakdown:
    """A cell's value over all blocks, and the parts that it is the sum of."""

    cell: Cell
    total: Estimate
    shares: Mapping[str, float]
    """Part → its share of the total. The shares sum to 1."""


def costs(trials: pd.DataFrame) -> list[Breakdown]:
    """Host CPU time per unit of traffic, for every cell that has it, in order of appearance.

    The unit is CPU seconds per gigabyte of payload (throughput) or per million transactions (other
    metrics), with the share of each kind (`CPU`).

    The trial's own CPU time during traffic is counted, on all CPUs: CPU seconds per second, divided
    by the measured rate. Its own are its pods, the worker and all softirqs. What others used, if it
    is known (`campaigns.isolation`; older trials lack it), is taken off, but not in the shares.
    """
    found = []
    columns = [f"machine.{part}_s" for part in CPU]
    for id, table in trials[trials.status == "ok"].groupby("cell", sort=False):
        if cost := cost_values(table):
            spent = table[columns].clip(lower=0).mean()
            shares = dict(zip(CPU, (spent / spent.sum()).tolist(), strict=True))
            total = marked(cost, disturbed_blocks(table))
            found.append(Breakdown(Cell.parse(str(id)), total, shares))
    return found


def breakdowns(trials: pd.DataFrame) -> list[Breakdown]:
    """Parts of startup (steps) and memory (owners), for every cell that measures these."""
    found = []
    for id, table in trials[trials.status == "ok"].groupby("cell", sort=False):
        cell = Cell.parse(str(id))
        if cell.metric.of_building:
            parts = table.filter(regex="^parts[.]").dropna(axis=1).mean().clip(lower=0)
            shares = {str(name)[6:]: float(part / parts.sum()) for name, part in parts.items()}
            total = marked(block_values(table, "value"), disturbed_blocks(table))
            found.append(Breakdown(cell, total, shares))
    return found


def cost_values(table: pd.DataFrame) -> dict[int, float]:
    """Block → host CPU time per unit of traffic (`costs`), of one cell's trials that are ok."""
    metric = Metric(str(table.metric.iloc[0]))
    if "machine.softirq_s" not in table or metric.of_building:
        return {}
    done = table.payload_bytes / 1e9
    if metric is not Metric.THROUGHPUT:
        done = table.transactions / 1e6
    own = table["machine.cpu_s"]
    if "machine.others_s" in table:
        own = own - table["machine.others_s"].fillna(0)
    cost = own / table["machine.active_s"] / (done / table.duration_s)
    return _by_block(table, cost)


def block_values(table: pd.DataFrame, quantity: str) -> dict[int, float]:
    """Block → value, of one cell's trials that are ok and whose value is positive and finite.

    There are none of a 99th percentile with fewer than `EXCEEDANCES` samples above it.
    """
    if quantity == P99 and not _has_p99(table):
        return {}
    return _by_block(table, table[quantity])


def disturbed_blocks(table: pd.DataFrame) -> set[int]:
    """Blocks whose trial was disturbed, of one cell."""
    return set(table.block[table.disturbed.notna()])


def marked(
    values: Mapping[int, float],
    disturbed: set[int],
    by: Callable[[Iterable[float]], Estimate] = estimate,
) -> Estimate:
    """Estimate of block values, which says how many blocks were disturbed."""
    return replace(by(values.values()), disturbed=len(values.keys() & disturbed))


def _has_p99(table: pd.DataFrame) -> bool:
    """Whether one cell's trials that are ok have enough samples together for a 99th percentile."""
    return int(table.transactions[table.status == "ok"].sum()) >= 100 * EXCEEDANCES


def _limited(table: pd.DataFrame, values: Mapping[int, float]) -> str | None:
    """The most frequent limit of the blocks that have a value, with the number of these blocks."""
    limits = table.limited[table.block.isin(list(values))].dropna()
    if limits.empty:
        return None
    limit = Limit(limits.mode().iloc[0])
    count = int((limits == limit).sum())
    return f"{count} of {len(values)} blocks: {limit.meaning}"


def _by_block(table: pd.DataFrame, values: pd.Series[Any]) -> dict[int, float]:
    has_one = (table.status == "ok") & (values > 0) & (values < inf)
    return {
        int(block): float(value)
        for block, value in zip(table.block[has_one], values[has_one], strict=True)
    }


def _ratio(
    values: Mapping[int, float],
    disturbed: set[int],
    divisor: str | None,
    other: pd.DataFrame | None,
    quantity: str,
) -> tuple[Estimate, str | None]:
    """Ratio to the reference over the blocks that have both values, or why there is no ratio."""
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
    ratios = {block: values[block] / others[block] for block in both}
    return marked(ratios, disturbed | disturbed_blocks(other)), None


def _status(table: pd.DataFrame, values: Mapping[int, float]) -> Status:
    if values:
        return Status.OK
    return Status.UNSUPPORTED if (table.status == "unsupported").all() else Status.FAILED


def _reason(table: pd.DataFrame, values: Mapping[int, float]) -> str | None:
    """The most frequent reason why blocks have no value, with a count if other blocks have one."""
    has_none = ~table.block.isin(list(values))
    if not has_none.any():
        return None
    without = table[has_none]
    reasons = without.reason.where(without.status != "ok").fillna("no value measured, or too few")
    text = " ".join(str(reasons.mode().iloc[0]).split())
    return text if not values else f"{len(without)} of {len(table)} blocks failed: {text}"
