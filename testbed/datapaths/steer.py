"""eBPF steers `localhost` between natives and guests whose links end in the pod's own namespace.

What the programs do is told in `bpf/steer.c`; here they are attached, to `lo` and to guests' ports.
The kernel's own loopback serves whatever no guest owns.

Past `lo` go sockets of the pod's cgroup. Programs at them know the pod's namespace by its cookie,
which Linux tells since 5.14; before, and for processes from elsewhere, everything goes by `lo`.
"""

from __future__ import annotations

import errno
import socket
import sys
from contextlib import suppress
from pathlib import Path

from testbed import bpf, localhost, model, netlink
from testbed.bpf import EGRESS, INGRESS, ProgramSet
from testbed.datapaths import Attachment, Count, Layout, LinkCounters, Wiring
from testbed.ledger import Scope
from testbed.localhost import LO_IFINDEX
from testbed.model import Cell, Family, Pair

REASONS = ("too_big", "spoofed", "truncated", "unhandled", "fragment_orphan", "no_guest",
           "odd_source", "answered", "steered", "assigned", "fallback")  # fmt: skip
"""What counters say, in the order of `enum reason`."""

ALIASES = tuple(str(model.alias(family)) for family in Family)
HOOKS = (
    "setsockopt",
    *(
        f"{call}{version}"
        for call in ("bind", "connect", "sendmsg", "recvmsg", "getpeername", "getsockname")
        for version in (4, 6)
    ),
)

SO_NETNS_COOKIE = 71


class Steer:
    name = "steer"
    layout = Layout.POD
    reference = "direct"
    localhost = True
    pairs = frozenset(Pair)

    def unsupported(self, cell: Cell) -> str | None:
        return None

    def attach(self, wiring: Wiring, owner: Scope) -> Attachment:
        return _Attachment(wiring, owner)


class _Attachment:
    def __init__(self, wiring: Wiring, owner: Scope) -> None:
        self._wiring = wiring
        self._scope = owner.part()
        self._links = self._scope
        self._held: list[socket.socket] = []
        try:
            self._held = localhost.hold_ports(wiring.pod, wiring.netns, wiring.owners)
            self._programs = bpf.load("steer", self._scope)
            self._rows = localhost.Rows(self._programs, REASONS)
            self._rows.fill(self._scope, wiring.owners, {p.n: p.families for p in wiring.ports})
            localhost.prepare_lo(self._scope, wiring.netns, wiring.owners, ALIASES)
            self._attach(LO_IFINDEX, EGRESS, "lo_egress")
            self._steer_sockets()
            self._links = self._scope.part()
            self._attach_links()
        except BaseException:
            self.detach()
            raise

    # --- Attachment -------------------------------------------------------------------------

    def carried(self, client: int | None, server: int | None) -> Count:
        if not client and not server:
            return LinkCounters(self._wiring).carried(None, None)
        return Count(*self._rows.carried(client, server))

    def counters(self) -> dict[str, Count]:
        return {reason: Count(*count) for reason, count in self._rows.counters().items()}

    def rewire(self, wiring: Wiring) -> None:
        self._wiring = wiring
        self._links.undo()
        self._attach_links()

    def detach(self) -> None:
        self._scope.undo()
        localhost.release_ports(self._held)
        if hasattr(self, "_programs"):
            self._programs.close()

    # --- parts ------------------------------------------------------------------------------

    def _steer_sockets(self) -> None:
        """Attach to the pod's cgroup, and say which namespace is the pod's."""
        try:
            cookie = netlink.inside(self._wiring.netns, _cookie)
        except OSError as e:
            if e.errno != errno.ENOPROTOOPT:
                raise
            return
        pins = str(self._programs.pins)
        self._scope.defer(forget_namespace, pins=pins, slot=self._programs.slot, cookie=cookie)
        _namespaces(self._programs)[cookie,] = (self._programs.slot,)
        for hook in HOOKS:
            bpf.attach_cgroup(self._scope, self._wiring.cgroup, hook, self._programs.program(hook))

    def _attach_links(self) -> None:
        for port in self._wiring.ports:
            self._rows.set_port(port.n, port.ifindex)
            self._attach(port.ifindex, INGRESS, "port_ingress", port.n)
            self._attach(port.ifindex, EGRESS, "port_egress", port.n)

    def _attach(self, ifindex: int, hook: int, name: str, n: int = 0) -> None:
        bpf.attach_tc(self._links, self._wiring.netns, ifindex, hook, self._programs.program(name),
                      name, classid=self._programs.slot << 8 | n)  # fmt: skip


def _cookie() -> int:
    """The network namespace's cookie."""
    with socket.socket() as any_socket:
        option = any_socket.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8)
    return int.from_bytes(option, sys.byteorder)


def _namespaces(programs: ProgramSet) -> bpf.Map:
    return programs.map("namespaces", "=Q", "=I")


def forget_namespace(pins: str, slot: int, cookie: int) -> None:
    """Steer no more sockets of a namespace; programs that are gone are no error."""
    if Path(pins, "users").exists():
        programs = ProgramSet(Path(pins), slot)
        with suppress(KeyError):
            del _namespaces(programs)[cookie,]
        programs.close()


DATAPATH = Steer()
