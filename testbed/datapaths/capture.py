"""Datapath `capture`: eBPF moves packets from the pod's `lo` to the guest that owns the port.

Replies go back the same way. `bpf/capture.c` describes the programs. They are attached here: to
`lo` and the veth in the pod's namespace, and to the ports of the bridge in the namespace of its
links. Ports that no guest owns are left to the kernel's own loopback.
"""

from __future__ import annotations

from pathlib import Path

from testbed import bpf
from testbed.bpf import EGRESS, INGRESS, ProgramSet
from testbed.datapaths.ebpf.attachment import EbpfAttachment
from testbed.datapaths.interface import Attachment, Datapath, Layout, Wiring
from testbed.host.ledger import Scope
from testbed.model.cells import Pair
from testbed.model.looks import Look

REASONS = bpf.reasons("capture")
"""Names of the counters, in the order of `enum reason`."""


class Capture(Datapath):
    """eBPF on `lo`, the pod's veth, and a bridge."""

    name = "capture"
    look = Look(50, "#D55E00", hatch="\\\\\\\\", marker="D")
    layout = Layout.BRIDGE
    reference = "bridge"
    programs = ("capture", "names")
    pairs = frozenset(Pair)

    def attach(self, wiring: Wiring, owner: Scope) -> Attachment:
        return _Attachment(wiring, owner)


class _Attachment(EbpfAttachment):
    def __init__(self, wiring: Wiring, owner: Scope) -> None:
        super().__init__("capture", REASONS, wiring, owner)

    def _attach_lo(self) -> None:
        pins, slot = str(self._programs.pins), self._programs.slot
        self._scope.defer(forget_pod, pins=pins, slot=slot)
        super()._attach_lo()
        self._show_names()

    def _attach_links(self) -> None:
        wiring, slot = self._wiring, self._programs.slot
        _pods(self._programs)[slot,] = (wiring.uplink_ifindex, wiring.uplink_peer_ifindex)
        self._attach(wiring.uplink_peer_ifindex, EGRESS, "bridge_egress", netns=wiring.link_netns)
        for port in wiring.ports:
            self._attach(port.ifindex, EGRESS, "bridge_egress", port.n, wiring.link_netns)
            self._attach(port.ifindex, INGRESS, "port_ingress", port.n, wiring.link_netns)
        self._attach(wiring.uplink_peer_ifindex, INGRESS, "router", netns=wiring.link_netns)
        self._attach(wiring.uplink_ifindex, EGRESS, "uplink_egress")
        self._attach(wiring.uplink_ifindex, INGRESS, "uplink_ingress")


def _pods(programs: ProgramSet) -> bpf.Map:
    return programs.map("pods", "=I", "=II")


def forget_pod(pins: str, slot: int) -> None:
    """Clear a pod's row in the map `pods`. It is no error if the programs are gone."""
    if Path(pins, "users").exists():
        programs = ProgramSet(Path(pins), slot)
        _pods(programs)[slot,] = (0, 0)
        programs.close()


DATAPATH = Capture()
