"""What the programs of `broadcast` make of a frame, run by BPF_PROG_TEST_RUN.

    guest 0 (us): 5000      guest 3: 5003      native: all other ports

At guest 0's door a wanted copy becomes, byte for byte, the frame that scapy makes with the other
addresses; an unwanted one goes without a trace but in the counter. Copying itself takes links:
`tests/integration/test_baselines.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from testbed.datapaths.broadcast import REASONS
from testbed.model.terms import Family

from .frames import EPHEMERAL, Plan, frame, from_guest, ip, tcp, to_guest, udp, unreachable
from .verdicts import ANOTHER, ANOTHERS_PORT, NATIVE_PORT, OWN_PORT, PASSED, US, Programs, in_slot_0

pytestmark = [pytest.mark.root, pytest.mark.parametrize("family", Family)]


class Doors(Programs):
    def lets_in(self, name: str, frame: bytes) -> bytes:
        """The frame afterwards, which must have been passed on."""
        verdict, after = self.run(name, frame)
        assert verdict == PASSED
        return after


@pytest.fixture(scope="module")
def doors() -> Iterator[Doors]:
    with in_slot_0("broadcast", REASONS) as programs:
        yield Doors(programs, REASONS)


@pytest.fixture
def a(family: Family) -> Plan:
    return Plan(family)


@pytest.mark.parametrize("l4", [tcp, udp])
class TestWanted:
    def test_what_a_native_sends_to_our_port(self, doors: Doors, a: Plan, l4: type) -> None:
        body = l4(EPHEMERAL, OWN_PORT)
        after = doors.lets_in("port_egress", frame(ip(a.loopback, a.loopback) / body))
        assert after == to_guest(ip(a.native_source, a.link) / body, US)

    def test_what_a_native_answers_us(self, doors: Doors, a: Plan, l4: type) -> None:
        body = l4(NATIVE_PORT, EPHEMERAL)
        after = doors.lets_in("port_egress", frame(ip(a.loopback, a.native_view) / body))
        assert after == to_guest(ip(a.alias, a.link) / body, US)

    def test_what_another_guest_sends_to_our_port(self, doors: Doors, a: Plan, l4: type) -> None:
        body = l4(EPHEMERAL, OWN_PORT)
        copy = from_guest(ip(a.others_link, a.alias) / body, ANOTHER)
        after = doors.lets_in("port_egress", copy)
        assert after == to_guest(ip(a.others_view, a.link) / body, US)

    def test_what_another_guest_answers_us(self, doors: Doors, a: Plan, l4: type) -> None:
        body = l4(ANOTHERS_PORT, EPHEMERAL)
        after = doors.lets_in("port_egress", from_guest(ip(a.others_link, a.view) / body, ANOTHER))
        assert after == to_guest(ip(a.alias, a.link) / body, US)

    def test_what_natives_say_to_natives(self, doors: Doors, a: Plan, l4: type) -> None:
        body = l4(EPHEMERAL, NATIVE_PORT)
        assert doors.passes("lo_ingress", frame(ip(a.loopback, a.loopback) / body))

    def test_what_the_pods_own_stack_sends_to_us(self, doors: Doors, a: Plan, l4: type) -> None:
        body = l4(EPHEMERAL, NATIVE_PORT)
        assert doors.passes("port_egress", to_guest(ip(a.pod_link, a.link) / body, US))


@pytest.mark.parametrize("l4", [tcp, udp])
class TestUnwanted:
    @pytest.mark.parametrize("port", [ANOTHERS_PORT, NATIVE_PORT])
    def test_for_anothers_port(self, doors: Doors, a: Plan, l4: type, port: int) -> None:
        body = l4(EPHEMERAL, port)
        assert doors.drops("port_egress", frame(ip(a.loopback, a.loopback) / body), "unwanted")
        copy = from_guest(ip(a.others_link, a.alias) / body, ANOTHER)
        assert doors.drops("port_egress", copy, "unwanted")

    def test_answers_to_somebody_else(self, doors: Doors, a: Plan, l4: type) -> None:
        body = l4(NATIVE_PORT, EPHEMERAL)
        for copy in (
            frame(ip(a.loopback, a.unknown) / body),
            frame(ip(a.loopback, a.loopback) / body),
            from_guest(ip(a.others_link, a.native_source) / body, ANOTHER),
            from_guest(ip(a.others_link, a.others_view) / body, ANOTHER),
        ):
            assert doors.drops("port_egress", copy, "unwanted")

    def test_natives_hear_nothing_of_guests_ports(self, doors: Doors, a: Plan, l4: type) -> None:
        for packet in (
            ip(a.loopback, a.loopback) / l4(EPHEMERAL, OWN_PORT),
            ip(a.loopback, a.native_view) / l4(NATIVE_PORT, EPHEMERAL),
        ):
            assert doors.drops("lo_ingress", frame(packet), "unwanted")


def test_errors_go_with_their_flow(doors: Doors, a: Plan) -> None:
    about = bytes(udp(OWN_PORT, EPHEMERAL))
    error = frame(ip(a.loopback, a.loopback) / unreachable(a.loopback, a.loopback, about))
    after = doors.lets_in("port_egress", error)
    assert after == to_guest(
        ip(a.native_source, a.link) / unreachable(a.link, a.native_source, about), US
    )
    assert doors.drops("lo_ingress", error, "unwanted")


def test_a_guest_claims_only_what_is_its_own(doors: Doors, a: Plan) -> None:
    for packet in (
        ip(a.others_link, a.alias) / tcp(EPHEMERAL, NATIVE_PORT),
        ip(a.link, a.loopback) / tcp(EPHEMERAL, NATIVE_PORT),
        ip(a.link, a.others_view) / tcp(ANOTHERS_PORT, EPHEMERAL),
    ):
        assert doors.drops("port_ingress", from_guest(packet), "spoofed")
