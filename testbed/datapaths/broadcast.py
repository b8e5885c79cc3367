"""Datapath `broadcast`: eBPF copies each local packet to all workloads; all but one drop it.

It reimplements the idea of the one public system that carries `localhost` between runtimes, as
correctly as possible. That system's code is not used: it translates neither ports nor checksums of
layer 4, and its IPv6 does not work. The cost grows with the number of workloads, for natives, too.

`bpf/broadcast.c` describes the programs. They are attached here, to `lo` and to guests' ports.
"""

from __future__ import annotations

from pathlib import Path

from testbed import bpf
from testbed.bpf import INGRESS, ProgramSet
from testbed.datapaths.ebpf.attachment import EbpfAttachment
from testbed.datapaths.ebpf.loopback_side import LO_IFINDEX
from testbed.datapaths.interface import Attachment, Datapath, Wiring
from testbed.host.ledger import Scope
from testbed.model.cells import Pair
from testbed.model.errors import Error
from testbed.model.looks import Look

REASONS = bpf.reasons("broadcast")
"""Names of the counters, in the order of `enum reason`."""

MAX_COPIES = 64
"""Most copies of one packet: the kernel's verifier rejects programs with more."""


class Broadcast(Datapath):
    """A copy of each local packet to each workload."""

    name = "broadcast"
    look = Look(110, "#000000", line=(8, 2), marker="h")
    reference = "direct"
    programs = ("broadcast",)
    pairs = frozenset(Pair)

    def attach(self, wiring: Wiring, owner: Scope) -> Attachment:
        return _Attachment(wiring, owner)


class _Attachment(EbpfAttachment):
    def __init__(self, wiring: Wiring, owner: Scope) -> None:
        if len(wiring.ports) > MAX_COPIES:
            raise Error(
                f"pod {wiring.pod} has {len(wiring.ports)} guests, and `broadcast` makes "
                f"at most {MAX_COPIES} copies",
                hint="choose another datapath",
            )
        super().__init__("broadcast", REASONS, wiring, owner)

    def _attach_lo(self) -> None:
        pins, slot = self._programs.pins, self._programs.slot
        self._scope.defer(clear_pod_guests, pins=str(pins), slot=slot)
        _pod_guests(self._programs)[slot,] = (len(self._wiring.ports),)
        super()._attach_lo()
        self._attach(LO_IFINDEX, INGRESS, "lo_ingress")


def _pod_guests(programs: ProgramSet) -> bpf.Map:
    return programs.map("pod_guests", "=I", "=I")


def clear_pod_guests(pins: str, slot: int) -> None:
    """Clear a pod's row in the map `pod_guests`. It is no error if the programs are gone."""
    if Path(pins, "users").exists():
        programs = ProgramSet(Path(pins), slot)
        _pod_guests(programs)[slot,] = (0,)
        programs.close()


DATAPATH = Broadcast()
