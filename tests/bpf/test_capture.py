"""What each program of `capture` makes of a frame, run by BPF_PROG_TEST_RUN.

A translated frame must be, byte for byte, the one that scapy makes with the other addresses: so all
checksums are right, and nothing else has changed.

    guest 0 (us): 5000      guest 3: 5003      native: all other ports
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, MutableSequence
from contextlib import closing
from ipaddress import ip_address

import pytest
from scapy.layers.inet import TCP, UDP
from scapy.layers.inet6 import IPv6ExtHdrFragment
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Packet, Raw

from testbed.bpf import ProgramSet
from testbed.datapaths.capture import REASONS
from testbed.datapaths.ebpf import state
from testbed.datapaths.ebpf.challenge_ack import GuestConnection
from testbed.datapaths.ebpf.rows import Rows
from testbed.model import addresses
from testbed.model.addresses import POD_MAC, Address, guest_mac
from testbed.model.terms import Family

from .frames import (
    EPHEMERAL,
    PAYLOAD,
    Plan,
    echo,
    fragments,
    frame,
    from_guest,
    ip,
    tcp,
    to_guest,
    udp,
    unreachable,
)
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

pytestmark = [pytest.mark.root, pytest.mark.parametrize("family", Family)]

L4: dict[str, Callable[[int, int], Packet]] = {
    "tcp": tcp,
    "udp": udp,
    "udp without payload": lambda s, d: udp(s, d, b""),
}


@pytest.fixture
def a(family: Family) -> Plan:
    return Plan(family)


# --- translation ----------------------------------------------------------------------------


@pytest.mark.parametrize("l4", ["tcp", "udp", "udp without payload"])
class TestTranslation:
    def test_native_to_guest(self, programs: Programs, a: Plan, l4: str) -> None:
        body = L4[l4](EPHEMERAL, OWN_PORT)
        after = programs.redirects("lo_egress", frame(ip(a.loopback, a.loopback) / body))
        assert after == to_guest(ip(a.native_source, a.link) / body, US)

    def test_guest_answers_native(self, programs: Programs, a: Plan, l4: str) -> None:
        body = L4[l4](OWN_PORT, EPHEMERAL)
        sent = from_guest(ip(a.link, a.native_source) / body)
        assert programs.redirects("port_ingress", sent) == sent
        after = programs.redirects("uplink_ingress", sent)
        assert after == frame(ip(a.loopback, a.loopback) / body)

    def test_guest_to_native(self, programs: Programs, a: Plan, l4: str) -> None:
        body = L4[l4](EPHEMERAL, NATIVE_PORT)
        sent = from_guest(ip(a.link, a.alias) / body)
        assert programs.redirects("port_ingress", sent) == sent
        after = programs.redirects("uplink_ingress", sent)
        assert after == frame(ip(a.native_view, a.loopback) / body)

    def test_native_answers_guest(self, programs: Programs, a: Plan, l4: str) -> None:
        body = L4[l4](NATIVE_PORT, EPHEMERAL)
        after = programs.redirects("lo_egress", frame(ip(a.loopback, a.native_view) / body))
        assert after == to_guest(ip(a.alias, a.link) / body, US)

    def test_guest_to_guest(self, programs: Programs, a: Plan, l4: str) -> None:
        body = L4[l4](EPHEMERAL, ANOTHERS_PORT)
        after = programs.redirects("port_ingress", from_guest(ip(a.link, a.alias) / body))
        assert after == to_guest(ip(a.view, a.others_link) / body, ANOTHER)

    def test_guest_answers_guest(self, programs: Programs, a: Plan, l4: str) -> None:
        body = L4[l4](OWN_PORT, EPHEMERAL)
        after = programs.redirects("port_ingress", from_guest(ip(a.link, a.others_view) / body))
        assert after == to_guest(ip(a.alias, a.others_link) / body, ANOTHER)

    def test_guest_to_itself_and_back(self, programs: Programs, a: Plan, l4: str) -> None:
        there = L4[l4](EPHEMERAL, OWN_PORT)
        after = programs.redirects("port_ingress", from_guest(ip(a.link, a.alias) / there))
        assert after == to_guest(ip(a.view, a.link) / there, US)
        back = L4[l4](OWN_PORT, EPHEMERAL)
        after = programs.redirects("port_ingress", from_guest(ip(a.link, a.view) / back))
        assert after == to_guest(ip(a.alias, a.link) / back, US)

    def test_native_flow_between_other_addresses_comes_back_to_them(
        self, programs: Programs, a: Plan, l4: str
    ) -> None:
        client = ip_address("127.0.0.5") if a.family is Family.IPV4 else a.pod_link
        there, back = L4[l4](EPHEMERAL, OWN_PORT), L4[l4](OWN_PORT, EPHEMERAL)
        for server in (a.loopback, a.pod_link):
            before = programs.count("odd_source")
            after = programs.redirects("lo_egress", frame(ip(client, server) / there))
            assert after == to_guest(ip(a.native_source_odd, a.link) / there, US)
            assert programs.count("odd_source") == before + 1
            sent = from_guest(ip(a.link, a.native_source_odd) / back)
            assert programs.redirects("port_ingress", sent) == sent
            after = programs.redirects("uplink_ingress", sent)
            assert after == frame(ip(server, client) / back)

    def test_a_hundred_pairs_of_unusual_addresses_are_told_apart(
        self, programs: Programs, a: Plan, l4: str
    ) -> None:
        clients = [ip_address(f"127.0.3.{n}") for n in range(1, 101)]
        if a.family is Family.IPV6:
            clients = [ip_address(f"fd00::{n}") for n in range(1, 101)]
        for i, client in enumerate(clients):
            there = L4[l4](EPHEMERAL + i, OWN_PORT)
            programs.redirects("lo_egress", frame(ip(client, a.loopback) / there))
        for i, client in enumerate(clients):
            back = L4[l4](OWN_PORT, EPHEMERAL + i)
            sent = from_guest(ip(a.link, a.native_source_odd) / back)
            after = programs.redirects("uplink_ingress", sent)
            assert after == frame(ip(a.loopback, client) / back)

    def test_router_sends_translated_frames_to_the_guest_untouched(
        self, programs: Programs, a: Plan, l4: str
    ) -> None:
        for source in (a.alias, a.native_source, a.native_source_odd):
            sent = to_guest(ip(source, a.link) / L4[l4](1, 2), US)
            assert programs.redirects("router", sent) == sent
        assert programs.passes("router", to_guest(ip(a.pod_link, a.link) / L4[l4](1, 2), US))


def test_fragments_from_outside_the_pod_leave_no_trace(
    programs: Programs, loaded: ProgramSet, a: Plan
) -> None:
    """Otherwise they could push out what the pod's own need."""
    programs.forget()
    source, to = ("10.9.8.7", "10.1.2.3") if a.family is Family.IPV4 else ("fd00::7", "fd00::3")
    whole = ip(ip_address(source), ip_address(to)) / udp(EPHEMERAL, OWN_PORT, bytes(64))
    for part in fragments(whole):
        assert programs.passes("uplink_ingress", frame(part))
    assert not any(state.mapped(loaded).fragments)


def test_guests_that_do_not_exist_are_not_counted(
    programs: Programs, loaded: ProgramSet, a: Plan
) -> None:
    """Otherwise one guest could fill what all pods' guests are counted in."""
    nobody = addresses.guest_view(a.family, 99)
    sent = from_guest(ip(a.link, nobody) / udp(OWN_PORT, EPHEMERAL, PAYLOAD))
    assert programs.run("port_ingress", sent)[0] == DROPPED
    counts = loaded.map("guest_counts", "=BBBx", "=QQ")
    assert not [key for key in counts if key[0] == 0 and 99 in key]


class TestGuestConnections:
    """What `capture` remembers of TCP between guests; guest 3 is the client of guest 0 (us), or its
    server."""

    @pytest.fixture
    def rows(self, loaded: ProgramSet) -> Iterator[Rows]:
        with closing(ProgramSet(loaded.pins, 0)) as programs:
            yield Rows(programs, REASONS)

    @pytest.mark.parametrize(("flags", "waits"), [("PA", True), ("FA", True), ("R", False)])
    def test_a_client_waits_until_it_resets(
        self, programs: Programs, rows: Rows, a: Plan, flags: str, waits: bool
    ) -> None:
        for flag in ("S", flags):
            dialed = segment(EPHEMERAL, ANOTHERS_PORT, flag)
            programs.redirects("port_ingress", from_guest(ip(a.link, a.alias) / dialed))
        expected = [GuestConnection(US, EPHEMERAL, a.alias, ANOTHERS_PORT)] if waits else []
        assert rows.take_connections(ANOTHER) == expected
        assert rows.take_connections(ANOTHER) == []

    def test_a_server_waits_for_its_client(self, programs: Programs, rows: Rows, a: Plan) -> None:
        dialed = segment(EPHEMERAL, ANOTHERS_PORT, "S")
        programs.redirects("port_ingress", from_guest(ip(a.link, a.alias) / dialed))
        expected = [GuestConnection(ANOTHER, ANOTHERS_PORT, a.view, EPHEMERAL)]
        assert rows.take_connections(US) == expected

    @pytest.mark.parametrize(
        ("client_ended", "flags", "waits"),
        [
            (False, "SA", True),
            (False, "FA", True),
            (False, "R", False),
            (True, "PA", True),
            (True, "FA", False),
        ],
    )
    def test_until_both_ended_it(
        self,
        programs: Programs,
        rows: Rows,
        a: Plan,
        client_ended: bool,
        flags: str,
        waits: bool,
    ) -> None:
        row = state.ConnectionRow(
            int(client_ended), OWN_PORT, EPHEMERAL, US, ANOTHER, a.family is Family.IPV6, True
        )
        put_row(state.mapped(rows.programs).guest_connections, bytes(row), key_from_bit=2)
        answer = segment(OWN_PORT, EPHEMERAL, flags)
        programs.redirects("port_ingress", from_guest(ip(a.link, a.others_view) / answer))
        expected = [GuestConnection(ANOTHER, EPHEMERAL, a.alias, OWN_PORT)] if waits else []
        assert rows.take_connections(US) == expected

    def test_who_dialed_itself_is_not_told(self, programs: Programs, rows: Rows, a: Plan) -> None:
        dialed = segment(EPHEMERAL, OWN_PORT, "S")
        programs.redirects("port_ingress", from_guest(ip(a.link, a.alias) / dialed))
        assert rows.take_connections(US) == []


def put_row(table: MutableSequence[int], row: bytes, key_from_bit: int) -> None:
    """As `put_row` in `bpf/state.h`, into an empty set."""
    word = int.from_bytes(row, sys.byteorder)
    in_set = (word >> key_from_bit) * 0x9E3779B97F4A7C15 % 2**64 >> 57
    table[8 * in_set] = word


def segment(sport: int, dport: int, flags: str) -> Packet:
    """A segment with the option that each side's first has."""
    return TCP(sport=sport, dport=dport, flags=flags, options=[("MSS", 1460)])


def test_ping_of_localhost_is_answered_by_the_pod(programs: Programs, a: Plan) -> None:
    sent = from_guest(ip(a.link, a.alias) / echo(a.family))
    assert programs.redirects("port_ingress", sent) == sent
    after = programs.redirects("uplink_ingress", sent)
    assert after == frame(ip(a.native_view, a.loopback) / echo(a.family))
    reply = echo(a.family, reply=True)
    after = programs.redirects("lo_egress", frame(ip(a.loopback, a.native_view) / reply))
    assert after == to_guest(ip(a.alias, a.link) / reply, US)


def test_udp_checksum_zero_stays_zero_and_none_becomes_zero(programs: Programs, a: Plan) -> None:
    def sent(payload: bytes, src: Address, dst: Address, **fields: int) -> Packet:
        return ip(src, dst) / udp(EPHEMERAL, OWN_PORT, payload, **fields)

    if a.family is Family.IPV4:  # IPv6 has no datagram without
        after = programs.redirects(
            "lo_egress", frame(sent(PAYLOAD, a.loopback, a.loopback, chksum=0))
        )
        assert after == to_guest(sent(PAYLOAD, a.native_source, a.link, chksum=0), US)
    # The payload for which the translated checksum sums up to zero: 0xffff must be sent then.
    at_zero = bytes(UDP(to_guest(sent(b"\0\0", a.native_source, a.link), US)[-10:]))
    missing = int.from_bytes(at_zero[6:8]).to_bytes(2)
    after = programs.redirects("lo_egress", frame(sent(missing, a.loopback, a.loopback)))
    assert after[-4:-2] == b"\xff\xff"
    assert after == to_guest(sent(missing, a.native_source, a.link), US)


# --- what stays the kernel's own ------------------------------------------------------------


def test_native_to_native_passes_untouched(programs: Programs, a: Plan) -> None:
    for body in (tcp(EPHEMERAL, NATIVE_PORT), udp(OWN_PORT, EPHEMERAL), echo(a.family)):
        assert programs.passes("lo_egress", frame(ip(a.loopback, a.loopback) / body))
    assert programs.passes("lo_egress", frame(ip(a.loopback, a.unknown) / tcp(1, NATIVE_PORT)))


def test_traffic_to_link_addresses_passes_to_the_bridge(programs: Programs, a: Plan) -> None:
    for there in (a.pod_link, a.others_link):
        sent = frame(ip(a.link, there) / tcp(1, OWN_PORT), src=guest_mac(US), dst=POD_MAC)
        assert programs.passes("port_ingress", sent)
        assert programs.passes("uplink_ingress", sent)
        assert programs.passes("bridge_egress", sent)


# --- sizes ----------------------------------------------------------------------------------


def test_syn_offers_segments_that_the_link_can_carry(programs: Programs, a: Plan) -> None:
    header = 40 if a.family is Family.IPV4 else 60
    rest = [("SAckOK", b""), ("Timestamp", (1, 0)), ("NOP", None), ("WScale", 7)]

    def syn(src: Address, dst: Address, mss: int) -> Packet:
        options = [("MSS", mss), *rest]
        return ip(src, dst) / TCP(sport=1, dport=OWN_PORT, flags="S", options=options)

    for offered, expected in ((65495, 1500 - header), (1500 - header, 1500 - header), (536, 536)):
        after = programs.redirects("lo_egress", frame(syn(a.loopback, a.loopback, offered)))
        assert after == to_guest(syn(a.native_source, a.link, expected), US)


def test_datagram_too_large_for_the_link_is_dropped_and_counted(
    programs: Programs, a: Plan
) -> None:
    most = 1500 - 8 - (20 if a.family is Family.IPV4 else 40)
    for source, destination, dport in (
        (a.loopback, a.loopback, OWN_PORT),
        (a.loopback, a.native_view, 9),
    ):
        fits = frame(ip(source, destination) / udp(1, dport, bytes(most)))
        assert programs.redirects("lo_egress", fits)
        larger = frame(ip(source, destination) / udp(1, dport, bytes(most + 1)))
        assert programs.drops("lo_egress", larger, "too_big")
    native = frame(ip(a.loopback, a.loopback) / udp(1, NATIVE_PORT, bytes(most + 1)))
    assert programs.passes("lo_egress", native)


# --- ICMP errors ----------------------------------------------------------------------------
#
# The packet inside is one that the error's receiver sent, so it has the receiver's own view; its
# layer 4 checksum is left as it was.


@pytest.mark.parametrize("l4", ["tcp", "udp"])
class TestErrors:
    def test_native_refuses_a_guests_datagram(self, programs: Programs, a: Plan, l4: str) -> None:
        inner = l4_bytes(ip(a.native_view, a.loopback) / L4[l4](EPHEMERAL, NATIVE_PORT))
        error = unreachable(a.native_view, a.loopback, inner)
        after = programs.redirects("lo_egress", frame(ip(a.loopback, a.native_view) / error))
        assert after == to_guest(ip(a.alias, a.link) / unreachable(a.link, a.alias, inner), US)

    def test_native_refuses_a_guest_servers_answer(
        self, programs: Programs, a: Plan, l4: str
    ) -> None:
        inner = l4_bytes(ip(a.loopback, a.loopback) / L4[l4](OWN_PORT, EPHEMERAL))
        error = unreachable(a.loopback, a.loopback, inner)
        after = programs.redirects("lo_egress", frame(ip(a.loopback, a.loopback) / error))
        inside = unreachable(a.link, a.native_source, inner)
        assert after == to_guest(ip(a.native_source, a.link) / inside, US)

    def test_guest_refuses_a_natives_datagram(self, programs: Programs, a: Plan, l4: str) -> None:
        inner = l4_bytes(ip(a.native_source, a.link) / L4[l4](EPHEMERAL, OWN_PORT))
        error = unreachable(a.native_source, a.link, inner)
        sent = from_guest(ip(a.link, a.native_source) / error)
        assert programs.redirects("port_ingress", sent) == sent
        after = programs.redirects("uplink_ingress", sent)
        inside = unreachable(a.loopback, a.loopback, inner)
        assert after == frame(ip(a.loopback, a.loopback) / inside)

    def test_guest_refuses_a_native_servers_answer(
        self, programs: Programs, a: Plan, l4: str
    ) -> None:
        inner = l4_bytes(ip(a.alias, a.link) / L4[l4](NATIVE_PORT, EPHEMERAL))
        sent = from_guest(ip(a.link, a.alias) / unreachable(a.alias, a.link, inner))
        assert programs.redirects("port_ingress", sent) == sent
        after = programs.redirects("uplink_ingress", sent)
        inside = unreachable(a.loopback, a.native_view, inner)
        assert after == frame(ip(a.native_view, a.loopback) / inside)

    def test_guest_refuses_another_guests_answer(
        self, programs: Programs, a: Plan, l4: str
    ) -> None:
        inner = l4_bytes(ip(a.alias, a.link) / L4[l4](ANOTHERS_PORT, EPHEMERAL))
        sent = from_guest(ip(a.link, a.alias) / unreachable(a.alias, a.link, inner))
        after = programs.redirects("port_ingress", sent)
        inside = unreachable(a.others_link, a.view, inner)
        assert after == to_guest(ip(a.view, a.others_link) / inside, ANOTHER)

    def test_guest_refuses_another_guests_datagram(
        self, programs: Programs, a: Plan, l4: str
    ) -> None:
        inner = l4_bytes(ip(a.others_view, a.link) / L4[l4](EPHEMERAL, OWN_PORT))
        sent = from_guest(ip(a.link, a.others_view) / unreachable(a.others_view, a.link, inner))
        after = programs.redirects("port_ingress", sent)
        inside = unreachable(a.others_link, a.alias, inner)
        assert after == to_guest(ip(a.alias, a.others_link) / inside, ANOTHER)

    def test_error_between_natives_passes(self, programs: Programs, a: Plan, l4: str) -> None:
        inner = l4_bytes(ip(a.loopback, a.loopback) / L4[l4](EPHEMERAL, NATIVE_PORT))
        error = ip(a.loopback, a.loopback) / unreachable(a.loopback, a.loopback, inner)
        assert programs.passes("lo_egress", frame(error))


def l4_bytes(packet: Packet) -> bytes:
    """Layer 4 with its checksum filled in."""
    return bytes(packet)[20 if packet.version == 4 else 40 :]


# --- fragments ------------------------------------------------------------------------------


class TestFragments:
    @pytest.fixture(autouse=True)
    def nothing_seen_before(self, programs: Programs) -> None:
        programs.forget()

    def test_later_ones_follow_the_first_between_guests(self, programs: Programs, a: Plan) -> None:
        body = udp(EPHEMERAL, ANOTHERS_PORT, bytes(range(100)))
        sent = fragments(ip(a.link, a.alias) / body)
        expected = fragments(ip(a.view, a.others_link) / body)
        for one, other in zip(sent, expected, strict=True):
            after = programs.redirects("port_ingress", from_guest(one))
            assert after == to_guest(other, ANOTHER)

    def test_later_ones_follow_the_first_to_natives(self, programs: Programs, a: Plan) -> None:
        body = udp(EPHEMERAL, NATIVE_PORT, bytes(range(100)))
        sent = fragments(ip(a.link, a.alias) / body)
        expected = fragments(ip(a.native_view, a.loopback) / body)
        for one, other in zip(sent, expected, strict=True):
            assert programs.redirects("port_ingress", from_guest(one)) == from_guest(one)
            assert programs.redirects("uplink_ingress", from_guest(one)) == frame(other)

    def test_later_ones_follow_the_first_from_natives(self, programs: Programs, a: Plan) -> None:
        for there, sport, dport, src, dst in (
            (a.loopback, EPHEMERAL, OWN_PORT, a.native_source, a.link),
            (a.native_view, NATIVE_PORT, EPHEMERAL, a.alias, a.link),
        ):
            body = udp(sport, dport, bytes(range(100)))
            sent, expected = fragments(ip(a.loopback, there) / body), fragments(ip(src, dst) / body)
            for one, other in zip(sent, expected, strict=True):
                assert programs.redirects("lo_egress", frame(one)) == to_guest(other, US)

    def test_one_without_its_first_is_dropped_at_ports_and_passes_on_lo(
        self, programs: Programs, a: Plan
    ) -> None:
        body = udp(EPHEMERAL, OWN_PORT, bytes(100))
        _, later = fragments(ip(a.link, a.alias) / body)
        assert programs.drops("port_ingress", from_guest(later), "fragment_orphan")
        _, later = fragments(ip(a.loopback, a.loopback) / body)
        assert programs.passes("lo_egress", frame(later))

    def test_another_datagrams_first_does_not_serve(self, programs: Programs, a: Plan) -> None:
        body = udp(EPHEMERAL, OWN_PORT, bytes(100))
        first, later = fragments(ip(a.link, a.alias) / body)
        programs.redirects("port_ingress", from_guest(first))
        layer = later if a.family is Family.IPV4 else later[IPv6ExtHdrFragment]
        layer.id += 1
        assert programs.drops("port_ingress", from_guest(later), "fragment_orphan")


# --- safety ---------------------------------------------------------------------------------


class TestSpoofing:
    def test_guest_sends_only_from_its_own_address(self, programs: Programs, a: Plan) -> None:
        outside = ip_address("192.0.2.1" if a.family is Family.IPV4 else "2001:db8::1")
        for source in (
            a.others_link,
            a.alias,
            a.native_source,
            a.pod_link,
            a.loopback,
            a.view,
            a.native_view,
            outside,
        ):
            for there in (a.alias, a.pod_link, a.others_link):
                sent = from_guest(ip(source, there) / tcp(1, NATIVE_PORT))
                assert programs.drops("port_ingress", sent, "spoofed")

    def test_guest_sends_only_from_its_own_mac(self, programs: Programs, a: Plan) -> None:
        sent = frame(ip(a.link, a.alias) / tcp(1, NATIVE_PORT), src=POD_MAC, dst=guest_mac(9))
        assert programs.drops("port_ingress", sent, "spoofed")

    def test_guest_reaches_no_loopback_address(self, programs: Programs, a: Plan) -> None:
        for there in (a.loopback, a.native_view):
            sent = from_guest(ip(a.link, there) / tcp(1, NATIVE_PORT))
            assert programs.drops("port_ingress", sent, "spoofed")

    def test_guest_answers_only_from_ports_that_it_owns(self, programs: Programs, a: Plan) -> None:
        for port in (NATIVE_PORT, ANOTHERS_PORT):
            for there in (a.native_source, a.native_source_odd, a.others_view):
                sent = from_guest(ip(a.link, there) / tcp(port, EPHEMERAL))
                assert programs.drops("port_ingress", sent, "spoofed")

    def test_natives_send_in_no_guests_name_by_lo(self, programs: Programs, a: Plan) -> None:
        for source in (a.link, a.others_link, a.others_link_local, a.view, a.native_view):
            for port in (OWN_PORT, NATIVE_PORT):
                for l4 in (tcp, udp):
                    sent = frame(ip(source, a.loopback) / l4(1, port))
                    assert programs.drops("lo_egress", sent, "spoofed")

    def test_natives_answer_from_no_guests_port(self, programs: Programs, a: Plan) -> None:
        for port in (OWN_PORT, ANOTHERS_PORT):
            sent = frame(ip(a.loopback, a.native_view) / udp(port, EPHEMERAL))
            assert programs.drops("lo_egress", sent, "spoofed")
        sent = frame(ip(a.loopback, a.native_view) / udp(NATIVE_PORT, EPHEMERAL))
        assert programs.run("lo_egress", sent)[0] == REDIRECTED

    def test_natives_send_in_no_guests_name_by_the_uplink(
        self, programs: Programs, a: Plan
    ) -> None:
        for source in (a.others_link_local, a.others_link, a.view, a.native_view, a.native_source):
            sent = frame(ip(source, a.link) / udp(1, OWN_PORT))
            assert programs.drops("uplink_egress", sent, "spoofed")
        assert programs.passes("uplink_egress", frame(ip(a.pod_link, a.link) / udp(1, OWN_PORT)))

    def test_nothing_bridged_may_look_like_ours(self, programs: Programs, a: Plan) -> None:
        for ours in (
            a.alias,
            a.native_source,
            a.native_source_odd,
            a.view,
            a.native_view,
            a.loopback,
        ):
            for sent in (ip(ours, a.link), ip(a.pod_link, ours)):
                bridged = frame(sent / tcp(1, 2), src=POD_MAC, dst=guest_mac(US))
                assert programs.drops("bridge_egress", bridged, "outside")

    def test_vlan_and_other_protocols_of_guests_are_dropped(
        self, programs: Programs, a: Plan
    ) -> None:
        inner = ip(a.link, a.alias) / tcp(1, NATIVE_PORT)
        kind = 0x0800 if a.family is Family.IPV4 else 0x86DD
        tagged = bytes(Ether(src=guest_mac(US)) / Dot1Q(vlan=5, type=kind) / inner)
        assert programs.drops("port_ingress", tagged, "unhandled")
        other = bytes(Ether(src=guest_mac(US), type=0x88B5) / Raw(bytes(60)))
        assert programs.drops("port_ingress", other, "unhandled")


# --- odd packets ----------------------------------------------------------------------------


def test_protocols_without_ports_pass_on_lo_and_are_dropped_at_ports(
    programs: Programs, a: Plan
) -> None:
    sctp = {"proto": 132} if a.family is Family.IPV4 else {"nh": 132}
    body = Raw(bytes(60))
    assert programs.passes("lo_egress", frame(ip(a.loopback, a.loopback, **sctp) / body))
    sent = from_guest(ip(a.link, a.alias, **sctp) / body)
    assert programs.drops("port_ingress", sent, "unhandled")


def test_wrong_ip_headers_are_never_translated(programs: Programs, a: Plan) -> None:
    good = frame(ip(a.loopback, a.loopback) / tcp(EPHEMERAL, OWN_PORT))
    first_bytes = (0x05, 0x41, 0x44, 0x60, 0xF5) if a.family is Family.IPV4 else (0x00, 0x45, 0x70)
    for first in first_bytes:
        bad = good[:14] + bytes([first]) + good[15:]
        assert programs.run("lo_egress", bad)[0] == PASSED
        assert programs.run("port_ingress", bad)[0] == DROPPED


def truncatable(a: Plan) -> Iterator[tuple[str, bytes, int]]:
    """Program, a frame that it redirects, and how many of its last bytes that does not need."""
    inner = l4_bytes(ip(a.native_source, a.link) / udp(EPHEMERAL, OWN_PORT, b""))
    error = unreachable(a.native_source, a.link, inner)
    yield "lo_egress", frame(ip(a.loopback, a.loopback) / TCP(dport=OWN_PORT)), 0
    yield "lo_egress", frame(ip(a.loopback, a.native_view) / udp(1, 2, b"")), 0
    yield "port_ingress", from_guest(ip(a.link, a.alias) / TCP(dport=ANOTHERS_PORT)), 0
    yield "port_ingress", from_guest(ip(a.link, a.alias) / udp(1, NATIVE_PORT, b"")), 0
    # An error tells its flow by the ports inside, the first four of the last eight bytes.
    yield "uplink_ingress", from_guest(ip(a.link, a.native_source) / error), 4
    yield "uplink_ingress", from_guest(ip(a.link, a.alias) / TCP(dport=NATIVE_PORT)), 0


def test_truncated_frames_are_not_translated_at_any_length(programs: Programs, a: Plan) -> None:
    shortest = 14 + (20 if a.family is Family.IPV4 else 40)  # Linux 6.18 runs nothing shorter
    for name, whole, spare in truncatable(a):
        assert programs.run(name, whole)[0] == REDIRECTED
        for length in range(shortest, len(whole)):
            verdict, after = programs.run(name, whole[:length])
            assert (verdict == REDIRECTED) == (length >= len(whole) - spare), (name, length)
            assert verdict != PASSED or after == whole[:length]
