"""What a packet pays for each program, against a program that does nothing but redirect.

A frame that a program gives other addresses is another frame when the program is run again, so such
runs are single ones, each with some 50 ns of its own. Programs at sockets cannot be run like this;
kernel statistics (`kernel.bpf_stats_enabled`) count them.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from testbed import bpf
from testbed.bpf import ProgramSet
from testbed.host import namespaces, netlink
from testbed.host.ledger import Owner
from testbed.model.terms import Family
from tests.bpf.conftest import loaded as capture
from tests.bpf.conftest import loaded_steer as steer
from tests.bpf.frames import EPHEMERAL, Plan, frame, from_guest, ip, tcp, to_guest
from tests.bpf.verdicts import ANOTHERS_PORT, NATIVE_PORT, OWN_PORT, PASSED, REDIRECTED

from .gate import Ratio
from .references import redirect_program

__all__ = ["capture", "steer"]

pytestmark = [
    pytest.mark.root,
    pytest.mark.bench,
    pytest.mark.parametrize("family", Family, ids=str),
]

GOAL_S = 100e-9

REPEAT, SINGLE = 20_000, 300
Frame = Callable[[Plan], bytes]


@pytest.fixture(scope="module")
def redirect() -> Iterator[int]:
    with redirect_program() as program:
        yield program


def per_packet(program: int, sent: bytes) -> float:
    """Seconds; the frame must come out as it went in."""
    verdict, after, ns = bpf.run(program, sent, REPEAT)
    assert verdict in (PASSED, REDIRECTED)
    assert after == sent
    return ns / 1e9


def per_single(program: int, sent: bytes) -> float:
    return sum(bpf.run(program, sent)[2] for _ in range(SINGLE)) / SINGLE / 1e9


def sent(plan: Plan, dport: int, *, to_pod: bool = False) -> bytes:
    """By guest 0, to the alias or to the pod's own address."""
    to = plan.pod_link if to_pod else plan.alias
    return from_guest(ip(plan.link, to) / tcp(EPHEMERAL, dport))


LEFT_ALONE: dict[str, tuple[str, Frame]] = {
    "native to native": (
        "lo_egress",
        lambda a: frame(ip(a.loopback, a.loopback) / tcp(EPHEMERAL, NATIVE_PORT)),
    ),
    "guest to native, at the port": ("port_ingress", lambda a: sent(a, NATIVE_PORT)),
    "bridged, at the port": ("port_ingress", lambda a: sent(a, NATIVE_PORT, to_pod=True)),
    "bridged, to the pod": ("bridge_egress", lambda a: sent(a, NATIVE_PORT, to_pod=True)),
    "bridged, in the pod": ("uplink_ingress", lambda a: sent(a, NATIVE_PORT, to_pod=True)),
    "native to guest, at the router": (
        "router",
        lambda a: from_guest(ip(a.alias, a.link) / tcp(1, 2)),
    ),
}
TRANSLATED: dict[str, tuple[str, Frame]] = {
    "native to guest": (
        "lo_egress",
        lambda a: frame(ip(a.loopback, a.loopback) / tcp(1, OWN_PORT)),
    ),
    "native answers guest": (
        "lo_egress",
        lambda a: frame(ip(a.loopback, a.native_view) / tcp(1, 2)),
    ),
    "guest to native": ("uplink_ingress", lambda a: from_guest(ip(a.link, a.alias) / tcp(1, 2))),
    "guest to guest": ("port_ingress", lambda a: sent(a, ANOTHERS_PORT)),
}


@pytest.mark.parametrize("what", LEFT_ALONE)
def test_a_packet_that_capture_leaves_alone(
    ratio: Ratio, capture: ProgramSet, redirect: int, family: Family, what: str
) -> None:
    name, make = LEFT_ALONE[what]
    program, data = capture.program(name), make(Plan(family))
    ratio(
        f"capture: {what}, {family}",
        lambda: per_packet(program, data),
        lambda: per_packet(redirect, data),
        goal_s=GOAL_S,
    )


@pytest.mark.parametrize("what", TRANSLATED)
def test_a_packet_that_capture_translates(
    ratio: Ratio, capture: ProgramSet, redirect: int, family: Family, what: str
) -> None:
    name, make = TRANSLATED[what]
    program, data = capture.program(name), make(Plan(family))
    ratio(
        f"capture: {what}, translated, {family}",
        lambda: per_single(program, data),
        lambda: per_single(redirect, data),
        goal_s=GOAL_S,
    )


@pytest.fixture(scope="module")
def netns() -> Iterator[str]:
    """A namespace that has the alias and guest 0's address."""
    with Owner() as owner:
        name = f"tb-{owner.id}-speed"
        with namespaces.create(owner, name) as ip:
            for family in Family:
                plan = Plan(family)
                for address in (plan.alias, plan.link):
                    netlink.add_address(ip, 1, address, address.max_prefixlen)
            yield name


@pytest.fixture
def connection(family: Family, netns: str) -> Iterator[int]:
    """A real one that guest 0 has with a native; its port."""
    plan = Plan(family)
    kind = socket.AF_INET if family is Family.IPV4 else socket.AF_INET6
    with ExitStack() as stack:
        listening, client = (
            stack.enter_context(namespaces.inside(netns, lambda: socket.socket(kind)))
            for _ in range(2)
        )
        listening.bind((str(plan.alias), NATIVE_PORT))
        listening.listen()
        client.bind((str(plan.link), 0))
        client.connect((str(plan.alias), NATIVE_PORT))
        yield client.getsockname()[1]


ESTABLISHED: dict[str, tuple[str, Callable[[Plan, int], bytes]]] = {
    "native to native": (
        "lo_egress",
        lambda a, _: frame(ip(a.loopback, a.loopback) / tcp(EPHEMERAL, NATIVE_PORT)),
    ),
    "native to guest": (
        "port_egress",
        lambda a, _: to_guest(ip(a.pod_link, a.link) / tcp(EPHEMERAL, OWN_PORT), 0),
    ),
    "guest answers native": (
        "port_ingress",
        lambda a, _: from_guest(ip(a.link, a.pod_link) / tcp(OWN_PORT, EPHEMERAL)),
    ),
    "guest to native": (
        "port_ingress",
        lambda a, own: from_guest(ip(a.link, a.alias) / tcp(own, NATIVE_PORT)),
    ),
    "native answers guest": (
        "port_egress",
        lambda a, own: to_guest(ip(a.alias, a.link) / tcp(NATIVE_PORT, own), 0),
    ),
}


@pytest.mark.parametrize("what", ESTABLISHED)
def test_a_packet_of_a_connection_that_steer_has_handed_over(
    ratio: Ratio,
    steer: ProgramSet,
    redirect: int,
    netns: str,
    connection: int,
    family: Family,
    what: str,
) -> None:
    name, make = ESTABLISHED[what]
    program, data = steer.program(name), make(Plan(family), connection)
    namespaces.inside(
        netns,
        lambda: ratio(
            f"steer: {what}, {family}",
            lambda: per_packet(program, data),
            lambda: per_packet(redirect, data),
            goal_s=GOAL_S,
        ),
    )
