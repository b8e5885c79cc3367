"""eBPF moves `localhost` packets from the pod's `lo` to the guest that owns the port, and back.

What the programs do is told in `bpf/capture.c`; here they are attached: to `lo` and the veth in the
pod's namespace, and to the bridge's ports in the node's. The kernel's own loopback serves whatever
no guest owns. Ports that guests own are held by sockets of ours, so that no native gets them.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from testbed import bpf, model, netlink
from testbed.bpf import EGRESS, INGRESS, ProgramSet
from testbed.datapaths import Attachment, Count, Layout, Wiring
from testbed.ledger import Scope
from testbed.model import Cell, Error, Family, Pair, Transport

REASONS = ("too_big", "spoofed", "outside", "truncated", "unhandled", "fragment_orphan", "no_guest",
           "odd_source", "answered")  # fmt: skip
"""What counters say, in the order of `enum reason`."""

LINK_MTU = 1500
LO_IFINDEX = 1
PROTOCOLS = {Transport.TCP: socket.IPPROTO_TCP, Transport.UDP: socket.IPPROTO_UDP}


class Capture:
    name = "capture"
    layout = Layout.BRIDGE
    reference = "bridge"
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
            self._hold_ports()
            self._programs = bpf.load("capture", self._scope)
            names = bpf.load("names", self._scope)
            self._fill_maps()
            self._prepare_lo()
            self._attach(LO_IFINDEX, EGRESS, "lo_egress", netns=wiring.netns)
            for hook in ("getpeername4", "getpeername6"):
                bpf.attach_cgroup(self._scope, wiring.cgroup, hook, names.program(hook))
            names.close()
            self._links = self._scope.part()
            self._attach_links()
        except BaseException:
            self.detach()
            raise

    # --- Attachment -------------------------------------------------------------------------

    def carried(self, client: int | None, server: int | None) -> Count:
        try:
            return Count(*_carried(self._programs)[self._programs.slot, client or 0, server or 0])
        except KeyError:
            return Count()

    def counters(self) -> dict[str, Count]:
        counters, first = _counters(self._programs), self._programs.slot * len(REASONS)
        return {reason: Count(*counters[first + i,]) for i, reason in enumerate(REASONS)}

    def rewire(self, wiring: Wiring) -> None:
        self._wiring = wiring
        self._links.undo()
        self._attach_links()

    def detach(self) -> None:
        self._scope.undo()
        for held in self._held:
            held.close()
        self._held.clear()
        if hasattr(self, "_programs"):
            self._programs.close()

    # --- parts ------------------------------------------------------------------------------

    def _hold_ports(self) -> None:
        """Bind every port that a guest owns: natives get EADDRINUSE, and none of them as ephemeral.

        Bound to `lo`: what comes from outside the pod is not theirs to swallow. On `lo`, the
        program takes the packets before a socket could.
        """

        def bind() -> None:
            for (transport, port), n in sorted(self._wiring.owners.items()):
                kind = socket.SOCK_STREAM if transport is Transport.TCP else socket.SOCK_DGRAM
                held = socket.socket(socket.AF_INET6, kind)
                self._held.append(held)
                held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                held.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
                try:
                    held.bind(("::", port))
                except OSError as e:
                    if e.errno != errno.EADDRINUSE:
                        raise
                    raise Error(
                        f"pod {self._wiring.pod}: {transport} port {port} is guest {n}'s, "
                        "but a native process has it",
                        hint="stop that process, or give the port to it in the manifest",
                    ) from e

        netlink.inside(self._wiring.netns, bind)

    def _fill_maps(self) -> None:
        slot = self._programs.slot
        owners = [[slot << 24 | PROTOCOLS[transport] << 16 | port]
                  for transport, port in self._wiring.owners]  # fmt: skip
        guests = [port.n for port in self._wiring.ports]
        pins = str(self._programs.pins)
        self._scope.defer(forget, pins=pins, slot=slot, owners=owners, guests=guests)
        for key, n in zip(owners, self._wiring.owners.values(), strict=True):
            _owners(self._programs)[tuple(key)] = (n,)
        for flow in _flows(slot, guests):
            _carried(self._programs)[flow] = (0, 0)

    def _prepare_lo(self) -> None:
        """Let `lo` take packets from loopback addresses that come to it from elsewhere.

        Never on `all`: other links would take them from outside, too (CVE-2020-8558). The routes
        make natives fragment what they send to guests for the guests' link; 127.77.0.0/24 is local
        by nature, its twin has to be made so.
        """
        self._scope.defer(unprepare_lo, netns=self._wiring.netns)
        _set_lo(self._wiring.netns, 1, [port for _, port in self._wiring.owners])
        _change_routes("replace", self._wiring.netns)

    def _attach_links(self) -> None:
        wiring, slot = self._wiring, self._programs.slot
        pods, guests = _pods(self._programs), _guests(self._programs)
        pods[slot,] = (wiring.uplink_ifindex, wiring.uplink_peer_ifindex)
        for port in wiring.ports:
            guests[slot << 8 | port.n,] = (port.ifindex,)
        self._attach(wiring.uplink_peer_ifindex, EGRESS, "bridge_egress", netns=wiring.node)
        for port in wiring.ports:
            self._attach(port.ifindex, EGRESS, "bridge_egress", wiring.node, port.n)
            self._attach(port.ifindex, INGRESS, "port_ingress", wiring.node, port.n)
        self._attach(wiring.uplink_peer_ifindex, INGRESS, "router", netns=wiring.node)
        self._attach(wiring.uplink_ifindex, INGRESS, "uplink_ingress", netns=wiring.netns)

    def _attach(self, ifindex: int, hook: int, name: str, netns: str, n: int = 0) -> None:
        bpf.attach_tc(self._links, netns, ifindex, hook, self._programs.program(name), name,
                      classid=self._programs.slot << 8 | n)  # fmt: skip


# --- maps -----------------------------------------------------------------------------------


def _pods(programs: ProgramSet) -> bpf.Map:
    return programs.map("pods", "=I", "=II")


def _guests(programs: ProgramSet) -> bpf.Map:
    return programs.map("guests", "=I", "=I")


def _owners(programs: ProgramSet) -> bpf.Map:
    return programs.map("owners", "=I", "=I")


def _carried(programs: ProgramSet) -> bpf.Map:
    return programs.map("carried", "=BBBx", "=QQ")


def _counters(programs: ProgramSet) -> bpf.Map:
    return programs.map("counters", "=I", "=QQ")


def _flows(slot: int, guests: Iterable[int]) -> list[tuple[int, int, int]]:
    """Keys of `carried`: all pairs that are not native to native."""
    workloads = [0, *guests]
    return [(slot, c, s) for c in workloads for s in workloads if c or s]


def forget(pins: str, slot: int, owners: list[list[int]], guests: list[int]) -> None:
    """Clear a pod's rows in the maps."""
    if not Path(pins, "users").exists():
        return
    programs = ProgramSet(Path(pins), slot)
    try:
        _pods(programs)[slot,] = (0, 0)
        for n in guests:
            _guests(programs)[slot << 8 | n,] = (0,)
        for reason in range(len(REASONS)):
            _counters(programs)[slot * len(REASONS) + reason,] = (0, 0)
        for owned in owners:
            with suppress(KeyError):  # not made yet
                del _owners(programs)[tuple(owned)]
        for flow in _flows(slot, guests):
            with suppress(KeyError):
                del _carried(programs)[flow]
    finally:
        programs.close()


# --- lo -------------------------------------------------------------------------------------

_LOCAL = {"type": "local", "table": 255, "oif": LO_IFINDEX, "metrics": {"mtu": LINK_MTU}}
_VIEW_ROUTES = (
    {"dst": f"{model.native_view(Family.IPV4, 0)}/24", "prefsrc": str(model.loopback(Family.IPV4)),
     "scope": "host", **_LOCAL},
    {"dst": model.NATIVE_VIEW_NET6, "prefsrc": str(model.loopback(Family.IPV6)),
     "family": socket.AF_INET6, **_LOCAL},
)  # fmt: skip


def _set_lo(netns: str, on: int, ports: Iterable[int]) -> None:
    netlink.set_sysctls(netns, {
        "net/ipv4/conf/lo/route_localnet": on,
        "net/ipv4/conf/lo/accept_local": on,
        "net/ipv4/ip_local_reserved_ports": ",".join(str(p) for p in sorted(set(ports))) or "\n",
    })  # fmt: skip


def _change_routes(command: str, netns: str) -> None:
    def change() -> None:
        with IPRoute() as ip:
            for route in _VIEW_ROUTES:
                try:
                    ip.route(command, **route)
                except NetlinkError as e:
                    if e.code != errno.ESRCH:  # deleted already
                        raise

    netlink.inside(netns, change)


def unprepare_lo(netns: str) -> None:
    """Undo what was set on a namespace's `lo`; one that is gone is no error."""
    if not (netlink.NETNS / netns).exists():
        return
    _set_lo(netns, 0, [])
    _change_routes("del", netns)


DATAPATH = Capture()
