"""Steps that several checks share."""

from __future__ import annotations

import errno
import time

from testbed.conformance.bed import Bed
from testbed.conformance.check import (
    expect,
    fails_with,
)
from testbed.conformance.sockets import Sock

AT_ONCE_S = 0.5
"""Limit for an immediate answer. It is below 1 s, after which a lost SYN is sent again."""


def exchange(near: Sock, far: Sock, size: int = 1000) -> None:
    """Send bytes both ways, and check each byte."""
    for a, b in ((near, far), (far, near)):
        a.send(size, phase=size)
        got = b.receive(size, phase=size)
        expect(got.bytes == size, f"{b.peer.name} received {got.bytes} of {size} bytes")
        expect(got.intact, f"{b.peer.name} received other bytes than were sent")


def two_clients_on_one_port(bed: Bed) -> list[tuple[Sock, Sock]]:
    """Connect two workloads from the same port to the server: the ends at client and server."""
    listener, ends, port = bed.serve(), [], 0
    for peer in (bed.client, bed.another_client()):
        near = bed.open(peer)
        near.bind(bed.wildcard, port)
        near.connect(peer.localhost(bed.family), bed.port)
        port = port or near.own_name[1]
        ends.append((near, listener.accept()[0]))
    return ends


def refused_at_once(bed: Bed, port: int = 0) -> None:
    """Check that a connection is refused within `AT_ONCE_S`."""
    began = time.monotonic()
    with fails_with(errno.ECONNREFUSED):
        bed.dial(port)
    took_s = time.monotonic() - began
    expect(took_s < AT_ONCE_S, f"refused only after {took_s:.2f} s")
