"""A pod: builds links, datapath and workloads, and takes them down.

`links` makes the links, `reconciler` watches them. Nothing is watched here.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from testbed.agent import Agent
from testbed.datapaths.interface import Attachment, Count, Datapath, Layout, Wiring
from testbed.host import cgroups, facts, ledger, namespaces, process, sockets
from testbed.host.ledger import Scope
from testbed.model.addresses import (
    Address,
    guest_link,
    loopback,
    native_view,
    node_address,
    pod_address,
    pod_link,
)
from testbed.model.errors import Error
from testbed.model.manifest import HostPort, Manifest, Workload, resolved
from testbed.model.terms import Family, Runtime, Transport
from testbed.pods.links import Links, port_name
from testbed.pods.network import gateway, node
from testbed.pods.sandbox import Sandbox
from testbed.runtimes import container
from testbed.runtimes.interface import Placement, Prepared

CONNECT_LIMIT_S = 5.0
"""Time limit of a connection to the agent of a ready workload."""


class Pod:
    """One pod. `Pod(...)` builds it, leaving the context takes it down.

    `start` starts the workloads. Raises `Error` if it cannot be built; then nothing is left.
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
        """`scratch`: folder with the files of a `Spec`; None: the pod makes one. `sandbox`: the
        foreign namespace that guests join; None: the pod makes one. `elsewhere`: addresses of those
        workloads of the manifest that are in another host's pod.
        """
        self.name, self.manifest, self.datapath = name, manifest, datapath
        self.elsewhere = elsewhere
        self.lock = threading.RLock()
        """Held while links change, since a netlink socket serves one thread at a time."""
        self.netns = f"tb-{owner.id}-{name}"
        self._runtimes = runtimes
        self._consoles, self._given = consoles, scratch
        self.sandbox = sandbox
        self.addresses: dict[Family, Address] = {}
        """The pod's addresses outside, the first of each family; empty if it is not connected."""
        self.processes: dict[str, process.Running] = {}
        self.cut_off: set[str] = set()
        """Guests whose link was missing when the pod was taken over; they may still run."""
        self._unmended: set[str] = set()
        """Links that vanished, until all that belongs to them is there again."""
        self._owner = owner.part()
        self.links = Links(
            self._owner, name, self.netns, manifest, datapath.layout, runtimes, sandbox
        )
        try:
            with self.lock:
                self._build()
        except BaseException:
            self._undo()
            raise

    def _build(self) -> None:
        self._scratch = self._given or ledger.create_folder(self._owner, f"{self.netns}-scratch")
        container.own(self._owner, self._scratch, self.netns)
        self.links.make_namespaces()
        if self.sandbox:
            gateway.guard(self._owner, self.netns, self.links.inside_names())
        root = cgroups.create(self._owner, self.netns)
        self.cgroup, self.guest_cgroup = root / "natives", root / "guests"
        for group in (self.cgroup, self.guest_cgroup):
            group.mkdir(exist_ok=True)
        if self.sandbox and self.sandbox.cgroup:
            self.cgroup = self.sandbox.cgroup
        if self._owner.continues:
            self.cut_off = self._guests_of(self.links.missing())
        self.links.build()
        began = time.monotonic()
        self.attachment: Attachment = self.datapath.attach(self.wiring(), self._owner)
        self.attached_s = time.monotonic() - began

    def connect(self, ports: Collection[HostPort]) -> None:
        """Connect guests with what is outside. Call it before starting.

        The pod's addresses are theirs outside: as source of what they send, and where their ports
        are reached. A foreign namespace has addresses. Another gets one of each family, and ports,
        on the node's network. Raises `Error` if another pod has one of the ports, or there is no
        nftables.
        """
        with self.lock:
            links = self.links.inside_names()
            if self.sandbox:
                addresses = self.sandbox.addresses(self.links.ip, links)
            else:
                gateway.guard(self._owner, self.netns, links)
                n = node.join(self._owner, self.name, self.netns, ports)
                addresses = {family: [pod_address(family, n)] for family in Family}
            self.addresses = {family: found[0] for family, found in addresses.items() if found}
            gateway.open(
                self._owner,
                self.netns,
                links,
                addresses,
                self.manifest.owners,
                {p.n: p.families for p in self.wiring().ports},
                needs_conntrack=self.attachment.needs_conntrack,
                foreign=self.sandbox is not None,
            )

    def wiring(self) -> Wiring:
        """The links as they are now, for the datapath."""
        return self.links.wiring(self.cgroup)

    def missing_links(self) -> set[str]:
        """Names of links that have vanished."""
        with self.lock:
            return self.links.missing()

    def missing_programs(self) -> set[str]:
        """Names of the datapath's programs that somebody else removed."""
        with self.lock:
            beside = self.links.taps.missing_programs() | self.links.checksums.missing_programs()
            return self.attachment.missing_programs() | beside

    def mend(self) -> set[str]:
        """Make again what is missing, connect new taps, and restart guests that lost their link.

        Returns the names of the links. If it raises, the next call does what is left to do.
        """
        with self.lock:
            changed = self.links.taps.changed()
            for name in self._guests_of(changed) & self.processes.keys():
                self.restart_workload(name)  # before its new tap is connected
            self._unmended |= self.links.missing() - changed
            self._unmended |= self.links.build()
            self.attachment.rewire(self.wiring())
        for name in self._guests_of(self._unmended) & self.processes.keys():
            self.restart_workload(name)
        if self._unmended:
            self.attach_deferred()
        mended, self._unmended = self._unmended, set()
        return mended | changed

    def _guests_of(self, missing: set[str]) -> set[str]:
        """Names of guests that hold one of these links, which vanished or are new.

        They have to be started again. A stand-in's sockets do not depend on its link.
        """
        return {
            guest.name
            for n, guest in self.manifest.guests.items()
            if self.links.tap(n) in missing and not self._runtimes[guest.runtime].kernel_has_sockets
        }

    # --- workloads --------------------------------------------------------------------------

    def console(self, workload: str) -> Path:
        """File with the output of a workload."""
        return self._consoles / f"{self.name}-{workload}.log"

    @property
    def _own_workloads(self) -> list[Workload]:
        """Workloads of the manifest that are in this pod, not in another host's."""
        return [w for w in self.manifest.workloads if w.name not in self.elsewhere]

    def start(self) -> None:
        """Start all workloads at once, and wait until their agents answer."""
        self.launch()
        self.wait()

    def launch(self) -> None:
        """Start all workloads."""
        self._consoles.mkdir(parents=True, exist_ok=True)
        for workload in self._own_workloads:
            self.start_workload(workload.name)
        self.attach_deferred()

    def attach_deferred(self) -> None:
        """Attach the parts of the datapath that may wait until workloads boot."""
        with self.lock:
            self.attachment.attach_deferred()

    def wait(self, families: Collection[Family] = tuple(Family), least_s: float = 0) -> None:
        """Wait until all workloads answer in those of these families that they have.

        They have the time limit of their runtime, and `least_s` at least.
        """
        for workload in self._own_workloads:
            self.wait_ready(workload.name, families, least_s)

    def start_workload(self, name: str) -> None:
        """Start one workload, also after its end."""
        _, workload = self._find(name)
        running = self.run(workload)
        with self.lock:
            self.processes[name] = running

    def run(self, workload: Workload) -> process.Running:
        """Start the process of a workload, once the end of the one before is handled."""
        with self.lock:
            if workload.name in self.processes:  # ended, maybe not noticed by the reconciler yet
                self.workload_ended(workload.name)
        return self._runtimes[workload.runtime].start(self.place(workload))

    def place(self, workload: Workload) -> Placement:
        """Placement of a workload of the manifest, or of another native one."""
        n, runtime = self.number_of(workload.name) or 0, self._runtimes[workload.runtime]
        if not n:
            netns, cgroup = self.netns, self.cgroup
        else:
            netns = self.links.guest_netns.get(n, self.links.link_netns)
            cgroup = self.guest_cgroup
        cgroup = cgroup / workload.name
        cgroup.mkdir(exist_ok=True)
        if workload.program:
            program = resolved(workload.program, self._late_fields())
            workload = replace(workload, program=program)
        return Placement(
            workload,
            n,
            netns,
            port_name(n) if runtime.uses_tap else "",
            cgroup,
            self.console(workload.name),
            self._scratch,
            self.links.socket(n) if runtime.uses_tap else None,
            not n or self.datapath.layout is not Layout.NO_LOOPBACK,
            self.links.queues(n) if n else 1,
        )

    def _late_fields(self) -> dict[str, str]:
        """Fields of the downward API that are known now (`manifest.late`)."""
        addresses = [str(address) for address in self.addresses.values()]
        nodes = [str(node_address(family)) for family in self.addresses if not self.sandbox]
        return {
            "status.podIP": "".join(addresses[:1]),
            "status.podIPs": ",".join(addresses),
            "status.hostIP": "".join(nodes[:1]),
        }

    def stop_workload(self, name: str) -> None:
        """End one workload, and the connections of its peers in the pod with it."""
        with self.lock:
            process.end(self.processes.pop(name))
            self.workload_ended(name)

    def restart_workload(self, name: str) -> None:
        """Stop one workload and start it again, with the lock held."""
        with self.lock:
            self.stop_workload(name)
            self.start_workload(name)

    def workload_ended(self, name: str) -> None:
        """Refuse packets for a guest that has ended, and end its peers' connections.

        To be called with the lock held, before the next process of the workload runs: it would end
        that one's connections.
        """
        if n := self.number_of(name):
            self.links.address_guest(n)
            self.attachment.guest_ended(n)
        self.end_peers(name)

    def end_peers(self, name: str) -> None:
        """End natives' TCP connections with a guest that has ended, which sent no FIN or RST.

        The datapath ends those of other guests (`Attachment.guest_ended`).
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

    def wait_ready(
        self, name: str, families: Collection[Family] = tuple(Family), least_s: float = 0
    ) -> None:
        """Wait until the workload's agent answers in all of `families` that its stack has.

        (OSv's IPv6 address is usable a second after the others.) Raises `Error` with the last lines
        of its console.
        """
        _, workload = self._find(name)
        runtime = self._runtimes[workload.runtime]
        limit_s, timeout_s = max(runtime.ready_limit_s, least_s) * facts.slowness(), 0.2
        deadline = time.monotonic() + limit_s
        while True:
            if (code := self.processes[name].poll()) is not None:
                problem = f"{name} of {self.name} ended with status {code}"
                break
            try:
                for family in sorted(runtime.families & set(families) & facts.families()):
                    with self.agent(name, timeout_s, family) as agent:
                        if not workload.program:  # a proxy may have accepted the connection
                            agent.hello(timeout_s)
                return
            except (OSError, Error):
                # Short at first, since TCP repeats a lost SYN only after a second.
                timeout_s = min(1.2 * timeout_s, limit_s)
                if time.monotonic() > deadline:
                    problem = f"{name} of {self.name} was not ready within {limit_s:g} s"
                    break
                time.sleep(0.005)
        lines = self.console(name).read_text(errors="replace").splitlines()[-8:]
        raise Error(
            f"{problem}; its console's last lines: {' | '.join(lines) or 'none'}",
            hint=f"see {self.console(name)}",
        )

    def revive(self, families: Collection[Family] = tuple(Family)) -> None:
        """Restart workloads that have ended, and wait. Raises `Error` if one does not get ready."""
        dead = [name for name, running in self.processes.items() if running.poll() is not None]
        for name in dead:
            self.start_workload(name)
        for name in dead:
            self.wait_ready(name, families)

    def number_of(self, name: str) -> int | None:
        """Number of a guest, None for a native workload."""
        return next((n for n, guest in self.manifest.guests.items() if guest.name == name), None)

    def carried(self, client: str, server: str) -> Count:
        """Packets and bytes that the datapath has carried between two workloads so far."""
        return self.attachment.carried(self.number_of(client), self.number_of(server))

    def address(self, name: str, family: Family) -> Address:
        """Own address of a workload: that of a guest's link, loopback for a native one."""
        n, _ = self._find(name)
        return guest_link(family, n) if n else loopback(family)

    def agent(self, name: str, timeout_s: float = 0, family: Family = Family.IPV4) -> Agent:
        """Open a control connection to the workload's agent. Raises `OSError`."""
        return Agent(self.dial(name, timeout_s, family))

    def dial(self, name: str, timeout_s: float = 0, family: Family = Family.IPV4) -> socket.socket:
        """Connect to a workload's control port, at its own address.

        If it is in another host's pod, the family is one that the hosts have between them. Raises
        `OSError`.
        """
        timeout_s = timeout_s or CONNECT_LIMIT_S * facts.slowness()
        _, workload = self._find(name)
        remote = self.elsewhere.get(name)
        address = next(iter(remote.values())) if remote else self.address(name, family)
        to = (str(address), workload.control_port)
        return namespaces.inside(self.netns, lambda: socket.create_connection(to, timeout_s))

    def _find(self, name: str) -> tuple[int, Workload]:
        for n, guest in self.manifest.guests.items():
            if guest.name == name:
                return n, guest
        return 0, next(w for w in self.manifest.natives if w.name == name)

    # --- the end ----------------------------------------------------------------------------

    def close(self) -> None:
        """Take the pod down. Nothing of it is left."""
        for running in self.processes.values():
            running.terminate()
        deadline = time.monotonic() + process.GRACE_S
        for running in self.processes.values():
            process.end(running, max(0, deadline - time.monotonic()))
        self.attachment.detach()
        self._undo()

    def _undo(self) -> None:
        self.links.close()
        self._owner.undo()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()
