"""Datapath `direct`: the client dials the server's link address over a tap in the pod's namespace.

There is no `localhost`. It is the reference of `steer`, which uses the same link.
"""

from __future__ import annotations

from testbed.datapaths.interface import Attachment, Datapath, Wiring
from testbed.datapaths.link_counters import LinkCounters
from testbed.host.ledger import Scope
from testbed.model.cells import Pair
from testbed.model.looks import Look


class Direct(Datapath):
    """The server's link address, over a tap."""

    name = "direct"
    look = Look(20, "#56B4E9", hatch="..", line=(1, 1), marker="s")
    reference = "direct"
    localhost = False
    pairs = frozenset({Pair.NATIVE_GUEST, Pair.GUEST_NATIVE})

    def attach(self, wiring: Wiring, owner: Scope) -> Attachment:
        return LinkCounters(wiring)


DATAPATH = Direct()
