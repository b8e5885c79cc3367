"""eBPF moves `localhost` packets from the pod's `lo` to the guest that owns the port, and back.

What the programs do is told in `bpf/capture.c`; here they are attached: to `lo` and the veth in the
pod's namespace, and to the bridge's ports in the node's. The kernel's own loopback serves whatever
no guest owns.
"""

from __future__ import annotations

import socket
from pathlib import Path

from testbed import bpf, localhost
from testbed.bpf import EGRESS, INGRESS, ProgramSet
from testbed.datapaths import Attachment, Count, Layout, LinkCounters, Wiring
from testbed.ledger import Scope
from testbed.localhost import LO_IFINDEX
from testbed.model import Cell, Pair

REASONS = ("too_big", "spoofed", "outside", "truncated", "unhandled", "fragment_orphan", "no_guest",
           "odd_source", "answered")  # fmt: skip
"""What counters say, in the order of `enum reason`."""


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
            self._held = localhost.hold_ports(wiring.pod, wiring.netns, wiring.owners)
            self._programs = bpf.load("capture", self._scope)
            names = bpf.load("names", self._scope)
            self._rows = localhost.Rows(self._programs, REASONS)
            self._rows.fill(self._scope, wiring.owners, {p.n: p.families for p in wiring.ports})
            localhost.prepare_lo(self._scope, wiring.netns, wiring.owners)
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
        if client is None and server is None:
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

    def _attach_links(self) -> None:
        wiring, slot = self._wiring, self._programs.slot
        self._links.defer(forget_pod, pins=str(self._programs.pins), slot=slot)
        _pods(self._programs)[slot,] = (wiring.uplink_ifindex, wiring.uplink_peer_ifindex)
        for port in wiring.ports:
            self._rows.set_port(port.n, port.ifindex)
        self._attach(wiring.uplink_peer_ifindex, EGRESS, "bridge_egress", netns=wiring.node)
        for port in wiring.ports:
            self._attach(port.ifindex, EGRESS, "bridge_egress", wiring.node, port.n)
            self._attach(port.ifindex, INGRESS, "port_ingress", wiring.node, port.n)
        self._attach(wiring.uplink_peer_ifindex, INGRESS, "router", netns=wiring.node)
        self._attach(wiring.uplink_ifindex, INGRESS, "uplink_ingress", netns=wiring.netns)

    def _attach(self, ifindex: int, hook: int, name: str, netns: str, n: int = 0) -> None:
        bpf.attach_tc(self._links, netns, ifindex, hook, self._programs.program(name), name,
                      classid=self._programs.slot << 8 | n)  # fmt: skip


def _pods(programs: ProgramSet) -> bpf.Map:
    return programs.map("pods", "=I", "=II")


def forget_pod(pins: str, slot: int) -> None:
    """Clear a pod's row; programs that are gone are no error."""
    if Path(pins, "users").exists():
        programs = ProgramSet(Path(pins), slot)
        _pods(programs)[slot,] = (0, 0)
        programs.close()


DATAPATH = Capture()
