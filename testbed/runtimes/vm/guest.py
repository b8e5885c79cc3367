"""A workload as a virtual machine: its CPUs, memory, queues and image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from testbed import paths
from testbed.images import compose, rootfs
from testbed.model.errors import Error
from testbed.model.manifest import Workload
from testbed.runtimes.interface import (
    Prepared,
    command_line,
)


def vcpus(workload: Workload) -> int:
    """CPUs of a guest: its limit, or as many as it is pinned to.

    Raises `Error` for a limit that is no whole number: a virtual machine has whole CPUs only.
    """
    limit = workload.program.cpus if workload.program else None
    if limit and limit != int(limit):
        raise Error(
            f"guest {workload.name!r} cannot have {limit:g} CPUs",
            hint="give it a whole number of them in resources.limits.cpu",
        )
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
        raise Error(
            f"guest {workload.name!r} cannot be given env or workingDir", hint="say it in args"
        )
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


def memory_mib(workload: Workload) -> int:
    """Memory of a guest: its limit, or enough for thousands of connections."""
    limit = workload.program.memory_bytes if workload.program else None
    return (limit or 256 << 20) >> 20
