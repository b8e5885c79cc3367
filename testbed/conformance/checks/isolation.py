"""Checks of what must not get through: forged sources, traffic from outside, other pods, floods."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from ipaddress import ip_address

from pyroute2 import IPRoute

from testbed.conformance import frames
from testbed.conformance.bed import Bed
from testbed.conformance.check import (
    FROM_GUEST,
    NATIVE_CLIENT,
    NATIVE_SERVER,
    UDP,
    Unsupported,
    check,
    expect,
)
from testbed.conformance.sockets import TIMEOUT_S, Peer, Sock
from testbed.conformance.steps import exchange, refused_at_once
from testbed.datapaths.interface import Layout
from testbed.host import namespaces, netlink, nft
from testbed.model.addresses import (
    ALIAS_MAC,
    POD_MAC,
    Address,
    alias,
    guest_link,
    guest_mac,
    loopback,
    native_source,
    pod_link,
)
from testbed.model.terms import Family, Transport
from testbed.model.trials import percentile
from testbed.pods.network import node

PATIENCE_S = 0.15
FLOOD_FACTOR = 10.0
"""Factor by which the median request of others may be slower while one guest floods."""
STRANGER = {Family.IPV4: "192.0.2.9", Family.IPV6: "2001:db8::9"}
"""Addresses for documentation (RFC 5737, RFC 3849), which no host of the test has."""


@contextmanager
def nothing_arrives(bed: Bed, server: Sock) -> Iterator[None]:
    """Check that frames of the `with` statement do not arrive, and that an honest client works."""
    yield
    try:
        got = server.receive(timeout_s=PATIENCE_S)
    except TimeoutError:
        pass
    else:
        expect(False, f"the server received {got.text!r} from {got.sender}")
    bed.dial().send("honest")
    expect(server.receive().text == b"honest", "an honest client is not served any more")


def forge(bed: Bed, sources: list[Address], destinations: list[Address]) -> None:
    """Send datagrams from guest 1 with forged sources, and check that none arrives."""
    netns = bed.stage.guest_netns("guest1")
    server = bed.serve(bed.family.wildcard)
    with nothing_arrives(bed, server):
        frames.send(
            netns,
            "eth0",
            [
                frames.datagram((guest_mac(1), mac), source, to, (7777, bed.port))
                for source in sources
                for to in destinations
                for mac in (ALIAS_MAC, POD_MAC)
            ],
        )


@check("RFC 2827: no forged sources", transports=UDP, pairs=FROM_GUEST)
def forged_source_of_guest(bed: Bed) -> None:
    """A guest that sends from another guest's address is not heard."""
    forge(bed, [guest_link(bed.family, 2)], [alias(bed.family), pod_link(bed.family)])


@check("RFC 2827: no forged sources", transports=UDP, pairs=FROM_GUEST)
def forged_source_of_native(bed: Bed) -> None:
    """A guest that sends from natives' addresses is not heard."""
    sources = [native_source(bed.family), pod_link(bed.family), alias(bed.family)]
    forge(bed, sources, [alias(bed.family)])


@check("RFC 1122, 3.2.1.3 (g); RFC 4291, 2.5.3", transports=UDP, pairs=FROM_GUEST)
def forged_source_of_loopback(bed: Bed) -> None:
    """A guest that sends from a loopback address is not heard."""
    sources = [loopback(bed.family)]
    if bed.family is Family.IPV4:
        sources += [ip_address("127.0.0.2"), ip_address("127.77.0.2")]
    forge(bed, sources, [alias(bed.family), pod_link(bed.family), loopback(bed.family)])


@check("RFC 1122, 3.2.1.3 (g): loopback is no address on a link", transports=UDP, pairs=FROM_GUEST)
def loopback_by_the_link(bed: Bed) -> None:
    """A guest does not reach loopback-bound sockets by putting 127.0.0.1 or ::1 on its link."""
    netns = bed.stage.guest_netns("guest1")
    own = guest_link(bed.family, 1)
    with nothing_arrives(bed, bed.serve(bed.loopback)):
        frames.send(
            netns,
            "eth0",
            [
                frames.datagram((guest_mac(1), mac), own, to, (7777, bed.port))
                for to in (loopback(bed.family), pod_link(bed.family))
                for mac in (ALIAS_MAC, POD_MAC)
            ],
        )


@contextmanager
def uplink(bed: Bed) -> Iterator[tuple[str, str]]:
    """(namespace, name) of the outer end of the pod's uplink; a new uplink if the pod has none."""
    pod = bed.own_pod.pod
    wiring = pod.wiring()
    if wiring.layout is Layout.BRIDGE:
        netns, ifindex = wiring.link_netns, wiring.uplink_peer_ifindex
        yield netns, namespaces.inside(netns, lambda: socket.if_indextoname(ifindex))
        return

    def link(command: str, **spec: str) -> None:
        with IPRoute() as ip:
            ip.link(command, ifname="outside", **spec)

    outside = f"{pod.netns}-outside"
    scope = bed.own_pod.owner.part()
    with ExitStack() as stack:
        stack.callback(scope.undo)
        with namespaces.create(scope, outside) as ip:
            peer = {"ifname": "outside", "net_ns_fd": pod.netns, "address": POD_MAC}
            netlink.create_link(ip, "eth0", kind="veth", state="up", peer=peer)
        # The kernel removes the links of a deleted namespace only later.
        stack.callback(namespaces.inside, pod.netns, lambda: link("del"))
        namespaces.inside(pod.netns, lambda: link("set", state="up"))
        yield outside, "eth0"


def from_outside(bed: Bed, destinations: list[Address]) -> None:
    """Send frames from outside through the pod's uplink, and check that none arrives."""
    sources = [ip_address(STRANGER[bed.family]), guest_link(bed.family, 9)]
    sources += [alias(bed.family), native_source(bed.family), loopback(bed.family)]
    with uplink(bed) as (netns, name), nothing_arrives(bed, bed.serve(bed.loopback)):
        frames.send(
            netns,
            name,
            [
                frames.datagram((ALIAS_MAC, POD_MAC), source, to, (7777, bed.port))
                for source in sources
                for to in destinations
            ],
        )


@check("CVE-2020-8558: loopback is not for neighbors", transports=UDP, pairs=NATIVE_SERVER)
def outside_to_loopback(bed: Bed) -> None:
    """From outside the pod nothing reaches a loopback-bound socket by 127.0.0.1 or ::1."""
    from_outside(bed, [loopback(bed.family)])


@check("the alias is the pod's own", transports=UDP, pairs=NATIVE_SERVER)
def outside_to_alias(bed: Bed) -> None:
    """From outside the pod nothing reaches a socket by the alias or the native source."""
    from_outside(bed, [alias(bed.family), native_source(bed.family), pod_link(bed.family)])


@check("bind(2): what is bound decides who is served, in a guest too", pairs=NATIVE_CLIENT)
def outside_reaches_the_wildcard_alone(bed: Bed) -> None:
    """At the pod's address a server at the wildcard is served outside, one at loopback is not."""
    if why := nft.unsupported():
        raise Unsupported(why)
    with connected_pod(bed) as (server, address):

        def dial() -> socket.socket:
            return socket.create_connection((str(address), bed.port), TIMEOUT_S)

        hidden = bed.serve(bed.loopback, peer=server)
        with suppress(OSError), namespaces.inside(node.NETNS, dial):
            _, name = hidden.accept(timeout_s=PATIENCE_S)
            expect(False, f"a server at {bed.loopback} was reached from {name}")
        hidden.close()
        listener = bed.serve(bed.family.wildcard, peer=server)
        with namespaces.inside(node.NETNS, dial) as near:
            far, _ = listener.accept()
            near.sendall(b"hello")
            expect(far.receive(5).text == b"hello", "what was sent from outside did not arrive")


@contextmanager
def connected_pod(bed: Bed) -> Iterator[tuple[Peer, Address]]:
    """Another pod that is connected with the node's network: its server, and its address there."""
    stage = bed.own_pod
    with stage.another(f"{stage.name}-c") as pod:
        pod.connect([])
        pod.start_workload(bed.server_name)
        pod.attach_deferred()
        pod.wait_ready(bed.server_name)
        server = Peer(bed.server_name, pod.agent(bed.server_name))
        try:
            yield server, pod.addresses[bed.family]
        finally:
            server.close()


@check("RFC 826, RFC 4861: who answers for the alias", pairs=FROM_GUEST)
def alias_claimed_by_guest(bed: Bed) -> None:
    """A guest that claims the alias by ARP or ND does not get another's connections."""
    netns = bed.stage.guest_netns("guest2")
    near, far = bed.connected()
    told, attacker = guest_link(bed.family, 1), guest_link(bed.family, 2)
    frames.send(
        netns,
        "eth0",
        [
            frames.claim((guest_mac(2), guest_mac(1)), alias(bed.family), told, attacker),
        ]
        * 3,
    )
    exchange(near, far)
    exchange(*bed.connected())


@check("one pod is one localhost", pairs=FROM_GUEST)
def pods_are_apart(bed: Bed) -> None:
    """What another pod serves is refused here, and is not reached by any address."""
    stage = bed.own_pod
    with stage.another(f"{stage.name}-b") as other:

        def listen() -> socket.socket:
            return socket.create_server((bed.family.wildcard, bed.port), family=bed.family.domain)

        with namespaces.inside(other.netns, listen) as listener:
            listener.setblocking(False)
            refused_at_once(bed)
            for address in (pod_link(bed.family), native_source(bed.family)):
                near = bed.open(bed.client)
                try:
                    near.connect(address, bed.port, timeout_s=0.3)
                except OSError:
                    continue
                expect(False, f"{address}:{bed.port} is served here")
            try:
                _, name = listener.accept()
            except BlockingIOError:
                return
            expect(False, f"the other pod's server was reached from {name}")


@check("RFC 4987: floods", pairs=FROM_GUEST)
def syn_flood(bed: Bed) -> None:
    """While one guest floods with SYNs, requests of another take 10 times as long at most."""
    netns = bed.stage.guest_netns("guest2")
    bed.serve(port=(flooded := bed.next_port()), backlog=16)
    bed.serve_by_agent()
    macs, own = (guest_mac(2), ALIAS_MAC), guest_link(bed.family, 2)
    syns = [frames.syn(macs, own, alias(bed.family), (1024 + i, flooded), i) for i in range(5000)]
    stop = threading.Event()

    def flood() -> None:
        while not stop.is_set():
            frames.send(netns, "eth0", syns)

    def median_us() -> float:
        result = bed.client.agent.run(
            Transport.TCP, bed.family, str(bed.target), bed.port, "rr", 64, duration_s=0.5
        )
        return percentile(result.histogram_us, 50)

    calm_us = median_us()
    flooding = threading.Thread(target=flood)
    flooding.start()
    try:
        flooded_us = median_us()
        exchange(*bed.connected())
    finally:
        stop.set()
        flooding.join()
    expect(flooded_us < FLOOD_FACTOR * calm_us, f"median {calm_us:.0f} µs → {flooded_us:.0f} µs")
