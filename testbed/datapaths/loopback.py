"""Both ends native: the kernel's own `lo`. The upper limit, and the control."""

from __future__ import annotations

from testbed.datapaths.interface import Attachment, Layout, Wiring
from testbed.datapaths.link_counters import LinkCounters
from testbed.host.ledger import Scope
from testbed.model.cells import Cell, Pair


class Loopback:
    name = "loopback"
    layout = Layout.POD
    reference = "loopback"
    localhost = True
    in_kernel = True
    programs: tuple[str, ...] = ()
    pairs = frozenset({Pair.NATIVE_NATIVE})

    def unsupported(self, cell: Cell) -> str | None:
        return None

    def attach(self, wiring: Wiring, owner: Scope) -> Attachment:
        return LinkCounters(wiring)


DATAPATH = Loopback()
