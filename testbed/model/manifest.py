"""Pod manifest: the workloads of a pod, their runtimes and ports.

A manifest that contradicts itself is refused here, before anything is built.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from ipaddress import ip_address

from testbed.model.addresses import CONTROL_PORT, MAX_GUESTS, Address
from testbed.model.errors import Error
from testbed.model.terms import Runtime, Transport


@dataclass(frozen=True)
class Action:
    """What a probe or a hook does: connect to a port, ask it by HTTP, run a command, or sleep."""

    port: int = 0
    """It succeeds if this port accepts a TCP connection."""
    path: str = ""
    """It succeeds if an HTTP GET of this path gives a status from 200 to 399."""
    headers: tuple[tuple[str, str], ...] = ()
    """Headers of that request."""
    command: tuple[str, ...] = ()
    """It succeeds if this command, run inside the workload, ends with status 0."""
    sleep_s: float = 0


@dataclass(frozen=True)
class Probe:
    """Kubernetes probe of a workload: what is done, how often, and what the answers mean."""

    action: Action
    delay_s: float = 0
    """Time from the start of the workload to the first probe."""
    period_s: float = 10
    timeout_s: float = 1
    failures: int = 3
    """Consecutive failures after which the workload counts as failed."""
    successes: int = 1
    """Consecutive successes after which the workload counts as working."""


@dataclass(frozen=True)
class Volume:
    """Folder that the workloads of a pod share, empty when the pod is built (`emptyDir`)."""

    name: str
    mode: int = 0o777
    group: int | None = None
    """Group that owns it, and the files made in it."""


@dataclass(frozen=True)
class Mount:
    """Volume of a pod in the file system of a workload."""

    volume: str
    path: str
    read_only: bool = False


@dataclass(frozen=True)
class Security:
    """What the program of a workload may do (Kubernetes' `securityContext`)."""

    user: int | None = None
    """None: the image's."""
    group: int | None = None
    groups: tuple[int, ...] = ()
    non_root: bool = False
    """Whether root is refused as its user."""
    read_only_root: bool = False
    escalation: bool = True
    """Whether it may gain privileges by executing a program (setuid, file capabilities)."""
    add: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    """Capabilities beyond the usual ones, and those of them that it lacks. `ALL` is all of them."""


@dataclass(frozen=True)
class Program:
    """The program of a workload. The runtime decides what `image` means."""

    image: str
    command: tuple[str, ...] = ()
    """Replaces the image's program."""
    args: tuple[str, ...] = ()
    """Replaces the image's arguments."""
    env: tuple[tuple[str, str], ...] = ()
    working_dir: str = ""
    memory_bytes: int | None = None
    """Limit of memory. None: no limit."""
    cpus: float | None = None
    """Limit of CPU time, in CPUs. None: no limit."""
    mounts: tuple[Mount, ...] = ()
    pids_of: str = ""
    """Container whose PID namespace it shares. Empty: it has one of its own."""
    security: Security = Security()
    startup: Probe | None = None
    """Until it succeeds, there are no other probes, and the workload is not ready."""
    readiness: Probe | None = None
    liveness: Probe | None = None
    post_start: Action | None = None
    """Done after each start. The workload is ended if it fails."""
    pre_stop: Action | None = None
    """Done before the workload is ended."""


def late(field: str) -> str:
    """Text that stands for a field of the pod that is known when the pod is built (`resolved`)."""
    return f"\0{field}\0"


def without_late(text: str) -> str:
    """A text without such fields."""
    return re.sub("\0(.+?)\0", "", text)


def resolved(program: Program, fields: Mapping[str, str]) -> Program:
    """The program with the values of such fields. Raises `Error` for one without a value."""

    def text(given: str) -> str:
        return re.sub("\0(.+?)\0", value, given)

    def value(found: re.Match[str]) -> str:
        if not fields.get(found[1]):
            raise Error(f"the pod has no {found[1]}, which a variable asks for")
        return fields[found[1]]

    return replace(
        program,
        command=tuple(map(text, program.command)),
        args=tuple(map(text, program.args)),
        env=tuple((name, text(given)) for name, given in program.env),
    )


@dataclass(frozen=True)
class Tap:
    """The tap of a guest that somebody else boots, in the pod's namespace."""

    name: str
    mac: str = ""
    """MAC address of the guest; empty: what it sends tells."""
    addresses: tuple[Address, ...] = ()
    """Addresses of the guest, at most one of each family; of others, what it sends tells."""

    @classmethod
    def parse(cls, text: str) -> Tap:
        """Parse NAME[,MAC][,ADDRESS…]. Raises `Error`."""
        name, *words = text.split(",")
        macs = [
            word for word in words if re.fullmatch(r"(?:[0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}", word)
        ]
        try:
            addresses = tuple(ip_address(word) for word in words if word not in macs)
        except ValueError as e:
            raise Error(f"tap {text!r}: {e}", hint="NAME, or NAME,MAC,ADDRESS") from e
        versions = [address.version for address in addresses]
        if not name or len(macs) > 1 or len(set(versions)) < len(versions):
            raise Error(
                f"tap {text!r} is not a name with at most one MAC, IPv4 and IPv6 address",
                hint="NAME, or NAME,MAC,ADDRESS",
            )
        return cls(name, "".join(macs), addresses)


@dataclass(frozen=True)
class Workload:
    """One program of a pod, and the (transport, port)s that it owns at `localhost`."""

    name: str
    runtime: Runtime
    ports: tuple[tuple[Transport, int], ...] = ()
    cpus: tuple[int, ...] = ()
    """CPUs that it is pinned to. Empty: all CPUs."""
    control_port: int = CONTROL_PORT
    """TCP port of its traffic agent, which answers once the workload is up."""
    program: Program | None = None
    """What it runs. None: the traffic agent."""
    tap: Tap | None = None
    """Of a guest that somebody else boots (`Runtime.FOREIGN`)."""


@dataclass(frozen=True)
class Manifest:
    """The workloads of one pod. Guests are numbered from 1, in the order of the workloads.

    Raises `Error` if two workloads have one name or claim one port, or if a port is out of range.
    """

    workloads: tuple[Workload, ...]

    def __post_init__(self) -> None:
        names: set[str] = set()
        owners: dict[tuple[Transport, int], str] = {}
        for w in self.workloads:
            if w.name in names:
                raise Error(f"two workloads are named {w.name!r}", hint="rename one")
            names.add(w.name)
            for transport, port in w.ports:
                if not 0 < port < 65536 or port == CONTROL_PORT:
                    raise Error(
                        f"workload {w.name!r} cannot have {transport} port {port}",
                        hint=f"any but {CONTROL_PORT} from 1 to 65535",
                    )
                other = owners.setdefault((transport, port), w.name)
                if other != w.name:
                    raise Error(
                        f"{other!r} and {w.name!r} both claim {transport} port {port}",
                        hint="give one of them another port",
                    )
        taps = [tap.name for tap in self.taps.values()]
        if twice := {name for name in taps if taps.count(name) > 1}:
            raise Error(f"two guests are on the tap {twice.pop()!r}", hint="name one for each")
        if len(self.guests) > MAX_GUESTS:
            raise Error(f"{len(self.guests)} guests in one pod", hint=f"at most {MAX_GUESTS}")

    @property
    def guests(self) -> dict[int, Workload]:
        """Guests by their number."""
        guests = (w for w in self.workloads if w.runtime.is_guest)
        return dict(enumerate(guests, start=1))

    @property
    def natives(self) -> tuple[Workload, ...]:
        """Workloads that run in the pod's own namespace."""
        return tuple(w for w in self.workloads if not w.runtime.is_guest)

    @property
    def taps(self) -> dict[int, Tap]:
        """Taps of guests that somebody else boots, by the guests' numbers."""
        return {n: w.tap for n, w in self.guests.items() if w.tap}

    @property
    def owners(self) -> dict[tuple[Transport, int], int]:
        """(transport, port) → number of the guest that owns it."""
        return {port: n for n, w in self.guests.items() for port in w.ports}


class Restart(StrEnum):
    """Kubernetes `restartPolicy`: which ended workloads are started again."""

    ALWAYS = "Always"
    ON_FAILURE = "OnFailure"
    NEVER = "Never"


@dataclass(frozen=True)
class HostPort:
    """Kubernetes `hostPort`: a port of the node that is forwarded to a port of the pod."""

    transport: Transport
    host_port: int
    port: int


@dataclass(frozen=True)
class Spec:
    """A pod as its Kubernetes manifest describes it: workloads, init workloads, names, ports."""

    name: str
    manifest: Manifest
    init: tuple[Workload, ...] = ()
    """Init containers: they run one after the other, to their end, before the workloads start.

    Those that are also workloads of the manifest are sidecars: when one has started, the next
    container runs. They run as long as the pod does."""
    volumes: tuple[Volume, ...] = ()
    restart: Restart = Restart.ALWAYS
    hostname: str = ""
    host_aliases: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """(address, names) of additional lines in hosts files."""
    resolv_conf: str = ""
    host_ports: tuple[HostPort, ...] = ()
    warnings: tuple[str, ...] = ()
    """What the manifest asks for and the testbed does not do, as text for the user."""

    @property
    def workloads(self) -> tuple[Workload, ...]:
        """All workloads, each once: init containers, then those of the manifest."""
        return tuple(dict.fromkeys((*self.init, *self.manifest.workloads)))

    @property
    def sidecars(self) -> tuple[Workload, ...]:
        """Init containers that run as long as the pod does."""
        return tuple(w for w in self.init if w in self.manifest.workloads)

    def on_taps(self, taps: Sequence[Tap]) -> Spec:
        """The same pod with its guests, in their order, on these taps, where somebody boots them.

        Raises `Error` unless each guest gets one.
        """
        guests = [w.name for w in self.manifest.guests.values()]
        if len(guests) != len(taps):
            raise Error(
                f"pod {self.name!r} has {len(guests)} guests, for {len(taps)} taps",
                hint="--tap for each guest",
            )
        tap_of = dict(zip(guests, taps, strict=True))
        workloads = (
            replace(w, runtime=Runtime.FOREIGN, tap=tap_of[w.name]) if w.name in tap_of else w
            for w in self.manifest.workloads
        )
        return replace(self, manifest=Manifest(tuple(workloads)))
