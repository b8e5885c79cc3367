"""Prepares the pod's namespace for the eBPF datapaths: reserves guests' ports, and sets up `lo`.

Sockets of ours are bound to the ports that guests own, so that no native can bind them. Sysctls and
routes let `lo` accept the packets that programs put on it. Each datapath attaches its programs
itself.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import ip_network
from typing import Any

from pyroute2.netlink.exceptions import NetlinkError

from testbed import bpf
from testbed.host import facts, namespaces, sockets
from testbed.host.ledger import Scope
from testbed.model import addresses
from testbed.model.errors import Error
from testbed.model.terms import Family, Transport

LINK_MTU = 1500
LO_IFINDEX = 1
SO_ATTACH_REUSEPORT_EBPF = 52
NOBODYS_UID = 0xFFFFFFEF
"""Id of a user that no process is."""
RT_TABLE_LOCAL = 255
GUESTS_TABLE = 7700
"""Table with the routes of natives' datagrams to guests' ports."""
FIRST, SECOND = 0, 1
"""Priorities of rules. The kernel's own rule, for the table `local`, is moved from the first to the
second, as no rule can be before the first."""
MOST_RULES = 16

Change = tuple[str, str, dict[str, Any]]
"""A change of a route or rule: method of `IPRoute`, its command and arguments."""
NO_ERRORS = {
    "route": {errno.ESRCH},
    "rule": {errno.EEXIST, errno.ENOENT, errno.EAFNOSUPPORT, errno.EOPNOTSUPP},
}
"""Errors of changes that were made already; and of a kernel that has no rules. Natives' datagrams
that are too large are dropped then."""

Owners = Mapping[tuple[Transport, int], int]
"""(transport, port) → n of the guest that serves it."""


# --- ports ----------------------------------------------------------------------------------


def hold_ports(pod: str, netns: str, owners: Owners) -> list[socket.socket]:
    """Bind sockets to each port that a guest owns, and return them.

    Natives that bind such a port get EADDRINUSE, at any address and device, and none gets it as an
    ephemeral port. The sockets accept no packets, so that the kernel refuses those for a guest that
    is down. Raises `Error` if a native process has a port.
    """
    held: list[socket.socket] = []

    def taken(transport: Transport, port: int) -> Error:
        return Error(
            f"pod {pod}: {transport} port {port} is guest {owners[transport, port]}'s, "
            "but a native process has it",
            hint="stop that process, or give the port to it in the manifest",
        )

    def bind() -> None:
        with bpf.refusing() as program:
            for transport, port in sorted(owners):
                held.append(_unbound(transport))
                if transport is Transport.UDP:  # of TCP it does not listen
                    _refuse(held[-1], program)
                try:
                    held[-1].bind(("", port))
                except OSError as e:
                    if e.errno != errno.EADDRINUSE:
                        raise
                    raise taken(transport, port) from e
        # If a port has more than ten sockets, bind(2) does not look at all of them (Linux before
        # e537dd15d0d4, of 2026).
        for port, _, uid in sockets.rows(Transport.UDP):
            if (Transport.UDP, port) in owners and uid != NOBODYS_UID:
                raise taken(Transport.UDP, port)

    try:
        namespaces.inside(netns, bind)
    except BaseException:
        release_ports(held)
        raise
    return held


def _unbound(transport: Transport) -> socket.socket:
    """A socket that is going to have its port in both families, if the kernel has both."""
    both = Family.IPV6 in facts.families()
    kind = socket.SOCK_STREAM if transport is Transport.TCP else socket.SOCK_DGRAM
    opened = socket.socket(Family.IPV6.domain if both else Family.IPV4.domain, kind)
    if both:
        opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    return opened


def _refuse(held: socket.socket, program: int) -> None:
    """Let a UDP socket refuse all that comes, by the program of `bpf.refusing`.

    Sockets share a port (SO_REUSEPORT) if all of them want it and are one user's, and a program may
    choose the receiver: ours chooses none. The socket becomes a user's that has no others.
    """
    os.fchown(held.fileno(), NOBODYS_UID, -1)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_EBPF, program)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)  # multicast asks no program


def release_ports(held: list[socket.socket]) -> None:
    """Close the sockets of `hold_ports`."""
    for each in held:
        each.close()
    held.clear()


# --- lo -------------------------------------------------------------------------------------

_LO = ("net/ipv4/conf/lo/route_localnet", "net/ipv4/conf/lo/accept_local")
_RESERVED = "net/ipv4/ip_local_reserved_ports"
_LOOPBACK = ("127.0.0.0/8", "::1/128")
_VIEWS = (f"{addresses.native_view(Family.IPV4, 0)}/24", addresses.NATIVE_VIEW_NET6)


def prepare_lo(owner: Scope, netns: str, owners: Owners, local: Sequence[str] = ()) -> None:
    """Let `lo` accept packets with loopback addresses that programs redirect to it.

    The sysctls are never set on `all`: other links would then accept such packets from outside
    (CVE-2020-8558). The MTU of the routes makes natives fragment packets to guests for the guests'
    links. 127.77.0.0/24 is local anyway; its IPv6 counterpart becomes so by its route. `local` are
    more addresses that the namespace is to accept as its own on all links. Datagrams to guests'
    ports at loopback addresses have routes of their own, because of the MTU.
    """
    routes = [*_VIEWS, *local]
    udp = _ranges(port for transport, port in owners if transport is Transport.UDP)
    moved = _families_with_local_first(netns) if udp else []
    before = namespaces.sysctls(netns, *_LO, _RESERVED)
    owner.defer(unprepare_lo, netns=netns, routes=routes, udp=udp, moved=moved, before=before)
    ports = ",".join(str(port) for port in sorted({port for _, port in owners}))
    reserved = ",".join(filter(None, (before[_RESERVED], ports)))
    namespaces.set_sysctls(netns, dict.fromkeys(_LO, 1) | {_RESERVED: reserved or "\n"})
    changes = _routes("replace", routes)
    if udp:
        changes += _routes("replace", _LOOPBACK, GUESTS_TABLE)
        changes += [*_local("add", moved, SECOND), *_local("del", moved, FIRST)]
        changes += _for_guests("add", udp)
    _change(netns, changes)


def unprepare_lo(
    netns: str,
    routes: list[str],
    udp: list[tuple[int, int]],
    moved: list[Family],
    before: dict[str, str],
) -> None:
    """Undo `prepare_lo`. A missing namespace is no error."""
    if not (namespaces.NETNS / netns).exists():
        return
    namespaces.set_sysctls(netns, before | {_RESERVED: before[_RESERVED] or "\n"})
    changes = _routes("del", routes)
    if udp:
        changes += _for_guests("del", udp)
        changes += [*_local("add", moved, FIRST), *_local("del", moved, SECOND)]
        changes += _routes("del", _LOOPBACK, GUESTS_TABLE)
    _change(netns, changes)


def _ranges(ports: Iterable[int]) -> list[tuple[int, int]]:
    """First and last of the ranges that the ports make up.

    If they are many, one range has all, since each rule costs each look-up of a route: what natives
    send to natives' ports in it is in fragments, too.
    """
    found: list[tuple[int, int]] = []
    for port in sorted(ports):
        if found and found[-1][1] == port - 1:
            found[-1] = found[-1][0], port
        else:
            found.append((port, port))
    return found if len(found) <= MOST_RULES else [(found[0][0], found[-1][1])]


def _local(command: str, families: Iterable[str], priority: int) -> list[Change]:
    """The kernel's rule for what is local, at this priority."""
    return [
        (
            "rule",
            command,
            {"family": Family(family).domain, "priority": priority, "table": RT_TABLE_LOCAL},
        )
        for family in families
    ]


def _for_guests(command: str, ranges: Iterable[tuple[int, int]]) -> list[Change]:
    """The rules for datagrams to ranges of guests' ports."""
    return [
        (
            "rule",
            command,
            {
                "family": family.domain,
                "priority": FIRST,
                "table": GUESTS_TABLE,
                "ip_proto": socket.IPPROTO_UDP,
                "dport_range": f"{first}:{last}",
            },
        )
        for family in facts.families()
        for first, last in ranges
    ]


def _routes(command: str, routes: Iterable[str], table: int = RT_TABLE_LOCAL) -> list[Change]:
    """Routes that take these networks for local, with the MTU of guests' links."""
    found: list[Change] = []
    for dst in routes:
        network = ip_network(dst)
        family = Family(f"ipv{network.version}")
        if family in facts.families():
            route = {
                "dst": str(network),
                "type": "local",
                "table": table,
                "family": family.domain,
                **({} if network.version == 6 else {"scope": "host"}),
                "oif": LO_IFINDEX,
                "prefsrc": str(addresses.loopback(family)),
                "metrics": {"mtu": LINK_MTU},
            }
            found.append(("route", command, route))
    return found


def _families_with_local_first(netns: str) -> list[Family]:
    """Families whose first rule is the kernel's own for what is local. It has no priority then."""

    with namespaces.open_socket(netns) as ip:
        return [
            family
            for family in facts.families()
            if any(
                not rule.get("priority") and rule.get("table") == RT_TABLE_LOCAL
                for rule in ip.get_rules(family=family.domain)
            )
        ]


def _change(netns: str, changes: Iterable[Change]) -> None:
    """Make changes of routes and rules. It is no error if one was made already."""

    with namespaces.open_socket(netns) as ip:
        for what, command, arguments in changes:
            try:
                getattr(ip, what)(command, **arguments)
            except NetlinkError as e:
                if e.code not in NO_ERRORS[what]:
                    raise
