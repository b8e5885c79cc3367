"""Datapath `routed`: plain IP routing between a client's pod on one host and a server's on another.

    client's pod        a host               another host         server's pod
          eth0 ──┊── tb-r0 ── its link ══ its link ── tb-r1 ──┊── eth0

It shows what `localhost` saves against a service on another node, in a cluster network without an
overlay (like flannel's backend host-gw). Each host gets one route: to the other's pod by the other
host's address on their link. Forwarding has to be enabled by the host's owner, since it concerns
all links of the host.
"""

from __future__ import annotations

import errno
import platform
from contextlib import suppress
from ipaddress import ip_address

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from testbed.datapaths.between_hosts import Side
from testbed.datapaths.interface import Attachment, Count, Datapath, Wiring
from testbed.datapaths.link_counters import LinkCounters
from testbed.host import namespaces, netlink
from testbed.host.ledger import Scope
from testbed.model.addresses import address_between_hosts
from testbed.model.cells import Cell, Pair
from testbed.model.errors import Error
from testbed.model.looks import Look

UPLINK = "eth0"


class Routed(Datapath):
    """Plain IP routing between two hosts."""

    name = "routed"
    look = Look(120, "#AAAA00", hatch="**", line=(6, 1, 1, 1), marker="p")
    reference = "loopback"
    localhost = False
    pairs = frozenset({Pair.NATIVE_NATIVE})

    def __init__(self, side: Side | None = None) -> None:
        """`side` is the end of the link; without one, all cells are unsupported."""
        self.side = side
        self.server_addresses = side.other if side else {}

    def between(self, side: Side | None) -> Datapath:
        return Routed(side)

    def unsupported(self, cell: Cell) -> str | None:
        if not self.side:
            return "it needs two hosts; give --hosts FILE"
        return {**self.side.lacks, **self.side.lacking()}.get(cell.family)

    def attach(self, wiring: Wiring, owner: Scope) -> Attachment:
        assert self.side
        number, ifname = self.side.number, f"tb-r{self.side.number}"
        with IPRoute() as host, namespaces.open_socket(wiring.netns) as pod:
            try:
                peer = {"ifname": UPLINK, "net_ns_fd": wiring.netns}
                port = netlink.create_link(host, ifname, kind="veth", state="up", peer=peer)
            except NetlinkError as e:
                if e.code != errno.EEXIST:
                    raise
                raise Error(
                    f"{platform.node()} has a link {ifname}: another campaign runs "
                    "between these hosts",
                    hint="wait for its end",
                ) from e
            uplink = netlink.links(wiring.netns)[UPLINK]
            pod.link("set", index=uplink, state="up")
            hosts_mac, pods_mac = (
                ip.get_links(at)[0].get("address") for ip, at in ((host, port), (pod, uplink))
            )
            for family, other_pod in self.side.other.items():
                own_pod = address_between_hosts(family, number)
                netlink.add_address(pod, uplink, own_pod, own_pod.max_prefixlen)
                netlink.add_route(pod, uplink, other_pod)
                netlink.add_neighbor(pod, uplink, other_pod, hosts_mac)
                netlink.add_route(host, port, own_pod)
                netlink.add_neighbor(host, port, own_pod, pods_mac)
                owner.defer(remove_route, address=str(other_pod))
                host.route(
                    "replace",
                    dst=f"{other_pod}/{other_pod.max_prefixlen}",
                    gateway=self.side.via[family],
                )
        return _Uplink(wiring)


def remove_route(address: str) -> None:
    """Remove this host's route to the other host's pod. A missing route is no error."""
    with IPRoute() as host, suppress(NetlinkError):
        host.route("del", dst=f"{address}/{ip_address(address).max_prefixlen}")


class _Uplink(LinkCounters):
    """Attachment that counts the traffic of the pod's link to its host."""

    def carried(self, client: int | None, server: int | None) -> Count:
        with namespaces.open_socket(self.wiring.netns) as ip:
            return Count(*netlink.traffic(ip, netlink.links(self.wiring.netns)[UPLINK]))


DATAPATH = Routed()
