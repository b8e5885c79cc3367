"""A neighbor on the pod's network: it reaches what is served at the pod's address, no more.

    neighbor ─ eth0 ──┊── eth0 ─ pod ─ g1, g2: guests

It has a route to the pod's inside by the pod's address, and the pod's namespace forwards, as those
on Kubernetes nodes do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from testbed import datapaths
from testbed.host import namespaces, netlink, nft
from testbed.host.ledger import Owner, Scope
from testbed.model import addresses
from testbed.model.addresses import Address
from testbed.model.terms import Family, Runtime, Transport
from testbed.pods.network import node
from testbed.pods.pod import Pod
from testbed.pods.sandbox import Sandbox
from testbed.runtimes.interface import Prepared
from tests.integration.conftest import Build
from tests.integration.sockets import MANIFEST, PORTS, Bench, send_frames, wait_until
from tests.integration.test_safety import segments_heard

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(bool(nft.unsupported()), reason=str(nft.unsupported())),
]

FAMILIES = pytest.mark.parametrize("family", Family, ids=str)
TRANSPORTS = pytest.mark.parametrize("transport", Transport, ids=str)
OURS = {Family.IPV4: ip_address("10.1.2.4"), Family.IPV6: ip_address("fd00:1::4")}
PODS = {Family.IPV4: ip_address("10.1.2.3"), Family.IPV6: ip_address("fd00:1::3")}
HOSTILE_S = 0.3
"""How long nothing may come."""


@dataclass
class Neighbor:
    """One who is at the pod's uplink."""

    bench: Bench
    netns: str
    ifname: str
    pods: dict[Family, Address]
    """The pod's addresses there."""
    uplink_mac: str

    def send(self, source: Address, destination: Address, transport: Transport, port: int) -> None:
        """A frame to the pod, whatever the addresses in it."""
        ip = IPv6 if source.version == 6 else IP
        l4 = TCP(sport=7777, flags="S") if transport is Transport.TCP else UDP(sport=7777) / b"!"
        l4.dport = port
        frame = Ether(dst=self.uplink_mac) / ip(src=str(source), dst=str(destination)) / l4
        send_frames(self.netns, self.ifname, bytes(frame))


def forwarding(netns: str) -> None:
    """As in a namespace of Kubernetes."""
    keys = ("net/ipv4/conf/all/forwarding", "net/ipv6/conf/all/forwarding")
    namespaces.set_sysctls(netns, dict.fromkeys(keys, 1))


def attached(
    owner: Scope, prepared: dict[Runtime, Prepared], name: str, consoles: Path
) -> Neighbor:
    """A neighbor of a pod that somebody else made, and guests were attached to."""
    theirs, outside = f"tb-{owner.id}-theirs-{name}", f"tb-{owner.id}-outside-{name}"
    with namespaces.create(owner, theirs) as ip, namespaces.create(owner, outside) as far:
        peer = {"ifname": "eth0", "net_ns_fd": theirs}
        link = netlink.create_link(far, "eth0", kind="veth", state="up", peer=peer)
        uplink = netlink.links(theirs)["eth0"]
        ip.link("set", index=uplink, state="up")
        mac = ip.get_links(uplink)[0].get("address")
        for family in Family:
            prefix = 24 if family is Family.IPV4 else 64
            netlink.add_address(ip, uplink, PODS[family], prefix)
            netlink.add_address(far, link, OURS[family], prefix)
    forwarding(theirs)
    guests = type(MANIFEST)(tuple(MANIFEST.guests.values()))
    pod = Pod(
        owner,
        name,
        guests,
        datapaths.get(name.partition("-")[2]),
        prepared,
        consoles,
        sandbox=Sandbox(namespaces.NETNS / theirs),
    )
    return Neighbor(Bench(pod), outside, "eth0", PODS, mac)


@pytest.fixture(scope="module", params=["up-steer", "up-capture", "attach-steer", "attach-capture"])
def neighbor(
    request: pytest.FixtureRequest,
    owner: Owner,
    build: Build,
    prepared: dict[Runtime, Prepared],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Neighbor]:
    how, _, datapath = request.param.partition("-")
    if how == "attach":
        with owner.part() as part:
            found = attached(part, prepared, request.param, tmp_path_factory.mktemp("consoles"))
            with found.bench.pod:
                yield found
        return
    pod = build(request.param, datapath=datapath)
    pod.connect([])
    with namespaces.open_socket(pod.netns) as ip:
        mac = ip.get_links(netlink.links(pod.netns)[node.UPLINK])[0].get("address")
    with namespaces.open_socket(node.NETNS) as ip:
        [route] = ip.get_routes(dst=str(pod.addresses[Family.IPV4]), dst_len=32)
        port = ip.get_links(route.get("oif"))[0].get("ifname")
    yield Neighbor(Bench(pod), node.NETNS, port, pod.addresses, mac)


@contextmanager
def nothing_heard(bench: Bench, n: int, family: Family, transport: Transport) -> Iterator[None]:
    """A workload serves its port, and nothing comes to its stack."""
    with bench.serve(n, family, transport) as server:
        before = segments_heard(bench, n)
        yield
        server.settimeout(HOSTILE_S)
        with pytest.raises(TimeoutError):
            server.recv(100) if transport is Transport.UDP else server.accept()
        assert segments_heard(bench, n) == before


@FAMILIES
@TRANSPORTS
def test_addresses_inside_the_pod_lead_nowhere_from_outside(
    neighbor: Neighbor, family: Family, transport: Transport
) -> None:
    """Guests' own, the views of them, the alias and the pod's, at ports that somebody serves."""
    inside = [
        addresses.guest_link(family, 1),
        addresses.guest_view(family, 1),
        addresses.native_view(family, 1),
        addresses.alias(family),
        addresses.native_source(family),
        addresses.pod_link(family),
    ]
    for n in (1, 0):
        with nothing_heard(neighbor.bench, n, family, transport):
            for destination in inside:
                neighbor.send(OURS[family], destination, transport, PORTS[n])


@FAMILIES
@TRANSPORTS
def test_nobody_outside_passes_for_one_inside(
    neighbor: Neighbor, family: Family, transport: Transport
) -> None:
    """To a native at the pod's own address, and to a guest's port."""
    sources = [
        addresses.guest_link(family, 1),
        addresses.guest_view(family, 1),
        addresses.native_view(family, 1),
        addresses.alias(family),
        addresses.native_source(family),
    ]
    for n in (0, 1):
        with nothing_heard(neighbor.bench, n, family, transport):
            for source in sources:
                neighbor.send(source, neighbor.pods[family], transport, PORTS[n])


@FAMILIES
@TRANSPORTS
def test_what_is_sent_to_the_pods_address_arrives(
    neighbor: Neighbor, family: Family, transport: Transport
) -> None:
    """The control: else nothing of the above says anything."""
    with neighbor.bench.serve(0, family, transport) as server:
        before = segments_heard(neighbor.bench, 0)
        neighbor.send(OURS[family], neighbor.pods[family], transport, PORTS[0])
        if transport is Transport.UDP:
            assert server.recv(100) == b"!"
        else:
            wait_until(lambda: segments_heard(neighbor.bench, 0) > before, "the SYN is there")


@FAMILIES
def test_an_interface_that_comes_later_is_outside_too(neighbor: Neighbor, family: Family) -> None:
    pod = neighbor.bench.pod
    with namespaces.open_socket(pod.netns) as ip:
        index = netlink.create_link(
            ip, "later", kind="veth", state="up", peer={"ifname": "later-peer", "state": "up"}
        )
        ip.link("set", index=netlink.links(pod.netns)["later-peer"], state="up")
        try:
            late = Neighbor(
                neighbor.bench,
                pod.netns,
                "later-peer",
                neighbor.pods,
                ip.get_links(index)[0].get("address"),
            )
            with nothing_heard(neighbor.bench, 1, family, Transport.UDP):
                late.send(OURS[family], addresses.guest_link(family, 1), Transport.UDP, PORTS[1])
        finally:
            ip.link("del", index=index)
