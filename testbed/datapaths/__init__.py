"""Ways of making `localhost` work in a pod: one file each, all with the interface below.

A datapath is told the finished wiring as plain data and attaches itself; it never builds links.
To add one: a module here with a `DATAPATH` that satisfies `Datapath`, at most one file in `bpf/`,
and its name in `NAMES`.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from testbed import bpf
from testbed.datapaths.ebpf import challenge_ack, loopback_side
from testbed.host import netlink
from testbed.host.ledger import Scope
from testbed.model.addresses import CONTROL_PORT, alias
from testbed.model.cells import Cell, Pair
from testbed.model.errors import Error
from testbed.model.terms import Family, Transport

NAMES = (
    "loopback",
    "direct",
    "bridge",
    "capture",
    "steer",
    "dnat",
    "proxy",
    "tcredirect",
    "broadcast",
    "passt",
    "tun",
    "routed",
)


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

    def carried(self, client: int | None, server: int | None) -> Count:
        """Traffic between client and server, both directions, since attaching.

        Guests by number, None for natives.
        """

    def counters(self) -> dict[str, Count]:
        """Everything the programs counted for this pod, by reason."""

    def rewire(self, wiring: Wiring) -> None:
        """Attach again after links were replaced; counters go on."""

    def settle(self) -> None:
        """What takes long and may wait until workloads boot: it makes nothing but speed."""

    def guest_ended(self, n: int) -> None:
        """Refuse what is for guest n, where the datapath can, until it sends something again.

        Guests that have a connection with it are refused as well.
        """

    def detach(self) -> None:
        """Remove everything that attaching made."""


class LinkCounters:
    """The attachment of datapaths without programs: the links count."""

    def __init__(self, wiring: Wiring) -> None:
        self.wiring = wiring

    def carried(self, client: int | None, server: int | None) -> Count:
        """Of the guests' ports among the two; between natives, of `lo`."""
        ports = {p.n: p.ifindex for p in self.wiring.ports}
        ends = {ports[n] for n in (client, server) if n is not None}
        netns = self.wiring.link_netns if ends else self.wiring.netns
        with netlink.open_socket(netns) as ip:
            total = sum((Count(*netlink.traffic(ip, i)) for i in ends or {1}), Count())
        if (client is None) is (server is None):  # a packet goes into one end and out of the other
            return Count(total.packets // 2, total.bytes // 2)
        return total

    def counters(self) -> dict[str, Count]:
        return {}

    def rewire(self, wiring: Wiring) -> None:
        self.wiring = wiring

    def settle(self) -> None:
        pass

    def guest_ended(self, n: int) -> None:
        pass

    def detach(self) -> None:
        pass


def add_aliases(wiring: Wiring) -> None:
    """Give the alias to the pod's end of every guest's link (layout `pod`), where it is not yet.

    It goes with the links.
    """
    with netlink.open_socket(wiring.netns) as ip:
        for port in wiring.ports:
            for family in Family:
                netlink.add_address(ip, port.ifindex, alias(family), alias(family).max_prefixlen)


AT_PORTS = {"port_ingress": bpf.INGRESS, "port_egress": bpf.EGRESS}
"""Programs at guests' ports in the pod's own namespace."""


class ProgramsOfPod:
    """The attachment of datapaths made of eBPF (`bpf/pod.h`): what is the same for all of them.

    Their own part is which programs stand where: `_attach_lo`, once, and `_attach_links`, again
    whenever links were replaced.
    """

    def __init__(
        self, name: str, reasons: tuple[str, ...], wiring: Wiring, owner: Scope,
        local: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """`reasons` in the order of the programs' `enum reason`; `local`: see `prepare_lo`."""
        self.name, self.reasons = name, reasons
        self._wiring = wiring
        self._scope = owner.part()
        self._links = self._scope
        self._held: list[socket.socket] = []
        self._places: dict[tuple[str, int, int], tuple[str, int]] = {}
        """(namespace, ifindex, hook) → name and class of the program there."""
        try:
            self._held = loopback_side.hold_ports(wiring.pod, wiring.netns, wiring.owners)
            self._programs = self._at_work = bpf.load(name, self._scope)
            self._rows = loopback_side.Rows(self._programs, reasons)
            self._rows.fill(self._scope, wiring.owners, {p.n: p.families for p in wiring.ports})
            for port in wiring.ports:
                self._rows.set_port(port.n, port.ifindex)
            loopback_side.prepare_lo(self._scope, wiring.netns, wiring.owners, local)
            self._attach_lo()
            self._links = self._scope.part()
            self._attach_links()
        except BaseException:
            self.detach()
            raise

    def carried(self, client: int | None, server: int | None) -> Count:
        if client is None and server is None:
            return LinkCounters(self._wiring).carried(None, None)
        return Count(*self._rows.carried(client, server))

    def counters(self) -> dict[str, Count]:
        return {reason: Count(*count) for reason, count in self._rows.counters().items()}

    def rewire(self, wiring: Wiring) -> None:
        self._wiring = wiring
        self._links.undo()
        for port in wiring.ports:
            if port.ifindex and self._rows.port(port.n):  # 0: vanished again; the guest is down
                self._rows.set_port(port.n, port.ifindex)
        self._attach_links()

    def guest_ended(self, n: int) -> None:
        self._rows.set_port(n, 0)
        if waiting := self._rows.take_conversations(n):
            links = {port.n: port.ifname for port in self._wiring.ports}
            with netlink.inside(self._wiring.link_netns, challenge_ack.open_socket) as opened:
                challenge_ack.send(opened, [(c, links[c.n]) for c in waiting])

    def detach(self) -> None:
        self._scope.undo()
        loopback_side.release_ports(self._held)
        if hasattr(self, "_programs"):
            self._programs.close()

    def settle(self) -> None:
        pass

    def _attach_lo(self) -> None:
        self._attach(loopback_side.LO_IFINDEX, bpf.EGRESS, "lo_egress")

    def _attach_links(self) -> None:
        for port in self._wiring.ports:
            for name, hook in AT_PORTS.items():
                self._attach(port.ifindex, hook, name, port.n)

    def _show_names(self) -> None:
        """Have natives of the pod's cgroup see guests' connections as from `localhost`."""
        names = bpf.load("names", self._scope)
        for hook in ("getpeername4", "getpeername6"):
            bpf.attach_cgroup(self._scope, self._wiring.cgroup, hook, names.program(hook))
        names.close()

    def _attach(
        self, ifindex: int, hook: int, name: str, n: int = 0, netns: str | None = None
    ) -> None:
        """To a link of the pod's namespace, or of another; `n` for a guest's port."""
        place, classid = (netns or self._wiring.netns, ifindex, hook), self._class_of(n)
        self._places[place] = name, classid
        bpf.attach_tc(self._links, *place, self._at_work.program(name), name, classid)

    def _class_of(self, n: int) -> int:
        """What programs are told of where they are (`where` in `bpf/pod.h`)."""
        return self._programs.slot << 8 | n

    @contextmanager
    def traced(self, lock: threading.RLock) -> Iterator[bpf.ProgramSet]:
        """Have the traced variant of the programs at work; the lock is held while they change."""
        with self._scope.part() as part:
            variant = bpf.load_traced(self._programs, part)
            try:
                self._replace(variant, lock)
                yield variant
            finally:
                self._replace(self._programs, lock)
                variant.close()

    def _replace(self, programs: bpf.ProgramSet, lock: threading.RLock) -> None:
        with lock:
            self._at_work = programs
            for place, (name, classid) in self._places.items():
                with suppress(OSError):  # that link is gone
                    bpf.replace_tc(*place, programs.program(name), name, classid)


class Datapath(Protocol):
    """A way of making `localhost` work."""

    name: str
    layout: Layout
    reference: str
    """The datapath whose cells these are divided by; its own name for a reference."""
    localhost: bool
    """Clients dial `localhost`; else the server's link address."""
    pairs: frozenset[Pair]
    programs: tuple[str, ...]
    """The sets of programs in `bpf/` that it loads."""
    in_kernel: bool
    """What it makes is all in the kernel and in the ledger: it works on when whoever attached it
    died, and a namespace that is not its own is left as it was."""

    def unsupported(self, cell: Cell) -> str | None:
        """Why this cell cannot be measured here, or None."""

    def attach(self, wiring: Wiring, owner: Scope) -> Attachment:
        """Make it work. What is made is in the owner's ledger first."""


def reference(name: str) -> str:
    """What a datapath's cells are divided by; those of a variant, by the datapath itself."""
    base, variant, _ = name.partition("~")
    return base if variant else get(name).reference


def get(name: str) -> Datapath:
    """The datapath of that name, whichever variant. Raises `Error` if there is none."""
    name = name.partition("~")[0]
    if name not in NAMES:
        raise Error(f"no datapath {name!r}", hint=f"choose from {', '.join(NAMES)}")
    return cast(Datapath, import_module(f"{__name__}.{name}").DATAPATH)
