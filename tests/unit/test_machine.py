"""What the machine says it was busy with adds up, and a guest's share is not counted twice."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from testbed.host import facts
from testbed.model.errors import Error


@pytest.mark.parametrize(("said", "factor"), [("", 1.0), ("1", 1.0), ("2.5", 2.5), ("0.5", 0.5)])
def test_slowness_is_what_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, said: str, factor: float
) -> None:
    monkeypatch.setenv("TESTBED_SLOWNESS", said)
    assert facts.slowness() == factor
    monkeypatch.delenv("TESTBED_SLOWNESS")
    assert facts.slowness() == 1


@pytest.mark.parametrize("said", ["0", "-1", "inf", "nan", "much"])
def test_slowness_that_is_no_factor_is_refused(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setenv("TESTBED_SLOWNESS", said)
    with pytest.raises(Error, match=f"TESTBED_SLOWNESS is '{said}'"):
        facts.slowness()


def test_parts_of_cpu_time_add_up_and_grow_with_work() -> None:
    before, end = facts.busy(), os.times().user + 0.1
    while os.times().user < end:
        pass
    after = facts.busy()
    assert after["user_s"] - before["user_s"] >= 0.08
    for sample in (before, after):
        parts = sum(sample[f"{part}_s"] for part in ("softirq", "system", "user", "guest"))
        assert parts == pytest.approx(sample["cpu_s"])


def test_user_time_of_guests_is_taken_out_of_user_time(tmp_path: Path) -> None:
    (tmp_path / "cpu.stat").write_text("usage_usec 5\nuser_usec 2500000\nsystem_usec 1\n")
    plain, split = facts.busy(), facts.busy([tmp_path])
    assert split["guest_s"] == 2.5
    assert split["user_s"] == pytest.approx(plain["user_s"] - 2.5, abs=0.5)
