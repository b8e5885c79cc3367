"""Forged Ethernet frames: UDP and TCP SYN with any source, false ARP replies and ND advertisements.

Their checksums are correct, so that only the forged field can be the reason for a drop.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable

from testbed.host import namespaces
from testbed.model.addresses import Address

ETH_P_IP, ETH_P_ARP, ETH_P_IPV6 = 0x0800, 0x0806, 0x86DD


def send(netns: str, ifname: str, frames: Iterable[bytes]) -> None:
    """Send frames on a link by a packet socket (packet(7)).

    If an egress program drops a frame, the socket reports ENOBUFS, which is ignored.
    """
    out = namespaces.inside(netns, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
    with out:
        out.bind((ifname, 0))
        for frame in frames:
            try:
                out.send(frame)
            except OSError as e:
                if e.errno != errno.ENOBUFS:
                    raise


def datagram(
    macs: tuple[str, str],
    source: Address,
    destination: Address,
    ports: tuple[int, int],
    payload: bytes = b"forged",
) -> bytes:
    """A UDP datagram. `macs` and `ports` are (source, destination)."""
    body = struct.pack("!HHHH", *ports, 8 + len(payload), 0) + payload
    return _ip(macs, source, destination, socket.IPPROTO_UDP, body, checksum_at=6)


def syn(
    macs: tuple[str, str],
    source: Address,
    destination: Address,
    ports: tuple[int, int],
    number: int,
) -> bytes:
    """A TCP SYN with the sequence number `number`."""
    body = struct.pack("!HHIIBBHHH", *ports, number, 0, 5 << 4, 2, 65535, 0, 0)
    return _ip(macs, source, destination, socket.IPPROTO_TCP, body, checksum_at=16)


def claim(macs: tuple[str, str], claimed: Address, told: Address, told_from: Address) -> bytes:
    """An ARP reply or neighbor advertisement which says that `claimed` is at the first MAC."""
    own, other = (_mac(m) for m in macs)
    if claimed.version == 4:
        body = struct.pack("!HHBBH", 1, ETH_P_IP, 6, 4, 2)
        return _eth(macs, ETH_P_ARP, body + own + claimed.packed + other + told.packed)
    # RFC 4861, 4.4: solicited, override, with the target's link-layer address
    body = struct.pack("!BBHI", 136, 0, 0, 0x60 << 24) + claimed.packed + b"\x02\x01" + own
    return _ip(macs, told_from, told, socket.IPPROTO_ICMPV6, body, checksum_at=2, hops=255)


def _ip(
    macs: tuple[str, str],
    source: Address,
    destination: Address,
    protocol: int,
    body: bytes,
    checksum_at: int,
    hops: int = 64,
) -> bytes:
    pseudo = source.packed + destination.packed + struct.pack("!IHBB", len(body), 0, 0, protocol)
    summed = struct.pack("!H", checksum(pseudo + body))
    body = body[:checksum_at] + summed + body[checksum_at + 2 :]
    if source.version == 6:
        head = struct.pack("!IHBB", 6 << 28, len(body), protocol, hops)
        return _eth(macs, ETH_P_IPV6, head + source.packed + destination.packed + body)
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0, hops, protocol, 0)
    head += source.packed + destination.packed
    head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
    return _eth(macs, ETH_P_IP, head + body)


def _eth(macs: tuple[str, str], kind: int, body: bytes) -> bytes:
    return _mac(macs[1]) + _mac(macs[0]) + struct.pack("!H", kind) + body


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def checksum(data: bytes) -> int:
    """Internet checksum (RFC 1071)."""
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
