"""Provokes challenge ACKs of guests, so that their TCP connections with a dead guest are reset.

A virtual machine that is killed sends its peers neither FIN nor RST. To reset a connection in its
place, one has to know the sequence number that the peer expects, and only the peer knows it. But a
peer answers a segment outside of its window with an ACK that has the number (RFC 9293, 3.10.7.4;
RFC 5961). That ACK is for a connection which the other end does not have, be it the pod's kernel or
that of the guest's next machine. So the other end answers with a RST that the peer accepts.
"""

from __future__ import annotations

import random
import socket
import struct
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from testbed.host import namespaces
from testbed.model.addresses import ALIAS_MAC, Address, guest_link, guest_mac
from testbed.model.terms import Family

SOL_PACKET, PACKET_QDISC_BYPASS = 263, 20
DELAYS_S = 0.0, 0.5, 2.0
"""Time before a segment, after the one before it."""
ETHERTYPES = {Family.IPV4: 0x0800, Family.IPV6: 0x86DD}


@dataclass(frozen=True)
class GuestConnection:
    """A TCP connection of guest n with another guest, with the addresses that guest n sees."""

    n: int
    port: int
    peer: Address
    peer_port: int


class Challenges:
    """Sends guests segments until `close`, in threads: first at once, then again.

    A segment is lost where a link is down or a guest's queue is full, and so may be the answer. One
    more is of no effect: whoever has the connection answers with an ACK that changes nothing.
    """

    def __init__(self) -> None:
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []

    def send(self, netns: str, to: Sequence[tuple[GuestConnection, str]]) -> None:
        """Send a segment for each connection by the link of that name, in a namespace."""
        packet_socket = namespaces.inside(netns, _open_socket)
        thread = threading.Thread(target=self._send, args=(packet_socket, to), daemon=True)
        self._threads = [each for each in self._threads if each.is_alive()] + [thread]
        thread.start()

    def _send(
        self, packet_socket: socket.socket, to: Sequence[tuple[GuestConnection, str]]
    ) -> None:
        with packet_socket:
            for delay_s in DELAYS_S:
                if self._closed.wait(delay_s):
                    return
                for connection, ifname in to:
                    with suppress(OSError):  # the link is down or missing
                        packet_socket.sendto(segment(connection), (ifname, 0))

    def close(self) -> None:
        self._closed.set()
        for thread in self._threads:
            thread.join()


def _open_socket() -> socket.socket:
    """Open a packet socket in this namespace that bypasses qdiscs, and so tc programs."""
    packet_socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    packet_socket.setsockopt(SOL_PACKET, PACKET_QDISC_BYPASS, 1)
    return packet_socket


def segment(of: GuestConnection) -> bytes:
    """Make a frame with a TCP segment that the guest does not accept.

    It has one byte of data at a random sequence number.
    """
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
    """Return the header with its checksum (RFC 1071) at offset `at`, where it has zeros.

    `before` is summed, too: the pseudo-header.
    """
    octets = before + header + bytes(len(before + header) % 2)
    total = sum(struct.unpack(f"!{len(octets) // 2}H", octets))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return header[:at] + struct.pack("!H", total ^ 0xFFFF) + header[at + 2 :]
