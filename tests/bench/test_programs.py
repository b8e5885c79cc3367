"""What a packet pays for each program, against a program that does nothing but redirect.

The kernel runs a program on a frame many times. A program that changes the frame is run by one that
puts the frame's headers back; what that takes is measured and taken off. Programs at sockets cannot
be run like this; kernel statistics (`kernel.bpf_stats_enabled`) count them.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from testbed import bpf
from testbed.bpf import ProgramSet
from testbed.datapaths import capture as capture_datapath
from testbed.datapaths import steer as steer_datapath
from testbed.host import namespaces, netlink
from testbed.host.ledger import Owner
from testbed.model.terms import Family
from tests.bpf.conftest import loaded as capture
from tests.bpf.conftest import loaded_steer as steer
from tests.bpf.frames import EPHEMERAL, Plan, frame, from_guest, ip, tcp, to_guest
from tests.bpf.variants import variant
from tests.bpf.verdicts import (
    ANOTHERS_PORT,
    NATIVE_PORT,
    OWN_PORT,
    PASSED,
    REDIRECTED,
    in_slot_0,
)

from .gate import Ratio
from .references import redirect_program

__all__ = ["capture", "steer"]

pytestmark = [
    pytest.mark.root,
    pytest.mark.bench,
    pytest.mark.parametrize("family", Family, ids=str),
]

GOAL_S = 100e-9

REPEAT = 20_000
Frame = Callable[[Plan], bytes]

HEADERS = 74
"""Bytes of a frame that programs change: up to the end of TCP in IPv6."""
NOTHING = f"""
struct headers {{ u8 bytes[{HEADERS}]; }};
BPF_ARRAY(original, struct headers, 1);

static __always_inline int nothing(struct __sk_buff *skb)
{{
	return bpf_redirect(1, 0);
}}
"""
RESTORING = f"""
int sched_cls__restoring_NAME(struct __sk_buff *skb)
{{
	u32 zero = 0;
	struct headers *headers = original.lookup(&zero);
	int verdict;

	if (!headers || bpf_skb_load_bytes(skb, 0, headers, {HEADERS}))
		return TC_ACT_SHOT;
	verdict = NAME(skb);
	if (bpf_skb_store_bytes(skb, 0, headers, {HEADERS}, 0))
		return TC_ACT_SHOT;
	return let_others_see(verdict);
}}
"""


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


@contextmanager
def restoring(
    datapath: str, reasons: tuple[str, ...], names: Iterable[str]
) -> Iterator[ProgramSet]:
    """A datapath in slot 0, with programs `restoring_NAME` that put the headers back."""

    def change(folder: Path) -> None:
        file = folder / f"{datapath}.c"
        entries = (RESTORING.replace("NAME", name) for name in ("nothing", *names))
        file.write_text(file.read_text() + NOTHING + "".join(entries))

    with ExitStack() as stack:
        with variant(datapath, change):
            programs = stack.enter_context(in_slot_0(datapath, reasons))
        yield programs


@pytest.fixture(scope="module")
def restored_capture() -> Iterator[ProgramSet]:
    names = dict.fromkeys(name for name, _ in TRANSLATED.values())
    with restoring("capture", capture_datapath.REASONS, names) as programs:
        programs.map("pods", "=I", "=II")[0,] = (1, 1)
        yield programs


@pytest.fixture(scope="module")
def restored_steer() -> Iterator[ProgramSet]:
    with restoring("steer", steer_datapath.REASONS, ["lo_egress", "port_ingress"]) as programs:
        yield programs


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


def compare_translated(
    ratio: Ratio, datapath: str, programs: ProgramSet, redirect: int, family: Family, what: str
) -> None:
    """Compare a program that changes the frame with a redirect."""
    program, make = TRANSLATED[what]
    data = make(Plan(family)) + bytes(HEADERS)
    nothing, tried = (programs.program(f"restoring_{of}") for of in ("nothing", program))
    restoring_s = per_packet(nothing, data) - per_packet(redirect, data)
    ratio(
        f"{datapath}: {what}, translated, {family}",
        lambda: per_packet(tried, data) - restoring_s,
        lambda: per_packet(redirect, data),
        goal_s=GOAL_S,
    )


@pytest.mark.parametrize("what", TRANSLATED)
def test_a_packet_that_capture_translates(
    ratio: Ratio, restored_capture: ProgramSet, redirect: int, family: Family, what: str
) -> None:
    compare_translated(ratio, "capture", restored_capture, redirect, family, what)


@pytest.mark.parametrize("what", ["native to guest", "guest to guest"])
def test_a_packet_that_steer_translates(
    ratio: Ratio, restored_steer: ProgramSet, redirect: int, family: Family, what: str
) -> None:
    compare_translated(ratio, "steer", restored_steer, redirect, family, what)


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
