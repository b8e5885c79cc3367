"""Datapath `bridge`: the client dials the server's link address over a veth and a Linux bridge.

There is no `localhost`. The bridge is outside the pod, as in container networks. It is the
reference of `capture`, which uses the same links.
"""

from __future__ import annotations

from testbed.datapaths.interface import Attachment, Datapath, Layout, Wiring
from testbed.datapaths.link_counters import LinkCounters
from testbed.host.ledger import Scope
from testbed.model.cells import Pair
from testbed.model.looks import Look


class Bridge(Datapath):
    """The server's link address, over a veth and a Linux bridge."""

    name = "bridge"
    look = Look(30, "#E69F00", hatch="////", line="--", marker="^")
    layout = Layout.BRIDGE
    reference = "direct"
    localhost = False
    pairs = frozenset({Pair.NATIVE_GUEST, Pair.GUEST_NATIVE, Pair.GUEST_GUEST})

    def attach(self, wiring: Wiring, owner: Scope) -> Attachment:
        return LinkCounters(wiring)


DATAPATH = Bridge()
