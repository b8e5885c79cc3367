"""The highest rate that arrives nearly whole: a search over attempts at UDP streams of given rates.

What RFC 2544 (section 26.1) calls throughput, with a stated bound on loss in the place of none, as
no software datapath is without. Bisection on a logarithmic scale down to `RESOLUTION`, a rate that
fails being tried once more before it counts as too high ("binary search with loss verification",
ETSI GS NFV-TST 009): else a hiccup of the machine would decide. How an attempt is made, and for how
long, is the caller's affair (`testbed.campaigns.trial`); nothing is sent here.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import NamedTuple

from testbed.model.cells import UDP_LOSS
from testbed.model.errors import Error

RESOLUTION = 0.05
"""How far apart the highest rate that passed and the lowest that did not may stay."""
DOWN = 0.7
"""By what a rate is lowered as long as none has passed."""
LEAST = 0.01
"""Of what was offered at full speed: below, there is no rate worth to be named."""


class Attempt(NamedTuple):
    """What came of an offered rate."""

    offered_bps: float
    """Payload sent, whatever was asked for."""
    arrived_bps: float
    loss: float
    """Share of datagrams."""

    @property
    def passed(self) -> bool:
        return self.loss <= UDP_LOSS


def highest_rate(attempt: Callable[[float], Attempt]) -> float:
    """The highest rate in bit/s whose loss stays at or below `UDP_LOSS`; 0 is as fast as it goes.

    Raises `Error` if even a small part of what can be sent is too much.
    """
    flood = attempt(0)
    if flood.passed:
        return 0
    low, high, rate = 0.0, flood.offered_bps, flood.arrived_bps
    step = 1 + RESOLUTION  # small at first: what arrives of too much is mostly what the link can do
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
