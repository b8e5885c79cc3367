"""What a datapath is told, and what it has to be: plain data and protocols."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from testbed.datapaths.between_hosts import Side
from testbed.host.ledger import Scope
from testbed.model.addresses import CONTROL_PORT, Address
from testbed.model.cells import Cell, Pair
from testbed.model.looks import Look
from testbed.model.terms import Family, Transport


class Layout(StrEnum):
    """Where the host's end of a guest's link lives."""

    POD = "pod"
    """In the pod's namespace: the pod routes between its guests."""
    BRIDGE = "bridge"
    """In a namespace in the host's place, ports of the pod's bridge, as the pod's own veth is."""
    ROUTED = "routed"
    """As `pod`, and guests have no loopback: 127.0.0.0/8 takes their default route, to the pod."""
    SOCKET = "socket"
    """Nowhere: a guest's frames go through a Unix socket, to a program that the datapath starts."""


@dataclass(frozen=True)
class Port:
    """The host's end of guest n's link: a tap, a veth for a stand-in, or a Unix socket."""

    n: int
    ifname: str
    ifindex: int
    """In the namespace that `Layout` says; 0 in layout `socket`."""
    families: frozenset[Family] = frozenset(Family)
    """What the guest's network stack speaks."""
    socket: Path | None = None
    """In layout `socket`: where the guest's machine looks for the program that listens."""
    control_port: int = CONTROL_PORT
    """TCP port of the guest's that is reached at its own address."""


@dataclass(frozen=True)
class Wiring:
    """A pod's finished links. Interface indices are per namespace."""

    pod: str
    netns: str
    """Name of the pod's namespace (under /run/netns)."""
    link_netns: str
    """Name of the namespace that holds ports and bridge; the pod's, but in layout `bridge`."""
    layout: Layout
    uplink_ifindex: int
    """The pod's veth in `netns`; 0 but in layout `bridge`."""
    uplink_peer_ifindex: int
    """Its other end in `link_netns`, a port of the pod's bridge; 0 but in layout `bridge`."""
    ports: tuple[Port, ...]
    owners: Mapping[tuple[Transport, int], int]
    """(transport, port) → n of the guest that serves it; what is not here is native."""
    cgroup: Path
    """cgroup2 directory that native workloads of the pod join."""
    native_ports: frozenset[tuple[Transport, int]] = frozenset()
    """What native workloads serve, as far as the manifest says."""


@dataclass(frozen=True)
class Count:
    """Packets and layer 3 bytes. A GSO packet counts once, with all its bytes."""

    packets: int = 0
    bytes: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.packets + other.packets, self.bytes + other.bytes)

    def __sub__(self, other: Count) -> Count:
        return Count(self.packets - other.packets, self.bytes - other.bytes)


class Attachment(Protocol):
    """A datapath at work in one pod."""

    tracked: bool
    """It needs connections to `localhost` in the kernel's connection tracking."""

    def carried(self, client: int | None, server: int | None) -> Count:
        """Traffic between client and server, both directions, since attaching.

        Guests by number, None for natives.
        """

    def counters(self) -> dict[str, Count]:
        """Everything the programs counted for this pod, by reason."""

    def rewire(self, wiring: Wiring) -> None:
        """Attach again after links were replaced; counters go on."""

    def attach_deferred(self) -> None:
        """What takes long and may wait until workloads boot: it makes nothing but speed."""

    def guest_ended(self, n: int) -> None:
        """Refuse what is for guest n, where the datapath can, until it sends something again.

        Guests that have a connection with it are refused as well.
        """

    def trace(self, lock: threading.RLock) -> AbstractContextManager[dict[str, Any]]:
        """Trace packets: what `testbed trace` has to know. The lock is held while programs change.

        Raises `Error` where there is nothing to trace.
        """

    def detach(self) -> None:
        """Remove everything that attaching made."""


class Datapath:
    """A way of making `localhost` work, in a module of its own as `DATAPATH`."""

    name: str
    look: Look
    reference: str
    """The datapath whose cells these are divided by; its own name for a reference."""
    pairs: frozenset[Pair]
    layout = Layout.POD
    localhost = True
    """Clients dial `localhost`; else the server's link address."""
    programs: tuple[str, ...] = ()
    """The sets of programs in `bpf/` that it loads."""
    in_kernel = True
    """What it makes is all in the kernel and in the ledger: it works on when whoever attached it
    died, and a namespace that is not its own is left as it was."""
    far: Mapping[Family, Address] = {}
    """Addresses of the servers' pod, where that is another host's."""

    def between(self, side: Side | None) -> Datapath:
        """The same at one end of a link between two hosts, if it goes there."""
        return self

    def unsupported(self, cell: Cell) -> str | None:
        """Why this cell cannot be measured here, or None."""
        return None

    def attach(self, wiring: Wiring, owner: Scope) -> Attachment:
        """Make it work. What is made is in the owner's ledger first."""
        raise NotImplementedError
