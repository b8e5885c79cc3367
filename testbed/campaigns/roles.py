"""TODO."""

from __future__ import annotations

from collections.abc import Iterable

from testbed.datapaths.interface import Datapath, Layout
from testbed.host import facts
from testbed.model.addresses import CONTROL_PORT
from testbed.model.cells import Cell, Pair
from testbed.model.manifest import Manifest, Workload
from testbed.model.metrics import Metric
from testbed.model.terms import Runtime, Transport
from testbed.runtimes.interface import Prepared


def unsupported(datapath: Datapath, cell: Cell, guest: Prepared) -> str | None:
    """Why a cell cannot be had with this guest, or None."""
    if cell.pair.shape not in datapath.pairs:
        return f"{datapath.name} does not carry {cell.pair.label('guest')}"
    if cell.family not in facts.families():
        return f"this machine's kernel has no {cell.family.replace('ip', 'IP')}"
    if cell.pair.guests and cell.family not in guest.families:
        kernel = guest.description.kernel or guest.description.runtime
        return f"the guest's kernel ({kernel}) has no {cell.family.replace('ip', 'IP')}"
    if datapath.layout is Layout.SOCKET and not guest.uses_tap:
        return f"{datapath.name} carries frames of a virtual machine, which a stand-in is not"
    if datapath.layout is Layout.ROUTED and guest.description.runtime is Runtime.OSV:
        return "OSv has its loopback in the kernel, which would have to be changed"
    if cell.metric is Metric.CONNECTIONS and cell.pair.startswith("wasm"):
        return "WASI has no close by reset: what was measured would be how many ports there are"
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
}
"""Client and server of each pair, by name."""

NATIVES = {"native": Runtime.PROCESS, "wasm": Runtime.WASM, "container": Runtime.CONTAINER}
"""What runs a native workload, by the kind in its name."""
PORTS = {"native": 8000, "wasm": 8004, "container": 8006, "guest": 8010}
"""Workload number n of its kind serves at the n-th port above."""


def ends(pair: Pair, guests: int = 1) -> list[tuple[str, str]]:
    """Client and server, by name, of all that are at work at once in a pod with so many guests."""
    client, server = ROLES[pair]
    names = [f"guest{n}" for n in range(1, guests + 1)]
    return [(client.replace("guest1", name), server.replace("guest1", name)) for name in names]


def port(name: str) -> int:
    """That a workload serves, TCP and UDP."""
    kind, number = _split(name)
    return PORTS[kind] + number


def natives(pairs: Iterable[Pair]) -> set[Runtime]:
    """What runs the native workloads that the pairs need."""
    kinds = {_split(name)[0] for pair in pairs for name in ROLES[pair]}
    return {NATIVES[kind] for kind in kinds & NATIVES.keys()}


def runtime(name: str, guest: Runtime) -> Runtime:
    """What runs the workload of that name."""
    return NATIVES.get(_split(name)[0], guest)


def manifest(pairs: Iterable[Pair], guest: Runtime, guests: int = 1) -> Manifest:
    """A pod with what the pairs need: the ends of each on different CPUs, where there are two."""
    names = {name for pair in pairs for both in ends(pair, guests) for name in both}
    return Manifest(
        tuple(
            Workload(
                name,
                runtime(name, guest),
                tuple((transport, port(name)) for transport in Transport),
                cpus=(_cpu(name, alone=guests > 1),),
                control_port=CONTROL_PORT + i,
            )
            for i, name in enumerate(sorted(names, key=port))
        )
    )


def _cpu(name: str, alone: bool) -> int:
    """Natives from the first CPU on, containers after them; guests from the last back, which leave
    the first `alone`.
    """
    cpus, (kind, number) = facts.cpus(), _split(name)
    if kind == "guest" and alone and len(cpus) > 1:
        cpus = cpus[1:]
    first = {"guest": -number, "container": number}.get(kind, number - 1)
    return cpus[first % len(cpus)]


def _split(name: str) -> tuple[str, int]:
    """Kind and number of a workload."""
    kind = name.rstrip("0123456789")
    return kind, int(name[len(kind) :])
