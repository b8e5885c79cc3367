"""Runtime `standin`: a network namespace in place of a guest, without a hypervisor.

It has a network stack and a hosts file of its own, so its packets are like a guest's, at a speed
that an emulated guest does not reach. Its program is one of this host, or that of a guest's image
definition, so it can take the place of any guest.
"""

from __future__ import annotations

from pathlib import Path

from testbed.images import compose, rootfs
from testbed.model.manifest import Workload
from testbed.model.terms import Runtime
from testbed.runtimes.interface import Options, command_line
from testbed.runtimes.program import PlainProgram
from testbed.runtimes.vm.guest import definition


def prepare(options: Options) -> Standin:
    """Compile the agent, and choose the hosts file as for an image."""
    return Standin(Runtime.STANDIN, compose.hosts_file(patched=options.hosts_patch))


class Standin(PlainProgram):
    """A program of this host, or of an image definition with its files."""

    def _command(self, workload: Workload) -> list[str]:
        if _is_of_host(workload):
            return super()._command(workload)
        image = definition(workload)
        return list(command_line(workload, (str(image.program), *image.arguments)))

    def _files(self, workload: Workload) -> dict[Path, str]:
        if _is_of_host(workload):
            return {}
        return {file: inside for inside, file in definition(workload).files.items()}


def _is_of_host(workload: Workload) -> bool:
    assert workload.program is not None
    return rootfs.is_of_host(workload.program.image)
