"""What makes a trial one to run again: time that others had, clocks that disagree."""

from __future__ import annotations

import os
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from testbed.agent import Result
from testbed.campaigns import isolation, trial
from testbed.host import facts
from testbed.model.cells import Cell
from testbed.model.trials import Limit


def test_a_stolen_share_above_the_limit_disturbs_a_trial() -> None:
    whole = 10.0 * len(facts.cpus())
    limit = isolation.STOLEN_SHARE
    spent = {"elapsed_s": 10.0, "steal_s": whole * limit * 0.9, "others_s": 0.0}
    assert isolation.disturbance(spent) is None
    assert isolation.disturbance(spent | {"steal_s": whole * 0.5}) == (
        "50.0% of the CPUs' time was stolen"
    )


def test_a_share_of_others_above_the_limit_disturbs_a_trial() -> None:
    whole = 10.0 * len(facts.cpus())
    spent = {"elapsed_s": 10.0, "steal_s": 0.0, "others_s": whole * isolation.OTHERS_SHARE * 0.9}
    assert isolation.disturbance(spent) is None
    assert isolation.disturbance(spent | {"others_s": whole * 0.25}) == (
        "25.0% of the CPUs' time was used by others"
    )


def test_system_time_that_was_taken_off_twice_hides_no_user_time_of_others() -> None:
    before = isolation.Reading(user_s=5.0, system_s=5.0)
    assert isolation.Reading(5.5, 4.0).since(before) == 0.5
    assert isolation.Reading(4.9, 5.25).since(before) == 0.25
    assert isolation.Reading(4.9, 4.9).since(before) == 0


def test_time_of_a_pod_and_of_this_process_is_not_that_of_others(tmp_path: Path) -> None:
    """Two readings of one moment differ by what the cgroup says, whatever the machine does."""
    (tmp_path / "cpu.stat").write_text(
        "usage_usec 7000000\nuser_usec 5000000\nsystem_usec 2000000\nnice_usec 0\n"
    )
    end = os.times().user + 0.2
    before, began = isolation.Reading.now([]), facts.busy()
    while os.times().user < end:
        pass
    after, ended = isolation.Reading.now([]), facts.busy()
    if facts.cpus() == list(range(os.cpu_count() or 1)):
        assert after.user_s - before.user_s < ended["user_s"] - began["user_s"] - 0.1
    without = isolation.Reading.now([tmp_path])
    assert after.user_s - without.user_s == pytest.approx(5, abs=0.5)
    assert after.system_s - without.system_s == pytest.approx(2, abs=0.5)


@pytest.mark.parametrize(
    ("late_s", "fine"), [(0.0, True), (1.0, True), (1.2, False), (-0.2, False)]
)
def test_clocks_may_differ_by_what_setting_up_takes_and_no_more(
    late_s: float, fine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TESTBED_SLOWNESS", raising=False)
    assert (trial.clock_fault(2.0, late_s) is None) is fine


@pytest.mark.parametrize(
    ("answered", "unanswered", "unsent", "saturated"),
    [
        (1000, 0, 0, False),
        (960, 0, 0, False),
        (940, 0, 0, True),  # the others were answered late, or the trial would end earlier
        (1000, 9, 0, False),
        (990, 12, 0, True),
        (990, 0, 12, True),
    ],
)
def test_a_rate_that_is_not_answered_saturates(
    answered: int, unanswered: int, unsent: int, saturated: bool
) -> None:
    cell = Cell.parse("direct/native-guest/ipv4/tcp/latency/64x1@500")
    result = Result(ip_address("::1"), 1, 2.0, answered, 0, 0, 0, 0, 0, (), unanswered, unsent)
    assert trial._saturation(cell, result) is (Limit.SATURATED if saturated else None)
    unpaced = Cell.parse("direct/native-guest/ipv4/tcp/latency/64x1")
    assert trial._saturation(unpaced, replace(result, unanswered=0, unsent=0)) is None
