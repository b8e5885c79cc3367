"""What a runtime is told, and what it has to be: plain data and a protocol."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from testbed.images import compose
from testbed.model.errors import Error
from testbed.model.manifest import Workload
from testbed.model.terms import Family, Runtime

ETC = (Path("/etc/hosts"), Path("/etc/resolv.conf"))
"""What a pod with a `Spec` gives to all its workloads, to natives and guests each their own."""


class Absent(Error):
    """A runtime is not there, and cannot be had."""


@dataclass(frozen=True)
class Options:
    """What a user may choose about guests."""

    osv_kernel: Path | None = None
    hosts_patch: bool = True
    """False leaves the stock hosts file in guests: there `localhost` is the guest itself."""
    etc: Mapping[str, bytes] = field(default_factory=dict)
    """Files of guests by path, in the place of those of their images; of a pod with a `Spec`."""
    say: Callable[[str], None] = print
    """Is told, in a line, how far something long is."""


@dataclass(frozen=True)
class Placement:
    """Where one workload starts."""

    workload: Workload
    n: int
    """Number of the guest; 0 for a native workload."""
    netns: str
    """Namespace to run in: the pod's, a stand-in's own, or the one that holds a guest's tap."""
    tap: str
    """The guest's tap; empty where there is none."""
    cgroup: Path
    console: Path
    """File that gets what the workload (a guest: its serial console) prints."""
    scratch: Path
    """Directory for sockets and the like, one per pod."""
    socket: Path | None = None
    """Unix socket in the place of the guest's tap."""
    loopback: bool = True
    """Whether the guest has one; without, its `localhost` is 127.0.0.1 all the same."""
    queues: int = 1
    """Pairs of queues of the guest's tap and network device."""

    @property
    def etc(self) -> dict[Path, str]:
        """Files of the pod → paths that they stand at in its workloads, of whose `Spec` they are.

        The pod's loopback is the alias to guests. An agent needs no more.
        """
        if not self.workload.program:
            return {compose.hosts_file(patched=self.n > 0): "/etc/hosts"}
        kind = "guest" if self.n else "native"
        return {self.scratch / kind / path.name: str(path) for path in ETC}


@dataclass(frozen=True)
class Description:
    """What a result has to say about a runtime."""

    runtime: Runtime
    kernel: str = ""
    """Kernel of a guest: flavor, commit or version, `unlisted` where it is not a published one."""
    accelerator: str = ""
    digests: dict[str, str] = field(default_factory=dict)
    """SHA-256 of images, kernels and programs by name."""
    offloads: str = ""
    vhost: bool = False
    """The host's kernel itself moves a guest's packets (vhost-net), not QEMU."""

    @property
    def functional_only(self) -> bool:
        """The guest is emulated: it proves function, not speed."""
        return self.accelerator == "tcg"


class Prepared(Protocol):
    """A runtime that is ready to start workloads."""

    families: frozenset[Family]
    """What its network stack speaks."""
    uses_tap: bool
    multiqueue: bool
    """The driver of its network device serves several pairs of queues."""
    ready_limit_s: float
    """A workload that does not answer by then has failed."""
    description: Description

    def dialed(self, family: Family) -> str:
        """The name that a client in there dials for `localhost` in one family."""

    def compose(self, workload: Workload) -> None:
        """Make the image of the workload's program, and keep it in the cache.

        Raises `Error` if there is no such image, or the program asks for what cannot be had.
        """

    def start(self, place: Placement) -> subprocess.Popen[bytes]:
        """Start a workload's program or traffic agent; readiness is for the caller to observe."""

    def enter(self, place: Placement) -> list[str]:
        """A command line; what is added to it runs inside the running workload.

        Raises `Error` if nothing can.
        """


def refuse_limits(workload: Workload) -> None:
    """Raises `Error` if the program has a limit of CPUs or memory that nobody would enforce."""
    program = workload.program
    if program and (program.cpus or program.memory_bytes):
        raise Error(
            f"{workload.name!r} has a limit that {workload.runtime} cannot keep",
            hint="take out resources.limits, or run it as a container",
        )


def command_line(workload: Workload, own: Sequence[str]) -> tuple[str, ...]:
    """What a workload runs whose image's own command line is this."""
    program = workload.program
    assert program is not None
    return (*(program.command or own[:1]), *(program.args or (() if program.command else own[1:])))
