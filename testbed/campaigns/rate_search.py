"""Finds the highest UDP rate with at most 0.1 % loss, by bisection (RFC 2544, section 26.1).

RFC 2544 demands no loss at all. Here a loss of up to `UDP_LOSS` is allowed, because every software
datapath loses some datagrams. The bisection is on a logarithmic scale and ends at `RESOLUTION`. A
rate that fails is tried once more before it counts as too high ("binary search with loss
verification", ETSI GS NFV-TST 009), so that a single stall of the machine does not decide. The
caller makes the attempts (`testbed.campaigns.trial`); nothing is sent here.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import NamedTuple

from testbed.model.cells import UDP_LOSS
from testbed.model.errors import Error

RESOLUTION = 0.05
"""Where the search ends: relative distance of the lowest failed from the highest passed rate."""
DOWN = 0.7
"""Factor by which a failed rate is lowered as long as no rate has passed."""
LEAST = 0.01
"""Lowest rate that is tried, as a share of the rate offered at full speed."""


class Attempt(NamedTuple):
    """Result of one UDP stream at one rate."""

    offered_bps: float
    """Payload rate that was really sent."""
    arrived_bps: float
    loss: float
    """Share of datagrams that were lost."""

    @property
    def passed(self) -> bool:
        """Whether the loss is within `UDP_LOSS`."""
        return self.loss <= UDP_LOSS


def highest_rate(attempt: Callable[[float], Attempt]) -> float:
    """The highest rate in bit/s whose loss is at most `UDP_LOSS`; 0 means full speed.

    Raises `Error` if even `LEAST` of the rate at full speed has too much loss.
    """
    flood = attempt(0)
    if flood.passed:
        return 0
    low, high, rate = 0.0, flood.offered_bps, flood.arrived_bps
    step = 1 + RESOLUTION  # small at first: the rate that arrives of a flood is close to the limit
    while high > low * (1 + RESOLUTION):
        if attempt(rate).passed or attempt(rate).passed:
            low, rate, step = rate, min(rate * step, sqrt(rate * high)), step * step
        else:
            high, rate = rate, sqrt(low * rate) if low else rate * DOWN
        if not low and high < LEAST * flood.offered_bps:
            raise Error(
                f"more than {UDP_LOSS:.1%} of datagrams are lost even at {high / 1e6:.3g} Mbit/s"
            )
    return low
