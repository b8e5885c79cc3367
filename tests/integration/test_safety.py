"""What must not arrive in a pod with `capture` does not, and is counted.

guest 1 ─ eth0 ─ g1 ─┬─ bridge ─ pod ─ guests ─ pod: a native at 6000, wildcard
guest 2 ─ eth0 ─ g2 ─┘    └ frames from outside
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6NDOptDstLLAddr, IPv6
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet

from testbed.host import namespaces
from testbed.model import addresses
from testbed.model.addresses import Address, guest_link, guest_mac
from testbed.model.terms import Family, Transport

from .conftest import Build
from .sockets import PAIRS, PORTS, Bench, Pair, localhost, send_frames

pytestmark = pytest.mark.root

FAMILIES = pytest.mark.parametrize("family", Family, ids=str)
TRANSPORTS = pytest.mark.parametrize("transport", Transport, ids=str)

STRANGER = {Family.IPV4: "169.254.64.9", Family.IPV6: "fd77::9"}
"""Nobody's address on the guest link."""


def reserved(family: Family) -> dict[str, Address]:
    """Addresses that none but the datapath may use outside `lo`."""
    return {
        "alias": addresses.alias(family),
        "native source": addresses.native_source(family),
        "odd native source": addresses.native_source_odd(family),
        "guest as guests see it": addresses.guest_view(family, 1),
        "guest as natives see it": addresses.native_view(family, 1),
        "loopback": addresses.loopback(family),
    }


def packet(source: Address | str, destination: Address | str, transport: Transport) -> Packet:
    """To all ports that somebody listens on, one after the other, is for the caller to say."""
    ip = IPv6 if ":" in str(source) else IP
    l4 = TCP(sport=7777, flags="S") if transport is Transport.TCP else UDP(sport=7777) / b"forged"
    made: Packet = ip(src=str(source), dst=str(destination)) / l4
    return made


def framed(sender: str, receiver: str, inner: Packet, port: int) -> bytes:
    inner[TCP if TCP in inner else UDP].dport = port
    return bytes(Ether(src=sender, dst=receiver) / inner)


@contextmanager
def nothing_arrives(bench: Bench, family: Family, transport: Transport) -> Iterator[None]:
    """At none of the ports that workloads listen on, at any address."""
    listening = {n: bench.serve(n, family, transport) for n in PORTS}
    try:
        yield
        for server in listening.values():
            server.setblocking(False)
            with pytest.raises(BlockingIOError):
                server.recv(100) if transport is Transport.UDP else server.accept()
    finally:
        for server in listening.values():
            server.close()


def segments_heard(bench: Bench, n: int) -> int:
    """TCP segments that a workload's stack took in, whatever came of them (both families)."""

    def count() -> int:
        lines = Path("/proc/thread-self/net/snmp").read_text().splitlines()
        header, values = (line.split() for line in lines if line.startswith("Tcp:"))
        return int(values[header.index("InSegs")])

    return namespaces.inside(bench.netns(n), count)


# --- guests ---------------------------------------------------------------------------------


@FAMILIES
@TRANSPORTS
def test_a_guest_that_forges_its_source_is_dropped_and_counted(
    bench: Bench, family: Family, transport: Transport
) -> None:
    """To every other workload and to itself, at `localhost` and at their own addresses."""
    sources = [
        *reserved(family).values(),
        guest_link(family, 2),
        addresses.pod_link(family),
        STRANGER[family],
    ]
    destinations = [
        (addresses.alias(family), addresses.ALIAS_MAC),
        (addresses.native_source(family), addresses.ALIAS_MAC),
        (addresses.pod_link(family), addresses.POD_MAC),
        (guest_link(family, 2), guest_mac(2)),
    ]
    frames = [
        framed(guest_mac(1), mac, packet(source, destination, transport), port)
        for source in sources
        for destination, mac in destinations
        for port in PORTS.values()
    ]
    before, heard = bench.counted("spoofed"), [segments_heard(bench, n) for n in PORTS]
    with nothing_arrives(bench, family, transport):
        bench.raw(1, *frames)
    assert bench.counted("spoofed") - before == len(frames)
    assert [segments_heard(bench, n) for n in PORTS] == heard


@FAMILIES
@TRANSPORTS
def test_a_guest_with_anothers_mac_is_dropped_and_counted(
    bench: Bench, family: Family, transport: Transport
) -> None:
    before = bench.counted("spoofed")
    with nothing_arrives(bench, family, transport):
        for mac in (guest_mac(2), addresses.ALIAS_MAC, addresses.POD_MAC):
            own = packet(guest_link(family, 1), addresses.alias(family), transport)
            bench.raw(1, framed(mac, addresses.ALIAS_MAC, own, PORTS[0]))
    assert bench.counted("spoofed") - before == 3


@FAMILIES
@TRANSPORTS
def test_a_guest_answers_only_from_ports_that_it_owns(
    bench: Bench, family: Family, transport: Transport
) -> None:
    """As a reply of guest 2's server it would reach the native's connection with guest 2."""
    before = bench.counted("spoofed")
    with bench.connected(Pair(0, 2), family, Transport.UDP) as (native, _):
        reply = packet(guest_link(family, 1), addresses.native_source(family), transport)
        reply[TCP if transport is Transport.TCP else UDP].sport = PORTS[2]
        frame = framed(guest_mac(1), addresses.ALIAS_MAC, reply, native.getsockname()[1])
        bench.raw(1, frame)
        assert bench.counted("spoofed") - before == 1
        native.setblocking(False)
        with pytest.raises(BlockingIOError):
            native.recv(100)


@FAMILIES
def test_a_guest_claims_no_neighbors_address(bench: Bench, family: Family) -> None:
    """ARP and neighbor advertisements for what is another's: the others go on to their owner."""
    own = guest_mac(1)
    claimed = [guest_link(family, 2), addresses.pod_link(family), *reserved(family).values()]
    frames = []
    for address in map(str, claimed):
        if family is Family.IPV4:
            says = ARP(op=2, hwsrc=own, psrc=address, hwdst="ff:ff:ff:ff:ff:ff", pdst=address)
            frames.append(bytes(Ether(src=own, dst="ff:ff:ff:ff:ff:ff") / says))
        else:
            na = ICMPv6ND_NA(tgt=address, O=1, R=0) / ICMPv6NDOptDstLLAddr(lladdr=own)
            ip = IPv6(src=str(guest_link(family, 1)), dst="ff02::1", hlim=255)
            frames.append(bytes(Ether(src=own, dst="33:33:00:00:00:01") / ip / na))
    before = bench.counted("spoofed")
    bench.raw(1, *frames)
    assert bench.counted("spoofed") - before == len(frames)


# --- from outside ---------------------------------------------------------------------------


@FAMILIES
@TRANSPORTS
def test_nothing_from_outside_reaches_localhost(
    bench: Bench, family: Family, transport: Transport
) -> None:
    """From the bridge: towards addresses that only we may use, and from such."""
    ends = [
        *((STRANGER[family], to) for to in reserved(family).values()),
        *((source, addresses.pod_link(family)) for source in reserved(family).values()),
        *((source, guest_link(family, 1)) for source in reserved(family).values()),
    ]
    frames = [
        framed("02:00:00:00:00:99", mac, packet(source, to, transport), port)
        for source, to in ends
        for mac in (addresses.POD_MAC, guest_mac(1))
        for port in PORTS.values()
    ]
    before, heard = bench.counted("outside"), [segments_heard(bench, n) for n in PORTS]
    with nothing_arrives(bench, family, transport):
        send_frames(bench.pod.links.link_netns, "bridge", *frames)
    # Stacks report the groups they are in (MLD) when they like, with an extension header.
    assert bench.counted("outside") - before >= len(frames)
    assert [segments_heard(bench, n) for n in PORTS] == heard


@FAMILIES
def test_a_socket_bound_to_loopback_hears_nothing_from_outside(
    bench: Bench, family: Family
) -> None:
    """Neither at its address nor at the pod's; one at all addresses hears what is for the pod."""
    loopback, pod = addresses.loopback(family), addresses.pod_link(family)
    frames = [
        framed(
            "02:00:00:00:00:99",
            addresses.POD_MAC,
            packet(STRANGER[family], to, Transport.UDP),
            PORTS[0],
        )
        for to in (loopback, pod)
    ]
    with bench.serve(0, family, Transport.UDP, str(loopback)) as server:
        send_frames(bench.pod.links.link_netns, "bridge", *frames)
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.recv(100)
    with bench.serve(0, family, Transport.UDP) as server:
        send_frames(bench.pod.links.link_netns, "bridge", *frames)
        assert server.recvfrom(100)[1][0] == STRANGER[family]
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.recv(100)


def test_no_link_but_lo_takes_loopback_addresses(bench: Bench) -> None:
    def conf() -> dict[str, str]:
        files = Path("/proc/sys/net/ipv4/conf").glob("*/route_localnet")
        return {f.parent.name: f.read_text().strip() for f in files}

    pod = namespaces.inside(bench.pod.netns, conf)
    assert pod.pop("lo") == "1"
    assert set(pod.values()) == {"0"}
    for netns in (bench.pod.links.link_netns, bench.netns(1)):
        assert set(namespaces.inside(netns, conf).values()) == {"0"}


# --- pods -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(build: Build) -> Bench:
    """A second pod on the same node, with the same addresses and ports."""
    return Bench(build("safety2"))


@FAMILIES
@TRANSPORTS
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_pods_of_one_node_do_not_meet(
    bench: Bench, other: Bench, pair: Pair, family: Family, transport: Transport
) -> None:
    """With the server in one pod only, the other's clients are refused, and nothing is carried."""
    ends = [n or None for n in pair]
    carried = bench.pod.attachment.carried(*ends)
    with bench.serve(pair.server, family, transport) as server:
        with other.open(pair.client, family, transport) as client:
            with pytest.raises(ConnectionRefusedError):
                ask(client, (localhost(pair.client, family), PORTS[pair.server]))
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.recv(100) if transport is Transport.UDP else server.accept()
    assert bench.pod.attachment.carried(*ends) == carried
    with bench.connected(pair, family, transport) as (near, far):
        with other.connected(pair, family, transport) as (others_near, others_far):
            near.send(b"ours")
            others_near.send(b"others'")
            assert (far.recv(100), others_far.recv(100)) == (b"ours", b"others'")


def ask(client: socket.socket, to: tuple[str, int]) -> None:
    client.connect(to)
    client.send(b"anybody there?")
    client.recv(100)
