"""Checksums of IPv6 packets for guests that take no partial ones: complete before the tap.

A tap that the test reads, as QEMU does, shows what comes to a guest. Then guests of OSv's branch
`ipv6` are reached by each datapath, and larger packets of IPv4 are still one.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from scapy.layers.inet import IP, TCP, UDP, in4_pseudoheader
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment, in6_pseudoheader
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Packet
from scapy.utils import checksum

from testbed import bpf, datapaths, runtimes
from testbed.bpf import hooks, syscall
from testbed.campaigns import roles, trial
from testbed.host import namespaces, netlink
from testbed.host.ledger import Owner
from testbed.images import kernels
from testbed.model.addresses import guest_link, guest_mac, pod_link
from testbed.model.cells import Cell, Pair
from testbed.model.metrics import Metric
from testbed.model.terms import Family, Runtime, Transport
from testbed.model.trials import Status
from testbed.pods import reconciler
from testbed.pods.checksums import Checksums
from testbed.pods.links import MTU
from testbed.pods.pod import Pod
from testbed.pods.reconciler import Reconciler
from testbed.runtimes import osv
from testbed.runtimes.interface import Options

from .sockets import opened, send_frames, wait_until

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not bpf.has_tcx(), reason="Linux 6.6"),
]

FAMILIES = pytest.mark.parametrize("family", Family, ids=str)
ETH_P_IP, ETH_P_IPV6 = 0x0800, 0x86DD
ETHERNET = {Family.IPV4: ETH_P_IP, Family.IPV6: ETH_P_IPV6}
HEADER = struct.Struct("=BBHHHH")
"""struct virtio_net_hdr (linux/virtio_net.h): flags, type of segmentation, length of the headers,
size of a segment, where the checksum begins, and where behind that it is."""
NEEDS_CSUM = 1
SEGMENTS = {Family.IPV4: 1, Family.IPV6: 4}
"""VIRTIO_NET_HDR_GSO_TCPV4 and _TCPV6."""
TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x2, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4 = 1, 2
SOL_PACKET, PACKET_VNET_HDR = 263, 15
SEGMENT, SEGMENTS_BYTES = 1400, 7000


@dataclass
class Guest:
    """The tap of guest 1, and what is read there."""

    netns: str
    file: int

    def frames(self, patience_ms: int = 300) -> Iterator[tuple[tuple[int, ...], Packet]]:
        """Headers and frames of IP that come, until none does for a while."""
        poller = select.poll()
        poller.register(self.file, select.POLLIN)
        while poller.poll(patience_ms):
            data = os.read(self.file, 1 << 17)
            frame = Ether(data[HEADER.size :])
            if frame.type in ETHERNET.values() and frame.dst == guest_mac(1):
                yield HEADER.unpack_from(data), frame


@pytest.fixture(params=["new", "half-made", "one-ended"])
def guest(owner: Owner, request: pytest.FixtureRequest) -> Iterator[Guest]:
    """Its driver takes partial checksums, and segments of IPv4, as OSv's does.

    Its pair is new, or somebody was interrupted while making it, or took one end away.
    """
    netns = f"tb-{owner.id}-checksums"
    with owner.part() as part:
        ip = namespaces.create(part, netns)
        tap = netlink.create_link(ip, "g1", kind="tuntap", mode="tap")
        if request.param != "new":
            netlink.create_link(ip, "c1", kind="veth", peer={"ifname": "c1-back"})
        if request.param == "one-ended":
            namespaces.create(part, f"{netns}-2").close()
            back = netlink.links(netns)["c1-back"]
            ip.link("set", index=back, net_ns_fd=f"{netns}-2")
        Checksums(part, netns, {1}).build(ip, {1: tap})
        file = namespaces.inside(netns, lambda: os.open("/dev/net/tun", os.O_RDWR))
        wanted = struct.pack("16sH22x", b"g1", IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)
        fcntl.ioctl(file, TUNSETIFF, wanted)
        fcntl.ioctl(file, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4)
        ip.link("set", index=tap, state="up")  # after it is opened: else it sends later
        for family in Family:
            netlink.add_address(ip, tap, pod_link(family), pod_link(family).max_prefixlen)
            netlink.add_route(ip, tap, guest_link(family, 1))
            netlink.add_neighbor(ip, tap, guest_link(family, 1), guest_mac(1))
        yield Guest(netns, file)
        os.close(file)
        ip.close()


def packet(family: Family, source: object, upper: Packet) -> Packet:
    """A frame to guest 1."""
    layer = IP if family is Family.IPV4 else IPv6
    to = str(guest_link(family, 1))
    return Ether(dst=guest_mac(1)) / layer(src=str(source), dst=to) / upper


def is_complete(frame: Packet) -> bool:
    """Whether a frame's checksum of layer 4 is right as it is."""
    layer = TCP if TCP in frame else UDP
    again = frame.copy()
    del again[layer].chksum
    return bool(Ether(bytes(again))[layer].chksum == frame[layer].chksum)


def send_segments(netns: str, family: Family, data: bytes) -> None:
    """Send a TCP packet of many segments, whose checksum is left to the device."""
    frame = packet(family, pod_link(family), TCP(dport=9, flags="A") / data)
    upper = len(frame[TCP])
    pseudo = (
        in4_pseudoheader(socket.IPPROTO_TCP, frame[IP], upper)
        if family is Family.IPV4
        else bytes(in6_pseudoheader(socket.IPPROTO_TCP, frame[IPv6], upper))
    )
    frame[TCP].chksum = 0xFFFF ^ checksum(pseudo)
    begins = len(frame) - upper
    headers = begins + 20
    header = HEADER.pack(NEEDS_CSUM, SEGMENTS[family], headers, SEGMENT, begins, 16)

    def send() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
            raw.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
            raw.bind(("g1", ETHERNET[family]))
            raw.send(header + bytes(frame))

    namespaces.inside(netns, send)


def test_segments_of_ipv4_come_as_one_and_those_of_ipv6_one_by_one_and_complete(
    guest: Guest,
) -> None:
    data = bytes(range(250)) * (SEGMENTS_BYTES // 250)
    send_segments(guest.netns, Family.IPV4, data)
    ((header, frame),) = guest.frames()
    assert header[:2] == (NEEDS_CSUM, SEGMENTS[Family.IPV4])
    assert bytes(frame[TCP].payload) == data
    send_segments(guest.netns, Family.IPV6, data)
    found = list(guest.frames())
    assert [header[:2] for header, _ in found] == [(0, 0)] * (SEGMENTS_BYTES // SEGMENT)
    assert all(len(frame) <= 14 + MTU and is_complete(frame) for _, frame in found)
    assert b"".join(bytes(frame[TCP].payload) for _, frame in found) == data


@FAMILIES
def test_a_datagram_of_the_namespaces_own_stack_comes_complete_in_ipv6(
    guest: Guest, family: Family
) -> None:
    with opened(guest.netns, family, Transport.UDP) as native:
        native.sendto(b"hello", (str(guest_link(family, 1)), 9))
    ((header, frame),) = guest.frames()
    assert bytes(frame[UDP].payload) == b"hello"
    assert (header[0], is_complete(frame)) == (
        (NEEDS_CSUM, False) if family is Family.IPV4 else (0, True)
    )


def test_fragments_come_as_they_are(guest: Guest) -> None:
    with opened(guest.netns, Family.IPV6, Transport.UDP) as native:
        native.sendto(bytes(3000), (str(guest_link(Family.IPV6, 1)), 9))
    sizes = [len(frame) for _, frame in guest.frames() if IPv6ExtHdrFragment in frame]
    assert len(sizes) == 3
    assert max(sizes) <= 14 + MTU


@pytest.mark.parametrize("ifname", ["g1", "c1", "c1-back"])
def test_nobody_in_the_namespace_passes_for_a_guest_by_the_pair(guest: Guest, ifname: str) -> None:
    """Not even with another frame than it tells the kernel. At the tap, datapaths look at these."""
    own, other = (
        packet(family, guest_link(family, 2), UDP(dport=9) / bytes(60))
        for family in (Family.IPV6, Family.IPV4)
    )
    tagged = Ether(dst=own.dst) / Dot1Q() / own[IPv6]

    def send() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
            raw.bind((ifname, ETH_P_IPV6))
            for frame in (own,) if ifname == "g1" else (own, other, tagged):
                with suppress(OSError):  # a program has dropped it
                    raw.send(bytes(frame))

    namespaces.inside(guest.netns, send)
    with opened(guest.netns, Family.IPV6, Transport.UDP) as native:
        native.sendto(b"last", (str(guest_link(Family.IPV6, 1)), 9))
    assert [bytes(frame[UDP].payload) for _, frame in guest.frames()] == [b"last"]


def test_what_is_forwarded_from_another_guest_comes(guest: Guest) -> None:
    """By a link, so that it has the address of a guest rightly."""
    family = Family.IPV6
    with namespaces.open_socket(guest.netns) as ip:
        netlink.create_link(ip, "g2", kind="veth", state="up", peer={"ifname": "e2"})
        ip.link("set", index=netlink.links(guest.netns)["e2"], state="up")
        mac = ip.get_links(netlink.links(guest.netns)["g2"])[0].get("address")
    namespaces.set_sysctls(guest.netns, {"net/ipv6/conf/all/forwarding": 1})
    frame = packet(family, guest_link(family, 2), UDP(dport=9) / b"hello")
    frame.dst = mac
    send_frames(guest.netns, "e2", bytes(frame))
    ((_, came),) = guest.frames()
    assert (came[IPv6].src, bytes(came[UDP].payload)) == (frame[IPv6].src, b"hello")


# --- OSv ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kind() -> osv.Osv:
    kernel = kernels.find_osv(flavor="ipv6", download=False)
    if kernel is None:
        pytest.skip("no OSv kernel of flavor ipv6 in the cache")
    return osv.prepare(Options(osv_kernel=kernel.path))


def built(owner: Owner, kind: osv.Osv, datapath: str, pairs: set[Pair], consoles: Path) -> Pod:
    kinds = {Runtime.PROCESS: runtimes.prepare(Runtime.PROCESS, Options()), Runtime.OSV: kind}
    manifest = roles.manifest(pairs, Runtime.OSV)
    name = f"checksums-{datapath}"
    return Pod(owner, name, manifest, datapaths.get(datapath), kinds, consoles)


DATAPATHS = ["direct", "bridge", "tcredirect", "capture", "steer", "broadcast", "dnat", "proxy"]


@pytest.mark.parametrize("datapath", DATAPATHS)
def test_osv_takes_both_families_by_every_datapath(
    owner: Owner, kind: osv.Osv, datapath: str, tmp_path: Path
) -> None:
    pairs = {Pair.NATIVE_GUEST, Pair.GUEST_NATIVE}
    if datapath != "tcredirect":  # its pods have one guest
        pairs |= {Pair.GUEST_GUEST} & datapaths.get(datapath).pairs
    with built(owner, kind, datapath, pairs, tmp_path) as pod:
        pod.start()
        for pair in sorted(pairs):
            for family in Family:
                for transport, metric, size in (
                    (Transport.TCP, Metric.THROUGHPUT, 65536),
                    (Transport.UDP, Metric.LATENCY, 1400),
                ):
                    cell = Cell(datapath, pair, family, transport, metric, size)
                    if roles.unsupported(pod.datapath, cell, kind):
                        continue
                    result = trial.run(cell, [pod], kind, 0.1, 0.5)
                    assert (cell.id, result.status, result.reason) == (cell.id, Status.OK, None)


def test_a_pair_or_program_that_somebody_removes_is_there_again(
    owner: Owner, kind: osv.Osv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconciler, "CHECK_S", 0.1)
    cell = Cell("steer", Pair.NATIVE_GUEST, Family.IPV6, Transport.TCP, Metric.LATENCY, 64)
    with built(owner, kind, "steer", {cell.pair}, tmp_path) as pod, Reconciler(pod) as watching:
        pod.start()
        tap = pod.wiring().ports[0].ifindex
        pid = pod.processes["guest1"].pid

        def detach() -> None:
            with hooks._running(tap, hooks.EGRESS) as programs:
                syscall.call(syscall.DETACH, "=III", tap, programs["detour"], hooks.EGRESS)

        def clear() -> None:
            index = netlink.links(pod.netns)["c1-back"]
            pod.links.ip.tc("del", "clsact", index)

        def remove() -> None:
            pod.links.ip.link("del", ifname="c1")

        for harm in (remove, clear, lambda: namespaces.inside(pod.netns, detach)):
            watching.mended.clear()
            with pod.lock:
                harm()
            wait_until(lambda: bool(watching.mended), "it is mended")
            running = bpf.running_tc(pod.netns, pod.links.link_ip, tap)
            assert next(name for name in running if "egress" in name) == "egress:detour"
            result = trial.run(cell, [pod], kind, 0.05, 0.2)
            assert (result.status, result.reason) == (Status.OK, None)
        assert pod.processes["guest1"].pid == pid
