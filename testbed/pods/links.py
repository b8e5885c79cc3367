"""The links of a pod: namespaces, guests' ports, the bridge between them.

`Links.build` makes the links that are missing. So the same code builds a pod, and mends one whose
tap or bridge vanished. Nothing is watched here; `reconciler` does that.

    layout `bridge`:   guest 1 ─ g1 ─┐  its links' namespace  ┊  pod's namespace
                                     ├─ bridge ───────── pod ─┊─ guests, pod_link
                       guest 2 ─ g2 ─┘                        ┊     natives at lo

    layout `pod`:                           guest 1 ─ g1, pod_link
                                            guest 2 ─ g2, pod_link

    layout `no-loopback`:                   the same, and guests without `lo`

    layout `socket`:                        guest 1 ─ a program of the datapath

A guest that somebody else boots has a link of ours, too, whose other end t<n> is in the pod's
namespace, as its tap is (`taps`). Beside the tap of a guest that takes no partial checksums in IPv6
is a pair c<n> (`checksums`).

The namespace of the links stands for the host's own. Each pod has one for itself, since removing a
namespace is fast (the kernel removes its links later), while removing a link takes time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pyroute2 import IPRoute

from testbed.datapaths.interface import Layout, Port, Wiring
from testbed.host import facts, ledger, namespaces, netlink
from testbed.host.ledger import Scope
from testbed.model.addresses import LINK_PREFIX, POD_MAC, guest_link, guest_mac, pod_link
from testbed.model.errors import Error
from testbed.model.manifest import Manifest
from testbed.model.terms import Family, Runtime
from testbed.pods.checksums import Checksums
from testbed.pods.sandbox import Sandbox
from testbed.pods.taps import Taps
from testbed.runtimes.interface import Prepared
from testbed.runtimes.vm.guest import queues as runtime_queues

MTU = 1500
"""MTU of all guests' links (OSv's driver supports no other)."""

BRIDGE, TO_POD, TO_GUESTS = "bridge", "pod", "guests"
"""Links of layout `bridge`. The last is in the pod's namespace, the others in that of its links."""


def port_name(n: int) -> str:
    """Name of the host's end of guest n's link."""
    return f"g{n}"


def inner_name(n: int) -> str:
    """Name of the other end, of a guest that somebody else boots."""
    return f"t{n}"


class Links:
    """The links of one pod. Nothing is made before `make_namespaces`."""

    def __init__(
        self,
        owner: Scope,
        pod: str,
        netns: str,
        manifest: Manifest,
        layout: Layout,
        runtimes: Mapping[Runtime, Prepared],
        sandbox: Sandbox | None,
    ) -> None:
        """`sandbox`: the foreign namespace that guests join; None: a new one is made."""
        self.netns, self.layout = netns, layout
        self.link_netns = f"{netns}-links" if layout is Layout.BRIDGE else netns
        """Name of the namespace with guests' ports and the bridge."""
        self.guest_netns = {
            n: f"{netns}-g{n}"
            for n, guest in manifest.guests.items()
            if not runtimes[guest.runtime].uses_tap
        }
        """Namespaces of guests without a tap (stand-ins, gVisor), by the guests' numbers."""
        self.taps = Taps(owner, netns, manifest.taps)
        by_tap = layout is not Layout.SOCKET and Family.IPV6 in facts.families()
        needing = {
            n
            for n, guest in manifest.guests.items()
            if by_tap and runtimes[guest.runtime].needs_ipv6_checksums
        }
        self.checksums = Checksums(owner, self.link_netns, needing)
        self._owner, self._pod, self._manifest = owner, pod, manifest
        self._runtimes, self._sandbox = runtimes, sandbox
        self._ips: dict[str, IPRoute] = {}
        """rtnetlink sockets, by namespace."""

    def make_namespaces(self) -> None:
        """Make or join the namespaces. Raises `Error` if a guest cannot have such links."""
        taps = {tap.name for tap in self.taps.taps.values()}
        if ours := taps & {"lo", *self.own_names()}:
            raise Error(f"{ours.pop()!r} is no tap, but a link of the pod's own")
        if self.layout is Layout.SOCKET:
            if self.guest_netns:
                raise Error(
                    "this datapath carries frames of virtual machines only",
                    hint="choose guests of osv or linux",
                )
            self._sockets = ledger.create_folder(self._owner, f"{self.netns}-sockets")
        for netns in dict.fromkeys((self.netns, self.link_netns, *self.guest_netns.values())):
            if self._sandbox and netns == self.netns:
                self._ips[netns] = self._sandbox.join(self._owner, netns, self.own_names())
            else:
                self._ips[netns] = namespaces.create(self._owner, netns)
        if self.layout is Layout.BRIDGE:
            # Ports of bridges need no addresses, and must not send router solicitations.
            namespaces.set_sysctls(self.link_netns, {"net/ipv6/conf/default/disable_ipv6": 1})

    def close(self) -> None:
        """Close the sockets in the namespaces."""
        for ip in self._ips.values():
            ip.close()

    @property
    def ip(self) -> IPRoute:
        """The rtnetlink socket in the pod's namespace."""
        return self._ips[self.netns]

    @property
    def link_ip(self) -> IPRoute:
        """The rtnetlink socket in the links' namespace."""
        return self._ips[self.link_netns]

    def socket(self, n: int) -> Path | None:
        """Path of guest n's Unix socket in layout `socket`, else None."""
        return self._sockets / f"{n}" if self.layout is Layout.SOCKET else None

    def _names(self) -> set[str]:
        """Names of the links whose loss breaks the pod."""
        if self.layout is Layout.SOCKET:
            return set()
        names = {port_name(n) for n in self._manifest.guests} | self.checksums.names
        bridged = self.layout is Layout.BRIDGE
        return names | {BRIDGE, TO_POD} if bridged else names

    def own_names(self) -> set[str]:
        """Names of the links in the pod's own namespace."""
        bridged = self.layout is Layout.BRIDGE
        inner = {inner_name(n) for n in self.taps.taps}
        return inner | ({TO_GUESTS} if bridged else self._names())

    def inside_names(self) -> set[str]:
        """Those of them by which packets of the pod's inside come in."""
        return self.own_names() - self.checksums.names

    def build(self) -> set[str]:
        """Make all links that are missing, and connect taps; returns the names of the links."""
        if self.layout is Layout.SOCKET:
            return set()
        ip = self.link_ip
        existing = netlink.links(self.link_netns)
        bridge = None
        if self.layout is Layout.BRIDGE:
            bridge = existing.get(BRIDGE) or netlink.create_link(
                ip, BRIDGE, kind="bridge", br_stp_state=0, br_mcast_snooping=0, state="up"
            )
            uplink = existing.get(TO_POD) or self._create_uplink()
            ip.link("set", index=uplink, master=bridge)
        guests = self._manifest.guests
        ports = {n: existing.get(port_name(n)) or self._create_port(n) for n in guests}
        self.checksums.build(ip, ports)
        neighbors_at = netlink.links(self.netns)[TO_GUESTS] if bridge else 0
        for n, port in ports.items():
            ip.link("set", index=port, state="up", **({"master": bridge} if bridge else {}))
            for family in Family:
                netlink.add_neighbor(
                    self.ip, neighbors_at or port, guest_link(family, n), guest_mac(n)
                )
                if not bridge:
                    netlink.add_route(self.ip, port, guest_link(family, n))
        if self.taps.taps:
            self.taps.build({n: self._inner(n) for n in self.taps.taps}, self.own_names())
        return self._names() - existing.keys()

    def _inner(self, n: int) -> tuple[int, str]:
        """Index of the other end of guest n's link, and the MAC that the pod has on that link."""
        here = netlink.links(self.netns)
        own = TO_GUESTS if self.layout is Layout.BRIDGE else port_name(n)
        return here[inner_name(n)], self.ip.get_links(here[own])[0].get("address")

    def _create_uplink(self) -> int:
        peer = {"ifname": TO_GUESTS, "net_ns_fd": self.netns, "address": POD_MAC}
        uplink = netlink.create_link(self.link_ip, TO_POD, kind="veth", state="up", peer=peer)
        guests = netlink.links(self.netns)[TO_GUESTS]
        self._prepare_link(TO_GUESTS)
        for family in Family:
            netlink.add_address(self.ip, guests, pod_link(family), LINK_PREFIX[family])
        self.ip.link("set", index=guests, state="up")
        return uplink

    def _create_port(self, n: int) -> int:
        """Make guest n's link; returns the index of the host's end.

        In the pod's namespace each port has the pod's link address.
        """
        ip, name = self.link_ip, port_name(n)
        if netns := self.guest_netns.get(n):
            peer = {"ifname": "eth0", "net_ns_fd": netns, "address": guest_mac(n)}
            port = netlink.create_link(ip, name, kind="veth", peer=peer)
            self.address_guest(n)
            if self.layout is Layout.NO_LOOPBACK:
                self._take_loopback(netns)
        elif n in self.taps.taps:
            inner = inner_name(n)
            peer = {"ifname": inner, "net_ns_fd": self.netns}
            port = netlink.create_link(ip, name, kind="veth", peer=peer)
            namespaces.set_sysctls(self.netns, {f"net/ipv6/conf/{inner}/disable_ipv6": 1})
            self.ip.link("set", index=netlink.links(self.netns)[inner], state="up")
        else:
            flags = {"multi_queue": int(self.queues(n) > 1)}
            port = netlink.create_link(ip, name, kind="tuntap", mode="tap", ifr=flags)
        if self.layout is not Layout.BRIDGE:
            self._prepare_link(name)
            ip.link("set", index=port, state="up")
            for family in Family:
                netlink.add_address(ip, port, pod_link(family), pod_link(family).max_prefixlen)
        return port

    def address_guest(self, n: int) -> None:
        """Give guest n's link its addresses and routes, if a namespace is in the guest's place.

        What runs there may have taken them away, as gVisor does. With them, the kernel refuses what
        comes while nothing runs there.
        """
        netns = self.guest_netns.get(n)
        if netns and (eth0 := netlink.links(netns).get("eth0")):
            ip = self._ips[netns]
            for family in Family:
                netlink.add_address(ip, eth0, guest_link(family, n), LINK_PREFIX[family])
            ip.link("set", index=eth0, state="up")
            for family in Family:
                netlink.add_default_route(ip, eth0, pod_link(family))

    def queues(self, n: int) -> int:
        """Pairs of queues of guest n's link. More than one need a tap with IFF_MULTI_QUEUE."""
        if self.layout is Layout.SOCKET:
            return 1
        guest = self._manifest.guests[n]
        return runtime_queues(self._runtimes[guest.runtime], guest)

    def _prepare_link(self, ifname: str) -> None:
        if self._sandbox:
            self._sandbox.prepare_link(self.netns, ifname)

    def _take_loopback(self, netns: str) -> None:
        """Remove the loopback of a stand-in.

        Its addresses have to go, too: routes to them stay when `lo` is down.
        """
        ip = self._ips[netns]
        ip.flush_addr(index=1)
        ip.link("set", index=1, state="down")
        namespaces.set_sysctls(netns, {"net/ipv4/conf/eth0/route_localnet": 1})

    def wiring(self, cgroup: Path) -> Wiring:
        """The links as they are now; `cgroup` is that of the pod's natives."""
        existing = netlink.links(self.link_netns)
        bridged = self.layout is Layout.BRIDGE
        return Wiring(
            pod=self._pod,
            netns=self.netns,
            link_netns=self.link_netns,
            layout=self.layout,
            uplink_ifindex=netlink.links(self.netns)[TO_GUESTS] if bridged else 0,
            uplink_peer_ifindex=existing[TO_POD] if bridged else 0,
            ports=tuple(
                Port(
                    n,
                    port_name(n),
                    existing.get(port_name(n), 0),
                    self._runtimes[guest.runtime].families,
                    self.socket(n),
                    guest.control_port,
                )
                for n, guest in self._manifest.guests.items()
            ),
            owners=self._manifest.owners,
            cgroup=cgroup,
            native_ports=frozenset(p for w in self._manifest.natives for p in w.ports),
        )

    def missing(self) -> set[str]:
        """Names of links that have vanished, and of taps that did or are new."""
        return self.taps.changed() | self._names() - netlink.links(self.link_netns).keys()

    def tap(self, n: int) -> str:
        """Name of the tap of a guest that is a virtual machine."""
        return self.taps.taps[n].name if n in self.taps.taps else port_name(n)
