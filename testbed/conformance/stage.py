"""Stage: the pod that conformance checks run in.

`OwnStage` builds a pod. `ForeignStage` uses a pod that somebody else made, with a traffic agent in
its guest; nothing in that pod can be restarted.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol, Self, TypeVar

from testbed import runtimes
from testbed.agent import Agent
from testbed.campaigns.roles import ROLES, manifest_of, natives
from testbed.conformance.check import EVERY, Unsupported
from testbed.conformance.sockets import TIMEOUT_S
from testbed.datapaths.interface import Datapath
from testbed.host import cgroups, namespaces
from testbed.host.ledger import Owner, Scope
from testbed.model.addresses import CONTROL_PORT
from testbed.model.cells import Pair
from testbed.model.errors import Error
from testbed.model.manifest import Manifest, Workload
from testbed.model.terms import Runtime
from testbed.pods.pod import Pod
from testbed.pods.reconciler import Reconciler
from testbed.runtimes import interface
from testbed.runtimes.interface import Options, Placement, Prepared

T = TypeVar("T")

PORTS_EACH = 32
PORTS = {
    name: range(start, start + PORTS_EACH)
    for name, start in (
        ("native1", 8000),
        ("native2", 8032),
        ("guest1", 8064),
        ("guest2", 8096),
        ("wasm1", 8128),
        ("container1", 8160),
    )
}
"""Workload → ports that it owns, for TCP and UDP. A foreign pod must have the same ports."""


def manifest(pairs: Collection[Pair], guest: Runtime) -> Manifest:
    """Manifest with two native processes, the workloads of the pairs, and two guests if needed."""
    names = {"native1", "native2", *(name for pair in pairs for name in ROLES[pair])}
    if any(pair.guests for pair in pairs):
        names |= {"guest1", "guest2"}
    return manifest_of([name for name in PORTS if name in names], guest, PORTS.__getitem__)


class Stage(Protocol):
    """A pod that checks run in."""

    datapath: str
    guest: str
    """Runtime of the guests; empty without guests."""
    kernel: str
    """Kernel of the guests, if they have one of their own and it is known."""
    pairs: frozenset[Pair]
    netns: str
    emulated: bool
    """Whether guests are emulated (TCG), and so slow."""

    def revive(self) -> None:
        """Restart workloads that have ended."""

    def agent(self, name: str) -> Agent:
        """Open a control connection to a workload. Raises `Unsupported` if it is not there."""

    def guest_netns(self, name: str) -> str:
        """Namespace of a stand-in. Raises `Unsupported` for other guests."""


class OwnStage:
    """A pod that is built here, for one datapath, with the workloads that the pairs need."""

    def __init__(
        self,
        owner: Scope,
        datapath: Datapath,
        pairs: frozenset[Pair],
        guest: Prepared,
        options: Options,
        consoles: Path,
    ) -> None:
        self.owner, self.datapath, self.pairs = owner, datapath.name, pairs
        self.runtime = guest.description.runtime
        self.guest = str(self.runtime) if any(pair.guests for pair in self.pairs) else ""
        self.kernel = guest.description.kernel if self.guest else ""
        self.emulated = guest.description.functional_only
        self._datapath, self._consoles = datapath, consoles
        needed = {Runtime.PROCESS, *natives(pairs)}
        self._runtimes = {self.runtime: guest, **{r: runtimes.prepare(r, options) for r in needed}}
        self.name = f"conform-{datapath.name}"
        self.build()

    def another(self, name: str) -> Pod:
        """Another pod of the same kind, built but not started."""
        workloads = manifest(self.pairs, self.runtime)
        return Pod(self.owner, name, workloads, self._datapath, self._runtimes, self._consoles)

    def build(self) -> None:
        """Build the pod, wait for its workloads, and start its reconciler.

        If that fails, everything is taken down.
        """
        with ExitStack() as stack:
            self.pod = self.another(self.name)
            stack.callback(self.pod.close)
            self.netns = self.pod.netns
            self.pod.start()
            stack.enter_context(Reconciler(self.pod))
            self._standing = stack.pop_all()
            self._stands = True

    def close(self) -> None:
        self._stands = False
        self._standing.close()

    def agent(self, name: str) -> Agent:
        if name not in {w.name for w in self.pod.manifest.workloads}:
            raise Unsupported(f"the pod has no {name}")
        try:
            return self.pod.agent(name)
        except OSError:  # the case before made the workload unusable, which is not this one's fault
            self.pod.restart_workload(name)
            self.pod.wait_ready(name)
            return self.pod.agent(name)

    def revive(self) -> None:
        if self._stands:
            self.pod.revive()
        else:
            self.build()

    def guest_netns(self, name: str) -> str:
        if self.runtime is not Runtime.STANDIN:
            raise Unsupported("needs a stand-in: a guest that sends any frame it is told to")
        return f"{self.netns}-g{self.pod.number_of(name)}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ForeignStage:
    """Somebody else's pod: natives are agents that are started here, the guest's agent is there."""

    guest = "foreign"
    kernel = ""
    emulated = False
    pairs = EVERY - {Pair.GUEST_GUEST}

    def __init__(
        self, owner: Owner, netns: Path, control: str, cgroup: Path | None, datapath: str
    ) -> None:
        """`control`: the guest agent's ADDRESS or ADDRESS:PORT ([…]:PORT for IPv6). `cgroup`: that
        of the pod's processes, in which natives are started; None: they are in none of the pod's.
        """
        if not netns.exists():
            raise Error(f"no network namespace {netns}", hint="give a path such as /run/netns/NAME")
        self.datapath = datapath
        namespaces.NETNS.mkdir(exist_ok=True)  # the relative path leads through it
        # Not resolved as a whole: a namespace in /proc is a link to what has no path.
        self.netns = os.path.relpath(netns.parent.resolve() / netns.name, namespaces.NETNS)
        host, colon, port = control.rpartition(":")
        if not colon or "]" in port or (host.count(":") and not host.startswith("[")):
            host, port = control, str(CONTROL_PORT)
        self._control = {
            "native1": ("127.0.0.1", CONTROL_PORT),
            "native2": ("127.0.0.1", CONTROL_PORT + 1),
            "guest1": (host.strip("[]"), int(port)),
        }
        program = runtimes.prepare(Runtime.PROCESS, interface.Options())
        cgroup = cgroups.create(owner, f"tb-{owner.id}-foreign", cgroup)
        for name in ("native1", "native2"):
            workload = Workload(name, Runtime.PROCESS, control_port=self._control[name][1])
            program.start(Placement(workload, 0, self.netns, "", cgroup, Path(os.devnull), Path()))

    def agent(self, name: str) -> Agent:
        if name not in self._control:
            raise Unsupported(f"needs {name}, and a foreign pod has guest1 alone")
        to = self._control[name]

        def connect() -> socket.socket:
            return socket.create_connection(to, TIMEOUT_S)

        try:
            return Agent(_patiently(lambda: namespaces.inside(self.netns, connect)))
        except OSError as e:
            raise Error(
                f"{name}: no agent answers at {to[0]}, port {to[1]}: {e.strerror or e}",
                hint="start it there, and say where with --control",
            ) from e

    def revive(self) -> None:
        pass  # the pod's workloads belong to somebody else

    def guest_netns(self, name: str) -> str:
        raise Unsupported("needs a stand-in of our own")


def _patiently(call: Callable[[], T]) -> T:
    """Call again until the connection is not refused: a new agent needs a moment to listen."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            return call()
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
