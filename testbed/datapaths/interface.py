"""Interface of datapaths: `Datapath`, `Attachment`, and the plain data that they take and give."""

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
    """Where the host's ends of guests' links are."""

    POD = "pod"
    """In the pod's namespace. The pod routes between its guests."""
    BRIDGE = "bridge"
    """On a bridge, with the pod's veth, in a second namespace, which stands for the host's."""
    NO_LOOPBACK = "no-loopback"
    """As `POD`, but guests have no loopback: their default route takes 127.0.0.0/8 to the pod."""
    SOCKET = "socket"
    """No link: a guest's frames go by a Unix socket to a program that the datapath starts."""


@dataclass(frozen=True)
class Port:
    """The host's end of guest n's link: a tap, a veth to its namespace, or a Unix socket."""

    n: int
    ifname: str
    ifindex: int
    """Index in the namespace that `Layout` says; 0 in layout `socket`."""
    families: frozenset[Family] = frozenset(Family)
    """IP versions of the guest's network stack."""
    socket: Path | None = None
    """Unix socket to which the guest's QEMU connects, in layout `socket`."""
    control_port: int = CONTROL_PORT
    """TCP port of the guest that is reached at its own address."""


@dataclass(frozen=True)
class Wiring:
    """A pod's finished links. Interface indices are per namespace."""

    pod: str
    netns: str
    """Name of the pod's namespace (under /run/netns)."""
    link_netns: str
    """Name of the namespace with the ports: in layout `bridge` the bridge's, else the pod's."""
    layout: Layout
    uplink_ifindex: int
    """The pod's veth in `netns`, in layout `bridge`; else 0."""
    uplink_peer_ifindex: int
    """Its other end in `link_netns`, a port of the pod's bridge, in layout `bridge`; else 0."""
    ports: tuple[Port, ...]
    owners: Mapping[tuple[Transport, int], int]
    """(transport, port) → n of the guest that serves it. All other ports are native."""
    cgroup: Path
    """cgroup2 directory of the pod's native workloads."""
    native_ports: frozenset[tuple[Transport, int]] = frozenset()
    """(transport, port) of native workloads, those that the manifest names."""


@dataclass(frozen=True)
class Count:
    """A number of packets, and their bytes of layer 3. A GSO packet is one packet."""

    packets: int = 0
    bytes: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.packets + other.packets, self.bytes + other.bytes)

    def __sub__(self, other: Count) -> Count:
        return Count(self.packets - other.packets, self.bytes - other.bytes)


class Attachment(Protocol):
    """A datapath that is attached to one pod."""

    needs_conntrack: bool
    """Whether connections to `localhost` have to be in the kernel's connection tracking."""

    def carried(self, client: int | None, server: int | None) -> Count:
        """Traffic between client and server in both directions since attaching.

        Guests by number, None for natives.
        """

    def counters(self) -> dict[str, Count]:
        """All that the programs counted for this pod, by reason."""

    def missing_programs(self) -> set[str]:
        """Names of attached programs that somebody else removed."""

    def rewire(self, wiring: Wiring) -> None:
        """Attach again after links were replaced or programs removed. Counters go on."""

    def attach_deferred(self) -> None:
        """Attach slow parts that may wait until workloads boot. They only improve speed."""

    def guest_ended(self, n: int) -> None:
        """Refuse packets for guest n, where the datapath can, until the guest sends one again.

        Connections of other guests with it are reset, too.
        """

    def trace(self, lock: threading.RLock) -> AbstractContextManager[dict[str, Any]]:
        """Trace packets while the context lasts. It yields the data that `testbed trace` needs.

        The lock is held while programs change. Raises `Error` if the datapath has no programs.
        """

    def detach(self) -> None:
        """Remove everything that attaching made."""


class Datapath:
    """A way of making `localhost` work. Its module has one instance, `DATAPATH`."""

    name: str
    look: Look
    reference: str
    """The datapath whose cells are the divisor of this one's; its own name for a reference."""
    pairs: frozenset[Pair]
    layout = Layout.POD
    localhost = True
    """Whether clients dial `localhost`; else they dial the server's link address."""
    programs: tuple[str, ...] = ()
    """Names of the sets of programs in `bpf/` that it loads."""
    in_kernel = True
    """Whether all that it makes is in the kernel and in the ledger. Then it works on after the
    process that attached it died, and leaves a foreign namespace as it was."""
    server_addresses: Mapping[Family, Address] = {}
    """Addresses of the servers' pod, if that is on another host."""

    def between(self, side: Side | None) -> Datapath:
        """This datapath at one end of a link between two hosts, if it goes between hosts."""
        return self

    def unsupported(self, cell: Cell) -> str | None:
        """Why this cell cannot be measured here, or None."""
        return None

    def attach(self, wiring: Wiring, owner: Scope) -> Attachment:
        """Attach to a pod's links. All that is made is in the owner's ledger first."""
        raise NotImplementedError
