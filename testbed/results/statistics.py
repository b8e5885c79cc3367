"""Statistics of block values: means with intervals, differences of two samples, distributions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from math import exp, expm1, inf, log, log1p, nan, sqrt
from statistics import fmean, stdev, variance

import numpy as np
from scipy.special import stdtr, stdtrit

CONFIDENCE = 0.95
SHAKEN_SHARE = 0.25
"""Share of disturbed blocks above which an estimate is shaken. If 0.29 of all values are wrong,
they may move a pseudomedian anywhere (Hodges, Proc. 5th Berkeley Symp. 1, 1967)."""


@dataclass(frozen=True)
class Estimate:
    """A mean over blocks and its 95 % interval (NaN where there are too few blocks for one)."""

    mean: float
    low: float
    high: float
    blocks: int
    disturbed: int = 0
    """Blocks whose value is of a disturbed trial; of a ratio, either of the two values."""

    @property
    def shaken(self) -> bool:
        """Whether so many blocks were disturbed that it is not shown as sound."""
        return self.disturbed > SHAKEN_SHARE * self.blocks

    @property
    def excludes_1(self) -> bool:
        """Whether the whole interval is on one side of 1."""
        return self.low > 1 or self.high < 1

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}] of {self.blocks} blocks"


NOTHING = Estimate(nan, nan, nan, 0)


def estimate(values: Iterable[float]) -> Estimate:
    """Geometric mean and t-interval of positive block values.

    exp(m ± t(0.975, n - 1) · s / √n) with m and s the mean and standard deviation of the n
    logarithms (Student, 1908; on logarithms, as ratios of programs' times are to be averaged:
    Fleming and Wallace, CACM 29(3), 1986). One value has no interval; no value gives NaN.
    """
    logs = [log(value) for value in values]
    n = len(logs)
    if n == 0:
        return NOTHING
    mean = fmean(logs)
    if n == 1:
        return Estimate(exp(mean), nan, nan, 1)
    half = _half(stdev(logs), n)
    return Estimate(exp(mean), exp(mean - half), exp(mean + half), n)


def _half(spread: float, n: int) -> float:
    """Half the width of the t-interval of n logarithms with this standard deviation."""
    return float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * spread / sqrt(n)


def half_width(spread: float, blocks: int) -> float:
    """How far the interval of `estimate` is expected to reach above its mean, as a share of it.

    `spread` is the standard deviation of the logarithms of block values. Infinite for one block.
    """
    return expm1(_half(spread, blocks)) if blocks > 1 else inf


def blocks_needed(spread: float, width: float, most: int) -> int | None:
    """Smallest number of blocks whose `half_width` is at most `width`; None if above `most`."""
    return next((n for n in range(2, most + 1) if half_width(spread, n) <= width), None)


def pseudomedian(values: Iterable[float]) -> Estimate:
    """Pseudomedian (Hodges and Lehmann) of positive block values, and its signed-rank interval.

    On logarithms: the median of the means of all pairs (Hodges and Lehmann, Ann. Math. Stat. 34(2),
    1963), between those of these means at which Wilcoxon's signed-rank test (Biometrics Bulletin
    1(6), 1945) begins to reject, exactly. A few blocks that something disturbed hardly move it,
    whereas the t-interval grows with each. Fewer than six values have no interval.
    """
    logs = np.log(np.fromiter(values, float))
    n = len(logs)
    if n == 0:
        return NOTHING
    i, j = np.triu_indices(n)
    pairs = np.sort((logs[i] + logs[j]) / 2)
    cut = _signed_rank(n)
    low, high = (exp(pairs[cut - 1]), exp(pairs[-cut])) if cut else (nan, nan)
    return Estimate(exp(np.median(pairs)), low, high, n)


@cache
def _signed_rank(n: int) -> int:
    """Number of signed-rank sums, from 0 up, whose total probability is at most 2.5 %.

    Under the null hypothesis every subset of the ranks 1 to n is equally likely.
    """
    likely = np.zeros(n * (n + 1) // 2 + 1)
    likely[0] = 1
    for rank in range(1, n + 1):
        likely[rank:] += likely[:-rank].copy()
        likely /= 2
    return int(np.searchsorted(np.cumsum(likely), (1 - CONFIDENCE) / 2, side="right"))


@dataclass(frozen=True)
class Difference:
    """Difference of two independent sets of block values."""

    ratio: Estimate
    """Ratio of geometric means, later by earlier; `blocks` is that of the smaller set."""
    p_different: float
    """p-value of the test for a difference: of so large a difference where there is none."""
    p_equivalent: float
    """p-value of the test for equivalence: of so small a difference where the true one is as large
    as the band, or larger."""


def difference(before: Iterable[float], after: Iterable[float], band: float) -> Difference:
    """Ratio of two geometric means with its t-interval, and tests of difference and equivalence.

    On logarithms, with unequal variances: t with Welch and Satterthwaite's degrees of freedom
    (Welch, Biometrika 34, 1947). Equivalent means that the ratio lies within 1 / (1 + band) and
    1 + band; tested by two one-sided tests (Schuirmann, J. Pharmacokinet. Biopharm. 15, 1987).
    Needs two values on either side: with fewer, NaN.
    """
    a, b = [log(value) for value in before], [log(value) for value in after]
    blocks = min(len(a), len(b))
    if blocks < 2:
        mean = exp(fmean(b) - fmean(a)) if blocks else nan
        return Difference(Estimate(mean, nan, nan, blocks), nan, nan)
    change, of_a, of_b = fmean(b) - fmean(a), variance(a) / len(a), variance(b) / len(b)
    # Only made-up values have no spread at all; 1e-12 avoids a division by zero.
    error = max(sqrt(of_a + of_b), 1e-12)
    spread = of_a**2 / (len(a) - 1) + of_b**2 / (len(b) - 1)
    freedom = (of_a + of_b) ** 2 / spread if spread else len(a) + len(b) - 2
    half = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * error
    edge = log1p(band)
    return Difference(
        Estimate(exp(change), exp(change - half), exp(change + half), blocks),
        p_different=2 * float(stdtr(freedom, -abs(change) / error)),
        p_equivalent=float(stdtr(freedom, (abs(change) - edge) / error)),
    )


def discoveries(p_values: Sequence[float], rate: float = 1 - CONFIDENCE) -> list[bool]:
    """Which of many null hypotheses to reject, at a false-discovery rate of at most `rate`.

    Benjamini and Hochberg's step-up procedure controls the false-discovery rate (J. R. Stat.
    Soc. B 57, 1995); it holds for positively dependent tests too, such as two percentiles of one
    trial (Benjamini and Yekutieli, Ann. Stat. 29, 2001). NaN is never rejected and not counted.
    """
    ranked = sorted(p for p in p_values if p == p)
    bounds = [p for k, p in enumerate(ranked, 1) if p <= rate * k / len(ranked)]
    return [bool(bounds) and p <= bounds[-1] for p in p_values]


PERCENTS = np.arange(1, 1000) / 10
"""Percentiles of a `distribution`: 0.1 to 99.9."""


def distribution(blocks: Sequence[Sequence[tuple[float, int]]]) -> list[tuple[float, float]]:
    """Mean cumulative distribution of several blocks' histograms of positive values.

    Points (value, share of samples at or below it), ascending. Each value is the geometric mean
    over blocks of one percentile of the block (nearest rank), as `estimate` gives it; so blocks
    have the same weight. To average values at equal shares, and not shares at equal values, keeps
    the shape of distributions that differ in place (Vincent, Comp. Psychol. Mono. 1, 1912;
    Ratcliff, Psychol. Bull. 86(3), 1979).
    """
    logs = []
    for block in blocks:
        uppers, counts = np.array(sorted(block)).T
        seen = counts.cumsum()
        ranks = np.ceil(PERCENTS * seen[-1] / 100)
        logs.append(np.log(uppers[np.searchsorted(seen, ranks)]))
    values = np.exp(np.mean(logs, axis=0))
    return [(float(x), float(p) / 100) for x, p in zip(values, PERCENTS, strict=True)]
