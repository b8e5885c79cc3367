"""Runtime `standin`: a network namespace in place of a guest, without a hypervisor.

It has a network stack and a hosts file of its own, so its packets are like a guest's, at a speed
that an emulated guest does not reach. Its program is one of this host, or that of a guest's image
definition, so it can take the place of any guest.
"""

from __future__ import annotations

from pathlib import Path

from testbed.images import compose
from testbed.images.compose import Definition
from testbed.images.rootfs import Process
from testbed.model.manifest import Workload
from testbed.model.terms import Runtime
from testbed.runtimes.interface import Options, process_of
from testbed.runtimes.program import PlainProgram


def prepare(options: Options) -> Standin:
    """Compile the agent, and choose the hosts file as for an image."""
    return Standin(Runtime.STANDIN, compose.hosts_file(patched=options.hosts_patch))


class Standin(PlainProgram):
    """A program of this host, or of an image definition with its files."""

    def _command(self, workload: Workload) -> list[str]:
        image = self._definition(workload)
        if image is None:
            return super()._command(workload)
        process = Process((str(image.program),), image.arguments)
        return list(process_of(workload, process).command)

    def _files(self, workload: Workload) -> dict[Path, str]:
        image = self._definition(workload)
        files = image.files.items() if image else ()
        return {file: inside for inside, file in files if str(file) != inside}

    def _definition(self, workload: Workload) -> Definition | None:
        assert workload.program is not None
        return compose.find_definition(workload.program.image)
