"""Has a guest ask whether its TCP connection still stands: only the guest knows how far that is.

A machine that is killed says nothing to those that wait for it. Whoever would refuse them in its
place has to know the sequence number that they expect. To a segment outside of its window a peer
answers with an ACK that tells it (RFC 9293, 3.10.7.4; RFC 5961), and whatever is then at the other
end, the pod's kernel or that of the next machine, answers that with the RST that fits.
"""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from testbed.model.addresses import ALIAS_MAC, Address, guest_link, guest_mac
from testbed.model.terms import Family

SOL_PACKET, PACKET_QDISC_BYPASS = 263, 20
ETHERTYPES = {Family.IPV4: 0x0800, Family.IPV6: 0x86DD}


@dataclass(frozen=True)
class GuestConnection:
    """A TCP connection of guest n, as it sees it, with another guest."""

    n: int
    port: int
    peer: Address
    peer_port: int


def open_socket() -> socket.socket:
    """For frames that go to a link of this namespace as they are, past its programs."""
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    made.setsockopt(SOL_PACKET, PACKET_QDISC_BYPASS, 1)
    return made


def send(opened: socket.socket, to: Iterable[tuple[GuestConnection, str]]) -> None:
    """Challenge guests, each by the link of that name; one that is gone is no error."""
    for connection, ifname in to:
        with suppress(OSError):
            opened.sendto(segment(connection), (ifname, 0))


def segment(of: GuestConnection) -> bytes:
    """A frame with a TCP segment that the guest cannot take: an octet at some random number."""
    family = Family(f"ipv{of.peer.version}")
    source, destination = of.peer.packed, guest_link(family, of.n).packed
    numbers = random.getrandbits(32), random.getrandbits(32)
    tcp = struct.pack("!HHIIHHHH", of.peer_port, of.port, *numbers, 0x5010, 0, 0, 0) + b"x"
    pseudo = source + destination + struct.pack("!II", len(tcp), socket.IPPROTO_TCP)
    tcp = _with_checksum(tcp, 16, pseudo)
    if family is Family.IPV4:
        fields = 0x4500, 20 + len(tcp), 0, 0x4000, 64, socket.IPPROTO_TCP, 0
        ip = _with_checksum(struct.pack("!HHHHBBH", *fields) + source + destination, 10)
    else:
        ip = struct.pack("!IHBB", 6 << 28, len(tcp), socket.IPPROTO_TCP, 64) + source + destination
    macs = bytes.fromhex((guest_mac(of.n) + ALIAS_MAC).replace(":", ""))
    return macs + struct.pack("!H", ETHERTYPES[family]) + ip + tcp


def _with_checksum(header: bytes, at: int, before: bytes = b"") -> bytes:
    """With the Internet checksum (RFC 1071) of both, in two octets that are zero yet."""
    octets = before + header + bytes(len(before + header) % 2)
    total = sum(struct.unpack(f"!{len(octets) // 2}H", octets))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return header[:at] + struct.pack("!H", total ^ 0xFFFF) + header[at + 2 :]
