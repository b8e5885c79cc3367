"""Pods on the node's network: out and in with the pod's address, and nothing else.

guests ─ pod ─ eth0 ─┬─ node ─ eth0 ─ peer: a pod of natives
"""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from pyroute2 import IPRoute
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from testbed import datapaths
from testbed.host import ledger, namespaces, netlink, nft
from testbed.host.ledger import Owner
from testbed.model import addresses
from testbed.model.addresses import Address, guest_link, node_address
from testbed.model.errors import Error
from testbed.model.manifest import HostPort, Manifest
from testbed.model.terms import Family, Transport
from testbed.pods.network import node
from testbed.pods.pod import Pod

from .conftest import Build
from .sockets import MANIFEST, PAIRS, PATIENCE_S, PORTS, Bench, opened, send_frames, served
from .test_baselines import connected

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(bool(nft.unsupported()), reason=str(nft.unsupported())),
]

FAMILIES = pytest.mark.parametrize("family", Family, ids=str)
TRANSPORTS = pytest.mark.parametrize("transport", Transport, ids=str)
WORKLOADS = pytest.mark.parametrize("n", PORTS, ids=lambda n: f"guest{n}" if n else "native")

DATAPATHS = ("steer", "capture", "direct", "dnat")
WITH_LOCALHOST = [name for name in DATAPATHS if datapaths.get(name).localhost]
PEERS_PORT = 7000
RTN_UNREACHABLE = 7


def host_port(datapath: str, n: int) -> int:
    """Port of the node that leads to a workload."""
    return 8000 + 10 * DATAPATHS.index(datapath) + n


@pytest.fixture(scope="module", params=DATAPATHS)
def bench(build: Build, request: pytest.FixtureRequest) -> Bench:
    name = request.param
    pod = build(f"net-{name}", datapath=name)
    pod.connect([HostPort(t, host_port(name, n), PORTS[n]) for n in PORTS for t in Transport])
    return Bench(pod)


@pytest.fixture(scope="module")
def peer(build: Build) -> Pod:
    pod = build("net-peer", Manifest(()), "loopback")
    pod.connect([])
    return pod


def source_seen(client: socket.socket, server: socket.socket, to: Address, port: int) -> str:
    """Whom the server sees; question and answer have come through."""
    with client, server:
        client.connect((str(to), port))
        client.send(b"question")
        if server.type is socket.SOCK_DGRAM:
            question, seen = server.recvfrom(100)
            server.sendto(b"answer", seen)
        else:
            far, seen = server.accept()
            with far:
                question = far.recv(100)
                far.send(b"answer")
        assert question == b"question"
        assert client.recv(100) == b"answer"
    return str(seen[0])


@FAMILIES
@TRANSPORTS
@WORKLOADS
def test_every_workload_reaches_out_with_the_pods_address(
    bench: Bench, peer: Pod, n: int, family: Family, transport: Transport
) -> None:
    server = served(peer.netns, family, transport, PEERS_PORT)
    client = bench.open(n, family, transport)
    seen = source_seen(client, server, peer.addresses[family], PEERS_PORT)
    assert seen == str(bench.pod.addresses[family])


@FAMILIES
@TRANSPORTS
@WORKLOADS
def test_every_port_answers_at_the_pods_address_and_sees_who_asks(
    bench: Bench, peer: Pod, n: int, family: Family, transport: Transport
) -> None:
    to = bench.pod.addresses[family]
    outside = {node.NETNS: node_address(family), peer.netns: peer.addresses[family]}
    for netns, address in outside.items():
        client = opened(netns, family, transport)
        seen = source_seen(client, bench.serve(n, family, transport), to, PORTS[n])
        assert seen == str(address)


@FAMILIES
@TRANSPORTS
@WORKLOADS
@pytest.mark.parametrize("client", PORTS, ids=lambda n: f"guest{n}" if n else "native")
def test_the_pod_reaches_itself_at_its_address(
    bench: Bench, client: int, n: int, family: Family, transport: Transport
) -> None:
    asking = bench.open(client, family, transport)
    to = bench.pod.addresses[family]
    source_seen(asking, bench.serve(n, family, transport), to, PORTS[n])


@FAMILIES
@TRANSPORTS
@WORKLOADS
def test_a_port_of_the_node_leads_to_the_pod(
    bench: Bench, peer: Pod, n: int, family: Family, transport: Transport
) -> None:
    port = host_port(bench.pod.datapath.name, n)
    for netns in (node.NETNS, peer.netns, bench.pod.netns, bench.netns(2)):
        client = opened(netns, family, transport)
        server = bench.serve(n, family, transport)
        source_seen(client, server, node_address(family), port)


@FAMILIES
@TRANSPORTS
def test_ports_that_nobody_serves_are_refused(
    bench: Bench, peer: Pod, family: Family, transport: Transport
) -> None:
    for netns in (node.NETNS, peer.netns):
        with opened(netns, family, transport) as client:
            with pytest.raises(ConnectionRefusedError):
                ask(client, (str(bench.pod.addresses[family]), PORTS[1]))


def ask(client: socket.socket, to: tuple[str, int]) -> None:
    client.connect(to)
    client.send(b"anybody there?")
    client.recv(100)


@pytest.mark.parametrize("bench", WITH_LOCALHOST, indirect=True)
@FAMILIES
@TRANSPORTS
def test_localhost_is_as_it_was_and_is_not_tracked(
    bench: Bench, family: Family, transport: Transport
) -> None:
    def tracked() -> int:
        return int(Path("/proc/sys/net/netfilter/nf_conntrack_count").read_text())

    before = namespaces.inside(bench.pod.netns, tracked)
    for pair in PAIRS:
        with connected(bench, pair, family, transport) as (near, far):
            near.send(b"question")
            assert far.recv(100) == b"question"
    if bench.pod.datapath.name != "dnat":
        assert namespaces.inside(bench.pod.netns, tracked) <= before


@FAMILIES
def test_nothing_else_comes_in_from_outside(bench: Bench, family: Family) -> None:
    """Not to addresses of the pod's inside, and not from such, to whatever socket."""
    pod = bench.pod.addresses[family]
    inside = [
        addresses.alias(family),
        addresses.native_source(family),
        addresses.native_source_odd(family),
        addresses.guest_view(family, 1),
        addresses.native_view(family, 1),
        addresses.loopback(family),
        addresses.pod_link(family),
        guest_link(family, 1),
    ]
    stranger = node_address(family)
    ends = [(stranger, to) for to in inside] + [(s, to) for s in inside for to in (*inside, pod)]
    with namespaces.open_socket(bench.pod.netns) as ip:
        mac = ip.get_links(ifname=node.UPLINK)[0].get("address")
    layer = IP if family is Family.IPV4 else IPv6
    frames = [
        bytes(Ether(dst=mac) / layer(src=str(s), dst=str(to)) / UDP(sport=7, dport=port) / b"bad")
        for s, to in ends
        for port in PORTS.values()
    ]
    honest = bytes(
        Ether(dst=mac) / layer(src=str(stranger), dst=str(pod)) / UDP(dport=PORTS[0]) / b"good"
    )
    servers = [bench.serve(n, family, Transport.UDP) for n in (1, 2)]
    servers.append(bench.serve(0, family, Transport.UDP))
    try:
        send_frames(node.NETNS, link_of(bench.pod), *frames, honest)
        assert servers[-1].recv(100) == b"good"
        for server in servers:
            server.setblocking(False)
            with pytest.raises(BlockingIOError):
                server.recv(100)
    finally:
        for server in servers:
            server.close()


def link_of(pod: Pod) -> str:
    """The node's end of a pod's link."""
    number = int(pod.addresses[Family.IPV4]) - int(node_address(Family.IPV4))
    return f"p{number}"


@FAMILIES
def test_a_loopback_bound_socket_hears_nothing_from_outside(bench: Bench, family: Family) -> None:
    to = (str(bench.pod.addresses[family]), PORTS[0])
    bound = str(addresses.loopback(family))
    with (
        bench.serve(0, family, Transport.TCP, bound),
        opened(node.NETNS, family, Transport.TCP) as client,
        pytest.raises(ConnectionRefusedError),
    ):
        client.connect(to)


@FAMILIES
def test_a_pod_that_claims_anothers_address_is_not_heard(
    bench: Bench, peer: Pod, family: Family
) -> None:
    with namespaces.open_socket(node.NETNS) as ip:
        mac = ip.get_links(ifname=link_of(peer))[0].get("address")
    layer = IP if family is Family.IPV4 else IPv6
    to = str(bench.pod.addresses[family])
    frames = [
        bytes(Ether(dst=mac) / layer(src=str(source), dst=to) / UDP(dport=PORTS[0]) / text)
        for source, text in (
            (addresses.pod_address(family, 900), b"bad"),
            (node_address(family), b"bad"),
            (peer.addresses[family], b"good"),
        )
    ]
    with bench.serve(0, family, Transport.UDP) as server:
        send_frames(peer.netns, node.UPLINK, *frames)
        assert server.recv(100) == b"good"


def test_a_port_of_the_node_is_one_pods_alone(bench: Bench, build: Build) -> None:
    other = build(f"{bench.pod.name}-other", Manifest(()), "loopback")
    port = host_port(bench.pod.datapath.name, 0)
    with pytest.raises(Error, match=f"pod '{bench.pod.name}' has tcp port {port} of the node"):
        other.connect([HostPort(Transport.TCP, port, 80)])
    other.connect([HostPort(Transport.TCP, port + 5, 80)])
    other.close()


def test_an_address_is_free_again_after_its_pod(build: Build, peer: Pod) -> None:
    def leases() -> set[str]:
        return {p.name for p in (ledger.ROOT / "node").iterdir()}

    before = leases()
    pod = build("net-short", MANIFEST, "direct")
    pod.connect([])
    assert len(leases() - before) == 1
    pod.close()
    assert leases() - before == set()


def refused(ip: IPRoute) -> set[str]:
    """Destinations that a namespace has unreachable routes to."""
    routes = [r for f in Family for r in ip.get_routes(family=f.domain, type=RTN_UNREACHABLE)]
    return {f"{route.get('dst')}/{route['dst_len']}" for route in routes}


@FAMILIES
def test_what_the_machine_sends_to_pods_is_refused_and_does_not_leave_it(
    peer: Pod, family: Family
) -> None:
    with socket.socket(family.domain) as client:
        client.settimeout(PATIENCE_S)
        with pytest.raises(OSError, match="No route to host"):
            client.connect((str(peer.addresses[family]), 80))


@FAMILIES
def test_another_route_of_the_machine_to_pods_addresses_is_left_alone(
    owner: Owner, family: Family
) -> None:
    wide = {Family.IPV4: "10.0.0.0/8", Family.IPV6: "fd00::/8"}
    netns = f"tb-{owner.id}-machine-{family}"
    with namespaces.create(owner, netns) as ip:
        link = netlink.create_link(ip, "a", kind="veth", state="up", peer={"ifname": "b"})
        ip.link("set", ifname="b", state="up")
        namespaces.inside(netns, node.refuse)
        assert refused(ip) == {str(node.pod_range(f)) for f in Family}
        namespaces.inside(netns, node.refuse_no_longer)
        assert refused(ip) == set()
        ip.route("add", dst=wide[family], oif=link)
        namespaces.inside(netns, node.refuse)
        assert refused(ip) == {str(node.pod_range(f)) for f in Family if f is not family}
        namespaces.inside(netns, node.refuse_no_longer)
        assert refused(ip) == set()


def test_the_node_goes_with_its_last_pod(owner: Owner) -> None:
    """As `clean` does it: by what is in the ledger."""
    others = {p.name for p in (ledger.ROOT / "node").iterdir() if owner.id not in p.name}
    if others:
        pytest.skip("other pods stand on this host")
    for lease in (ledger.ROOT / "node").iterdir():
        node.leave(int(lease.name.partition("-")[0]), owner.id)
    assert not (namespaces.NETNS / node.NETNS).exists()
    with IPRoute() as ip:
        assert not refused(ip) & {str(node.pod_range(family)) for family in Family}
