"""Roles: the workloads (`native1`, `guest1`, …) that pairs need, as manifests of pods.

A role's name decides its runtime, ports and CPU. `unsupported` says why a cell cannot be run.
Nothing is built here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from testbed.datapaths.interface import Datapath, Layout
from testbed.host import facts
from testbed.model.addresses import CONTROL_PORT
from testbed.model.cells import Cell, Pair
from testbed.model.manifest import Manifest, Workload
from testbed.model.metrics import Metric
from testbed.model.terms import Runtime, Transport
from testbed.runtimes.interface import Prepared


def unsupported(datapath: Datapath, cell: Cell, guest: Prepared) -> str | None:
    """Why a cell cannot be run with this datapath and guest on this machine, or None."""
    if cell.pair.shape not in datapath.pairs:
        return f"{datapath.name} does not carry {cell.pair.label('guest')}"
    if cell.family not in facts.families():
        return f"this machine's kernel has no {cell.family.replace('ip', 'IP')}"
    if cell.pair.guests and cell.family not in guest.families:
        kernel = guest.description.kernel or guest.description.runtime
        return f"the guest's kernel ({kernel}) has no {cell.family.replace('ip', 'IP')}"
    runtime = guest.description.runtime
    if datapath.layout is Layout.SOCKET and not guest.uses_tap:
        return f"{datapath.name} carries frames of a virtual machine, which no {runtime} is"
    if datapath.layout is Layout.NO_LOOPBACK and runtime in (Runtime.OSV, Runtime.GVISOR):
        return f"{runtime} has its loopback in its kernel, which would have to be changed"
    if cell.metric is Metric.CONNECTIONS and cell.pair.startswith("wasm"):
        return "WASI has no close by reset: what was measured would be how many ports there are"
    if cell.rate_per_s and cell.pair.startswith("wasm"):
        return "a component waits for whole milliseconds: requests would not leave when due"
    return datapath.unsupported(cell)


ROLES = {
    Pair.NATIVE_NATIVE: ("native1", "native2"),
    Pair.NATIVE_GUEST: ("native1", "guest1"),
    Pair.GUEST_NATIVE: ("guest1", "native1"),
    Pair.GUEST_GUEST: ("guest1", "guest2"),
    Pair.GUEST_SELF: ("guest1", "guest1"),
    Pair.WASM_GUEST: ("wasm1", "guest1"),
    Pair.GUEST_WASM: ("guest1", "wasm1"),
    Pair.WASM_CONTAINER: ("wasm1", "container1"),
    Pair.CONTAINER_GUEST: ("container1", "guest1"),
    Pair.GUEST_CONTAINER: ("guest1", "container1"),
}
"""Pair → names of its client and its server."""

NATIVES = {"native": Runtime.PROCESS, "wasm": Runtime.WASM, "container": Runtime.CONTAINER}
"""Kind of a native workload (in its name) → its runtime."""
PORTS = {"native": 8000, "wasm": 8004, "container": 8006, "guest": 8010}
"""Kind of a workload → base of its ports: workload number n of a kind serves at base + n."""


def ends(pair: Pair, guests: int = 1) -> list[tuple[str, str]]:
    """Names of client and server of each flow of a pair, in a pod with this number of guests."""
    client, server = ROLES[pair]
    names = [f"guest{n}" for n in range(1, guests + 1)]
    return [(client.replace("guest1", name), server.replace("guest1", name)) for name in names]


def port(name: str) -> int:
    """The port that a workload serves, for TCP and for UDP."""
    kind, number = _split(name)
    return PORTS[kind] + number


def natives(pairs: Iterable[Pair]) -> set[Runtime]:
    """Runtimes of the native workloads that the pairs need."""
    kinds = {_split(name)[0] for pair in pairs for name in ROLES[pair]}
    return {NATIVES[kind] for kind in kinds & NATIVES.keys()}


def heavy(pair: Pair) -> tuple[str, ...]:
    """Names of the workloads of a pair that are no plain processes: guests, WASM, containers.

    A plain process that waits takes no CPU time and hardly any memory, so a pod may have one that
    its cell does not need. It has no such workload of these kinds.
    """
    return tuple(sorted(name for name in {*ROLES[pair]} if _split(name)[0] != "native"))


def runtime(name: str, guest: Runtime) -> Runtime:
    """Runtime of a workload, by its name."""
    return NATIVES.get(_split(name)[0], guest)


def number(name: str) -> int:
    """Number of a guest by its name, 0 for a native."""
    kind, found = _split(name)
    return 0 if kind in NATIVES else found


def manifest(pairs: Iterable[Pair], guest: Runtime, guests: int = 1) -> Manifest:
    """Manifest of a pod for these pairs. Client and server of a pair are on different CPUs, if
    there are two.
    """
    names = {name for pair in pairs for both in ends(pair, guests) for name in both}
    return manifest_of(
        sorted(names, key=port),
        guest,
        ports=lambda name: [port(name)],
        cpus=lambda name: (cpu(name, alone=guests > 1),),
    )


def manifest_of(
    names: Sequence[str],
    guest: Runtime,
    ports: Callable[[str], Iterable[int]],
    cpus: Callable[[str], tuple[int, ...]] = lambda _: (),
) -> Manifest:
    """Manifest of named workloads. Each owns its `ports`, for TCP and UDP, and has its `cpus`."""
    return Manifest(
        tuple(
            Workload(
                name,
                runtime(name, guest),
                tuple((transport, port) for transport in Transport for port in ports(name)),
                cpus=cpus(name),
                control_port=CONTROL_PORT + i,
            )
            for i, name in enumerate(names)
        )
    )


def cpu(name: str, alone: bool) -> int:
    """CPU of a workload: natives count from the first CPU up, guests from the last CPU down.

    Containers come one CPU after natives. With `alone`, no guest is on the first CPU.
    """
    cpus, (kind, number) = facts.cpus(), _split(name)
    if kind == "guest" and alone and len(cpus) > 1:
        cpus = cpus[1:]
    first = {"guest": -number, "container": number}.get(kind, number - 1)
    return cpus[first % len(cpus)]


def _split(name: str) -> tuple[str, int]:
    """Kind and number of a workload, from its name."""
    kind = name.rstrip("0123456789")
    return kind, int(name[len(kind) :])
