"""No `localhost`: guest and veth tied by tc redirect, as Kata Containers and urunc do. A reference.

    pod's namespace   ┊   its links' namespace
            guests ───┊─── pod  <── u32, mirred ──>  g1 ─── guest 1

There the guest takes over the pod's end of the veth, and whoever talks to it is outside; nothing
native is left in the pod. Here whoever talks to it are the pod's natives, at the other end: the
way of the packets is the same, the names of the namespaces are swapped. So there can be one guest
only, and both links leave the bridge: there is no other way for a packet.
"""

from __future__ import annotations

from testbed.datapaths.interface import Attachment, Datapath, Layout, Wiring
from testbed.datapaths.link_counters import LinkCounters
from testbed.host import namespaces
from testbed.host.ledger import Scope
from testbed.model.cells import Pair
from testbed.model.errors import Error
from testbed.model.looks import Look

INGRESS = 0xFFFF0000
"""Handle of the qdisc `ingress` (linux/pkt_sched.h), of whose filters it is the parent."""
ETH_P_ALL = 3


class TcRedirect(Datapath):
    name = "tcredirect"
    look = Look(40, "#882255", hatch="xxxx", line=(3, 1, 1, 1, 1, 1), marker="<")
    layout = Layout.BRIDGE
    reference = "bridge"
    localhost = False
    in_kernel = False
    pairs = frozenset({Pair.NATIVE_GUEST, Pair.GUEST_NATIVE})

    def attach(self, wiring: Wiring, owner: Scope) -> Attachment:
        return _Attachment(wiring)


class _Attachment(LinkCounters):
    """What it makes goes with the links."""

    def __init__(self, wiring: Wiring) -> None:
        super().__init__(wiring)
        if len(wiring.ports) != 1:
            raise Error(
                f"pod {wiring.pod} has {len(wiring.ports)} guests, and one veth to tie to",
                hint="give it one guest, or choose another datapath",
            )
        self._tie()

    def rewire(self, wiring: Wiring) -> None:
        self.detach()
        super().rewire(wiring)
        self._tie()

    def detach(self) -> None:
        with namespaces.open_socket(self.wiring.link_netns) as ip:
            for ifindex in self._ends:
                if any(q.get("kind") == "ingress" for q in ip.get_qdiscs(ifindex)):
                    ip.tc("del", "ingress", ifindex, INGRESS)

    @property
    def _ends(self) -> tuple[int, int]:
        return self.wiring.uplink_peer_ifindex, self.wiring.ports[0].ifindex

    def _tie(self) -> None:
        one, other = self._ends
        with namespaces.open_socket(self.wiring.link_netns) as ip:
            for here, there in ((one, other), (other, one)):
                ip.link("set", index=here, master=0)
                ip.tc("add", "ingress", here, INGRESS)
                redirect = {
                    "kind": "mirred",
                    "direction": "egress",
                    "action": "redirect",
                    "ifindex": there,
                }
                ip.tc(
                    "add-filter",
                    "u32",
                    here,
                    parent=INGRESS,
                    protocol=ETH_P_ALL,
                    keys=["0x0/0x0+0"],
                    target=INGRESS,
                    action=redirect,
                )


DATAPATH = TcRedirect()
