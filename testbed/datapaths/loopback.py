"""Datapath `loopback`: the kernel's own `lo` between native workloads.

It is the upper limit of performance, and the control.
"""

from __future__ import annotations

from testbed.datapaths.interface import Attachment, Datapath, Wiring
from testbed.datapaths.link_counters import LinkCounters
from testbed.host.ledger import Scope
from testbed.model.cells import Pair
from testbed.model.looks import Look


class Loopback(Datapath):
    """The kernel's own loopback."""

    name = "loopback"
    look = Look(10, "#999999")
    reference = "loopback"
    pairs = frozenset({Pair.NATIVE_NATIVE})

    def attach(self, wiring: Wiring, owner: Scope) -> Attachment:
        return LinkCounters(wiring)


DATAPATH = Loopback()
