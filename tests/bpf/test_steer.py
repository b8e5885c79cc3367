"""What each program of `steer` makes of a frame, run by BPF_PROG_TEST_RUN.

Only what differs from `capture`, with which it shares `bpf/pod.h`. Sockets are looked up in the
namespace that the test runs in, where none has these addresses: handing packets to sockets is
tested with real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from scapy.packet import Packet

from testbed.bpf import ProgramSet
from testbed.datapaths import steer
from testbed.datapaths.ebpf.rows import Rows
from testbed.model.addresses import guest_mac
from testbed.model.terms import Family

from .frames import EPHEMERAL, Plan, echo, fragments, frame, from_guest, ip, tcp, to_guest, udp
from .frames import unreachable as port_unreachable
from .verdicts import (
    ANOTHER,
    ANOTHERS_PORT,
    DROPPED,
    NATIVE_PORT,
    OWN_PORT,
    PASSED,
    US,
    Programs,
)

pytestmark = [pytest.mark.root, pytest.mark.parametrize("family", Family)]

Body = Callable[[int, int], Packet]
L4: dict[str, Body] = {"tcp": tcp, "udp": udp}
EACH_L4 = pytest.mark.parametrize("l4", L4.values(), ids=L4)


@pytest.fixture
def programs(loaded_steer: ProgramSet) -> Programs:
    return Programs(loaded_steer, steer.REASONS)


@pytest.fixture
def rows(loaded_steer: ProgramSet) -> Rows:
    return Rows(loaded_steer, steer.REASONS)


@pytest.fixture
def a(family: Family) -> Plan:
    return Plan(family)


@EACH_L4
class TestTranslation:
    def test_native_to_guest(self, programs: Programs, a: Plan, l4: Body) -> None:
        body = l4(EPHEMERAL, ANOTHERS_PORT)
        after = programs.redirects("lo_egress", frame(ip(a.loopback, a.loopback) / body))
        assert after == to_guest(ip(a.native_source, a.others_link) / body, ANOTHER)

    def test_guest_answers_native(self, programs: Programs, a: Plan, l4: Body) -> None:
        body = l4(OWN_PORT, EPHEMERAL)
        after = programs.redirects("port_ingress", from_guest(ip(a.link, a.native_source) / body))
        assert after == frame(ip(a.loopback, a.loopback) / body)

    def test_guest_to_native_without_a_socket_of_the_pod(
        self, programs: Programs, a: Plan, l4: Body
    ) -> None:
        before = programs.count("fallback")
        body = l4(EPHEMERAL, NATIVE_PORT)
        after = programs.redirects("port_ingress", from_guest(ip(a.link, a.alias) / body))
        assert after == frame(ip(a.native_view, a.loopback) / body)
        assert programs.count("fallback") == before + 1

    def test_native_answers_guest(self, programs: Programs, a: Plan, l4: Body) -> None:
        body = l4(NATIVE_PORT, EPHEMERAL)
        after = programs.redirects("lo_egress", frame(ip(a.loopback, a.native_view) / body))
        assert after == to_guest(ip(a.alias, a.link) / body, US)

    def test_guest_to_guest_and_back(self, programs: Programs, a: Plan, l4: Body) -> None:
        there, back = l4(EPHEMERAL, ANOTHERS_PORT), l4(OWN_PORT, EPHEMERAL)
        after = programs.redirects("port_ingress", from_guest(ip(a.link, a.alias) / there))
        assert after == to_guest(ip(a.view, a.others_link) / there, ANOTHER)
        after = programs.redirects("port_ingress", from_guest(ip(a.link, a.others_view) / back))
        assert after == to_guest(ip(a.alias, a.others_link) / back, ANOTHER)


class TestGuestThatIsDown:
    @pytest.fixture(autouse=True)
    def _down(self, rows: Rows) -> Iterator[None]:
        rows.set_port(ANOTHER, 0)
        yield
        rows.set_port(ANOTHER, 1)

    def test_its_peer_is_refused_by_the_kernel_in_its_name(
        self, programs: Programs, a: Plan
    ) -> None:
        there, back = tcp(OWN_PORT, EPHEMERAL), tcp(EPHEMERAL, OWN_PORT, flags="R")
        after = programs.redirects("port_ingress", from_guest(ip(a.link, a.others_view) / there))
        assert after == frame(ip(a.native_view, a.others_native_view) / there)
        after = programs.redirects(
            "lo_egress", frame(ip(a.others_native_view, a.native_view) / back)
        )
        assert after == to_guest(ip(a.others_view, a.link) / back, US)

    @pytest.mark.parametrize(
        "body",
        [tcp(OWN_PORT, NATIVE_PORT, flags="S"), udp(OWN_PORT, NATIVE_PORT)],
        ids=["SYN", "datagram"],
    )
    def test_nothing_that_a_native_could_take_gets_to_lo(
        self, programs: Programs, a: Plan, body: Packet
    ) -> None:
        sent = from_guest(ip(a.link, a.others_view) / body)
        assert programs.drops("port_ingress", sent, "no_guest")


class TestNothingRewritten:
    def test_answers_to_the_pods_own_address_pass_and_are_counted(
        self, programs: Programs, rows: Rows, a: Plan
    ) -> None:
        packets, octets = rows.carried(None, US)
        sent = from_guest(ip(a.link, a.pod_link) / tcp(OWN_PORT, EPHEMERAL))
        assert programs.passes("port_ingress", sent)
        assert rows.carried(None, US) == (packets + 1, octets + len(sent) - 14)

    @pytest.mark.parametrize("source", ["pod_link", "alias"])
    def test_what_the_pods_own_stack_sends_is_counted(
        self, programs: Programs, rows: Rows, a: Plan, source: str
    ) -> None:
        ends = (None, US) if source == "pod_link" else (US, None)
        packets, octets = rows.carried(*ends)
        sent = to_guest(ip(getattr(a, source), a.link) / tcp(EPHEMERAL, OWN_PORT), US)
        assert programs.passes("port_egress", sent)
        assert rows.carried(*ends) == (packets + 1, octets + len(sent) - 14)

    def test_echo_to_the_alias_is_the_pods_own(self, programs: Programs, a: Plan) -> None:
        assert programs.passes("port_ingress", from_guest(ip(a.link, a.alias) / echo(a.family)))

    def test_what_no_guest_owns_stays_on_lo(self, programs: Programs, a: Plan) -> None:
        sent = frame(ip(a.loopback, a.loopback) / tcp(EPHEMERAL, NATIVE_PORT))
        assert programs.passes("lo_egress", sent)


class TestByLoAlways:
    def test_fragments(self, programs: Programs, a: Plan) -> None:
        whole = ip(a.link, a.alias) / udp(EPHEMERAL, NATIVE_PORT)
        expected = fragments(ip(a.native_view, a.loopback) / udp(EPHEMERAL, NATIVE_PORT))
        for sent, arrives in zip(fragments(whole), expected, strict=True):
            after = programs.redirects("port_ingress", from_guest(sent))
            # The checksum in the first covers what only both hold: compare all but it.
            assert len(after) == len(frame(arrives))
            assert after[:34] == frame(arrives)[:34]
        programs.forget()

    def test_errors_about_datagrams(self, programs: Programs, a: Plan) -> None:
        """Our socket would be found by the addresses on `lo` alone."""
        sent_before = bytes(udp(NATIVE_PORT, EPHEMERAL))
        error = ip(a.link, a.alias) / port_unreachable(a.alias, a.link, sent_before)
        after = programs.redirects("port_ingress", from_guest(error))
        on_lo = ip(a.native_view, a.loopback) / port_unreachable(
            a.loopback, a.native_view, sent_before
        )
        assert after == frame(on_lo)


class TestDropped:
    @pytest.mark.parametrize("claimed", ["others_link", "alias", "native_source", "pod_link"])
    def test_sources_that_are_not_its_own(self, programs: Programs, a: Plan, claimed: str) -> None:
        sent = from_guest(ip(getattr(a, claimed), a.alias) / tcp(EPHEMERAL, NATIVE_PORT))
        assert programs.drops("port_ingress", sent, "spoofed")

    @pytest.mark.parametrize("aim", ["loopback", "native_view"])
    def test_addresses_that_exist_on_lo_only(self, programs: Programs, a: Plan, aim: str) -> None:
        sent = from_guest(ip(a.link, getattr(a, aim)) / tcp(EPHEMERAL, NATIVE_PORT))
        assert programs.drops("port_ingress", sent, "spoofed")

    @pytest.mark.parametrize("aim", ["native_source", "others_view"])
    def test_answers_from_a_port_that_it_does_not_own(
        self, programs: Programs, a: Plan, aim: str
    ) -> None:
        sent = from_guest(ip(a.link, getattr(a, aim)) / tcp(NATIVE_PORT, EPHEMERAL))
        assert programs.drops("port_ingress", sent, "spoofed")

    def test_too_big_for_the_link(self, programs: Programs, a: Plan) -> None:
        sent = frame(ip(a.loopback, a.loopback) / udp(EPHEMERAL, OWN_PORT, bytes(1480)))
        assert programs.drops("lo_egress", sent, "too_big")

    @EACH_L4
    def test_truncated_at_any_length_it_does_no_harm(
        self, programs: Programs, a: Plan, l4: Body
    ) -> None:
        body = l4(EPHEMERAL, NATIVE_PORT)
        arrives, leaves = from_guest(ip(a.link, a.alias) / body), frame(ip(a.alias, a.link) / body)
        headers = len(arrives) - len(bytes(body.payload))
        shortest = 14 + (20 if a.family is Family.IPV4 else 40)  # Linux 6.18 runs nothing shorter
        for length in range(shortest, headers):
            assert programs.run("port_ingress", arrives[:length])[0] == DROPPED
            assert programs.run("port_egress", leaves[:length])[0] == PASSED

    def test_what_natives_send_in_anothers_name(self, programs: Programs, a: Plan) -> None:
        for source in (a.others_link_local, a.others_link, a.view, a.native_view, a.native_source):
            sent = frame(ip(source, a.link) / udp(1, OWN_PORT))
            assert programs.drops("port_egress", sent, "spoofed")
        for source in (a.pod_link, a.alias):
            assert programs.passes("port_egress", frame(ip(source, a.link) / udp(1, OWN_PORT)))

    def test_frames_from_another_mac_address(self, programs: Programs, a: Plan) -> None:
        packet = ip(a.link, a.alias) / tcp(EPHEMERAL, NATIVE_PORT)
        sent = frame(packet, src=guest_mac(ANOTHER), dst=guest_mac(US))
        assert programs.drops("port_ingress", sent, "spoofed")
