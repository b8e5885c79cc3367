"""What runs a workload: one file each, all with the interface below, never importing each other.

A runtime is prepared once (images composed, kernels found), then starts any number of workloads. To
add one: a module here with `prepare`, and its name in `model.Runtime`.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from testbed import agent, paths
from testbed.host.process import spawn
from testbed.images import compose, rootfs
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

    def start(self, place: Place) -> subprocess.Popen[bytes]:
        """Start a workload's program or traffic agent; readiness is for the caller to observe."""

    def enter(self, place: Place) -> list[str]:
        """A command line; what is added to it runs inside the running workload.

        Raises `Error` if nothing can.
        """


def refuse_limits(workload: Workload) -> None:
    """Raises `Error` if the program has a limit of CPUs or memory that nobody would enforce."""
    program = workload.program
    if program and (program.cpus or program.memory_bytes):
        raise Error(f"{workload.name!r} has a limit that {workload.runtime} cannot keep",
                    hint="take out resources.limits, or run it as a container")  # fmt: skip


def vcpus(workload: Workload) -> int:
    """CPUs of a guest: its limit, or as many as it is pinned to.

    Raises `Error` for a limit that is no whole number: a virtual machine has whole CPUs only.
    """
    limit = workload.program.cpus if workload.program else None
    if limit and limit != int(limit):
        raise Error(f"guest {workload.name!r} cannot have {limit:g} CPUs",
                    hint="give it a whole number of them in resources.limits.cpu")  # fmt: skip
    return int(limit or 0) or len(workload.cpus) or 1


def queues(runtime: Prepared, workload: Workload) -> int:
    """Pairs of queues of a guest's network device: one per vCPU, where its driver has several."""
    return vcpus(workload) if runtime.multiqueue else 1


def definition(workload: Workload) -> compose.Definition:
    """What a guest's program is composed of: a definition of osv/ by name or path, or host:PROGRAM.

    Raises `Error` if there is none, or the program asks for what guests are not told.
    """
    program = workload.program
    assert program is not None
    vcpus(workload)
    if program.env or program.working_dir:
        raise Error(f"guest {workload.name!r} cannot be given env or workingDir",
                    hint="say it in args")  # fmt: skip
    if program.image.startswith(rootfs.HOST):
        found = rootfs.programs(program.image)
        if len(found) != 1:
            raise Error(f"guest {workload.name!r} has {len(found)} programs", hint="give it one")
        return compose.Definition(program=found[0])
    named = program.image.endswith(".toml")
    return compose.load(Path(program.image) if named else paths.OSV / f"{program.image}.toml")


def as_told(workload: Workload, image: compose.Image) -> compose.Image:
    """The image of a guest's program, with the command line that the program says instead."""
    return replace(image, command=command_line(workload, image.command))


def command_line(workload: Workload, own: Sequence[str]) -> tuple[str, ...]:
    """What a workload runs whose image's own command line is this."""
    program = workload.program
    assert program is not None
    return (*(program.command or own[:1]),
            *(program.args or (() if program.command else own[1:])))  # fmt: skip


def memory_mib(workload: Workload) -> int:
    """Memory of a guest: its limit, or enough for thousands of connections."""
    limit = workload.program.memory_bytes if workload.program else None
    return (limit or 256 << 20) >> 20


def join(cgroup: Path, netns: str) -> list[str]:
    """A command line; what is added to it runs in a cgroup and a network namespace."""
    script = 'echo $$ > "$0" && exec "$@"'
    return [
        "sh",
        "-c",
        script,
        str(cgroup / "cgroup.procs"),
        "nsenter",
        f"--net=/run/netns/{netns}",
    ]


class Program:
    """A plain program in a namespace: natives and stand-ins.

    Its image is `host:PROGRAM`, as it stands on this host.
    """

    families = frozenset(Family)
    uses_tap = multiqueue = False
    ready_limit_s = 5.0

    def __init__(self, runtime: Runtime, hosts: Path) -> None:
        self._agent, self._hosts = agent.build(), hosts
        digest = hashlib.sha256(self._agent.read_bytes()).hexdigest()
        self.description = Description(runtime, digests={"agent": digest})

    def dialed(self, family: Family) -> str:
        return "localhost"

    def compose(self, workload: Workload) -> None:
        refuse_limits(workload)
        self._command(workload)

    def enter(self, place: Place) -> list[str]:
        return join(place.cgroup, place.netns)

    def start(self, place: Place) -> subprocess.Popen[bytes]:
        if program := place.workload.program:
            return spawn(
                self._command(place.workload),
                cgroup=place.cgroup, netns=place.netns, cpus=place.workload.cpus,
                binds={**place.etc, **self._files(place.workload)}, output=place.console,
                env={"PATH": rootfs.PATH, **dict(program.env)},
                working_dir=program.working_dir or None,
            )  # fmt: skip
        hosts = self._hosts if place.loopback else compose.hosts_file(patched=False)
        return spawn(
            [self._agent, "--control-port", str(place.workload.control_port)],
            cgroup=place.cgroup, netns=place.netns, cpus=place.workload.cpus,
            binds={hosts: "/etc/hosts"}, output=place.console,
        )  # fmt: skip

    def _files(self, workload: Workload) -> dict[Path, str]:
        """Files that the program needs besides, and the paths that they stand at."""
        return {}

    def _command(self, workload: Workload) -> list[str]:
        program = workload.program
        assert program is not None
        if not rootfs.is_of_host(program.image):
            raise Error(f"{workload.name!r} has the image {program.image!r}, but is no container",
                        hint=f"the runtime {workload.runtime} takes host:PROGRAM")  # fmt: skip
        own = [str(path) for path in rootfs.programs(program.image)][:1]
        command = [*(program.command or own), *program.args]
        if not command or shutil.which(command[0]) is None:
            raise Error(f"{workload.name!r}: this host has no program {' '.join(command[:1])!r}",
                        hint="give an image host:PROGRAM, or a command")  # fmt: skip
        return command


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


def best(options: Options) -> Runtime:
    """The best guest that is there, as `choose` has it; `options.say` is told which, in a line."""
    guest, why = choose("best", options)
    found = guest.description
    words = " ".join(filter(None, (found.runtime, found.kernel, found.accelerator)))
    options.say(f"the best guest here: {words}{f'; {why}' if why else ''}")
    return found.runtime
