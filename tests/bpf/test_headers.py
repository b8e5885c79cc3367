"""Headers that only one family has: options of IPv4, extension headers of IPv6."""

from __future__ import annotations

import pytest
from scapy.layers.inet import ICMP, IPOption_NOP, IPOption_RR
from scapy.layers.inet6 import (
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
)
from scapy.packet import Packet, Raw

from testbed.model.addresses import Address
from testbed.model.terms import Family

from .frames import EPHEMERAL, Plan, frame, from_guest, ip, tcp, to_guest, too_big, udp, unreachable
from .verdicts import OWN_PORT, US, Programs

pytestmark = pytest.mark.root


def test_ip_options_survive(programs: Programs) -> None:
    a = Plan(Family.IPV4)
    options = {"options": [IPOption_RR(routers=["0.0.0.0"] * 3), IPOption_NOP()]}
    body = tcp(EPHEMERAL, OWN_PORT)
    after = programs.redirects("lo_egress", frame(ip(a.loopback, a.loopback, **options) / body))
    assert after == to_guest(ip(a.native_source, a.link, **options) / body, US)


def test_extension_headers_pass_on_lo_and_are_dropped_at_ports(programs: Programs) -> None:
    a = Plan(Family.IPV6)
    for extension in (IPv6ExtHdrDestOpt(), IPv6ExtHdrHopByHop()):
        body = extension / tcp(EPHEMERAL, OWN_PORT)
        assert programs.passes("lo_egress", frame(ip(a.loopback, a.loopback) / body))
        sent = from_guest(ip(a.link, a.alias) / body)
        assert programs.drops("port_ingress", sent, "unhandled")


def test_atomic_fragment_is_none(programs: Programs) -> None:
    a = Plan(Family.IPV6)

    def sent(src: Address, dst: Address) -> Packet:
        return ip(src, dst) / IPv6ExtHdrFragment(id=1) / udp(EPHEMERAL, OWN_PORT)

    after = programs.redirects("lo_egress", frame(sent(a.loopback, a.loopback)))
    assert after == to_guest(sent(a.native_source, a.link), US)


@pytest.mark.parametrize("family", Family, ids=str)
def test_a_guest_tells_loopback_no_path_mtu(programs: Programs, family: Family) -> None:
    """The kernel would keep it for 127.0.0.1 or ::1, that is for all natives of the pod."""
    a = Plan(family)
    about = bytes(tcp(EPHEMERAL, OWN_PORT))
    inner = bytes(unreachable(a.native_source, a.link, about).payload)
    told = too_big(family)
    sent = from_guest(ip(a.link, a.native_source) / told / Raw(inner))
    assert programs.drops("port_ingress", sent, "unhandled")
    inner = bytes(unreachable(a.pod_link, a.link, about).payload)
    sent = from_guest(ip(a.link, a.pod_link) / told / Raw(inner))
    assert programs.drops("port_ingress", sent, "unhandled")
    refused = unreachable(a.native_source, a.link, about)
    programs.redirects("port_ingress", from_guest(ip(a.link, a.native_source) / refused))


@pytest.mark.parametrize("family", Family)
def test_an_error_is_about_what_its_receiver_sent_to_its_sender(
    programs: Programs, family: Family
) -> None:
    """The kernel believes what an error says about the flow that it quotes, whosever that is."""
    a = Plan(family)
    about = bytes(udp(EPHEMERAL, OWN_PORT))
    for to in (a.pod_link, a.native_source, a.alias):
        for source, destination in (
            (a.loopback, a.loopback),
            (to, a.others_link),
            (a.loopback, a.link),
        ):
            posing = unreachable(source, destination, about)
            assert programs.drops("port_ingress", from_guest(ip(a.link, to) / posing), "unhandled")
    own = from_guest(ip(a.link, a.pod_link) / unreachable(a.pod_link, a.link, about))
    assert programs.passes("port_ingress", own)


def test_an_error_about_a_later_fragment_has_no_ports(programs: Programs) -> None:
    """What stands where ports would be is the guest's to choose."""
    a = Plan(Family.IPV4)
    posing = bytes(udp(EPHEMERAL, OWN_PORT))
    inner = bytes(ip(a.native_source, a.link, proto=17, frag=10) / Raw(posing))
    sent = from_guest(ip(a.link, a.native_source) / ICMP(type=3, code=3) / Raw(inner))
    assert programs.drops("port_ingress", sent, "unhandled")
