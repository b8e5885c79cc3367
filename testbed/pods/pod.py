"""A pod: links, datapath and workloads, put together and taken down.

Links are made by convergence: `_build_links` makes what is not there, so that building a pod and
mending one whose tap or bridge vanished are the same code. Nothing here watches; `supervisor` does.

    layout `bridge`:   guest 1 ─ g1 ─┐  its links' namespace  ┊  pod's namespace
                                     ├─ bridge ───────── pod ─┊─ guests, pod_link
                       guest 2 ─ g2 ─┘                        ┊     natives at lo

    layout `pod`:                           guest 1 ─ g1, pod_link
                                            guest 2 ─ g2, pod_link

    layout `routed`:                        the same, and guests without `lo`

    layout `socket`:                        guest 1 ─ a program of the datapath

The namespace of the links stands for the host's own. It is the pod's alone, because namespaces go
at once (the kernel takes their links down later), while whoever removes a link waits for it.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from pyroute2 import IPRoute

from testbed.agent import Agent
from testbed.datapaths.interface import Attachment, Datapath, Layout, Port, Wiring
from testbed.host import cgroups, facts, ledger, namespaces, netlink, process, sockets
from testbed.host.ledger import Scope
from testbed.model.addresses import (
    LINK_PREFIX,
    POD_MAC,
    Address,
    guest_link,
    guest_mac,
    loopback,
    native_view,
    pod_address,
    pod_link,
)
from testbed.model.errors import Error
from testbed.model.manifest import HostPort, Manifest, Workload
from testbed.model.terms import Family, Runtime, Transport
from testbed.pods.network import gateway, node
from testbed.pods.sandbox import Sandbox
from testbed.runtimes import container
from testbed.runtimes.interface import Placement, Prepared
from testbed.runtimes.vm.guest import queues

MTU = 1500
"""Of every guest link (OSv's driver knows no other)."""


CONNECT_LIMIT_S = 5.0
"""To an agent, that is to a workload that is ready."""

BRIDGE, TO_POD, TO_GUESTS = "bridge", "pod", "guests"
"""Links of layout `bridge`: the last is the pod's own, the others are in its links' namespace."""


def port_name(n: int) -> str:
    """The host's end of guest n's link."""
    return f"g{n}"


class Pod:
    """One pod. Made whole by `Pod(...)`, taken down by leaving the context.

    `start` starts the workloads. Raises `Error` if something cannot be made; then nothing is left.
    """

    def __init__(
        self,
        owner: Scope,
        name: str,
        manifest: Manifest,
        datapath: Datapath,
        runtimes: Mapping[Runtime, Prepared],
        consoles: Path,
        scratch: Path | None = None,
        sandbox: Sandbox | None = None,
        elsewhere: Mapping[str, Mapping[Family, Address]] = {},
    ) -> None:
        """`scratch`: a folder with the files of a `Spec`; without, one of the pod's own. `sandbox`:
        the namespace that guests are to join; without, one of the pod's own. `elsewhere`: those of
        the manifest's workloads that another host's pod has, and their addresses there.
        """
        self.name, self.manifest, self.datapath = name, manifest, datapath
        self.elsewhere = elsewhere
        self.lock = threading.RLock()
        """Held while links change: a netlink socket serves one thread at a time."""
        self.netns = f"tb-{owner.id}-{name}"
        bridged = datapath.layout is Layout.BRIDGE
        self.link_netns = f"{self.netns}-links" if bridged else self.netns
        """The namespace that holds guests' ports, and the bridge."""
        self._runtimes = runtimes
        self._consoles, self._given = consoles, scratch
        self.sandbox = sandbox
        self._ips: dict[str, IPRoute] = {}
        """Sockets, by namespace."""
        self.addresses: dict[Family, Address] = {}
        """Its own on the node's network, if it is connected."""
        self.processes: dict[str, process.Running] = {}
        self.cut_off: set[str] = set()
        """Guests that run, if they do, with a link that is not there any more."""
        self._owner = owner.part()
        try:
            with self.lock:
                self._build()
        except BaseException:
            self._undo()
            raise

    def _build(self) -> None:
        self._scratch = self._given or ledger.create_folder(self._owner, f"{self.netns}-scratch")
        if Runtime.CONTAINER in self._runtimes:
            container.own(self._owner, self._scratch, self.netns)
        for netns in dict.fromkeys((self.netns, self.link_netns, *self._standins.values())):
            if self.sandbox and netns == self.netns:
                self._ips[netns] = self.sandbox.join(self._owner, netns, self._own_links())
            else:
                self._ips[netns] = namespaces.create(self._owner, netns)
        if self.datapath.layout is Layout.BRIDGE:
            # Ports of bridges need no addresses, and have nothing to say to IPv6 routers.
            namespaces.set_sysctls(self.link_netns, {"net/ipv6/conf/default/disable_ipv6": 1})
        root = cgroups.create(self._owner, self.netns)
        self.cgroup, self.guest_cgroup = root / "natives", root / "guests"
        for group in (self.cgroup, self.guest_cgroup):
            group.mkdir(exist_ok=True)
        if self.sandbox and self.sandbox.cgroup:
            self.cgroup = self.sandbox.cgroup
        if self.datapath.layout is Layout.SOCKET:
            if self._standins:
                raise Error(
                    f"{self.datapath.name} carries frames of virtual machines only",
                    hint="choose guests other than stand-ins",
                )
            self._sockets = ledger.create_folder(self._owner, f"{self.netns}-sockets")
        if self._owner.goes_on:
            missing = self.missing_links()
            self.cut_off = {
                g.name
                for n, g in self.manifest.guests.items()
                if port_name(n) in missing and n not in self._standins
            }
        self._build_links()
        began = time.monotonic()
        self.attachment: Attachment = self.datapath.attach(self.wiring(), self._owner)
        self.attached_s = time.monotonic() - began

    def connect(self, ports: Collection[HostPort]) -> None:
        """Give it addresses on the node's network, and the ports there; before it is started.

        It and its guests reach out from them, and are reached at them. Raises `Error` if another
        pod has one of the ports, or there is no nftables.
        """
        with self.lock:
            n = node.join(self._owner, self.name, self.netns, ports)
            self.addresses = {family: pod_address(family, n) for family in Family}
            gateway.open(
                self.netns,
                node.UPLINK,
                self.addresses,
                self.manifest.owners,
                {p.n: p.families for p in self.wiring().ports},
                tracked=self.attachment.tracked,
            )

    # --- links ------------------------------------------------------------------------------

    @property
    def ip(self) -> IPRoute:
        """A socket in the pod's namespace."""
        return self._ips[self.netns]

    @property
    def link_ip(self) -> IPRoute:
        """A socket in the links' namespace."""
        return self._ips[self.link_netns]

    @property
    def _standins(self) -> dict[int, str]:
        """Their namespaces."""
        return {
            n: f"{self.netns}-g{n}"
            for n, guest in self.manifest.guests.items()
            if not self._runtimes[guest.runtime].uses_tap
        }

    def _socket(self, n: int) -> Path | None:
        """In the place of a port, where there are no links."""
        return self._sockets / f"{n}" if self.datapath.layout is Layout.SOCKET else None

    def _link_names(self) -> set[str]:
        """Links whose loss breaks the pod."""
        if self.datapath.layout is Layout.SOCKET:
            return set()
        names = {port_name(n) for n in self.manifest.guests}
        bridged = self.datapath.layout is Layout.BRIDGE
        return names | {BRIDGE, TO_POD} if bridged else names

    def _own_links(self) -> set[str]:
        """Links in the pod's own namespace."""
        bridged = self.datapath.layout is Layout.BRIDGE
        return {TO_GUESTS} if bridged else self._link_names()

    def _build_links(self) -> None:
        """Make every link that is not there."""
        if self.datapath.layout is Layout.SOCKET:
            return
        ip = self.link_ip
        there = netlink.links(self.link_netns)
        bridge = None
        if self.datapath.layout is Layout.BRIDGE:
            bridge = there.get(BRIDGE) or netlink.create_link(
                ip, BRIDGE, kind="bridge", br_stp_state=0, br_mcast_snooping=0, state="up"
            )
            uplink = there.get(TO_POD) or self._create_uplink()
            ip.link("set", index=uplink, master=bridge)
        neighbors_at = netlink.links(self.netns)[TO_GUESTS] if bridge else 0
        for n in self.manifest.guests:
            port = there.get(port_name(n)) or self._create_port(n)
            ip.link("set", index=port, state="up", **({"master": bridge} if bridge else {}))
            for family in Family:
                netlink.add_neighbor(
                    self.ip, neighbors_at or port, guest_link(family, n), guest_mac(n)
                )
                if not bridge:
                    netlink.add_route(self.ip, port, guest_link(family, n))

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
        """The host's end of guest n's link. In the pod every port has the pod's address."""
        ip, name = self.link_ip, port_name(n)
        if netns := self._standins.get(n):
            guest_ip = self._ips[netns]
            peer = {"ifname": "eth0", "net_ns_fd": netns, "address": guest_mac(n)}
            port = netlink.create_link(ip, name, kind="veth", peer=peer)
            eth0 = netlink.links(netns)["eth0"]
            for family in Family:
                netlink.add_address(guest_ip, eth0, guest_link(family, n), LINK_PREFIX[family])
            guest_ip.link("set", index=eth0, state="up")
            for family in Family:
                netlink.add_default_route(guest_ip, eth0, pod_link(family))
            if self.datapath.layout is Layout.ROUTED:
                self._take_loopback(netns)
        else:
            flags = {"multi_queue": int(self._queues(n) > 1)}
            port = netlink.create_link(ip, name, kind="tuntap", mode="tap", ifr=flags)
        if self.datapath.layout is not Layout.BRIDGE:
            self._prepare_link(name)
            ip.link("set", index=port, state="up")
            for family in Family:
                netlink.add_address(ip, port, pod_link(family), pod_link(family).max_prefixlen)
        return port

    def _queues(self, n: int) -> int:
        """Pairs of queues of guest n's link. A tap for several is another kind of tap to Linux."""
        if self.datapath.layout is Layout.SOCKET:
            return 1
        guest = self.manifest.guests[n]
        return queues(self._runtimes[guest.runtime], guest)

    def _prepare_link(self, ifname: str) -> None:
        if self.sandbox:
            self.sandbox.prepare_link(self.netns, ifname)

    def _take_loopback(self, netns: str) -> None:
        """Of a stand-in. That `lo` is down is not enough: routes to its own addresses stay."""
        ip = self._ips[netns]
        ip.flush_addr(index=1)
        ip.link("set", index=1, state="down")
        namespaces.set_sysctls(netns, {"net/ipv4/conf/eth0/route_localnet": 1})

    def wiring(self) -> Wiring:
        """The links as they are now, for the datapath."""
        there = netlink.links(self.link_netns)
        bridged = self.datapath.layout is Layout.BRIDGE
        return Wiring(
            pod=self.name,
            netns=self.netns,
            link_netns=self.link_netns,
            layout=self.datapath.layout,
            uplink_ifindex=netlink.links(self.netns)[TO_GUESTS] if bridged else 0,
            uplink_peer_ifindex=there[TO_POD] if bridged else 0,
            ports=tuple(
                Port(
                    n,
                    port_name(n),
                    there.get(port_name(n), 0),
                    self._runtimes[guest.runtime].families,
                    self._socket(n),
                    guest.control_port,
                )
                for n, guest in self.manifest.guests.items()
            ),
            owners=self.manifest.owners,
            cgroup=self.cgroup,
            native_ports=frozenset(p for w in self.manifest.natives for p in w.ports),
        )

    def missing_links(self) -> set[str]:
        """Links that somebody took away."""
        with self.lock:
            return self._link_names() - netlink.links(self.link_netns).keys()

    def mend(self) -> None:
        """Make vanished links again, attach the datapath, restart guests that lost their tap."""
        missing = self.missing_links()
        with self.lock:
            self._build_links()
            self.attachment.rewire(self.wiring())
        for n, guest in self.manifest.guests.items():
            if port_name(n) in missing and n not in self._standins and guest.name in self.processes:
                self.restart_workload(guest.name)
        self.attach_deferred()

    # --- workloads --------------------------------------------------------------------------

    def console(self, workload: str) -> Path:
        """What the workload printed so far."""
        return self._consoles / f"{self.name}-{workload}.log"

    @property
    def _here(self) -> list[Workload]:
        return [w for w in self.manifest.workloads if w.name not in self.elsewhere]

    def start(self) -> None:
        """Start all workloads at once and wait until each one's agent answers."""
        self.launch()
        self.wait()

    def launch(self) -> None:
        """Start all workloads."""
        self._consoles.mkdir(parents=True, exist_ok=True)
        for workload in self._here:
            self.start_workload(workload.name)
        self.attach_deferred()

    def attach_deferred(self) -> None:
        """Do, while workloads boot, what the datapath leaves for then."""
        with self.lock:
            self.attachment.attach_deferred()

    def wait(self, families: Collection[Family] = tuple(Family)) -> None:
        """Wait until all workloads answer in those families that they have of these."""
        for workload in self._here:
            self.wait_ready(workload.name, families)

    def start_workload(self, name: str) -> None:
        """Start one workload (again)."""
        _, workload = self._find(name)
        with self.lock:
            if name in self.processes:  # it has ended, and that may not have been noticed yet
                self.workload_ended(name)
        running = self._runtimes[workload.runtime].start(self.place(workload))
        with self.lock:
            self.processes[name] = running

    def place(self, workload: Workload) -> Placement:
        """Where a workload of the manifest runs, or another native one."""
        n, runtime = self.number_of(workload.name) or 0, self._runtimes[workload.runtime]
        if not n:
            netns, cgroup = self.netns, self.cgroup
        else:
            netns = self._standins.get(n, self.link_netns)
            cgroup = self.guest_cgroup
        cgroup = cgroup / workload.name
        cgroup.mkdir(exist_ok=True)
        return Placement(
            workload,
            n,
            netns,
            port_name(n) if runtime.uses_tap else "",
            cgroup,
            self.console(workload.name),
            self._scratch,
            self._socket(n) if runtime.uses_tap else None,
            not n or self.datapath.layout is not Layout.ROUTED,
            self._queues(n) if n else 1,
        )

    def stop_workload(self, name: str) -> None:
        """End one workload, and the connections that its peers in the pod still have with it."""
        with self.lock:
            process.end(self.processes.pop(name))
            self.workload_ended(name)

    def restart_workload(self, name: str) -> None:
        """Stop one workload and start it; whoever else wants to, after that."""
        with self.lock:
            self.stop_workload(name)
            self.start_workload(name)

    def workload_ended(self, name: str) -> None:
        """A workload has ended: what is for a guest is refused, and its peers are told.

        With the lock held, and not when its next process runs: that one's connections would end.
        """
        if n := self.number_of(name):
            self.attachment.guest_ended(n)
        self.end_peers(name)

    def end_peers(self, name: str) -> None:
        """End natives' TCP connections with a guest that is gone: it sent them neither FIN nor RST.

        Connections of other guests are the datapath's to end (`Attachment.guest_ended`).
        """
        n, workload = self._find(name)
        if not n:
            return
        ends = [f"dst [{address(f, n)}]" for f in Family for address in (guest_link, native_view)]
        pod = [f"[{pod_link(f)}]" for f in Family]
        ends += [
            f"( dst {net} and dport = :{port} )"
            for transport, port in workload.ports
            if transport is Transport.TCP
            for net in ("127.0.0.0/8", "[::1]", *pod)
        ]
        sockets.kill_connections(self.netns, " or ".join(ends))

    def wait_ready(self, name: str, families: Collection[Family] = tuple(Family)) -> None:
        """Wait until the workload's agent answers in every one of `families` that its stack has.

        (OSv's IPv6 address is usable a second after the rest.) Raises `Error` with its last console
        lines.
        """
        _, workload = self._find(name)
        runtime = self._runtimes[workload.runtime]
        limit_s, patience_s = runtime.ready_limit_s * facts.slowness(), 0.2
        deadline = time.monotonic() + limit_s
        while True:
            if (code := self.processes[name].poll()) is not None:
                problem = f"{name} of {self.name} ended with status {code}"
                break
            try:
                for family in sorted(runtime.families & set(families) & facts.families()):
                    with self.agent(name, patience_s, family) as agent:
                        if not workload.program:  # a proxy on the way accepts for it
                            agent.hello(patience_s)
                return
            except (OSError, Error):
                # Short at first, as what is lost is sent again after a second only.
                patience_s = min(1.2 * patience_s, limit_s)
                if time.monotonic() > deadline:
                    problem = f"{name} of {self.name} was not ready within {limit_s:g} s"
                    break
                time.sleep(0.005)
        lines = self.console(name).read_text(errors="replace").splitlines()[-8:]
        raise Error(
            f"{problem}; its console's last lines: {' | '.join(lines) or 'none'}",
            hint=f"see {self.console(name)}",
        )

    def revive(self) -> None:
        """Start workloads that ended again, and wait. Raises `Error` if one does not come back."""
        dead = [name for name, running in self.processes.items() if running.poll() is not None]
        for name in dead:
            self.start_workload(name)
        for name in dead:
            self.wait_ready(name)

    def number_of(self, name: str) -> int | None:
        """The guest's number, None for a native workload."""
        return next((n for n, guest in self.manifest.guests.items() if guest.name == name), None)

    def address(self, name: str, family: Family) -> Address:
        """The workload's own address: a guest's on its link, loopback for a native one."""
        n, _ = self._find(name)
        return guest_link(family, n) if n else loopback(family)

    def agent(self, name: str, timeout_s: float = 0, family: Family = Family.IPV4) -> Agent:
        """A control connection to the workload's agent, at its own address. Raises `OSError`."""
        timeout_s = timeout_s or CONNECT_LIMIT_S * facts.slowness()
        _, workload = self._find(name)
        there = self.elsewhere.get(name)  # whichever family the hosts have between them
        address = next(iter(there.values())) if there else self.address(name, family)
        to = (str(address), workload.control_port)
        return Agent(namespaces.inside(self.netns, lambda: socket.create_connection(to, timeout_s)))

    def _find(self, name: str) -> tuple[int, Workload]:
        for n, guest in self.manifest.guests.items():
            if guest.name == name:
                return n, guest
        return 0, next(w for w in self.manifest.natives if w.name == name)

    # --- the end ----------------------------------------------------------------------------

    def close(self) -> None:
        """Take the pod down; nothing of it stays."""
        for running in self.processes.values():
            running.terminate()
        deadline = time.monotonic() + process.GRACE_S
        for running in self.processes.values():
            process.end(running, max(0, deadline - time.monotonic()))
        self.attachment.detach()
        self._undo()

    def _undo(self) -> None:
        for ip in self._ips.values():
            ip.close()
        self._owner.undo()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()
