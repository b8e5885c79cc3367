"""Whatever a guest sends, both datapaths make of it what the address plan says, byte for byte.

In `capture` what a native is to get is brought to it by a second program; here that follows the
first. Pings of the alias and fragments, on which the two differ or which take several frames, have
tests of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import TCP, UDP, IPOption_NOP
from scapy.packet import Packet, Raw

from testbed.bpf import ProgramSet
from testbed.datapaths import steer
from testbed.host.facts import slowness
from testbed.model.addresses import Address
from testbed.model.terms import Family

from .frames import EPHEMERAL, Plan, frame, from_guest, ip, to_guest, unreachable
from .verdicts import (
    ANOTHER,
    ANOTHERS_PORT,
    DROPPED,
    NATIVE_PORT,
    OWN_PORT,
    PASSED,
    REDIRECTED,
    US,
    Programs,
)

pytestmark = pytest.mark.root

Carry = Callable[[bytes], tuple[int, bytes]]


@pytest.fixture(scope="module", params=["capture", "steer"])
def carry(request: pytest.FixtureRequest, loaded: ProgramSet, loaded_steer: ProgramSet) -> Carry:
    """Verdict on a frame of guest 0, and the frame when it has got to where it is redirected to."""
    if request.param == "steer":
        programs = Programs(loaded_steer, steer.REASONS)
        return lambda sent: programs.run("port_ingress", sent)
    programs = Programs(loaded)

    def carry(sent: bytes) -> tuple[int, bytes]:
        verdict, after = programs.run("port_ingress", sent)
        if verdict == REDIRECTED and after == sent:
            return programs.run("uplink_ingress", sent)
        return verdict, after

    return carry


ports = st.sampled_from([OWN_PORT, ANOTHERS_PORT, NATIVE_PORT, EPHEMERAL])
payloads = st.binary(max_size=64) | st.just(bytes(1400))
segments: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "flags": st.sampled_from(["S", "SA", "A", "PA", "FA", "R"]),
        "seq": st.integers(0, 2**32 - 1),
        "options": st.sampled_from([[], [("MSS", 1460), ("WScale", 7)], [("NOP", None)] * 40]),
    }
)
tails = st.sampled_from([b"", b"\0", bytes(18)])
"""What a link may put behind a packet."""


def headers(family: Family) -> st.SearchStrategy[dict[str, Any]]:
    if family is Family.IPV6:
        return st.fixed_dictionaries({"hlim": st.integers(0, 255), "fl": st.integers(0, 2**20 - 1)})
    nops = st.sampled_from([0, 1, 4, 40]).map(lambda n: [IPOption_NOP()] * n)
    return st.fixed_dictionaries(
        {"ttl": st.integers(0, 255), "flags": st.sampled_from(["", "DF"]), "options": nops}
    )


Body = Callable[[Address, Address], Packet]


def bodies(data: st.DataObject, a: Plan) -> tuple[int, int, Body]:
    """Ports of a flow, and what its packet between any two addresses carries."""
    sport, dport, payload = data.draw(ports), data.draw(ports), Raw(data.draw(payloads))
    kind = data.draw(st.sampled_from(["tcp", "udp", "error"]))
    if kind == "tcp":
        segment = TCP(sport=sport, dport=dport, **data.draw(segments)) / payload
        return sport, dport, lambda src, dst: segment
    if kind == "udp":
        unsummed = a.family is Family.IPV4 and data.draw(st.booleans())  # none in IPv6
        datagram = UDP(sport=sport, dport=dport, chksum=0 if unsummed else None) / payload
        return sport, dport, lambda src, dst: datagram
    # About what came to us; its own checksum, of the addresses then, is left as it is.
    inner = UDP(sport=dport, dport=sport, chksum=0x1234) / Raw(bytes(8))
    return sport, dport, lambda src, dst: unreachable(dst, src, bytes(inner))


Translated = tuple[Address, Address, int | None]


def expected(a: Plan, src: Address, dst: Address, sport: int, dport: int) -> int | Translated:
    """A verdict, or the addresses afterwards and the guest that gets it; None: a native."""
    if dst in (a.pod_link, a.others_link):
        return PASSED if src == a.link else DROPPED
    if src != a.link:
        return DROPPED
    if dst == a.alias:
        if dport == OWN_PORT:
            return a.view, a.link, US
        if dport == ANOTHERS_PORT:
            return a.view, a.others_link, ANOTHER
        return a.native_view, a.loopback, None
    if sport != OWN_PORT:
        return DROPPED
    answers: dict[Address, Translated] = {
        a.view: (a.alias, a.link, US),
        a.others_view: (a.alias, a.others_link, ANOTHER),
        a.native_source: (a.loopback, a.loopback, None),
    }
    return answers.get(dst, DROPPED)


@pytest.mark.parametrize("family", Family)
@settings(max_examples=round(200 / min(slowness(), 10)), deadline=None)  # fewer where all is slow
@given(data=st.data())
def test_it_goes_where_the_address_plan_says_or_nowhere(
    carry: Carry, family: Family, data: st.DataObject
) -> None:
    a = Plan(family)
    src = data.draw(st.sampled_from([a.link] * 8 + [a.others_link, a.alias, a.loopback, a.view]))
    dst = data.draw(
        st.sampled_from(
            [a.alias, a.view, a.others_view, a.native_source] * 2
            + [a.pod_link, a.others_link, a.loopback, a.native_view]
        )
    )
    sport, dport, body = bodies(data, a)
    fields, tail = data.draw(headers(family)), data.draw(tails)

    sent = from_guest(ip(src, dst, **fields) / body(src, dst)) + tail
    verdict, after = carry(sent)
    match expected(a, src, dst, sport, dport):
        case new_src, new_dst, n:
            packet = ip(new_src, new_dst, **fields) / body(new_src, new_dst)
            there = frame(packet) if n is None else to_guest(packet, n)
            assert (verdict, after) == (REDIRECTED, there + tail)
        case end:
            assert verdict == end
            assert end == DROPPED or after == sent
