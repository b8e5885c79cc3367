"""The statistics against values worked out by other means, and their coverage by simulation."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from testbed.model.cells import Pair
from testbed.model.trials import Limit, Status, Trial, percentile
from testbed.results import analysis, statistics, store

positive = st.floats(1e-6, 1e12)
histogram = st.lists(st.tuples(st.floats(0.1, 1e6), st.integers(1, 1000)), min_size=1)


def test_estimate_of_hand_computed_values() -> None:
    """ln of 1, e, e² has mean and deviation 1; t(0.975, 2) = 4.302653 (tables of Student's t)."""
    e = statistics.estimate([1.0, math.e, math.e**2])
    half = 4.302653 / math.sqrt(3)
    assert e.blocks == 3
    assert e.mean == pytest.approx(math.e)
    assert e.low == pytest.approx(math.exp(1 - half), rel=1e-6)
    assert e.high == pytest.approx(math.exp(1 + half), rel=1e-6)


@given(st.lists(positive, min_size=2, max_size=40).filter(lambda v: max(v) > 1.001 * min(v)))
def test_estimate_is_scipys_t_interval_on_logarithms(values: list[float]) -> None:
    logs = [math.log(v) for v in values]
    low, high = stats.t.interval(
        0.95, len(logs) - 1, loc=sum(logs) / len(logs), scale=stats.sem(logs)
    )
    e = statistics.estimate(values)
    assert math.log(e.mean) == pytest.approx(sum(logs) / len(logs), abs=1e-9)
    assert math.log(e.mean / e.low) == pytest.approx(math.log(e.high / e.mean), abs=1e-6)
    assert math.log(e.low) == pytest.approx(low, rel=1e-6, abs=1e-6)
    assert math.log(e.high) == pytest.approx(high, rel=1e-6, abs=1e-6)


def test_intervals_cover_the_truth_nineteen_times_in_twenty() -> None:
    """2,000 campaigns of 5 blocks: 95 % within three standard errors of the binomial, ±1.5 %."""
    rng = random.Random(20)
    hits = 0
    for _ in range(2000):
        e = statistics.estimate(rng.lognormvariate(math.log(3.5e9), 0.2) for _ in range(5))
        hits += e.low <= 3.5e9 <= e.high
    assert hits / 2000 == pytest.approx(0.95, abs=0.015)


def test_a_half_width_is_that_of_an_estimate_of_the_same_spread() -> None:
    values = [1.0, 1.1, 1.3, 0.9]
    e = statistics.estimate(values)
    spread = float(np.std(np.log(values), ddof=1))
    assert statistics.half_width(spread, 4) == pytest.approx(e.high / e.mean - 1)
    assert statistics.half_width(spread, 1) == math.inf


@pytest.mark.parametrize("spread", [0.001, 0.02, 0.1, 0.3])
def test_blocks_needed_is_the_first_number_whose_interval_is_narrow_enough(spread: float) -> None:
    needed = statistics.blocks_needed(spread, 0.05, 1000)
    assert needed
    assert statistics.half_width(spread, needed) <= 0.05
    assert needed == 2 or statistics.half_width(spread, needed - 1) > 0.05
    assert statistics.blocks_needed(spread, 1e-9, 1000) is None


def test_one_block_has_no_interval_and_none_has_no_mean() -> None:
    one, none = statistics.estimate([7.0]), statistics.estimate([])
    assert one.mean == pytest.approx(7)
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert math.isnan(none.mean)
    assert none.blocks == 0


@pytest.mark.parametrize(
    ("n", "critical"), [(6, 0), (7, 2), (10, 8), (15, 25), (20, 52), (30, 137)]
)
def test_pseudomedian_ends_where_the_signed_rank_test_rejects(n: int, critical: int) -> None:
    """Critical values (0.05, two-sided) of published tables of Wilcoxon's signed-rank test."""
    rng = random.Random(n)
    values = [rng.lognormvariate(0, 0.2) for _ in range(n)]
    means = sorted(math.sqrt(a * b) for i, a in enumerate(values) for b in values[i:])
    e = statistics.pseudomedian(values)
    assert (e.low, e.high) == pytest.approx((means[critical], means[-1 - critical]))
    assert e.mean == pytest.approx(math.exp(np.median(np.log(means))))
    below, above = (
        stats.wilcoxon([math.log(v / e.low) + by for v in values]) for by in (1e-9, -1e-9)
    )
    assert below.pvalue <= 0.05 < above.pvalue


def test_pseudomedian_of_few() -> None:
    assert math.isnan(statistics.pseudomedian([1.0, 1.1, 1.2, 1.3, 1.4]).low)
    assert statistics.pseudomedian([]).blocks == 0


def test_pseudomedian_covers_and_bears_with_blocks_that_were_disturbed() -> None:
    rng, covered, wide = random.Random(3), 0, []
    for _ in range(400):
        spread = [rng.choice((0.05,) * 9 + (0.5,)) for _ in range(60)]
        values = [rng.lognormvariate(math.log(0.98), s) for s in spread]
        e, t = statistics.pseudomedian(values), statistics.estimate(values)
        covered += e.low <= 0.98 <= e.high
        wide.append(math.log(t.high / t.low) / math.log(e.high / e.low))
    assert 0.92 < covered / 400 < 0.98
    assert sum(wide) / len(wide) > 1.8


def test_percentile_of_known_samples() -> None:
    """1 to 100, each once: the nearest rank of p is p."""
    hundred = [(float(n), 1) for n in range(1, 101)]
    assert [percentile(hundred, p) for p in (0, 1, 50, 99, 99.5, 100)] == [
        1,
        1,
        50,
        99,
        100,
        100,
    ]
    assert percentile([(10.0, 999), (500.0, 1)], 99) == 10.0
    assert percentile([(10.0, 98), (500.0, 2)], 99) == 500.0
    assert math.isnan(percentile([], 50))


@given(histogram, st.floats(0.1, 100))
def test_percentile_is_a_sample_with_enough_at_or_below_it(
    buckets: list[tuple[float, int]], percent: float
) -> None:
    value = percentile(buckets, percent)
    total = sum(c for _, c in buckets)
    below = sum(c for u, c in buckets if u < value)
    at_most = sum(c for u, c in buckets if u <= value)
    assert below * 100 < percent * total * (1 + 1e-12) or below == 0
    assert at_most * 100 >= percent * total * (1 - 1e-12)


@given(st.lists(histogram, min_size=1, max_size=4))
def test_every_percentile_of_a_distribution_is_the_mean_of_those_of_blocks(
    blocks: list[list[tuple[float, int]]],
) -> None:
    points = statistics.distribution(blocks)
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert [y for _, y in points] == sorted({y for _, y in points})
    values = {round(1000 * y): x for x, y in points}
    for percent in (0.1, 50, 99, 99.9):
        mean = statistics.estimate(percentile(block, percent) for block in blocks).mean
        assert values[round(10 * percent)] == pytest.approx(mean)


def test_blocks_weigh_the_same_in_a_distribution_however_many_samples() -> None:
    values = [x for x, _ in statistics.distribution([[(1.0, 1000)], [(4.0, 1)]])]
    assert values == pytest.approx([2.0] * len(values))


REFERENCES = {"capture": "bridge", "bridge": "direct", "direct": "direct", "loopback": "loopback"}


def trials(
    cell: str, values: dict[int, float | str | None], metric: str = "throughput"
) -> list[Trial]:
    """A float is a value, a string the reason of an unsupported block, None a failure."""
    cell = f"{cell}/ipv4/tcp/{metric}/65536x1"
    made = []
    for block, v in values.items():
        if isinstance(v, float):
            made.append(
                Trial(
                    cell,
                    block,
                    0,
                    Status.OK,
                    value=v,
                    transactions=10_000,
                    histogram_us=((v, 9), (9 * v, 1)),
                )
            )
        elif v is None:
            made.append(Trial(cell, block, 0, Status.FAILED, reason="guest not ready"))
        else:
            made.append(Trial(cell, block, 0, Status.UNSUPPORTED, reason=v))
    return made


def summary(*groups: list[Trial]) -> list[analysis.Summary]:
    return analysis.summarise(store.frame([t for group in groups for t in group]), REFERENCES)


def test_ratios_are_taken_within_blocks() -> None:
    """The machine is ten times slower in block 1: the ratio does not notice."""
    _, capture = summary(
        trials("bridge/native-guest", {0: 4e9, 1: 4e8, 2: 4e9}),
        trials("capture/native-guest", {0: 2e9, 1: 2e8, 2: 2e9}),
    )
    ratio = capture.ratio
    assert (capture.reference, ratio.blocks, capture.no_ratio) == ("bridge", 3, None)
    assert (ratio.mean, ratio.low, ratio.high) == pytest.approx((0.5, 0.5, 0.5))
    assert capture.estimate.mean == pytest.approx((2e9 * 2e8 * 2e9) ** (1 / 3))
    assert capture.estimate.high / capture.estimate.low > 100


def test_only_blocks_that_have_both_make_a_ratio() -> None:
    bridge, capture = summary(
        trials("bridge/native-guest", {0: 4e9, 1: None, 2: 1e9}),
        trials("capture/native-guest", {0: 2e9, 1: 2e9, 2: 1e9}),
    )
    assert capture.ratio.mean == pytest.approx(math.sqrt(0.5 * 1))
    assert (capture.estimate.blocks, capture.ratio.blocks, capture.reason) == (3, 2, None)
    assert (bridge.status, bridge.estimate.blocks) == (Status.OK, 2)
    assert bridge.reason == "1 of 3 blocks failed: guest not ready"


def test_a_reference_is_one_to_itself_and_native_pairs_are_held_to_loopback() -> None:
    rows = summary(
        trials("direct/native-guest", {0: 4e9, 1: 5e9}),
        trials("loopback/native-native", {0: 4e10, 1: 5e10}),
        trials("capture/native-native", {0: 3.6e10, 1: 4.5e10}),
    )
    assert [row.ratio.mean for row in rows] == pytest.approx([1, 1, 0.9])
    assert [row.ratio.low for row in rows] == pytest.approx([1, 1, 0.9])
    assert [row.reference for row in rows] == ["direct", "loopback", "loopback"]


def test_a_missing_ratio_says_why() -> None:
    rows = summary(
        trials("capture/guest-guest", {0: 1e9}),
        trials("bridge/native-guest", {0: "no IPv6 in this kernel"}),
        trials("capture/native-guest", {0: 1e9}),
        trials("bridge/guest-native", {0: 1e9}),
        trials("direct/guest-native", {1: 1e9}),
        trials("novel/native-guest", {0: 1e9}),
    )
    assert [row.no_ratio for row in rows] == [
        "bridge has no such cell in this campaign",
        "direct has no such cell in this campaign",
        "bridge: no IPv6 in this kernel",
        "no block has both this and direct",
        None,
        "no reference datapath",
    ]
    assert [math.isnan(row.ratio.mean) for row in rows] == [True, True, True, True, False, True]
    assert [row.status for row in rows] == ["ok", "unsupported", "ok", "ok", "ok", "ok"]


def test_latency_is_summarised_by_median_and_99th_percentile_of_each_block() -> None:
    rows = summary(trials("direct/native-guest", {0: 10.0, 1: 40.0}, "latency"))
    assert [row.quantity for row in rows] == ["p50_us", "p99_us"]
    assert [row.estimate.mean for row in rows] == pytest.approx([20, 180])


def test_a_99th_percentile_needs_a_hundred_samples_above_it() -> None:
    few = trials("direct/native-guest", {0: 10.0, 1: 40.0}, "latency")
    few = [replace(trial, transactions=4_999) for trial in few]
    assert [row.quantity for row in summary(few)] == ["p50_us"]
    assert analysis.block_values(store.frame(few), "p99_us") == {}
    enough = [few[0], replace(few[1], transactions=5_001)]
    assert [row.quantity for row in summary(enough)] == ["p50_us", "p99_us"]


def test_what_limits_values_other_than_the_datapath_is_said_with_the_number_of_blocks() -> None:
    made = trials("direct/native-guest", {0: 1e9, 1: 2e9, 2: 3e9})
    made[0], made[2] = (replace(made[n], limited=Limit.SENDER) for n in (0, 2))
    (row,) = summary(made)
    assert row.limited == f"2 of 3 blocks: {Limit.SENDER.meaning}"
    assert [Trial.from_json(trial.as_json()) for trial in made] == made


def test_the_tail_is_of_all_blocks_together_and_needs_a_hundred_samples_above_it() -> None:
    cell = "direct/native-guest/ipv4/tcp/latency/64x1"
    slow = [(10.0, 50_000), (70.0, 60)], [(10.0, 49_840), (30.0, 60), (70.0, 40)]
    blocks = [Trial(cell, n, 0, Status.OK, histogram_us=tuple(h)) for n, h in enumerate(slow)]
    (tail,) = analysis.tails(blocks)
    assert (tail.quantity, tail.estimate.mean, tail.estimate.blocks) == ("p999_us", 30.0, 2)
    assert math.isnan(tail.estimate.low)
    assert math.isnan(tail.ratio.mean)
    assert analysis.tails([blocks[0], replace(blocks[1], status=Status.FAILED)]) == []
    assert (
        analysis.tails([replace(b, cell=cell.replace("latency", "connections")) for b in blocks])
        == []
    )


def test_ok_without_a_value_counts_as_failed() -> None:
    cell = "direct/native-guest/ipv4/tcp/throughput/65536x1"
    (row,) = summary([Trial(cell, 0, 0, Status.OK, value=0.0)])
    assert (row.status, row.reason) == ("failed", "no value measured, or too few")
    assert (row.estimate.blocks, row.no_ratio) == (0, None)


def test_no_trials_no_rows() -> None:
    assert summary([]) == []


def test_a_variant_is_held_to_what_it_is_a_variant_of() -> None:
    references = {"loopback~again": "loopback", "steer~slow": "steer"}
    assert analysis.reference("loopback~again", Pair.NATIVE_NATIVE, references) == "loopback"
    assert analysis.reference("steer~slow", Pair.NATIVE_NATIVE, references) == "steer"
    assert analysis.reference("steer", Pair.NATIVE_NATIVE, references) == "loopback"


def test_controls_find_the_known_delay_and_count_differences_that_are_none() -> None:
    references = {"steer~again": "steer", "steer~slow": "steer", "steer": "direct"}
    groups = [
        trials("steer/native-guest", {0: 10.0, 1: 11.0, 2: 10.5}, "latency"),
        trials("steer~again/native-guest", {0: 10.5, 1: 10.5, 2: 10.6}, "latency"),
        trials("steer~slow/native-guest", {0: 20.0, 1: 22.0, 2: 21.1}, "latency"),
    ]
    rows = analysis.summarise(store.frame([t for g in groups for t in g]), references)
    assert analysis.controls(rows) == analysis.Controls(
        same=2, differing=0, bound=1, slow=1, found=1
    )
    assert analysis.controls(rows[:2]) is None
    blind = [trials("steer~slow/native-guest", {0: 9.0, 1: 12.0, 2: 10.0}, "latency"), groups[0]]
    rows = analysis.summarise(store.frame([t for g in blind for t in g]), references)
    found = analysis.controls(rows)
    assert found
    assert not found.passed


def test_the_widest_interval_is_that_of_a_ratio_and_infinite_without_one() -> None:
    bridge = trials("bridge/native-guest", {0: 1e9, 1: 1e9})
    assert analysis.widest(summary(bridge)) == 0
    two = summary(bridge, trials("capture/native-guest", {0: 1e9, 1: 1.1e9}))
    assert analysis.widest(two) == pytest.approx(two[1].ratio.high / two[1].ratio.mean - 1)
    one = summary(bridge, trials("capture/native-guest", {0: 1e9}))
    assert math.isinf(analysis.widest(one))


def test_cost_is_cpu_time_by_traffic_and_its_shares_are_of_the_whole() -> None:
    """2 s of CPU in 2 s of traffic at 4 GB/s: a quarter of a second each; block 1 the double."""
    spent = {
        "cpu_s": 2.0,
        "softirq_s": 1.0,
        "system_s": 0.6,
        "user_s": 0.3,
        "guest_s": 0.1,
        "active_s": 2.0,
        "elapsed_s": 2.1,
    }
    cell = "direct/native-guest/ipv4/tcp/throughput/65536x1"
    first = Trial(
        cell, 0, 0, Status.OK, value=3.2e10, duration_s=1.0, payload_bytes=4 * 10**9, machine=spent
    )
    twice = replace(first, block=1, machine={k: 2 * v for k, v in spent.items()} | {"active_s": 2})
    (cost,) = analysis.costs(store.frame([first, twice]))
    assert cost.total.mean == pytest.approx(math.sqrt(0.25 * 0.5))
    assert cost.shares == pytest.approx(
        {"softirq": 0.5, "system": 0.3, "user": 0.15, "guest": 0.05}
    )
    beside = replace(first, machine=spent | {"others_s": 1.0})
    (cost,) = analysis.costs(store.frame([beside, replace(first, block=1)]))
    assert cost.total.mean == pytest.approx(math.sqrt(0.125 * 0.25))  # an older one does not tell
    requests = replace(first, cell=cell.replace("throughput", "latency"), transactions=10**5)
    (cost,) = analysis.costs(store.frame([requests]))
    assert cost.total.mean == pytest.approx(10)
    assert analysis.costs(store.frame([replace(first, machine={})])) == []


@given(
    st.lists(positive, min_size=2, max_size=12).filter(lambda v: max(v) > 1.001 * min(v)),
    st.lists(positive, min_size=2, max_size=12).filter(lambda v: max(v) > 1.001 * min(v)),
)
def test_difference_is_scipys_welch_test_on_logarithms(a: list[float], b: list[float]) -> None:
    expected = stats.ttest_ind([math.log(v) for v in b], [math.log(v) for v in a], equal_var=False)
    low, high = expected.confidence_interval(0.95)
    found = statistics.difference(a, b, 0.05)
    assert found.p_different == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)
    assert math.log(found.ratio.low) == pytest.approx(low, rel=1e-6, abs=1e-6)
    assert math.log(found.ratio.high) == pytest.approx(high, rel=1e-6, abs=1e-6)


def test_discoveries_are_scipys_benjamini_hochberg() -> None:
    rng = random.Random(3)
    for _ in range(200):
        ps = [rng.random() ** 3 for _ in range(rng.randint(1, 30))]
        assert statistics.discoveries(ps) == list(stats.false_discovery_control(ps) <= 0.05)


def test_what_was_not_tested_is_no_discovery_and_makes_no_other_harder() -> None:
    assert statistics.discoveries([math.nan, 0.04, math.nan]) == [False, True, False]
    assert statistics.discoveries([math.nan]) == [False]
    assert statistics.discoveries([]) == []


def campaigns(
    rng: random.Random, change: float, blocks: int = 5, spread: float = 0.04, cells: int = 20
) -> list[statistics.Difference]:
    """Two campaigns of cells that differ by a factor, whose spread differs twofold."""
    return [
        statistics.difference(
            [rng.lognormvariate(0, spread) for _ in range(blocks)],
            [rng.lognormvariate(math.log(change), spread / 2) for _ in range(blocks)],
            0.05,
        )
        for _ in range(cells)
    ]


def binomial_bound(n: int, share: float) -> int:
    """The count that is exceeded once in a thousand."""
    return int(stats.binom.ppf(0.999, n, share))


def test_without_a_change_hardly_a_campaign_shows_one() -> None:
    """Of 400 pairs of campaigns of 20 cells 5 % have any discovery; of intervals 5 % exclude 1."""
    rng = random.Random(5)
    drawn = [campaigns(rng, 1.0) for _ in range(400)]
    wrong = sum(any(statistics.discoveries([d.p_different for d in c])) for c in drawn)
    assert wrong <= binomial_bound(400, 0.05)
    excluded = sum(not d.ratio.low <= 1 <= d.ratio.high for c in drawn for d in c)
    assert excluded <= binomial_bound(8000, 0.05)
    assert excluded >= 8000 * 0.03


def test_a_change_as_large_as_the_band_is_not_called_equivalent() -> None:
    rng = random.Random(6)
    for change in (1.05, 1 / 1.05):
        wrong = sum(
            d.p_equivalent <= 0.05 for _ in range(100) for d in campaigns(rng, change, spread=0.02)
        )
        assert wrong <= binomial_bound(2000, 0.05)


def test_a_real_change_and_real_equality_are_found() -> None:
    rng = random.Random(7)
    changed = campaigns(rng, 0.8)
    assert all(statistics.discoveries([d.p_different for d in changed]))
    equal = campaigns(rng, 1.0, spread=0.01)
    assert all(statistics.discoveries([d.p_equivalent for d in equal]))


def test_one_block_on_a_side_has_a_ratio_but_proves_nothing() -> None:
    found = statistics.difference([1.0], [2.0, 2.1], 0.05)
    assert found.ratio.mean == pytest.approx(math.sqrt(4.2))
    assert math.isnan(found.ratio.low)
    assert math.isnan(found.p_different)
    assert math.isnan(statistics.difference([], [1.0], 0.05).ratio.mean)
