"""What makes a trial one to run again: time that others had, clocks that disagree."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from testbed.agent import Result
from testbed.campaigns import trial
from testbed.host import facts


def test_a_stolen_share_above_the_limit_disturbs_a_trial() -> None:
    whole = 10.0 * len(facts.cpus())
    limit = trial.STOLEN_SHARE
    spent = {"elapsed_s": 10.0, "steal_s": whole * limit * 0.9}
    assert trial._stolen(spent) is None
    assert trial._stolen(spent | {"steal_s": whole * 0.5}) == "50.0% of the CPUs' time was stolen"


@pytest.mark.parametrize(
    ("late_s", "fine"), [(0.0, True), (1.0, True), (1.2, False), (-0.2, False)]
)
def test_clocks_may_differ_by_what_setting_up_takes_and_no_more(
    late_s: float, fine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TESTBED_SLOWNESS", raising=False)
    result = Result(ip_address("::1"), 1, 2.0, 1, 0, 0, 0, 0, 0, ())
    assert (trial._clock(result, late_s) is None) is fine
