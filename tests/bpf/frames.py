"""Frames of either family, made by scapy, whose checksums are the independent opinion."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6PacketTooBig,
    IPv6,
    IPv6ExtHdrFragment,
)
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from testbed.model import addresses
from testbed.model.addresses import ALIAS_MAC, Address, guest_mac
from testbed.model.terms import Family

from .verdicts import ANOTHER, US

NOBODY = "00:00:00:00:00:00"
PAYLOAD = b"odd sized payload"
EPHEMERAL = 40000


def link_local(n: int) -> str:
    """What Linux and OSv make of the MAC of guest n (RFC 4291, appendix A)."""
    return f"fe80::77:ff:fe00:1{n:02x}"


class Plan:
    """The addresses of one family, as guest `us` and guest `another` have them."""

    def __init__(self, family: Family, us: int = US, another: int = ANOTHER) -> None:
        self.family = family
        self.loopback = addresses.loopback(family)
        self.alias = addresses.alias(family)
        self.native_source = addresses.native_source(family)
        self.native_source_odd = addresses.native_source_odd(family)
        self.pod_link = addresses.pod_link(family)
        self.link = addresses.guest_link(family, us)
        self.others_link = addresses.guest_link(family, another)
        self.view = addresses.guest_view(family, us)
        self.others_view = addresses.guest_view(family, another)
        self.native_view = addresses.native_view(family, us)
        self.others_native_view = addresses.native_view(family, another)
        self.unknown = addresses.native_view(family, 99)
        self.others_link_local = self.others_link
        if family is Family.IPV6:
            self.others_link_local = ip_address(link_local(another))


def ip(src: Address, dst: Address, **fields: Any) -> Packet:
    """An IP header with some fields that must survive."""
    if src.version == 4:
        return IP(src=str(src), dst=str(dst), **{"id": 4711, "ttl": 63, "tos": 8, **fields})
    return IPv6(src=str(src), dst=str(dst), **{"hlim": 63, "fl": 0x12345, "tc": 8, **fields})


def frame(packet: Packet, src: str = NOBODY, dst: str = NOBODY) -> bytes:
    """Bytes of an Ethernet frame, all checksums computed."""
    kind = 0x0800 if packet.version == 4 else 0x86DD
    return bytes(Ether(src=src, dst=dst, type=kind) / packet)


def to_guest(packet: Packet, n: int) -> bytes:
    """As our programs address frames to guests."""
    return frame(packet, src=ALIAS_MAC, dst=guest_mac(n))


def from_guest(packet: Packet, n: int = 0) -> bytes:
    """As guests address frames to `localhost`."""
    return frame(packet, src=guest_mac(n), dst=ALIAS_MAC)


def tcp(sport: int, dport: int, **fields: Any) -> Packet:
    return TCP(sport=sport, dport=dport, seq=7, ack=9, **{"flags": "PA", **fields}) / Raw(PAYLOAD)


def udp(sport: int, dport: int, payload: bytes = PAYLOAD, **fields: Any) -> Packet:
    return UDP(sport=sport, dport=dport, **fields) / Raw(payload)


def echo(family: Family, reply: bool = False) -> Packet:
    if family is Family.IPV4:
        return ICMP(type=0 if reply else 8, id=5, seq=6) / Raw(PAYLOAD)
    return (ICMPv6EchoReply if reply else ICMPv6EchoRequest)(id=5, seq=6, data=PAYLOAD)


def unreachable(src: Address, dst: Address, l4: bytes) -> Packet:
    """Port unreachable, about a packet from `src` to `dst` with these bytes of layer 4."""
    inner = bytes(ip(src, dst, **_carrying(src, l4)) / Raw(l4))
    if src.version == 4:
        return ICMP(type=3, code=3) / Raw(inner)
    return ICMPv6DestUnreach(code=4) / Raw(inner)


def too_big(family: Family) -> Packet:
    """The beginning of an error that tells a path MTU. What it is about comes behind it."""
    if family is Family.IPV4:
        return ICMP(type=3, code=4, nexthopmtu=600)
    return ICMPv6PacketTooBig(mtu=1280)


def _carrying(address: Address, l4: bytes) -> dict[str, int]:
    proto = 6 if len(l4) > 30 and l4[12] == 0x50 else 17
    return {"proto": proto} if address.version == 4 else {"nh": proto}


def fragments(packet: Packet, size: int = 16) -> list[Packet]:
    """The datagram in two fragments, the first with `size` bytes of layer 4."""
    whole = bytes(packet.payload)
    protocol = packet.payload
    number = {TCP: 6, UDP: 17}[type(protocol)]
    # The checksum covers the whole datagram; scapy fills it in when the whole is built.
    whole = bytes(packet)[-len(whole) :]
    parts = [(0, 1, whole[:size]), (size // 8, 0, whole[size:])]
    src, dst = packet.src, packet.dst
    if packet.version == 4:
        return [
            IP(
                src=src,
                dst=dst,
                id=4711,
                ttl=63,
                proto=number,
                flags="MF" if more else 0,
                frag=offset,
            )
            / Raw(part)
            for offset, more, part in parts
        ]
    return [
        IPv6(src=src, dst=dst, hlim=63)
        / IPv6ExtHdrFragment(nh=number, offset=offset, m=more, id=4711)
        / Raw(part)
        for offset, more, part in parts
    ]
