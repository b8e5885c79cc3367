"""Guests in virtual machines: the common part of the runtimes `osv` and `linux`."""

from __future__ import annotations

import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from testbed import paths
from testbed.host import process
from testbed.images import compose, rootfs
from testbed.images.compose import Definition, Image
from testbed.images.kernels import LinuxKernel, OsvKernel
from testbed.model.addresses import guest_mac
from testbed.model.errors import Error
from testbed.model.manifest import Workload
from testbed.model.terms import Family, Runtime
from testbed.runtimes.interface import (
    Description,
    Options,
    Placement,
    Prepared,
    command_line,
    refuse_isolation,
)
from testbed.runtimes.vm import accelerator, qemu
from testbed.runtimes.vm.qemu import Vm


def vcpus(workload: Workload) -> int:
    """Number of virtual CPUs of a guest: its limit, or as many as it is pinned to, or 1.

    Raises `Error` for a limit that is not a whole number.
    """
    limit = workload.program.cpus if workload.program else None
    if limit and limit != int(limit):
        raise Error(
            f"guest {workload.name!r} cannot have {limit:g} CPUs",
            hint="give it a whole number of them in resources.limits.cpu",
        )
    return int(limit or 0) or len(workload.cpus) or 1


def queues(runtime: Prepared, workload: Workload) -> int:
    """Pairs of queues of a guest's network device: one per vCPU if its driver is multiqueue."""
    return vcpus(workload) if runtime.multiqueue else 1


def definition(workload: Workload) -> Definition:
    """Image definition of a guest's program.

    The manifest names a definition of osv/ or its path, or `host:PROGRAM`. Raises `Error` if there
    is none, or the program asks for something that guests cannot be given.
    """
    program = workload.program
    assert program is not None
    vcpus(workload)
    refuse_isolation(workload)
    if program.env or program.working_dir:
        raise Error(
            f"guest {workload.name!r} cannot be given env or workingDir", hint="pass it in args"
        )
    if program.image.startswith(rootfs.HOST):
        found = rootfs.programs(program.image)
        if len(found) != 1:
            raise Error(f"guest {workload.name!r} has {len(found)} programs", hint="give it one")
        return Definition(program=found[0])
    named = program.image.endswith(".toml")
    return compose.load(Path(program.image) if named else paths.OSV / f"{program.image}.toml")


def memory_mib(workload: Workload) -> int:
    """Memory of a guest: its limit, or enough for thousands of connections."""
    limit = workload.program.memory_bytes if workload.program else None
    return (limit or 256 << 20) >> 20


class VirtualMachines(ABC):
    """Prepared runtime of a kernel on QEMU, with an image of the agent and one per program."""

    uses_tap = True
    kernel_has_sockets = False
    families: frozenset[Family]
    multiqueue: bool
    ready_limit_s: float

    def __init__(
        self,
        runtime: Runtime,
        kernel: OsvKernel | LinuxKernel,
        options: Options,
        version: str,
        offloads: str = "",
    ) -> None:
        """`version` and `offloads` are text for the description of the runtime."""
        self._options = options
        self._composed: dict[Definition, Image] = {}
        self.image = self._compose(compose.load(compose.AGENT), hosts_patch=options.hosts_patch)
        self.accelerator = accelerator.accelerator(kernel.path).name
        self.vhost = self.accelerator == "kvm" and accelerator.vhost_net()
        self.description = Description(
            runtime,
            kernel=version,
            accelerator=self.accelerator,
            vhost=self.vhost,
            digests={"kernel": kernel.sha256, "image": self.image.sha256},
            offloads=offloads,
        )

    def compose(self, workload: Workload) -> None:
        self._image(workload)

    def start(self, place: Placement) -> subprocess.Popen[bytes]:
        """Boot guest n of the pod with the agent or the workload's program."""
        workload = place.workload
        vm = Vm(
            self.accelerator,
            place.tap,
            guest_mac(place.n),
            qemu.link_addresses(place.n),
            place.console,
            vhost=self.vhost,
            memory_mib=memory_mib(workload),
            socket=place.socket,
            loopback=place.loopback,
            vcpus=vcpus(workload),
            queues=place.queues,
        )
        image, arguments = self.image, ["--control-port", str(workload.control_port)]
        if workload.program:
            image, arguments = self._image(workload), []
        elif not place.loopback:
            image = self._compose(compose.load(compose.AGENT), hosts_patch=False)
        return process.spawn(
            self._command(vm, image, arguments),
            cgroup=place.cgroup,
            netns=place.netns,
            cpus=workload.cpus,
            output=place.console,
        )

    def runs(self, place: Placement) -> bool:
        return True

    def _image(self, workload: Workload) -> Image:
        """Image of the workload's program, with the command line that the manifest gives."""
        wanted = definition(workload)
        if wanted not in self._composed:
            self._composed[wanted] = self._compose(
                wanted, hosts_patch=self._options.hosts_patch, etc=self._options.etc
            )
        image = self._composed[wanted]
        return replace(image, command=command_line(workload, image.command))

    @abstractmethod
    def _compose(
        self, definition: Definition, *, hosts_patch: bool, etc: Mapping[str, bytes] = {}
    ) -> Image:
        """Compose an image for this kernel."""

    @abstractmethod
    def _command(self, vm: Vm, image: Image, arguments: Sequence[str]) -> list[str]:
        """QEMU's command line (argv). `arguments` follow those of the image."""
