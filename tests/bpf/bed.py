"""A pod with two stand-ins for guests, bare of everything but links; and servers that echo in them.

pod namespace -- eth0 -- u -- bridge -- g1 ---- eth0 -- namespace of guest 1
                                     -- g200 -- eth0 -- namespace of guest 200

What guests carry is counted in two places, by their number: one of them is in each.
"""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Callable

from testbed.datapaths.interface import Layout, Port, Wiring
from testbed.host import cgroups, namespaces, netlink
from testbed.host.facts import slowness
from testbed.host.ledger import Scope
from testbed.model import addresses
from testbed.model.addresses import Address, guest_link, guest_mac
from testbed.model.terms import Family, Transport

OWNERS = {(t, port): n for t in Transport for port, n in ((5001, 1), (5002, 200))}
PATIENCE_S = 3 * slowness()


class Bed:
    """The links of a pod with two guests."""

    def __init__(self, owner: Scope, name: str) -> None:
        mark = f"{owner.id}-{name}"
        self.pod, self.links = f"pod-{mark}", f"links-{mark}"
        self.guests = {n: f"guest{n}-{mark}" for n in (1, 200)}
        self._ip = {
            ns: namespaces.create(owner, ns) for ns in (self.pod, self.links, *self.guests.values())
        }
        self.cgroup = cgroups.create(owner, f"bpf-{mark}")
        namespaces.set_sysctls(self.links, {"net/ipv6/conf/default/disable_ipv6": 1})
        self._bridge = netlink.create_link(self._ip[self.links], "br", kind="bridge", state="up")
        uplink = self._link("u", self.pod, addresses.POD_MAC, addresses.pod_link)
        self.wiring = Wiring(
            pod=name,
            netns=self.pod,
            link_netns=self.links,
            layout=Layout.BRIDGE,
            uplink_ifindex=netlink.links(self.pod)["eth0"],
            uplink_peer_ifindex=uplink,
            ports=tuple(self.link_guest(n) for n in self.guests),
            owners=OWNERS,
            cgroup=self.cgroup,
        )

    def link_guest(self, n: int) -> Port:
        port = self._link(f"g{n}", self.guests[n], guest_mac(n), lambda f: guest_link(f, n))
        return Port(n, f"g{n}", port)

    def unlink_guest(self, n: int) -> None:
        self._ip[self.links].link("del", ifname=f"g{n}")

    def netns(self, workload: int | None) -> str:
        return self.guests[workload] if workload else self.pod

    def close(self) -> None:
        for ip in self._ip.values():
            ip.close()

    def _link(self, name: str, netns: str, mac: str, address: Callable[[Family], Address]) -> int:
        peer = {"ifname": "eth0", "net_ns_fd": netns, "address": mac}
        port = netlink.create_link(self._ip[self.links], name, kind="veth", state="up", peer=peer)
        self._ip[self.links].link("set", index=port, master=self._bridge)
        eth0 = netlink.links(netns)["eth0"]
        for family in Family:
            netlink.add_address(
                self._ip[netns], eth0, address(family), addresses.LINK_PREFIX[family]
            )
        self._ip[netns].link("set", index=eth0, state="up")
        return port


# --- sockets --------------------------------------------------------------------------------


def open_socket(netns: str, family: Family, transport: Transport) -> socket.socket:
    kind = socket.SOCK_STREAM if transport is Transport.TCP else socket.SOCK_DGRAM
    made = namespaces.inside(netns, lambda: socket.socket(family.domain, kind))
    made.settimeout(PATIENCE_S)
    return made


class Echo:
    """Serves one client or datagram at a time: sends back who the peer is, then what it sent."""

    def __init__(
        self, netns: str, family: Family, transport: Transport, port: int, host: str = ""
    ) -> None:
        self._socket = open_socket(netns, family, transport)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((host, port))
        self._stop, self._stopped = os.pipe()
        serve = self._serve_udp
        if transport is Transport.TCP:
            self._socket.listen()
            serve = self._serve_tcp
        self._thread = threading.Thread(target=self._until_stopped, args=(serve,))
        self._thread.start()

    def close(self) -> None:
        os.close(self._stopped)
        self._thread.join()
        os.close(self._stop)
        self._socket.close()

    def _until_stopped(self, serve: Callable[[], None]) -> None:
        both = [self._socket.fileno(), self._stop]
        while self._stop not in select.select(both, [], [])[0]:
            serve()

    def _serve_tcp(self) -> None:
        client, peer = self._socket.accept()
        with client:
            client.settimeout(PATIENCE_S)
            client.sendall(f"{peer[0]}\n".encode())
            sent = b"".join(iter(lambda: client.recv(65536), b""))
            client.sendall(sent)

    def _serve_udp(self) -> None:
        sent, peer = self._socket.recvfrom(65536)
        self._socket.sendto(f"{peer[0]}\n".encode() + sent, peer)


def ask(client: socket.socket, to: tuple[str, int], message: bytes = b"hello") -> str:
    """Send a message to an echo, check that it comes back; returns the peer that the server saw."""
    with client:
        client.connect(to)
        if client.type is socket.SOCK_DGRAM:
            client.send(message)
            answer = client.recv(65536)
        else:

            def send() -> None:
                client.sendall(message)
                client.shutdown(socket.SHUT_WR)

            sender = threading.Thread(target=send)
            sender.start()
            with client.makefile("rb") as file:
                peer = file.readline()
                sender.join()
                answer = peer + file.read()
        assert answer.partition(b"\n")[2] == message
        return answer.partition(b"\n")[0].decode()


def localhost(workload: int | None, family: Family) -> str:
    """What `localhost` resolves to for a workload."""
    return str(addresses.alias(family) if workload else addresses.loopback(family))


def seen(family: Family, client: int | None, server: int | None) -> Address:
    """As what a server sees a client that dialed `localhost`."""
    if client is None:
        return addresses.native_source(family)
    return (addresses.guest_view if server else addresses.native_view)(family, client)
