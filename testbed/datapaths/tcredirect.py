"""Datapath `tcredirect`: tc redirects packets between the pod's veth and the guest's tap.

    pod's namespace   ┊   its links' namespace
            guests ───┊─── pod  <── u32, mirred ──>  g1 ─── guest 1

Kata Containers and urunc do so. There is no `localhost`: it is a reference.

There, the guest takes over the pod's end of the veth. Its peers are outside, and no native is left
in the pod. Here, its peers are the pod's natives, at the other end of the veth. The path of packets
is the same, with the namespaces swapped. So a pod can have one guest only. Both links leave the
bridge, so that packets have no other path.
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
"""Handle of the qdisc ingress (linux/pkt_sched.h), the parent of its filters."""
ETH_P_ALL = 3


class TcRedirect(Datapath):
    """tc redirect between the pod's veth and a guest's tap."""

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
    """Attachment by filters that go with the links."""

    def __init__(self, wiring: Wiring) -> None:
        super().__init__(wiring)
        if len(wiring.ports) != 1:
            raise Error(
                f"pod {wiring.pod} has {len(wiring.ports)} guests, and one veth to tie to",
                hint="give it one guest, or choose another datapath",
            )
        self._redirect()

    def rewire(self, wiring: Wiring) -> None:
        self.detach()
        super().rewire(wiring)
        self._redirect()

    def detach(self) -> None:
        with namespaces.open_socket(self.wiring.link_netns) as ip:
            for ifindex in self._ends:
                if any(q.get("kind") == "ingress" for q in ip.get_qdiscs(ifindex)):
                    ip.tc("del", "ingress", ifindex, INGRESS)

    @property
    def _ends(self) -> tuple[int, int]:
        return self.wiring.uplink_peer_ifindex, self.wiring.ports[0].ifindex

    def _redirect(self) -> None:
        veth, tap = self._ends
        with namespaces.open_socket(self.wiring.link_netns) as ip:
            for ifindex, target in ((veth, tap), (tap, veth)):
                ip.link("set", index=ifindex, master=0)
                ip.tc("add", "ingress", ifindex, INGRESS)
                redirect = {
                    "kind": "mirred",
                    "direction": "egress",
                    "action": "redirect",
                    "ifindex": target,
                }
                ip.tc(
                    "add-filter",
                    "u32",
                    ifindex,
                    parent=INGRESS,
                    protocol=ETH_P_ALL,
                    keys=["0x0/0x0+0"],
                    target=INGRESS,
                    action=redirect,
                )


DATAPATH = TcRedirect()
