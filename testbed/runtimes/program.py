"""A plain program in a network namespace: the common part of `process` and `standin`."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

from testbed import agent
from testbed.host.process import seeing, spawn
from testbed.images import compose, rootfs
from testbed.images.compose import Definition
from testbed.images.rootfs import Process
from testbed.model.errors import Error
from testbed.model.manifest import Workload
from testbed.model.terms import Family, Runtime
from testbed.runtimes.interface import (
    Description,
    Placement,
    Prepared,
    process_of,
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

    Images are `host:PROGRAM`, or an image definition, whose files the program sees in their places,
    as far as this host has files there, too. Either runs without a root file system of its own. A
    program of a definition has a /tmp of its own, as in an image, unless it is in this host's.
    """

    families = frozenset(Family)
    uses_tap = multiqueue = False
    kernel_has_sockets = has_shell = True
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
        self._command(workload, _definition(workload))

    def runs(self, place: Placement) -> bool:
        return True

    def enter(self, place: Placement, *, terminal: bool = False) -> list[str]:
        binds = {**place.etc, **_files(_definition(place.workload))}
        return [*join(place.cgroup, place.netns), *seeing(binds)]

    def start(self, place: Placement) -> subprocess.Popen[bytes]:
        if program := place.workload.program:
            image = _definition(place.workload)
            return spawn(
                self._command(place.workload, image),
                cgroup=place.cgroup,
                netns=place.netns,
                cpus=place.workload.cpus,
                binds={**place.etc, **_files(image)},
                own_tmp=_has_own_tmp(image),
                output=place.console,
                env={"PATH": _path(image), **dict(program.env)},
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

    def _command(self, workload: Workload, image: Definition | None) -> list[str]:
        program = workload.program
        assert program is not None
        if image:
            absent = [at for at in _files(image).values() if not Path(at).exists()]
            if absent:
                raise Error(f"{workload.name!r}: this host has no {absent[0]} to show a file at")
            described = Process((str(image.program),), image.arguments)
            return list(process_of(workload, described).command)
        if not rootfs.is_of_host(program.image):
            raise Error(
                f"{workload.name!r} has the image {program.image!r}, but is not a container",
                hint=f"the runtime {workload.runtime} takes host:PROGRAM",
            )
        found = [str(path) for path in rootfs.programs(program.image)][:1]
        command = [*(program.command or found), *program.args]
        if not command or shutil.which(command[0]) is None:
            raise Error(
                f"{workload.name!r}: this host has no program {' '.join(command[:1])!r}",
                hint="give an image host:PROGRAM, or a command",
            )
        return command


def _definition(workload: Workload) -> Definition | None:
    return compose.find_definition(workload.program.image) if workload.program else None


def _has_own_tmp(image: Definition | None) -> bool:
    """Whether a program sees a /tmp of its own: not if it, or another, is in this host's."""
    return image is not None and not any(p.is_relative_to("/tmp") for p in image.programs)


def _files(image: Definition | None) -> dict[Path, str]:
    """Files of an image definition → paths at which its program sees them."""
    files = image.files.items() if image else ()
    return {file: inside for inside, file in files if str(file) != inside}


def _path(image: Definition | None) -> str:
    """PATH of a program, with the folders of those that its image definition names."""
    programs = image.programs if image else ()
    folders = dict.fromkeys(str(program.parent) for program in programs)
    return ":".join([*folders, rootfs.PATH])
