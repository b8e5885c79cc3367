"""eBPF copies every local packet to every workload; those that are not meant drop their copies.

The idea of the one public system that carries `localhost` between runtimes, made as correct as it
can be: not its code, which never translates ports or checksums of layer 4 and has no working IPv6.
What the programs do is told in `bpf/broadcast.c`; here they are attached, to `lo` and to guests'
ports. The price of the idea grows with the number of workloads, and natives pay it, too.
"""

from __future__ import annotations

import socket
from pathlib import Path

from testbed import bpf, localhost
from testbed.bpf import EGRESS, INGRESS, ProgramSet
from testbed.datapaths import Attachment, Count, Layout, LinkCounters, Wiring
from testbed.ledger import Scope
from testbed.localhost import LO_IFINDEX
from testbed.model import Cell, Error, Pair

REASONS = ("too_big", "spoofed", "truncated", "unhandled", "fragment_orphan", "no_guest",
           "odd_source", "answered", "copied", "unwanted")  # fmt: skip
"""What counters say, in the order of `enum reason`."""

MAX_COPIES = 64
"""Of one packet: what the kernel's verifier is willing to follow."""


class Broadcast:
    name = "broadcast"
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
        if len(wiring.ports) > MAX_COPIES:
            raise Error(f"pod {wiring.pod} has {len(wiring.ports)} guests, and `broadcast` makes "
                        f"at most {MAX_COPIES} copies", hint="choose another datapath")  # fmt: skip
        self._wiring = wiring
        self._scope = owner.part()
        self._links = self._scope
        self._held: list[socket.socket] = []
        try:
            self._held = localhost.hold_ports(wiring.pod, wiring.netns, wiring.owners)
            self._programs = bpf.load("broadcast", self._scope)
            self._rows = localhost.Rows(self._programs, REASONS)
            self._rows.fill(self._scope, wiring.owners, {p.n: p.families for p in wiring.ports})
            pins, slot = self._programs.pins, self._programs.slot
            self._scope.defer(forget_size, pins=str(pins), slot=slot)
            _sizes(self._programs)[slot,] = (len(wiring.ports),)
            localhost.prepare_lo(self._scope, wiring.netns, wiring.owners)
            self._attach(LO_IFINDEX, EGRESS, "lo_egress")
            self._attach(LO_IFINDEX, INGRESS, "lo_ingress")
            self._links = self._scope.part()
            self._attach_links()
        except BaseException:
            self.detach()
            raise

    # --- Attachment -------------------------------------------------------------------------

    def carried(self, client: int | None, server: int | None) -> Count:
        """What was wanted; all copies are among the counters."""
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

    def _attach_links(self) -> None:
        for port in self._wiring.ports:
            self._rows.set_port(port.n, port.ifindex)
            self._attach(port.ifindex, INGRESS, "port_ingress", port.n)
            self._attach(port.ifindex, EGRESS, "port_egress", port.n)

    def _attach(self, ifindex: int, hook: int, name: str, n: int = 0) -> None:
        bpf.attach_tc(self._links, self._wiring.netns, ifindex, hook, self._programs.program(name),
                      name, classid=self._programs.slot << 8 | n)  # fmt: skip


def _sizes(programs: ProgramSet) -> bpf.Map:
    return programs.map("sizes", "=I", "=I")


def forget_size(pins: str, slot: int) -> None:
    """Clear a pod's row; programs that are gone are no error."""
    if Path(pins, "users").exists():
        programs = ProgramSet(Path(pins), slot)
        _sizes(programs)[slot,] = (0,)
        programs.close()


DATAPATH = Broadcast()
