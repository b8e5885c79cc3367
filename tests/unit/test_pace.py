"""The time left of a campaign, by a clock of its own."""

from __future__ import annotations

import pytest

from testbed.campaigns.pace import Pace
from testbed.model.trials import Status, Trial

CELLS = [f"steer/native-guest/ipv4/tcp/latency/{size}x1" for size in range(1, 11)]
START_S, TRIAL_S = 30.0, 2.0


def trial(block: int, cell: str, status: Status = Status.OK, host: str = "") -> Trial:
    return Trial(cell, block, 0, status, host=host)


def left(*blocks: int, host: str = "", done: int = 0) -> list[tuple[str, int, str]]:
    """What is left of these blocks, the first `done` cells of the first one being done."""
    return [(host, block, cell) for block in blocks for cell in CELLS][done:]


def test_the_time_left_is_right_from_the_second_trial_on_although_pods_are_built_first() -> None:
    pace = Pace(trial_s=1.0)
    pace.ready("", 100.0)
    assert pace.left_s(left(0, 1, 2)) is None
    now_s = 100 + START_S
    for done, cell in enumerate(CELLS, 1):
        now_s += TRIAL_S
        pace.ended(trial(0, cell), now_s)
        planned_s = 1.0 if done == 1 else TRIAL_S  # nothing else is known yet
        extra_s = 2 * (START_S + TRIAL_S - planned_s)
        expected_s = extra_s + (30 - done) * planned_s
        assert pace.left_s(left(0, 1, 2, done=done)) == pytest.approx(expected_s)


def test_cells_that_are_unsupported_take_no_time() -> None:
    pace = Pace(trial_s=1.0)
    pace.ready("", 0.0)
    pace.ended(trial(0, CELLS[0], Status.UNSUPPORTED), 0.0)
    pace.ended(trial(0, CELLS[1]), START_S + TRIAL_S)
    pace.ended(trial(0, CELLS[2]), START_S + 2 * TRIAL_S)
    expected_s = 7 * TRIAL_S + START_S + 9 * TRIAL_S
    assert pace.left_s(left(0, 1, done=3)) == pytest.approx(expected_s)


def test_a_trial_that_was_run_twice_counts_once_with_both_times() -> None:
    pace = Pace(trial_s=1.0)
    pace.ready("", 0.0)
    for now_s, cell in ((START_S, CELLS[0]), (START_S + 2, CELLS[1]), (START_S + 4, CELLS[1])):
        pace.ended(trial(0, cell), now_s)
    assert pace.left_s(left(0, done=2)) == pytest.approx(8 * 4)


def test_hosts_work_at_the_same_time() -> None:
    pace = Pace(trial_s=1.0)
    for block, host in enumerate(("a", "b")):
        pace.ready(host, 0.0)
        pace.ended(trial(block, CELLS[0], host=host), 0.0)
        pace.ended(trial(block, CELLS[1], host=host), TRIAL_S)
    both = left(0, host="a", done=2) + left(1, host="b", done=6)
    assert pace.left_s(both) == pytest.approx(8 * TRIAL_S)
    assert pace.left_s([]) == 0
