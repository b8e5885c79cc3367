"""The search for a rate finds what a link can do, for any link, and hiccups do not decide."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.campaigns.rate_search import RESOLUTION, Attempt, highest_rate
from testbed.model.cells import UDP_LOSS
from testbed.model.errors import Error


class Link:
    """Loses what is more than it can carry; `asked` are the rates that were tried."""

    def __init__(self, carries: float, sender: float, livelock: float = 1.0) -> None:
        self.carries, self.sender, self.livelock = carries, sender, livelock
        self.asked: list[float] = []

    def __call__(self, rate_bps: float) -> Attempt:
        self.asked.append(rate_bps)
        sent = min(rate_bps or self.sender, self.sender)
        arrived = sent if sent <= self.carries else self.carries * self.livelock
        return Attempt(sent, arrived, 1 - arrived / sent)


@given(st.floats(2e5, 1e10), st.floats(1.01, 20), st.floats(0.1, 1))
def test_what_is_found_passes_and_is_within_the_resolution_of_what_the_link_carries(
    carries: float, faster: float, livelock: float
) -> None:
    link = Link(carries, carries * faster, livelock)
    found = highest_rate(link)
    if found:
        assert carries / (1 + RESOLUTION) <= found <= carries * (1 + UDP_LOSS)
    else:
        assert faster <= 1 + UDP_LOSS
    assert len(link.asked) < 30


def test_a_sender_that_is_slower_than_the_link_is_let_run() -> None:
    link = Link(carries=2e9, sender=1e9)
    assert highest_rate(link) == 0
    assert link.asked == [0]


def test_one_hiccup_does_not_lower_what_is_found() -> None:
    link = Link(carries=1e9, sender=3e9)
    undisturbed = highest_rate(link)

    def hiccup(rate_bps: float) -> Attempt:
        attempt = link(rate_bps)
        disturbed = len(link.asked) % 4 == 0
        return attempt._replace(loss=0.5) if disturbed else attempt

    link.asked.clear()
    assert highest_rate(hiccup) == undisturbed


def test_a_link_that_loses_at_any_rate_is_an_error() -> None:
    with pytest.raises(Error, match=r"more than 0.1% of datagrams are lost even at .* Mbit/s"):
        highest_rate(lambda rate_bps: Attempt(rate_bps or 1e9, 0.9 * (rate_bps or 1e9), 0.1))
