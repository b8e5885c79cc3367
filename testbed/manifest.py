"""What a pod is to hold: its workloads, their runtimes and ports.

What cannot be is refused here, before anything is built.
"""

from __future__ import annotations

from dataclasses import dataclass

from testbed.model import CONTROL_PORT, MAX_GUESTS, Error, Runtime, Transport


@dataclass(frozen=True)
class Workload:
    """One program of a pod, and the (transport, port)s that it owns at `localhost`."""

    name: str
    runtime: Runtime
    ports: tuple[tuple[Transport, int], ...] = ()
    cpus: tuple[int, ...] = ()
    """CPUs that it is pinned to; empty: all."""
    control_port: int = CONTROL_PORT


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
                    raise Error(f"workload {w.name!r} cannot have {transport} port {port}",
                                hint=f"any but {CONTROL_PORT} from 1 to 65535")  # fmt: skip
                other = owners.setdefault((transport, port), w.name)
                if other != w.name:
                    raise Error(f"{other!r} and {w.name!r} both claim {transport} port {port}",
                                hint="give one of them another port")  # fmt: skip
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
