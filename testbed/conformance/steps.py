"""Steps that several checks share."""

from __future__ import annotations

import errno
import time

from testbed.conformance.bed import Bed
from testbed.conformance.check import Unsupported, expect, fails_with
from testbed.conformance.sockets import Sock
from testbed.model.terms import Family

AT_ONCE_S = 0.5
"""Limit for an immediate answer. It is below 1 s, after which a lost SYN is sent again."""


def exchange(near: Sock, far: Sock, size: int = 1000) -> None:
    """Send bytes both ways, and check each byte."""
    for a, b in ((near, far), (far, near)):
        a.send(size, phase=size)
        got = b.receive(size, phase=size)
        expect(got.bytes == size, f"{b.peer.name} received {got.bytes} of {size} bytes")
        expect(got.intact, f"{b.peer.name} received other bytes than were sent")


def bound_to_one_port(bed: Bed) -> list[Sock]:
    """Sockets of two workloads, bound to the same port."""
    clients, port = [], 0
    for peer in (bed.client, bed.another_client()):
        client = bed.open(peer)
        client.bind(bed.family.wildcard, port)
        port = client.own_name[1]
        clients.append(client)
    return clients


def two_clients_on_one_port(bed: Bed) -> list[tuple[Sock, Sock]]:
    """Connect two workloads from the same port to the server: the ends at client and server."""
    listener, ends = bed.serve(), []
    for near in bound_to_one_port(bed):
        near.connect(near.peer.localhost(bed.family), bed.port)
        ends.append((near, listener.accept()[0]))
    return ends


def need_ipv6(bed: Bed) -> None:
    """Raise `Unsupported` if the server's kernel has no IPv6."""
    if Family.IPV6 not in bed.server.agent.hello().families:
        raise Unsupported(f"{bed.server.name} has no IPv6: see ipv6-client-of-ipv4-guest")


def refused_at_once(bed: Bed, port: int = 0, family: Family | None = None) -> None:
    """Check that a connection is refused within `AT_ONCE_S`."""
    began = time.monotonic()
    with fails_with(errno.ECONNREFUSED):
        bed.dial(port, family=family)
    took_s = time.monotonic() - began
    expect(took_s < AT_ONCE_S, f"refused only after {took_s:.2f} s")
