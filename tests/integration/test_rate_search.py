"""UDP throughput over a link of known speed: the rate that is found is the link's."""

from __future__ import annotations

import pytest

from testbed.campaigns import rate_search, roles, trial
from testbed.host import netlink
from testbed.model.cells import Cell, Pair
from testbed.model.metrics import Metric
from testbed.model.terms import Family, Runtime, Transport
from testbed.model.trials import Limit, Status, Trial
from testbed.pods.links import port_name
from testbed.runtimes.interface import Prepared

from .conftest import Build

pytestmark = pytest.mark.root

LINK_BPS = 40e6
SIZE = 1400
HEADERS = {Family.IPV4: 14 + 20 + 8, Family.IPV6: 14 + 40 + 8}
"""Ethernet, IP, UDP: they take their share of the link."""


@pytest.mark.parametrize("family", Family, ids=str)
def test_the_rate_that_is_found_is_what_the_link_can_carry(
    build: Build, prepared: dict[Runtime, Prepared], family: Family
) -> None:
    pair, guest = Pair.NATIVE_GUEST, prepared[Runtime.STANDIN]
    pod = build(f"slow-{family}", roles.manifest([pair], Runtime.STANDIN), "direct")
    pod.start()
    port = netlink.links(pod.links.link_netns)[port_name(1)]
    # A token bucket (tc-tbf); rates are in bytes per second.
    pod.links.link_ip.tc("add", "tbf", port, rate=int(LINK_BPS / 8), burst=20_000, limit=50_000)
    cell = Cell("direct", pair, family, Transport.UDP, Metric.THROUGHPUT, SIZE)
    for _ in range(3):
        found = trial.run(cell, [pod], guest, warmup_s=0.1, duration_s=0.6)
        if found.status is Status.OK and not found.disturbed:
            break  # else again, as a campaign does: others may have held the receiver up throughout

    assert (found.status, found.reason) == (Status.OK, None)
    attempts = [rate_search.Attempt(*attempt) for attempt in found.searched]
    most_bps = LINK_BPS * SIZE / (SIZE + HEADERS[family])
    # Not more than that; less, where other work on the machine holds the receiver up.
    assert 0.25 * most_bps < (found.value or 0) < 1.1 * most_bps
    assert attempts[0].loss > 0.2  # as fast as it goes is too fast
    assert attempts[-1].passed
    assert found.disturbed or found.limited is None  # a disturbed sender may be held up, too
    assert attempts[-1].arrived_bps == pytest.approx(found.value)
    assert Trial.from_json(found.as_json()) == found


def test_a_rate_that_only_the_sender_limits_says_so(
    build: Build, prepared: dict[Runtime, Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every loss passes, so that all that is sent at full speed is the highest rate."""
    monkeypatch.setattr(rate_search, "UDP_LOSS", 1.0)
    pair, guest = Pair.NATIVE_GUEST, prepared[Runtime.STANDIN]
    pod = build("unlimited", roles.manifest([pair], Runtime.STANDIN), "direct")
    pod.start()
    cell = Cell("direct", pair, Family.IPV4, Transport.UDP, Metric.THROUGHPUT, SIZE)
    found = trial.run(cell, [pod], guest, warmup_s=0.1, duration_s=0.6)
    assert (found.status, found.limited) == (Status.OK, Limit.SENDER)
    assert Trial.from_json(found.as_json()) == found
