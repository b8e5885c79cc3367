"""No `localhost`: the client dials the server's link address over a tap in the pod's namespace.

What `steer`, which uses the same link, is divided by.
"""

from __future__ import annotations

from testbed.datapaths.interface import Attachment, Layout, Wiring
from testbed.datapaths.link_counters import LinkCounters
from testbed.host.ledger import Scope
from testbed.model.cells import Cell, Pair


class Direct:
    name = "direct"
    layout = Layout.POD
    reference = "direct"
    localhost = False
    in_kernel = True
    programs: tuple[str, ...] = ()
    pairs = frozenset({Pair.NATIVE_GUEST, Pair.GUEST_NATIVE})

    def unsupported(self, cell: Cell) -> str | None:
        return None

    def attach(self, wiring: Wiring, owner: Scope) -> Attachment:
        return LinkCounters(wiring)


DATAPATH = Direct()
