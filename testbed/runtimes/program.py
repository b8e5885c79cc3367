"""A plain program in a network namespace: the common part of `process` and `standin`."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

from testbed import agent
from testbed.host.process import seeing, spawn
from testbed.images import compose, rootfs
from testbed.model.errors import Error
from testbed.model.manifest import Workload
from testbed.model.terms import Family, Runtime
from testbed.runtimes.interface import (
    Description,
    Placement,
    Prepared,
    refuse_isolation,
    refuse_limits,
)


def join(cgroup: Path, netns: str) -> list[str]:
    """Prefix of a command line that runs a command in a cgroup and a network namespace."""
    script = 'echo $$ > "$0" && exec "$@"'
    return [
        "sh",
        "-c",
        script,
        str(cgroup / "cgroup.procs"),
        "nsenter",
        f"--net=/run/netns/{netns}",
    ]


class PlainProgram(Prepared):
    """Prepared runtime that starts a program of this host in a network namespace.

    Images are `host:PROGRAM`, and run without a root file system of their own.
    """

    families = frozenset(Family)
    uses_tap = multiqueue = False
    kernel_has_sockets = True
    ready_limit_s = 5.0

    def __init__(self, runtime: Runtime, hosts: Path) -> None:
        self._agent, self._hosts = agent.build(), hosts
        digest = hashlib.sha256(self._agent.read_bytes()).hexdigest()
        self.description = Description(runtime, digests={"agent": digest})

    def dialed(self, family: Family) -> str:
        return "localhost"

    def compose(self, workload: Workload) -> None:
        refuse_limits(workload)
        refuse_isolation(workload)
        self._command(workload)

    def runs(self, place: Placement) -> bool:
        return True

    def enter(self, place: Placement, *, terminal: bool = False) -> list[str]:
        binds = {**place.etc, **self._files(place.workload)}
        return [*join(place.cgroup, place.netns), *seeing(binds)]

    def start(self, place: Placement) -> subprocess.Popen[bytes]:
        if program := place.workload.program:
            return spawn(
                self._command(place.workload),
                cgroup=place.cgroup,
                netns=place.netns,
                cpus=place.workload.cpus,
                binds={**place.etc, **self._files(place.workload)},
                output=place.console,
                env={"PATH": rootfs.PATH, **dict(program.env)},
                working_dir=program.working_dir or None,
            )
        hosts = self._hosts if place.loopback else compose.hosts_file(patched=False)
        return spawn(
            [self._agent, "--control-port", str(place.workload.control_port)],
            cgroup=place.cgroup,
            netns=place.netns,
            cpus=place.workload.cpus,
            binds={hosts: "/etc/hosts"},
            output=place.console,
        )

    def _files(self, workload: Workload) -> dict[Path, str]:
        """Extra files that the program needs → paths at which it sees them."""
        return {}

    def _command(self, workload: Workload) -> list[str]:
        program = workload.program
        assert program is not None
        if not rootfs.is_of_host(program.image):
            raise Error(
                f"{workload.name!r} has the image {program.image!r}, but is not a container",
                hint=f"the runtime {workload.runtime} takes host:PROGRAM",
            )
        image = [str(path) for path in rootfs.programs(program.image)][:1]
        command = [*(program.command or image), *program.args]
        if not command or shutil.which(command[0]) is None:
            raise Error(
                f"{workload.name!r}: this host has no program {' '.join(command[:1])!r}",
                hint="give an image host:PROGRAM, or a command",
            )
        return command
