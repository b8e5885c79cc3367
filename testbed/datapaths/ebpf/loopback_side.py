"""What the datapaths made of eBPF have in common, besides `bpf/pod.h`: the pod's `lo`, and maps.

Ports that guests own are held by sockets of ours, so that no native gets them. `lo` is told to take
packets that were put on it. A pod's rows in the maps of `bpf/maps.h` are filled, read and cleared.
Which programs there are, and where they stand, is each datapath's own business.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from testbed import bpf
from testbed.bpf import ProgramSet
from testbed.datapaths.ebpf.challenge_ack import GuestConnection
from testbed.host import facts, namespaces
from testbed.host.ledger import Scope
from testbed.model import addresses
from testbed.model.errors import Error
from testbed.model.terms import Family, Transport

LINK_MTU = 1500
LO_IFINDEX = 1
NO_IFINDEX = 0x7FFFFFFF
SO_BINDTOIFINDEX = 62
"""Takes any number, since Linux 5.0; the device need not be there (socket(7) does not say so)."""
RT_TABLE_LOCAL = 255
NATIVE_FLOW_GUESTS = 64
"""Flows of guests below this number with natives are counted in the map `native_flow_counts`."""
IPV4_ONLY = 0x100
"""In a value of `owners`: the guest has no IPv6."""
PROTOCOLS = {Transport.TCP: socket.IPPROTO_TCP, Transport.UDP: socket.IPPROTO_UDP}

Owners = Mapping[tuple[Transport, int], int]
"""(transport, port) → n of the guest that serves it."""


# --- ports ----------------------------------------------------------------------------------


def hold_ports(pod: str, netns: str, owners: Owners) -> list[socket.socket]:
    """Bind every port that a guest owns: natives get EADDRINUSE, and none of them as ephemeral.

    None of them takes a packet, so that the kernel refuses what is for a guest that is down: TCP's
    do not listen, UDP's are bound to a device that there is not. Raises `Error` if a native process
    has one of the ports.
    """
    held: list[socket.socket] = []
    has_ipv6 = Family.IPV6 in facts.families()

    def bind() -> None:
        for (transport, port), n in sorted(owners.items()):
            kind = socket.SOCK_STREAM if transport is Transport.TCP else socket.SOCK_DGRAM
            held.append(socket.socket(socket.AF_INET6 if has_ipv6 else socket.AF_INET, kind))
            if has_ipv6:
                held[-1].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            device = LO_IFINDEX if transport is Transport.TCP else NO_IFINDEX
            held[-1].setsockopt(socket.SOL_SOCKET, SO_BINDTOIFINDEX, device)
            try:
                held[-1].bind(("::" if has_ipv6 else "0.0.0.0", port))
            except OSError as e:
                if e.errno != errno.EADDRINUSE:
                    raise
                raise Error(
                    f"pod {pod}: {transport} port {port} is guest {n}'s, "
                    "but a native process has it",
                    hint="stop that process, or give the port to it in the manifest",
                ) from e

    try:
        namespaces.inside(netns, bind)
    except BaseException:
        release_ports(held)
        raise
    return held


def release_ports(held: list[socket.socket]) -> None:
    """Let the ports go."""
    for each in held:
        each.close()
    held.clear()


# --- lo -------------------------------------------------------------------------------------

_LO = ("net/ipv4/conf/lo/route_localnet", "net/ipv4/conf/lo/accept_local")
_RESERVED = "net/ipv4/ip_local_reserved_ports"
_VIEWS = (f"{addresses.native_view(Family.IPV4, 0)}/24", addresses.NATIVE_VIEW_NET6)


def prepare_lo(owner: Scope, netns: str, owners: Owners, local: Sequence[str] = ()) -> None:
    """Let `lo` take packets from loopback addresses that come to it from elsewhere.

    Never on `all`: other links would take them from outside, too (CVE-2020-8558). The routes make
    natives fragment what they send to guests for the guests' link; 127.77.0.0/24 is local by
    nature, its twin has to be made so. So has `local`, what else the namespace is to take for its
    own on whatever link.
    """
    routes = [*_VIEWS, *local]
    before = namespaces.sysctls(netns, *_LO, _RESERVED)
    owner.defer(unprepare_lo, netns=netns, routes=routes, before=before)
    ports = ",".join(str(port) for port in sorted({port for _, port in owners}))
    reserved = ",".join(filter(None, (before[_RESERVED], ports)))
    namespaces.set_sysctls(netns, dict.fromkeys(_LO, 1) | {_RESERVED: reserved or "\n"})
    _change_routes("replace", netns, routes)


def unprepare_lo(netns: str, routes: list[str], before: dict[str, str]) -> None:
    """Undo what was set on a namespace's `lo`; one that is gone is no error."""
    if not (namespaces.NETNS / netns).exists():
        return
    namespaces.set_sysctls(netns, before | {_RESERVED: before[_RESERVED] or "\n"})
    _change_routes("del", netns, routes)


def _change_routes(command: str, netns: str, routes: Sequence[str]) -> None:
    def change() -> None:
        with IPRoute() as ip:
            for dst in routes:
                network = ip_network(dst)
                family = Family(f"ipv{network.version}")
                if family not in facts.families():
                    continue
                try:
                    ip.route(command, dst=str(network), type="local", table=RT_TABLE_LOCAL,
                             family=socket.AF_INET6 if network.version == 6 else socket.AF_INET,
                             **({} if network.version == 6 else {"scope": "host"}),
                             oif=LO_IFINDEX, prefsrc=str(addresses.loopback(family)),
                             metrics={"mtu": LINK_MTU})  # fmt: skip
                except NetlinkError as e:
                    if e.code != errno.ESRCH:  # deleted already
                        raise

    namespaces.inside(netns, change)


# --- maps -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """A pod's rows in the maps of `bpf/maps.h`. Counts are (packets, layer 3 bytes)."""

    programs: ProgramSet
    reasons: tuple[str, ...]
    """What `counters` counts, in the order of the programs' `enum reason`."""

    def fill(self, owner: Scope, owners: Owners, guests: Mapping[int, Collection[Family]]) -> None:
        """Say who owns which port and which families each guest speaks, and make room to count."""
        slot = self.programs.slot
        keys = [[slot << 24 | PROTOCOLS[transport] << 16 | port] for transport, port in owners]
        owner.defer(clear, pins=str(self.programs.pins), slot=slot, owners=keys,
                    guests=list(guests), reasons=len(self.reasons))  # fmt: skip
        for key, n in zip(keys, owners.values(), strict=True):
            nature = 0 if Family.IPV6 in guests[n] else IPV4_ONLY
            _owners(self.programs)[tuple(key)] = (n | nature,)
        for flow in _flows(slot, guests):
            _flow_counts(self.programs).add(flow, (0, 0))

    def port(self, n: int) -> int:
        """The link of guest n; 0 while the guest is down."""
        return int(_guests(self.programs)[self.programs.slot << 8 | n,][0])

    def set_port(self, n: int, ifindex: int) -> None:
        """Say so; a guest that sends has its link back."""
        _guests(self.programs)[self.programs.slot << 8 | n,] = (ifindex,)

    def carried(self, client: int | None, server: int | None) -> tuple[int, ...]:
        """Between two workloads, both directions; None for native, of which one must be a guest."""
        c, s = client or 0, server or 0
        if not (c and s) and c + s < NATIVE_FLOW_GUESTS:
            row = 2 * ((c + s) << 1 | (not c))
            return _native_flow_counts(self.programs)[self.programs.slot,][row : row + 2]
        try:
            return _flow_counts(self.programs)[self.programs.slot, c, s]
        except KeyError:
            return (0, 0)

    def take_connections(self, n: int) -> list[GuestConnection]:
        """Forget guest n's TCP connections with other guests; returns them as those see them."""
        taken = []
        for client, server, v6, client_port, server_port in _take_connections(self.programs, [n]):
            family = Family.IPV6 if v6 else Family.IPV4
            if client != n:
                taken.append(
                    GuestConnection(client, client_port, addresses.alias(family), server_port)
                )
            elif server != n:
                dialed_by = addresses.guest_view(family, n)
                taken.append(GuestConnection(server, server_port, dialed_by, client_port))
        return taken

    def counters(self) -> dict[str, tuple[int, ...]]:
        """Everything else that was counted, by reason."""
        counters, first = _counters(self.programs), self.programs.slot * len(self.reasons)
        return {reason: counters[first + i,] for i, reason in enumerate(self.reasons)}


def clear(pins: str, slot: int, owners: list[list[int]], guests: list[int], reasons: int) -> None:
    """Clear a pod's rows; programs that are gone, and rows not made yet, are no error."""
    if not Path(pins, "users").exists():
        return
    programs = ProgramSet(Path(pins), slot)
    try:
        for n in guests:
            _guests(programs)[slot << 8 | n,] = (0,)
        for reason in range(reasons):
            _counters(programs)[slot * reasons + reason,] = (0, 0)
        _native_flow_counts(programs)[slot,] = (0,) * 4 * NATIVE_FLOW_GUESTS
        for owned in owners:
            with suppress(KeyError):
                del _owners(programs)[tuple(owned)]
        for flow in _flows(slot, guests):
            with suppress(KeyError):
                del _flow_counts(programs)[flow]
        _take_connections(programs, guests)
    finally:
        programs.close()


def _guests(programs: ProgramSet) -> bpf.Map:
    return programs.map("guests", "=I", "=I")


def _owners(programs: ProgramSet) -> bpf.Map:
    return programs.map("owners", "=I", "=I")


def _flow_counts(programs: ProgramSet) -> bpf.Map:
    return programs.map("flow_counts", "=BBBx", "=QQ")


def _native_flow_counts(programs: ProgramSet) -> bpf.Map:
    return programs.map("native_flow_counts", "=I", f"={4 * NATIVE_FLOW_GUESTS}Q")


def _counters(programs: ProgramSet) -> bpf.Map:
    return programs.map("counters", "=I", "=QQ")


def _take_connections(programs: ProgramSet, guests: list[int]) -> list[tuple[int, ...]]:
    """Delete those of some guests; programs that follow none have no such map."""
    taken = []
    with suppress(FileNotFoundError):
        connections = programs.map("guest_connections", "=BBBBHH", "=B")
        for key in connections:
            slot, client, server, *_ = key
            if slot == programs.slot and (client in guests or server in guests):
                taken.append(key[1:])
                with suppress(KeyError):
                    del connections[key]
    return taken


def _flows(slot: int, guests: Iterable[int]) -> list[tuple[int, int, int]]:
    """Keys of `flow_counts`: all pairs but natives alone, and those in `native_flow_counts`."""
    workloads = [0, *guests]
    pairs = ((client, server) for client in workloads for server in workloads)
    return [(slot, c, s) for c, s in pairs if (c and s) or c + s >= NATIVE_FLOW_GUESTS]
