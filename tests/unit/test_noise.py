"""What an A/A says of a plan: widths, numbers of blocks, and how long it may take."""

from __future__ import annotations

import pytest

from testbed.campaigns import noise
from testbed.campaigns.isolation import OTHERS_SHARE
from testbed.campaigns.noise import Noise


def test_a_quiet_machine_is_told_the_width_after_its_blocks_and_the_blocks_for_its_target() -> None:
    """t(0.975, 4) = 2.776 (tables of Student's t): 0.02 · 2.776 / √5 = 0.0248, and e^0.0248 - 1."""
    found = Noise(20, 0.02, 0.001)
    assert found.quiet
    said = "others use 0.1% of the CPUs, and A/A ratios of 0.2 s trials spread by 2.0%"
    assert found.text(5, None) == f"{said}: expect ±2.5% after 5 blocks"
    assert found.text(5, 0.05) == f"{said}: expect ±2.5% after 5 blocks; ±5.0% takes 4 blocks"


def test_a_machine_that_is_not_quiet_is_told_so_in_bounds() -> None:
    found = Noise(20, 3.0, 2 * OTHERS_SHARE)
    assert not found.quiet
    assert found.text(3, 0.05).endswith(
        "expect more than ±100% after 3 blocks; ±5.0% takes more than 1000 blocks"
    )


@pytest.mark.parametrize(
    ("trials_s", "expected_s"), [(5000, 10), (100, 10), (60, 6), (29, 0), (0, 0)]
)
def test_a_short_campaign_has_a_shorter_one_or_none(trials_s: float, expected_s: float) -> None:
    assert noise.duration_s(trials_s) == pytest.approx(expected_s)
