"""What a packet pays for each program, and a pod for attaching."""

from __future__ import annotations

import statistics
import time
from contextlib import closing

import pytest

from testbed import bpf
from testbed.bpf import ProgramSet
from testbed.datapaths import get
from testbed.ledger import Owner
from testbed.model import Address, Family

from .bed import Bed
from .frames import EPHEMERAL, Plan, frame, from_guest, ip, tcp
from .verdicts import ANOTHERS_PORT, NATIVE_PORT, OWN_PORT

pytestmark = [pytest.mark.root, pytest.mark.bench]

LEFT_ALONE_NS = 150
TRANSLATED_NS = 500
ATTACH_S = 0.05


def left_alone(a: Plan) -> list[tuple[str, str, bytes]]:
    """(what, program, frame): frames that stay as they are, so that one run may be repeated."""

    def sent(dst: Address, dport: int) -> bytes:
        return from_guest(ip(a.link, dst) / tcp(EPHEMERAL, dport))

    native = frame(ip(a.loopback, a.loopback) / tcp(EPHEMERAL, NATIVE_PORT))
    return [
        ("native to native", "lo_egress", native),
        ("guest to native, at the port", "port_ingress", sent(a.alias, NATIVE_PORT)),
        ("bridged, at the port", "port_ingress", sent(a.pod_link, NATIVE_PORT)),
        ("bridged, to the pod", "bridge_egress", sent(a.pod_link, NATIVE_PORT)),
        ("bridged, in the pod", "uplink_ingress", sent(a.pod_link, NATIVE_PORT)),
        ("native to guest, at the router", "router", from_guest(ip(a.alias, a.link) / tcp(1, 2))),
    ]


def translated(a: Plan) -> list[tuple[str, str, bytes]]:
    """Frames that the program gives other addresses."""
    return [
        ("native to guest", "lo_egress", frame(ip(a.loopback, a.loopback) / tcp(1, OWN_PORT))),
        ("native answers guest", "lo_egress", frame(ip(a.loopback, a.native_view) / tcp(1, 2))),
        ("guest to native", "uplink_ingress", from_guest(ip(a.link, a.alias) / tcp(1, 2))),
        ("guest to guest", "port_ingress", from_guest(ip(a.link, a.alias) / tcp(1, ANOTHERS_PORT))),
    ]


@pytest.mark.parametrize("family", Family)
def test_ns_per_packet(loaded: ProgramSet, family: Family) -> None:
    for what, program, sent in left_alone(Plan(family)):
        ns = statistics.median(
            bpf.run(loaded.program(program), sent, repeat=100_000)[2] for _ in range(5)
        )
        print(f"{family} {what}: {ns} ns")
        assert ns <= LEFT_ALONE_NS, what
    for what, program, sent in translated(Plan(family)):
        ns = statistics.median(bpf.run(loaded.program(program), sent)[2] for _ in range(1000))
        print(f"{family} {what}, translated: {ns} ns, with about 50 ns of a single run's own")
        assert ns <= TRANSLATED_NS, what


def test_attaching_and_detaching_a_pod_more(loaded: ProgramSet) -> None:
    times_s = []
    with Owner() as owner:
        for i in range(5):
            with owner.part() as part, closing(Bed(part, f"s{i}")) as bed:
                start = time.perf_counter()
                get("capture").attach(bed.wiring, part).detach()
                times_s.append(time.perf_counter() - start)
    print(f"attached and detached in {1000 * statistics.median(times_s):.1f} ms")
    assert statistics.median(times_s) <= ATTACH_S
