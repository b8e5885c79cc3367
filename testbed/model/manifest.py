"""What a pod is to hold: its workloads, their runtimes and ports.

What cannot be is refused here, before anything is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from testbed.model.addresses import CONTROL_PORT, MAX_GUESTS
from testbed.model.errors import Error
from testbed.model.terms import Runtime, Transport


@dataclass(frozen=True)
class Probe:
    """A question to a workload: does it work? One of a port, a port and a path, a command."""

    port: int = 0
    """Answers if it accepts a TCP connection."""
    path: str = ""
    """Answers if an HTTP GET gives a status from 200 to 399."""
    command: tuple[str, ...] = ()
    """Answers if it ends with status 0, run inside the workload."""
    delay_s: float = 0
    """After the start, before the first question."""
    period_s: float = 10
    timeout_s: float = 1
    failures: int = 3
    """In a row, for `no`."""
    successes: int = 1
    """In a row, for `yes`."""


@dataclass(frozen=True)
class Program:
    """What a workload runs. What an image is, is its runtime's business."""

    image: str
    command: tuple[str, ...] = ()
    """Instead of the image's program."""
    args: tuple[str, ...] = ()
    """Instead of the image's arguments."""
    env: tuple[tuple[str, str], ...] = ()
    working_dir: str = ""
    memory_bytes: int | None = None
    """Limit, as the next one."""
    cpus: float | None = None
    readiness: Probe | None = None
    liveness: Probe | None = None


@dataclass(frozen=True)
class Workload:
    """One program of a pod, and the (transport, port)s that it owns at `localhost`."""

    name: str
    runtime: Runtime
    ports: tuple[tuple[Transport, int], ...] = ()
    cpus: tuple[int, ...] = ()
    """CPUs that it is pinned to; empty: all."""
    control_port: int = CONTROL_PORT
    """TCP port at which it answers once it is up."""
    program: Program | None = None
    """None: the traffic agent."""


@dataclass(frozen=True)
class Manifest:
    """The workloads of one pod. Guests are numbered from 1 in their order.

    Raises `Error` if two workloads share a name or claim one port, or a port is none.
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
        if len(self.guests) > MAX_GUESTS:
            raise Error(f"{len(self.guests)} guests in one pod", hint=f"at most {MAX_GUESTS}")

    @property
    def guests(self) -> dict[int, Workload]:
        """Guests by number."""
        guests = (w for w in self.workloads if w.runtime.is_guest)
        return dict(enumerate(guests, start=1))

    @property
    def natives(self) -> tuple[Workload, ...]:
        """Workloads in the pod's own namespace."""
        return tuple(w for w in self.workloads if not w.runtime.is_guest)

    @property
    def owners(self) -> dict[tuple[Transport, int], int]:
        """(transport, port) → number of the guest that owns it."""
        return {port: n for n, w in self.guests.items() for port in w.ports}


class Restart(StrEnum):
    """Which ended workloads are started again."""

    ALWAYS = "Always"
    ON_FAILURE = "OnFailure"
    NEVER = "Never"


@dataclass(frozen=True)
class HostPort:
    """A port of the node that leads to one of the pod."""

    transport: Transport
    host_port: int
    port: int


@dataclass(frozen=True)
class Spec:
    """A pod as somebody wrote it: the workloads, and what it has beside them."""

    name: str
    manifest: Manifest
    init: tuple[Workload, ...] = ()
    """Run to their end one after the other, before the workloads start."""
    restart: Restart = Restart.ALWAYS
    hostname: str = ""
    host_aliases: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """(address, names) of further lines in hosts files."""
    resolv_conf: str = ""
    host_ports: tuple[HostPort, ...] = ()
    warnings: tuple[str, ...] = ()
    """What was asked for and is not done."""
