"""Datapath `dnat`: nftables translates `localhost` to guests' addresses (destination NAT).

It is the solution that most people find first. Rules are in the pod's namespace, and conntrack
translates the replies. As with kube-proxy, `route_localnet` on guests' ports lets translated
packets have loopback addresses there. IPv6 has no such setting. But it accepts packets that were
translated to ::1 if ::1 has a local route on the link that they come from (otherwise they are
counted as Ip6InNoRoutes).

What these settings would let in from guests is dropped before translation: packets with a source
address that is not the guest's, or for a loopback address. Peers' names are not hidden. Natives can
still bind a guest's port, but nobody at `localhost` reaches them there.
"""

from __future__ import annotations

import shutil
import socket

from testbed.datapaths.interface import Attachment, Datapath, Wiring
from testbed.datapaths.link_counters import LinkCounters, add_aliases
from testbed.host import namespaces, nft
from testbed.host.ledger import Scope
from testbed.model.addresses import alias, guest_link, loopback, pod_link
from testbed.model.cells import Cell, Pair
from testbed.model.looks import Look
from testbed.model.terms import Family

LOCAL_TABLE = 255
LO_METRIC = 1024
"""Metric of routes for ::1 on guests' links. Natives use the route of `lo`, whose metric is 0."""


class Dnat(Datapath):
    """Destination NAT by nftables."""

    name = "dnat"
    look = Look(70, "#009E73", hatch="++++", line="-.", marker="P")
    reference = "direct"
    in_kernel = False
    pairs = frozenset(Pair) - {Pair.NATIVE_NATIVE}

    def unsupported(self, cell: Cell) -> str | None:
        if shutil.which("nft") is None:
            return nft.MISSING
        return None

    def attach(self, wiring: Wiring, owner: Scope) -> Attachment:
        return _Attachment(wiring)


class _Attachment(LinkCounters):
    def __init__(self, wiring: Wiring) -> None:
        super().__init__(wiring)
        nft.load(wiring.netns, rules(wiring))
        self._open(wiring)

    def rewire(self, wiring: Wiring) -> None:
        super().rewire(wiring)
        self._open(wiring)

    def detach(self) -> None:
        """Delete the rules. Settings of links and of the namespace go with the pod."""
        nft.load(self.wiring.netns, f"delete table inet {self.wiring.netns}")

    def _open(self, wiring: Wiring) -> None:
        add_aliases(wiring)
        namespaces.set_sysctls(
            wiring.netns,
            {
                "net/ipv4/conf/all/forwarding": 1,
                "net/ipv6/conf/all/forwarding": 1,
                "net/ipv4/conf/all/send_redirects": 0,
                **{f"net/ipv4/conf/{p.ifname}/route_localnet": 1 for p in wiring.ports},
                **{f"net/ipv4/conf/{p.ifname}/send_redirects": 0 for p in wiring.ports},
            },
        )
        with namespaces.open_socket(wiring.netns) as ip:
            for port in wiring.ports:
                ip.route(
                    "replace",
                    family=socket.AF_INET6,
                    dst="::1/128",
                    oif=port.ifindex,
                    type="local",
                    table=LOCAL_TABLE,
                    priority=LO_METRIC + port.n,
                )


_ALIAS4, _ALIAS6 = alias(Family.IPV4), alias(Family.IPV6)
_POD4, _POD6 = pod_link(Family.IPV4), pod_link(Family.IPV6)

CHAINS = f"""
chain guests_send {{
    type filter hook prerouting priority raw
    iifname @ports ip daddr 127.0.0.0/8 drop
    iifname @ports ip6 daddr ::1 drop
    iifname @ports iifname . ip saddr != @links4 drop
    iifname @ports ip6 saddr != {{ ::, fe80::/10 }} iifname . ip6 saddr != @links6 drop
}}
chain guests_dial {{
    type nat hook prerouting priority dstnat
    ip daddr {_ALIAS4} dnat ip to meta l4proto . th dport map @owners4
    ip6 daddr {_ALIAS6} dnat ip6 to meta l4proto . th dport map @owners6
    ip daddr {_ALIAS4} dnat ip to {loopback(Family.IPV4)}
    ip6 daddr {_ALIAS6} dnat ip6 to {loopback(Family.IPV6)}
}}
chain natives_dial {{
    type nat hook output priority -100
    ip daddr 127.0.0.0/8 dnat ip to meta l4proto . th dport map @owners4
    ip6 daddr ::1 dnat ip6 to meta l4proto . th dport map @owners6
}}
chain guests_see {{
    type nat hook postrouting priority srcnat
    oifname @ports ip saddr 127.0.0.0/8 snat ip to {_POD4}
    oifname @ports ip6 saddr ::1 snat ip6 to {_POD6}
    oifname @ports iifname @ports meta nfproto ipv4 snat ip to {_POD4}
    oifname @ports iifname @ports meta nfproto ipv6 snat ip6 to {_POD6}
}}
chain between_guests {{
    type filter hook forward priority filter
    ct status dnat accept
    ct state related accept
    iifname @ports oifname @ports drop
}}
"""


def rules(wiring: Wiring) -> str:
    """Rules of the pod in nft's language: a table that is named after its namespace."""
    ports = wiring.ports
    owners = wiring.owners.items()
    return "\n".join(
        (
            f"table inet {wiring.netns} {{",
            nft.elements("set ports", "ifname", (f'"{p.ifname}"' for p in ports)),
            *(
                nft.elements(
                    f"set links{ip[3]}",
                    f"ifname . {ip}_addr",
                    (f'"{p.ifname}" . {guest_link(family, p.n)}' for p in ports),
                )
                + nft.elements(
                    f"map owners{ip[3]}",
                    f"inet_proto . inet_service : {ip}_addr",
                    (f"{t} . {port} : {guest_link(family, n)}" for (t, port), n in owners),
                )
                for family, ip in ((Family.IPV4, "ipv4"), (Family.IPV6, "ipv6"))
            ),
            CHAINS,
            "}",
        )
    )


DATAPATH = Dnat()
