"""`capture` in a pod: what flows between natives and guests arrives, and arrives unharmed."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import ICMPv6PacketTooBig, IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from testbed.host import namespaces, netlink
from testbed.model import addresses
from testbed.model.addresses import guest_link, guest_mac
from testbed.model.terms import Family, Transport

from .sockets import (
    MTU_DISCOVER,
    NOBODYS_PORT,
    PAIRS,
    PATIENCE_S,
    PMTUDISC_DO,
    PORTS,
    Bench,
    Pair,
    localhost,
    transfer,
)

pytestmark = pytest.mark.root

FAMILIES = pytest.mark.parametrize("family", Family, ids=str)
TRANSPORTS = pytest.mark.parametrize("transport", Transport, ids=str)
EVERY_PAIR = pytest.mark.parametrize("pair", PAIRS, ids=str)
FROM_NATIVES = pytest.mark.parametrize("pair", [p for p in PAIRS if not p.client], ids=str)

DATA = os.urandom(8_000_000)
HEADERS = {Family.IPV4: 20 + 20, Family.IPV6: 40 + 20}
"""Of IP and TCP, bytes."""
LINK_MTU = 1500
IP_RECVERR, IPV6_RECVERR = 11, 25  # linux/in.h, linux/in6.h


# --- what arrives ---------------------------------------------------------------------------


@EVERY_PAIR
@FAMILIES
@TRANSPORTS
def test_both_ends_hear_each_other_by_the_datapath(
    bench: Bench, pair: Pair, family: Family, transport: Transport
) -> None:
    ends = [n or None for n in pair]
    before = bench.pod.attachment.carried(*ends)
    with bench.connected(pair, family, transport) as (near, far):
        near.sendall(b"question")
        assert far.recv(100) == b"question"
        far.sendall(b"answer")
        assert near.recv(100) == b"answer"
        assert near.getpeername()[:2] == (localhost(pair.client, family), PORTS[pair.server])
    carried = bench.pod.attachment.carried(*ends) - before
    assert carried.packets >= 2
    assert carried.bytes >= len(b"question" + b"answer") + 2 * HEADERS[family] - 24


@EVERY_PAIR
@FAMILIES
@TRANSPORTS
def test_a_port_that_nobody_serves_refuses_at_once(
    bench: Bench, pair: Pair, family: Family, transport: Transport
) -> None:
    port = PORTS[pair.server] if pair.server else NOBODYS_PORT
    with bench.open(pair.client, family, transport) as client:
        began = time.monotonic()
        with pytest.raises(ConnectionRefusedError):
            ask(client, (localhost(pair.client, family), port))
        assert time.monotonic() - began < 0.5


@pytest.mark.parametrize("offload", [True, False], ids=["offload", "no-offload"])
@EVERY_PAIR
@FAMILIES
def test_large_segments_arrive_whole_with_and_without_checksum_offload(
    bench: Bench, pair: Pair, family: Family, offload: bool
) -> None:
    ends = [n or None for n in pair]
    carried, before = bench.pod.attachment.carried(*ends), bench.checksum_errors()
    links = [
        (bench.pod.netns, "guests"),
        *((bench.netns(n), "eth0") for n in (1, 2)),
        *((bench.pod.links.link_netns, port) for port in ("pod", "g1", "g2")),
    ]
    for netns, ifname in links:
        netlink.set_checksum_offload(netns, ifname, on=offload)
    try:
        with bench.connected(pair, family) as (near, far):
            up = transfer(near, far, DATA)
            down = transfer(far, near, DATA)
    finally:
        for netns, ifname in links:
            netlink.set_checksum_offload(netns, ifname, on=True)
    assert [digest(up), digest(down)] == [digest(DATA)] * 2
    assert bench.checksum_errors() == before
    carried = bench.pod.attachment.carried(*ends) - carried
    if offload:
        assert carried.bytes / carried.packets > LINK_MTU  # packets of many segments


@EVERY_PAIR
@FAMILIES
@pytest.mark.parametrize("size", [0, 1, 1472, 1473, 3000, 65507])
def test_a_datagram_arrives_whole(bench: Bench, pair: Pair, family: Family, size: int) -> None:
    """Natives are processes outside of the pod's cgroup, whose datagrams all go by `lo`."""
    data = DATA[:size]
    errors = bench.checksum_errors()
    with bench.connected(pair, family, Transport.UDP) as (near, far):
        far.send(data)
        assert near.recv(65536) == data
        near.send(data)
        assert far.recv(65536) == data
    assert bench.checksum_errors() == errors


@FROM_NATIVES
@FAMILIES
def test_a_native_that_forbids_fragments_is_told_the_mtu(
    bench: Bench, pair: Pair, family: Family
) -> None:
    with bench.connected(pair, family, Transport.UDP) as (near, far):
        near.setsockopt(*MTU_DISCOVER[family], PMTUDISC_DO)
        with pytest.raises(OSError, match="Message too long"):
            near.send(DATA[:3000])
        near.send(DATA[:1000])
        assert far.recv(65536) == DATA[:1000]


@EVERY_PAIR
@FAMILIES
def test_segments_are_agreed_to_fit_the_link(bench: Bench, pair: Pair, family: Family) -> None:
    options = 12  # time stamps, in every segment
    with bench.connected(pair, family) as ends:
        for end in ends:
            mss = end.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
            assert mss == LINK_MTU - HEADERS[family] - options


# --- what is said of errors -----------------------------------------------------------------


@FROM_NATIVES
@FAMILIES
def test_an_error_about_the_path_mtu_ends_at_the_guests_port(
    bench: Bench, pair: Pair, family: Family
) -> None:
    """As a guest's kernel, or a hostile guest, says it: natives' loopback would be told, too."""
    with bench.connected(pair, family, Transport.UDP) as (near, far):
        queue_errors(near, family)
        before = bench.counted("unhandled")
        bench.raw(pair.server, too_big(family, pair.server, near.getsockname()[1], mtu=1300))
        far.send(b"what comes next")
        assert near.recv(100) == b"what comes next"
        near.setblocking(False)
        with pytest.raises(BlockingIOError):
            near.recvmsg(100, 500, socket.MSG_ERRQUEUE)
    assert bench.counted("unhandled") == before + 1


@EVERY_PAIR
@FAMILIES
def test_an_icmp_error_shows_the_sender_its_own_packet(
    bench: Bench, pair: Pair, family: Family
) -> None:
    """Addresses and ports inside an error are those that it was sent with, the checksum right."""
    port = PORTS[pair.server] if pair.server else NOBODYS_PORT
    with (
        bench.open(pair.client, family, Transport.UDP) as sender,
        icmp_listener(bench, pair.client, family) as listener,
    ):
        sender.connect((localhost(pair.client, family), port))
        sent = (*sender.getsockname()[:2], *sender.getpeername()[:2])
        sender.send(b"nobody there")
        with pytest.raises(ConnectionRefusedError):
            sender.recv(100)
        error = listener.recv(2000)
    if family is Family.IPV4:
        assert error[20:22] == bytes((3, 3))  # port unreachable
        inner = error[20 + 8 :]
        assert IP(inner[:20]).chksum == IP(bytes(IP(inner[:20], chksum=None))[:20]).chksum
        shown: Packet = IP(inner)
    else:
        assert error[:2] == bytes((1, 4))
        shown = IPv6(error[8:])
    assert (shown.src, shown[UDP].sport, shown.dst, shown[UDP].dport) == sent
    assert bytes(shown[UDP].payload) == b"nobody there"


@FAMILIES
def test_an_unconnected_native_learns_of_errors_if_it_asks(bench: Bench, family: Family) -> None:
    """IP_RECVERR: the error queue names the port that refused, and who refused."""
    with bench.open(0, family, Transport.UDP) as native:
        queue_errors(native, family)
        native.sendto(b"nobody there", (localhost(0, family), PORTS[2]))
        with pytest.raises(ConnectionRefusedError):
            native.recv(100)
        data, ancillary, _, about = native.recvmsg(100, 500, socket.MSG_ERRQUEUE)
    assert data == b"nobody there"
    assert about[:2] == (localhost(0, family), PORTS[2])
    ((_, _, error),) = ancillary
    assert struct.unpack_from("=I", error)[0] == errno.ECONNREFUSED


def ask(client: socket.socket, to: tuple[str, int]) -> None:
    client.connect(to)
    client.send(b"anybody there?")
    client.recv(100)


def queue_errors(udp: socket.socket, family: Family) -> None:
    if family is Family.IPV4:
        udp.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
    else:
        udp.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVERR, 1)


def too_big(family: Family, guest: int, port: int, mtu: int) -> bytes:
    """The frame in which a guest refuses a datagram from a native's `port` to its own."""
    own, native = str(guest_link(family, guest)), str(addresses.native_source(family))
    refused = UDP(sport=port, dport=PORTS[guest], len=1408) / bytes(500)  # only its beginning
    if family is Family.IPV4:
        about: Packet = ICMP(type=3, code=4, nexthopmtu=mtu)
        sent: Packet = IP(src=native, dst=own, flags="DF", len=1428) / refused
        packet: Packet = IP(src=own, dst=native) / about / sent
    else:
        about = ICMPv6PacketTooBig(mtu=mtu)
        sent = IPv6(src=native, dst=own, plen=1408) / refused
        packet = IPv6(src=own, dst=native) / about / sent
    return bytes(Ether(src=guest_mac(guest), dst=addresses.ALIAS_MAC) / packet)


@contextmanager
def icmp_listener(bench: Bench, n: int, family: Family) -> Iterator[socket.socket]:
    """A raw socket of a workload that hears of destinations that are unreachable, and no more."""
    protocol = socket.IPPROTO_ICMP if family is Family.IPV4 else socket.IPPROTO_ICMPV6
    with namespaces.inside(
        bench.netns(n), lambda: socket.socket(family.domain, socket.SOCK_RAW, protocol)
    ) as listener:
        listener.settimeout(PATIENCE_S)
        yield listener


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
