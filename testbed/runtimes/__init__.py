"""What runs a workload: one file each, all with the interface below, never importing each other.

A runtime is prepared once (images composed, kernels found), then starts any number of workloads. To
add one: a module here with `prepare`, and its name in `model.Runtime`.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from testbed import agent
from testbed.manifest import Workload
from testbed.model import Error, Family, Runtime
from testbed.process import spawn


class Absent(Error):
    """A runtime is not there, and cannot be had."""


@dataclass(frozen=True)
class Options:
    """What a user may choose about guests."""

    osv_kernel: Path | None = None
    hosts_patch: bool = True
    """False leaves the stock hosts file in guests: there `localhost` is the guest itself."""
    say: Callable[[str], None] = print
    """Is told, in a line, how far something long is."""


@dataclass(frozen=True)
class Place:
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

    @property
    def functional_only(self) -> bool:
        """The guest is emulated: it proves function, not speed."""
        return self.accelerator == "tcg"


class Prepared(Protocol):
    """A runtime that is ready to start workloads."""

    families: frozenset[Family]
    """What its network stack speaks."""
    uses_tap: bool
    ready_limit_s: float
    """A workload that does not answer by then has failed."""
    description: Description

    def dialed(self, family: Family) -> str:
        """The name that a client in there dials for `localhost` in one family."""

    def start(self, place: Place) -> subprocess.Popen[bytes]:
        """Start a workload's traffic agent; readiness is for the caller to observe."""


class Program:
    """The traffic agent as a plain program in a namespace: natives and stand-ins."""

    families = frozenset(Family)
    uses_tap = False
    ready_limit_s = 5.0

    def __init__(self, runtime: Runtime, hosts: Path) -> None:
        self._agent, self._hosts = agent.build(), hosts
        digest = hashlib.sha256(self._agent.read_bytes()).hexdigest()
        self.description = Description(runtime, digests={"agent": digest})

    def dialed(self, family: Family) -> str:
        return "localhost"

    def start(self, place: Place) -> subprocess.Popen[bytes]:
        return spawn(
            [self._agent, "--control-port", str(place.workload.control_port)],
            cgroup=place.cgroup, netns=place.netns, cpus=place.workload.cpus,
            binds={self._hosts: "/etc/hosts"}, output=place.console,
        )  # fmt: skip


def prepare(runtime: Runtime, options: Options) -> Prepared:
    """Make a runtime ready. Raises `Error` with what to type if something is missing."""
    module = import_module(f"{__name__}.{runtime}")
    return cast(Callable[[Options], Prepared], module.prepare)(options)


def choose(name: str, options: Options) -> tuple[Prepared, str]:
    """The runtime of that name, or for `best` the first of OSv, Linux and stand-in that is there.

    Second value: why it is not a better one, in a line; empty if it is the best or was asked for.
    Raises `Error` if what was asked for cannot be had, a kernel named by the user too.
    """
    if name != "best":
        return prepare(Runtime(name), options), ""
    why: list[str] = []
    for runtime in (Runtime.OSV, Runtime.LINUX):
        try:
            return prepare(runtime, options), "; ".join(why)
        except Absent as e:
            why.append(f"no {runtime} guest: {e.message}")
    return prepare(Runtime.STANDIN, options), "; ".join(why)
