"""What a packet pays for each program of `steer` that leaves it as it is: the goal is 100 ns.

    guest 0 (us): 5000      guest 3: 5003      native: all other ports

The connection that a guest has with a native is a real one, in a namespace that has both addresses.
Programs at sockets cannot be run like this; kernel statistics (`kernel.bpf_stats_enabled`) count
them.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from testbed import bpf, netlink
from testbed.bpf import ProgramSet
from testbed.ledger import Owner
from testbed.model import Family

from .frames import EPHEMERAL, Plan, frame, from_guest, ip, tcp, to_guest
from .test_steer import loaded
from .verdicts import NATIVE_PORT, OWN_PORT, PASSED

__all__ = ["loaded"]

pytestmark = [pytest.mark.root, pytest.mark.bench]

GOAL_NS = 100
REPEAT = 10_000
WHERE = [
    ("native to native", "lo_egress"),
    ("native to guest", "port_egress"),
    ("guest answers native", "port_ingress"),
    ("guest to native", "port_ingress"),
    ("native answers guest", "port_egress"),
]


@pytest.fixture(scope="module")
def netns() -> Iterator[str]:
    """A namespace that has the alias and guest 0's address."""
    with Owner() as owner:
        name = f"tb-{owner.id}-speed"
        with netlink.create_netns(owner, name) as ip:
            for family in Family:
                plan = Plan(family)
                for address in (plan.alias, plan.link):
                    netlink.add_address(ip, 1, address, address.max_prefixlen)
            yield name


@pytest.fixture(scope="module", params=Family, ids=str)
def frames(request: pytest.FixtureRequest, netns: str) -> Iterator[dict[str, bytes]]:
    """A frame of each kind; the connection that one of them is of."""
    a = Plan(request.param)
    kind = socket.AF_INET if a.family is Family.IPV4 else socket.AF_INET6
    with ExitStack() as stack:
        listening, client = (
            stack.enter_context(netlink.inside(netns, lambda: socket.socket(kind)))
            for _ in range(2)
        )
        listening.bind((str(a.alias), NATIVE_PORT))
        listening.listen()
        client.bind((str(a.link), 0))
        client.connect((str(a.alias), NATIVE_PORT))
        own = client.getsockname()[1]
        yield {
            "native to native": frame(ip(a.loopback, a.loopback) / tcp(EPHEMERAL, NATIVE_PORT)),
            "native to guest": to_guest(ip(a.pod_link, a.link) / tcp(EPHEMERAL, OWN_PORT), 0),
            "guest answers native": from_guest(ip(a.link, a.pod_link) / tcp(OWN_PORT, EPHEMERAL)),
            "guest to native": from_guest(ip(a.link, a.alias) / tcp(own, NATIVE_PORT)),
            "native answers guest": to_guest(ip(a.alias, a.link) / tcp(NATIVE_PORT, own), 0),
        }


@pytest.mark.parametrize(("what", "program"), WHERE, ids=[what for what, _ in WHERE])
def test_a_packet_of_a_connection_costs_little(
    benchmark: BenchmarkFixture,
    loaded: ProgramSet,
    netns: str,
    frames: dict[str, bytes],
    what: str,
    program: str,
) -> None:
    fd, sent, ns = loaded.program(program), frames[what], []

    def run() -> None:
        verdict, after, per_packet_ns = bpf.run(fd, sent, REPEAT)
        assert (verdict, after) == (PASSED, sent)
        ns.append(per_packet_ns)

    netlink.inside(netns, lambda: benchmark(run))
    benchmark.extra_info["ns_per_packet"] = sorted(ns)[len(ns) // 2]
    print(f"{benchmark.extra_info['ns_per_packet']} ns")
    assert min(ns) <= GOAL_NS
