"""A pod's network namespace that somebody else made, for guests to join (in CRI: a pod sandbox).

Its maker runs the natives in it, and has given it links. They are left alone; sysctls that are
changed, here and in `network.gateway`, are written back in the end. If something in it does not go
together with the datapath, the pod is refused before anything is made.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from ipaddress import ip_interface, ip_network
from pathlib import Path

from pyroute2 import IPRoute

from testbed import bpf
from testbed.datapaths.ebpf.loopback_side import LO_IFINDEX
from testbed.datapaths.interface import Datapath, Layout
from testbed.host import namespaces, netlink
from testbed.host.ledger import Scope
from testbed.model import addresses
from testbed.model.addresses import Address
from testbed.model.errors import Error
from testbed.model.manifest import Spec
from testbed.model.terms import Family

IPV6_OFF = "net/ipv6/conf/lo/disable_ipv6"
OURS = [ip_network(net) for family in Family for net in addresses.GUEST_NETS[family]]
"""Networks that the address plan needs for itself."""


@dataclass(frozen=True)
class Sandbox:
    """A foreign namespace, and the cgroup of its processes."""

    netns: Path
    """Path such as /run/netns/NAME or /proc/PID/ns/net."""
    cgroup: Path | None = None
    """cgroup2 directory of its processes. Without it, all their packets go by `lo`."""
    id: str = ""
    """Identifier that its maker has for it."""

    def check(self, spec: Spec, datapath: Datapath) -> None:
        """Raises `Error` if this pod cannot be there, whatever is in the namespace."""
        if not namespaces.is_namespace(self.netns):
            raise Error(
                f"{self.netns} is no network namespace",
                hint="give a path like /run/netns/NAME or /proc/PID/ns/net",
            )
        if self.netns.samefile("/proc/thread-self/ns/net"):
            raise Error(
                f"{self.netns} is this host's own network namespace", hint="give that of a pod"
            )
        if self.cgroup and not (self.cgroup / "cgroup.controllers").exists():
            raise Error(
                f"{self.cgroup} is no cgroup of version 2",
                hint="see 0::PATH in /proc/PID/cgroup of a process of the pod",
            )
        workloads = spec.workloads
        if natives := [w.name for w in workloads if not w.runtime.is_guest]:
            raise Error(
                f"{', '.join(natives)} would be native to {self.netns}, where only guests "
                "are started",
                hint="leave it to the maker of the namespace",
            )
        if not datapath.in_kernel or datapath.layout not in (Layout.POD, Layout.BRIDGE):
            raise Error(
                f"{datapath.name} needs a pod that it has for itself",
                hint="choose steer or capture",
            )

    def join(self, owner: Scope, name: str, links: Collection[str]) -> IPRoute:
        """Give the namespace a name of ours, and return an rtnetlink socket in it.

        `links` are the names of links that will be made in it. IPv6 is switched on at `lo`: pods of
        clusters without IPv6 may lack it. Raises `Error` if something in the namespace conflicts.
        """
        ip = namespaces.hold(owner, name, self.netns)
        if not owner.continues and (obstacle := next(self._obstacles(ip, name, links), None)):
            ip.close()
            raise Error(f"{self.netns}: {obstacle[0]}", hint=obstacle[1])
        if namespaces.sysctls(name, IPV6_OFF).get(IPV6_OFF) == "1":
            owner.defer(turn_ipv6_off, netns=name)
            namespaces.set_sysctls(name, {IPV6_OFF: 0})
        for ifname in links:
            owner.defer(netlink.remove_link, netns=name, ifname=ifname)
        return ip

    @staticmethod
    def addresses(ip: IPRoute, links: Collection[str]) -> dict[Family, list[Address]]:
        """Addresses of the namespace that are known outside: at links that are none of ours."""
        found = [address for _, address in netlink.outside_addresses(ip, links)]
        return {f: [a for a in found if f"ipv{a.version}" == f] for f in Family}

    @staticmethod
    def prepare_link(netns: str, ifname: str) -> None:
        """Give a link of ours the IPv6 settings that it has in our own namespaces."""
        off = ("disable_ipv6", "accept_dad", "accept_ra", "autoconf")
        namespaces.set_sysctls(netns, {f"net/ipv6/conf/{ifname}/{key}": 0 for key in off})

    def _obstacles(
        self, ip: IPRoute, name: str, links: Collection[str]
    ) -> Iterator[tuple[str, str]]:
        """All conflicts in the namespace: (what conflicts, what to do)."""
        enter, other = f"nsenter --net={self.netns}", "guests may be attached to it already"
        if ip.get_links(1)[0]["state"] != "up":
            yield "lo is down", f"{enter} ip link set lo up"
        for address in ip.get_addr():
            found = ip_interface(f"{address.get('address')}/{address['prefixlen']}")
            if any(found in our for our in OURS):
                yield f"there is an address {found}", other
        for ifname in netlink.links(name).keys() & set(links):
            yield f"there is a link {ifname}", other
        for route in ip.get_routes():
            if dst := route.get("dst"):
                net = ip_network(f"{dst}/{route['dst_len']}")
                if any(net.overlaps(our) and net.prefixlen >= our.prefixlen for our in OURS):
                    yield f"there is a route to {net}", other
        if any(qdisc.get("kind") == "clsact" for qdisc in ip.get_qdiscs(1)):
            yield "there are programs on lo", f"{enter} tc qdisc del dev lo clsact"
        elif bpf.running_tc(name, ip, LO_IFINDEX):
            yield (
                "there are programs on lo",
                "have whoever attached them detach them (bpftool net)",
            )


def turn_ipv6_off(netns: str) -> None:
    """Switch IPv6 off at `lo`, as it was before guests joined, if the namespace still exists."""
    if (namespaces.NETNS / netns).exists():
        namespaces.set_sysctls(netns, {IPV6_OFF: 1})
