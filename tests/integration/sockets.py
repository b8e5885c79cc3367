"""The tests' own sockets in a pod: opened from inside its namespaces, where its workloads would be.

    native: 6000, 6001        guest 1: 5001        guest 2: 5002

A workload is meant by its number, as in the programs: 0 for natives, else the guest's.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.l2 import Ether

from testbed.host import namespaces
from testbed.host.facts import slowness
from testbed.model import addresses
from testbed.model.manifest import Manifest, Workload
from testbed.model.terms import Family, Runtime, Transport
from testbed.pods.pod import Pod

PATIENCE_S = 5 * slowness()
PORTS = {0: 6000, 1: 5001, 2: 5002}
MTU_DISCOVER = {
    Family.IPV4: (socket.IPPROTO_IP, 10),
    Family.IPV6: (socket.IPPROTO_IPV6, 23),
}
"""Level and number of the options IP_MTU_DISCOVER and IPV6_MTU_DISCOVER (linux/in.h, in6.h)."""
PMTUDISC_DO, PMTUDISC_PROBE = 2, 3
NOBODYS_PORT = 6001
"""A native's that no test listens on."""


def workload(name: str, runtime: Runtime, *ports: int) -> Workload:
    return Workload(name, runtime, tuple((t, p) for p in ports for t in Transport))


MANIFEST = Manifest(
    (
        workload("native1", Runtime.PROCESS, PORTS[0]),
        workload("guest1", Runtime.STANDIN, PORTS[1]),
        workload("guest2", Runtime.STANDIN, PORTS[2]),
    )
)


class Pair(NamedTuple):
    """Client and server."""

    client: int
    server: int

    def __str__(self) -> str:
        return "-".join(f"guest{n}" if n else "native" for n in self)


PAIRS = [Pair(0, 1), Pair(0, 2), Pair(1, 0), Pair(1, 2), Pair(2, 1), Pair(1, 1)]


class Bench:
    """A pod and its namespaces."""

    def __init__(self, pod: Pod) -> None:
        self.pod = pod

    def netns(self, n: int) -> str:
        return f"{self.pod.netns}-g{n}" if n else self.pod.netns

    def open(self, n: int, family: Family, transport: Transport) -> socket.socket:
        """A socket of a workload."""
        return opened(self.netns(n), family, transport)

    def serve(self, n: int, family: Family, transport: Transport, host: str = "") -> socket.socket:
        """A socket bound to the workload's port, that listens if it can."""
        return bound(self.open(n, family, transport), family, transport, PORTS[n], host)

    @contextmanager
    def connected(
        self, pair: Pair, family: Family, transport: Transport = Transport.TCP
    ) -> Iterator[tuple[socket.socket, socket.socket]]:
        """Both ends of a flow to `localhost`: the client's, and the server's."""
        client, server = pair
        with (
            self.serve(server, family, transport) as listening,
            self.open(client, family, transport) as near,
        ):
            near.connect((localhost(client, family), PORTS[server]))
            if transport is Transport.UDP:
                near.send(b"hello")
                listening.connect(listening.recvfrom(100)[1])
                yield near, listening
                return
            far, _ = listening.accept()
            with far:
                far.settimeout(PATIENCE_S)
                yield near, far

    def refuses_until_it_sends(self, family: Family, transport: Transport) -> None:
        """Guest 1 is said to have ended: nobody is let through, though its kernel would answer."""
        target = {n: (localhost(n, family), PORTS[1]) for n in (0, 2)}
        with self.serve(1, family, transport):
            for n in target:
                assert any(self._is_refused(n, target[n], family, transport) for _ in range(5))
        self._wake(1, family)
        for n in target:
            with self.connected(Pair(n, 1), family, transport):
                pass

    def a_guest_hears_of_anothers_death(
        self,
        pair: Pair,
        dead: int,
        family: Family,
        before: Callable[[socket.socket, socket.socket], object] = lambda client, server: None,
    ) -> None:
        """Of two guests, whichever dialed: the kernel of one is gone, and says nothing.

        `before` is called with both ends of their connection before that.
        """
        with self.connected(pair, family) as ends:
            before(*ends)
            self.pod.links.link_ip.link("del", ifname=f"g{dead}")
            self.pod.attachment.guest_ended(dead)
            with pytest.raises(ConnectionResetError):
                ends[1 - pair.index(dead)].recv(1)
        self.pod.mend()
        self._wake(dead, family)
        with self.connected(pair, family):
            pass

    def _wake(self, n: int, family: Family) -> None:
        """Have a guest send something: who was said to have ended has not. Nobody serves there."""
        with self.open(n, family, Transport.UDP) as guest:
            guest.connect((localhost(n, family), PORTS[0]))
            guest.send(b"!")
            with pytest.raises(ConnectionRefusedError):  # so the datapath has seen it
                guest.recv(1)

    def _is_refused(
        self, n: int, target: tuple[str, int], family: Family, transport: Transport
    ) -> bool:
        """At once. Not so if guest 1's kernel, which lives, has just sent something of its own."""
        self.pod.attachment.guest_ended(1)
        with self.open(n, family, transport) as client:
            began = time.monotonic()
            try:
                client.connect(target)
                client.send(b"?")
                client.recv(1)
            except ConnectionRefusedError:
                return time.monotonic() - began < 1
            except TimeoutError:
                return False
        raise AssertionError(f"{n} got through")

    def raw(self, n: int, *frames: bytes) -> None:
        """Send Ethernet frames out of guest n's interface, as its kernel never would."""
        send_frames(self.netns(n), "eth0", *frames)

    def counted(self, reason: str) -> int:
        """Packets that the datapath counted for a reason."""
        return self.pod.attachment.counters()[reason].packets

    def checksum_errors(self) -> dict[int, dict[str, int]]:
        """What each workload's stack counted as wrong (nstat's *InCsumErrors)."""
        return {n: namespaces.inside(self.netns(n), _checksum_errors) for n in PORTS}


def opened(netns: str, family: Family, transport: Transport) -> socket.socket:
    """A socket in a namespace."""
    kind = socket.SOCK_STREAM if transport is Transport.TCP else socket.SOCK_DGRAM
    made = namespaces.inside(netns, lambda: socket.socket(family.domain, kind))
    made.settimeout(PATIENCE_S)
    return made


def served(
    netns: str, family: Family, transport: Transport, port: int, host: str = ""
) -> socket.socket:
    """A socket in a namespace that is bound in its family alone, and listens if it can."""
    return bound(opened(netns, family, transport), family, transport, port, host)


def bound(
    server: socket.socket, family: Family, transport: Transport, port: int, host: str = ""
) -> socket.socket:
    """That socket, bound in its family alone, which listens if it can."""
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family is Family.IPV6:
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    server.bind((host, port))
    if transport is Transport.TCP:
        server.listen()
    return server


def dial(netns: str, to: str, port: int, limit_s: float = 5, source: str = "") -> socket.socket:
    """A TCP connection from a namespace."""
    return namespaces.inside(
        netns, lambda: socket.create_connection((to, port), limit_s, (source, 0))
    )


def echoes(connection: socket.socket) -> bool:
    """Whether the other end answers with what it is told. The connection is closed then."""
    with connection:
        connection.sendall(b"hello")
        return connection.recv(5) == b"hello"


def localhost(n: int, family: Family) -> str:
    """What `localhost` resolves to for a workload."""
    return str(addresses.alias(family) if n else addresses.loopback(family))


def send_frames(netns: str, ifname: str, *frames: bytes) -> None:
    def send() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
            raw.bind((ifname, 0))
            for frame in frames:
                raw.send(frame)

    namespaces.inside(netns, send)


def floods(n: int, to: int, dialed: int, count: int) -> list[bytes]:
    """Frames of guest n that make its pod remember most: `count` first fragments of datagrams to a
    port at the alias, and as many handshakes with another.
    """
    source, alias = str(addresses.guest_link(Family.IPV4, n)), str(addresses.alias(Family.IPV4))
    head = Ether(src=addresses.guest_mac(n), dst=addresses.ALIAS_MAC)
    first = bytes(head / IP(src=source, dst=alias, flags="MF") / UDP(dport=to) / bytes(16))
    handshake = bytes(head / IP(src=source, dst=alias) / TCP(dport=dialed))
    return [
        frame[:at] + number.to_bytes(2) + frame[at + 2 :]
        for frame, at in ((first, 18), (handshake, 34))  # id of the datagram, client's port
        for number in range(count)
    ]


def transfer(
    source: socket.socket, sink: socket.socket, data: bytes, chunk: int = 1 << 20
) -> bytes:
    """Send all of it and shut down; returns what arrived until then."""

    def send() -> None:
        for at in range(0, len(data), chunk):
            source.sendall(data[at : at + chunk])
        source.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    with sink.makefile("rb") as file:
        arrived = file.read()
    sender.join()
    return arrived


def wait_until(holds: Callable[[], bool], what: str, limit_s: float = 5) -> None:
    limit_s *= slowness()
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}"
        time.sleep(0.005)


def _checksum_errors() -> dict[str, int]:
    """From /proc/net/snmp (header and values in two lines) and snmp6 (one line each)."""
    errors: dict[str, int] = {}
    lines = Path("/proc/thread-self/net/snmp").read_text().splitlines()
    for header, values in zip(lines[::2], lines[1::2], strict=True):
        protocol, *names = header.split()
        row = dict(zip(names, map(int, values.split()[1:]), strict=True))
        errors[protocol] = row.get("InCsumErrors", 0)
    for line in Path("/proc/thread-self/net/snmp6").read_text().splitlines():
        name, value = line.split()
        if name.endswith("InCsumErrors"):
            errors[name] = int(value)
    return errors
