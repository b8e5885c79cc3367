"""Interface of runtimes: the protocol `Prepared`, and the plain data that it takes and gives."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from testbed.images import compose
from testbed.images.rootfs import Process
from testbed.model.errors import Error
from testbed.model.manifest import Security, Workload
from testbed.model.terms import Family, Runtime

ETC = (Path("/etc/hosts"), Path("/etc/resolv.conf"))
"""Files that a pod with a `Spec` gives to its workloads: one version to natives, one to guests."""

VOLUMES = "volumes"
"""Folder of the pod's scratch folder with a folder for each volume of its `Spec`."""


class Absent(Error):
    """A runtime is not available on this machine."""


@dataclass(frozen=True)
class Options:
    """Options of guests that a user may choose."""

    osv_kernel: Path | None = None
    hosts_patch: bool = True
    """Whether guests get the patched hosts file. With the stock one, `localhost` is the guest."""
    shim: bool = False
    """Whether the traffic agent in an OSv guest gets the shim, as programs do by default."""
    etc: Mapping[str, bytes] = field(default_factory=dict)
    """Files of guests by path, which replace those of images. Set for a pod with a `Spec`."""
    say: Callable[[str], None] = print
    """Called with a line of text about the progress of long steps."""


@dataclass(frozen=True)
class Placement:
    """Where and how one workload starts."""

    workload: Workload
    n: int
    """Number of the guest; 0 for a native workload."""
    netns: str
    """Namespace to run in: the pod's, a guest's own, or the one that holds a guest's tap."""
    tap: str
    """The guest's tap; empty if it has none."""
    cgroup: Path
    console: Path
    """File for the output of the workload (of a virtual machine: its serial console)."""
    scratch: Path
    """The pod's directory for sockets and other files."""
    socket: Path | None = None
    """Unix socket that takes the place of the guest's tap."""
    loopback: bool = True
    """Whether the guest has a loopback interface. Without, its `localhost` is 127.0.0.1 still."""
    queues: int = 1
    """Pairs of queues of the guest's tap and network device."""

    def console_begin(self, size_bytes: int, since: int = 0) -> str:
        """The beginning of what was written to the console after its first `since` bytes."""
        try:
            with self.console.open("rb") as console:
                console.seek(since)
                return console.read(size_bytes).decode(errors="replace")
        except FileNotFoundError:
            return ""

    def console_end(self, size_bytes: int, since: int = 0) -> str:
        """The end of what was written to the console after its first `since` bytes."""
        try:
            with self.console.open("rb") as console:
                console.seek(max(since, console.seek(0, os.SEEK_END) - size_bytes))
                return console.read().decode(errors="replace")
        except FileNotFoundError:
            return ""

    @property
    def etc(self) -> dict[Path, str]:
        """Files of the pod → paths at which the workload sees them.

        A workload with a program gets those of the pod's `Spec`. An agent, and a program in a pod
        without one, get a hosts file only, in which `localhost` is the alias for guests, the
        loopback address for natives.
        """
        folder = self.scratch / ("guest" if self.n else "native")
        if self.workload.program and folder.exists():
            return {folder / path.name: str(path) for path in ETC}
        return {compose.hosts_file(patched=self.n > 0 and self.loopback): "/etc/hosts"}


@dataclass(frozen=True)
class Description:
    """Description of a runtime for results."""

    runtime: Runtime
    kernel: str = ""
    """Kernel of a guest: flavor, commit or version, "unlisted" if it is not a published one."""
    accelerator: str = ""
    digests: dict[str, str] = field(default_factory=dict)
    """SHA-256 of images, kernels and programs by name."""
    offloads: str = ""
    vhost: bool = False
    """Whether the host's kernel moves a guest's packets (vhost-net), not QEMU."""
    capabilities: Mapping[str, Any] = field(default_factory=dict)
    """What was found out about a guest's kernel (`vm.capabilities`), as plain data."""

    @property
    def functional_only(self) -> bool:
        """Whether the guest is emulated: then it proves function, not speed."""
        return self.accelerator == "tcg"


class Prepared(Protocol):
    """A prepared runtime, which starts workloads."""

    families: frozenset[Family]
    """IP versions of its network stack."""
    uses_tap: bool
    """Whether it takes a tap. A guest that does not has a namespace of its own."""
    kernel_has_sockets: bool
    """Whether its sockets are of this machine's kernel, which then knows what is served."""
    multiqueue: bool
    """Whether the driver of its network device serves several pairs of queues."""
    has_shell: bool
    """Whether a program of a workload can be a shell, which starts others of its image."""
    ready_limit_s: float
    """Time in which a workload has to answer; else it has failed."""
    needs_ipv6_checksums: bool = False
    """Whether the host has to complete the checksums of IPv6 packets before its tap."""
    description: Description

    def dialed(self, family: Family) -> str:
        """The name that a client in a workload dials for `localhost` in one family."""

    def compose(self, workload: Workload) -> None:
        """Make the image of the workload's program, and store it in the cache.

        Raises `Error` if there is no such image, or the runtime lacks what the program asks for.
        """

    def start(self, place: Placement) -> subprocess.Popen[bytes]:
        """Start a workload's program or traffic agent. The caller waits until it is ready."""

    def runs(self, place: Placement) -> bool:
        """Whether a workload that was started runs by now; of a guest, whether its machine does."""

    def exit_status(self, place: Placement, code: int) -> int:
        """Exit status of a workload's program, from that of the process that was started."""
        return code

    def is_of_program(self, line: str) -> bool:
        """Whether a workload's program wrote a line of its console, and not a kernel."""
        return True

    def enter(self, place: Placement, *, terminal: bool = False) -> list[str]:
        """Prefix of a command line that runs a command inside the running workload.

        `terminal`: standard input is a terminal, and the command is to have one of its own. Raises
        `Error` if the runtime cannot do so.
        """


def refuse_isolation(workload: Workload, *, has_users: bool = False) -> None:
    """Raises `Error` if the program has volumes or a security context: it is no container.

    `has_users`: whether it can at least run as another user.
    """
    program = workload.program
    if program is None:
        return
    security = program.security
    if has_users:
        security = replace(security, user=None, group=None, groups=(), non_root=False)
    if program.mounts or security != Security():
        context = "more than users and groups in its securityContext"
        what = "volumeMounts" if program.mounts else context if has_users else "a securityContext"
        raise Error(
            f"{workload.name!r} has {what}, which {workload.runtime} cannot give it",
            hint="take it out (a securityContext also of the pod), or run it as a container",
        )


def refuse_limits(workload: Workload) -> None:
    """Raises `Error` if the program has a limit of CPUs or memory: this runtime enforces none."""
    program = workload.program
    if program and (program.cpus or program.memory_bytes):
        raise Error(
            f"{workload.name!r} has a limit that {workload.runtime} cannot enforce",
            hint="take out resources.limits, or run it as a container",
        )


def process_of(workload: Workload, image: Process, defaults: Mapping[str, str] = {}) -> Process:
    """The process of a workload: that of its image, with what the manifest says instead.

    `command` and `args` replace those of the image as in Kubernetes. `defaults` are variables which
    neither has to name. The traffic agent's process is that of its image, without these. Raises
    `Error` if there is no command, or it is root where another user is asked for.
    """
    program = workload.program
    if program is None:
        return image
    security = program.security
    arguments = program.args or (() if program.command else image.arguments)
    of_image = dict(variable.split("=", 1) for variable in image.env)
    env = {**defaults, **of_image, **dict(program.env)}
    made = Process(
        program.command or image.entrypoint,
        arguments,
        tuple(f"{name}={value}" for name, value in env.items()),
        program.working_dir or image.working_dir,
        image.uid if security.user is None else security.user,
        image.gid if security.user is None else 0,
        image.groups if security.user is None else (),
    )
    if security.group is not None:
        made = replace(made, gid=security.group)
    if not made.command:
        raise Error(f"the image of {workload.name!r} has no command", hint="give the workload one")
    if security.non_root and made.uid == 0:
        raise Error(
            f"{workload.name!r} is to run as another user than root, and its image says root",
            hint="give it a securityContext.runAsUser",
        )
    return replace(made, groups=(*made.groups, *security.groups))
