"""ARP and neighbor discovery at a guest's port: answers byte for byte, and who may claim what."""

from __future__ import annotations

from typing import Any

import pytest
from scapy.layers.inet6 import (
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6ND_Redirect,
    ICMPv6ND_RS,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptSrcLLAddr,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    PadN,
)
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet, Raw

from testbed.model import addresses
from testbed.model.addresses import ALIAS_MAC, POD_MAC, Address, guest_mac
from testbed.model.terms import Family

from .frames import link_local
from .verdicts import ANOTHER, US, Programs

pytestmark = pytest.mark.root

OURS = guest_mac(US)
BROADCAST = "ff:ff:ff:ff:ff:ff"
LINK_LOCAL, LINK_LOCAL_OF_ANOTHER = link_local(US), link_local(ANOTHER)


def answered(family: Family) -> list[Address]:
    """Addresses that nobody has, and that guests must find."""
    return [
        addresses.alias(family),
        addresses.native_source(family),
        addresses.native_source_odd(family),
        addresses.guest_view(family, US),
        addresses.guest_view(family, ANOTHER),
    ]


def others(family: Family) -> list[Address]:
    """Addresses that others have, and answer for."""
    return [addresses.pod_link(family), addresses.guest_link(family, ANOTHER)]


# --- ARP ------------------------------------------------------------------------------------

LINK4 = str(addresses.guest_link(Family.IPV4, US))


def arp(**fields: Any) -> bytes:
    header = Ether(src=OURS, dst=BROADCAST)
    return bytes(header / ARP(**{"op": 1, "hwsrc": OURS, "psrc": LINK4, **fields}))


def test_arp_requests_for_our_addresses_are_answered(programs: Programs) -> None:
    for address in answered(Family.IPV4):
        before = programs.count("answered")
        after = programs.redirects("port_ingress", arp(pdst=str(address)))
        reply = ARP(op=2, hwsrc=ALIAS_MAC, psrc=str(address), hwdst=OURS, pdst=LINK4)
        assert after == bytes(Ether(src=ALIAS_MAC, dst=OURS) / reply)
        assert programs.count("answered") == before + 1


def test_arp_among_link_addresses_passes(programs: Programs) -> None:
    for address in [*others(Family.IPV4), addresses.guest_link(Family.IPV4, US)]:
        assert programs.passes("port_ingress", arp(pdst=str(address)))
    reply = arp(op=2, pdst=str(addresses.pod_link(Family.IPV4)), hwdst=POD_MAC)
    assert programs.passes("port_ingress", reply)
    assert programs.passes("port_ingress", arp(psrc="0.0.0.0", pdst=LINK4))  # a probe


@pytest.mark.parametrize("op", [1, 2])
def test_arp_claims_only_the_guests_own_address(programs: Programs, op: int) -> None:
    for claimed in [*answered(Family.IPV4), *others(Family.IPV4)]:
        sent = arp(op=op, psrc=str(claimed), pdst=str(addresses.pod_link(Family.IPV4)))
        assert programs.drops("port_ingress", sent, "spoofed")
    assert programs.drops("port_ingress", arp(op=op, hwsrc=POD_MAC), "spoofed")


def test_bridged_arp_may_not_claim_our_addresses(programs: Programs) -> None:
    for claimed in answered(Family.IPV4):
        assert programs.drops("bridge_egress", arp(psrc=str(claimed), pdst=LINK4), "outside")
    assert programs.passes("bridge_egress", arp(pdst=LINK4))


# --- neighbor discovery ---------------------------------------------------------------------

LINK6 = str(addresses.guest_link(Family.IPV6, US))


def nd(message: Packet, src: str = LINK6, dst: str = "ff02::1:ff00:1") -> bytes:
    return bytes(
        Ether(src=OURS, dst="33:33:ff:00:00:01") / IPv6(src=src, dst=dst, hlim=255) / message
    )


def solicitation(target: Address | str) -> Packet:
    return ICMPv6ND_NS(tgt=str(target)) / ICMPv6NDOptSrcLLAddr(lladdr=OURS)


@pytest.mark.parametrize("source", [LINK6, LINK_LOCAL])
@pytest.mark.parametrize("option", [True, False])
def test_solicitations_for_our_addresses_are_answered(
    programs: Programs, source: str, option: bool
) -> None:
    for address in answered(Family.IPV6):
        asked = solicitation(address) if option else ICMPv6ND_NS(tgt=str(address))
        after = programs.redirects("port_ingress", nd(asked, src=source))
        answer = (
            Ether(src=ALIAS_MAC, dst=OURS)
            / IPv6(src=str(address), dst=source, hlim=255)
            / ICMPv6ND_NA(tgt=str(address), R=0, S=1, O=1)
            / ICMPv6NDOptDstLLAddr(lladdr=ALIAS_MAC)
        )
        assert after == bytes(answer)


def test_solicitations_for_others_pass(programs: Programs) -> None:
    for address in others(Family.IPV6):
        assert programs.passes("port_ingress", nd(solicitation(address)))
    assert programs.passes("port_ingress", nd(ICMPv6ND_RS(), src=LINK_LOCAL, dst="ff02::2"))


def test_duplicate_address_detection_of_own_addresses_passes(programs: Programs) -> None:
    for target in (LINK6, LINK_LOCAL):
        assert programs.passes("port_ingress", nd(ICMPv6ND_NS(tgt=target), src="::"))


def test_neighbor_discovery_claims_only_the_guests_own_addresses(programs: Programs) -> None:
    for claimed in [*answered(Family.IPV6), *others(Family.IPV6)]:
        for message, source in (
            (ICMPv6ND_NS(tgt=str(claimed)), "::"),
            (ICMPv6ND_NA(tgt=str(claimed)), LINK6),
            (solicitation(addresses.pod_link(Family.IPV6)), str(claimed)),
        ):
            assert programs.drops("port_ingress", nd(message, src=source), "spoofed")


def test_guest_may_not_pose_as_a_router(programs: Programs) -> None:
    for message in (ICMPv6ND_RA(), ICMPv6ND_Redirect()):
        assert programs.drops("port_ingress", nd(message, src=LINK_LOCAL), "spoofed")


def test_bridged_advertisements_may_not_claim_our_addresses(programs: Programs) -> None:
    for claimed in answered(Family.IPV6):
        sent = nd(ICMPv6ND_NA(tgt=str(claimed)), src=str(addresses.pod_link(Family.IPV6)))
        assert programs.drops("bridge_egress", sent, "outside")


@pytest.mark.parametrize("op", ["solicits", "advertises", "probes"])
def test_nobody_claims_the_link_local_address_of_another(programs: Programs, op: str) -> None:
    of_another = LINK_LOCAL_OF_ANOTHER
    message, source = {
        "solicits": (solicitation(addresses.pod_link(Family.IPV6)), of_another),
        "advertises": (ICMPv6ND_NA(tgt=of_another), LINK6),
        "probes": (ICMPv6ND_NS(tgt=of_another), "::"),
    }[op]
    assert programs.drops("port_ingress", nd(message, src=source), "spoofed")
    for strange in ("fe80::1", "fe80::1:77:ff:fe00:100", "fe80:1::77:ff:fe00:100"):
        assert programs.drops("port_ingress", nd(ICMPv6ND_NA(tgt=strange), src=LINK6), "spoofed")


HIDING = {
    "hop-by-hop": IPv6ExtHdrHopByHop(options=[PadN(optdata=bytes(4))]),
    "destination": IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(4))]),
    "routing": IPv6ExtHdrRouting(),
    "several": IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt(),
    "atomic-fragment": IPv6ExtHdrFragment(offset=0, m=0),
    "first-fragment": IPv6ExtHdrFragment(offset=0, m=1),
    "fragment-of-options": IPv6ExtHdrFragment(offset=0, m=0) / IPv6ExtHdrDestOpt(),
}
"""RFC 7113: what a guard that looks at the first header alone does not see behind."""


@pytest.mark.parametrize("hiding", HIDING.values(), ids=HIDING)
def test_no_header_hides_neighbor_discovery(programs: Programs, hiding: Packet) -> None:
    of_alias = str(addresses.alias(Family.IPV6))
    for message in (ICMPv6ND_RA(), ICMPv6ND_Redirect(), ICMPv6ND_NA(tgt=of_alias)):
        for source in (LINK6, LINK_LOCAL):
            frame = nd(hiding.copy() / message, src=source, dst="ff02::1")
            assert any(
                programs.drops("port_ingress", frame, why) for why in ("spoofed", "unhandled")
            )


@pytest.mark.parametrize("hiding", HIDING.values(), ids=HIDING)
def test_no_header_hides_a_bridged_advertisement(programs: Programs, hiding: Packet) -> None:
    message = hiding.copy() / ICMPv6ND_NA(tgt=str(addresses.alias(Family.IPV6)))
    for source in (LINK6, LINK_LOCAL):
        frame = nd(message, src=source, dst="ff02::1")
        assert programs.drops("bridge_egress", frame, "outside")


def test_a_first_fragment_too_short_to_tell_is_dropped(programs: Programs) -> None:
    """RFC 7112: the rest could be a router advertisement's."""
    short = IPv6ExtHdrFragment(nh=58, offset=0, m=1) / Raw(bytes(ICMPv6ND_RA())[:4])
    assert programs.drops("port_ingress", nd(short, dst="ff02::1"), "truncated")
