"""eBPF copies every local packet to every workload; those that are not meant drop their copies.

The idea of the one public system that carries `localhost` between runtimes, made as correct as it
can be: not its code, which never translates ports or checksums of layer 4 and has no working IPv6.
What the programs do is told in `bpf/broadcast.c`; here they are attached, to `lo` and to guests'
ports. The price of the idea grows with the number of workloads, and natives pay it, too.
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
"""What counters say, in the order of `enum reason`."""

MAX_COPIES = 64
"""Of one packet: what the kernel's verifier is willing to follow."""


class Broadcast(Datapath):
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
    """Clear a pod's row; programs that are gone are no error."""
    if Path(pins, "users").exists():
        programs = ProgramSet(Path(pins), slot)
        _pod_guests(programs)[slot,] = (0,)
        programs.close()


DATAPATH = Broadcast()
