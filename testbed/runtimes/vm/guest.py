"""Guests in virtual machines: the common part of the runtimes `osv` and `linux`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from testbed.host import cache, process
from testbed.images.compose import Image
from testbed.images.kernels import LinuxKernel, OsvKernel
from testbed.model.addresses import guest_mac
from testbed.model.errors import Error
from testbed.model.manifest import Program, Workload
from testbed.model.terms import Family, Runtime
from testbed.runtimes.interface import (
    Description,
    Options,
    Placement,
    Prepared,
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


def memory_mib(workload: Workload) -> int:
    """Memory of a guest: its limit, or enough for thousands of connections."""
    limit = workload.program.memory_bytes if workload.program else None
    return (limit or 256 << 20) >> 20


KILLED = 128 + signal.SIGKILL
"""Exit status, as a shell has it, of a guest that ended before its program did."""
NOT_OF_PROGRAM = re.compile(r"\[ *\d+\.\d+\] |guest (ready|ends):")
"""Beginning of a line of a console that is of Linux, or of what we add to images."""
SEARCHED_BYTES = 64 << 10
"""Length of the beginning and of the end of a console in which is looked for how a guest began and
ended. (OSv prints up to 128 frames when it crashes.)"""


class VirtualMachines(Prepared, ABC):
    """Prepared runtime of a kernel on QEMU, with an image of the agent and one per program."""

    uses_tap = True
    kernel_has_sockets = False
    families: frozenset[Family]
    multiqueue: bool
    smp: bool
    """Whether the kernel boots with several CPUs."""
    has_shell: bool
    ready_limit_s: float

    def __init__(
        self,
        runtime: Runtime,
        kernel: OsvKernel | LinuxKernel,
        options: Options,
        version: str,
        offloads: str = "",
        capabilities: Mapping[str, Any] = {},
    ) -> None:
        """`version`, `offloads` and `capabilities` are for the description of the runtime."""
        self._options = options
        self._images: dict[tuple[Program | None, bool], Image] = {}
        self._console_begin: dict[Path, int] = {}
        """Console → its size when the guest was started last."""
        agent = self._image(Workload("", runtime))
        self.accelerator = accelerator.accelerator(kernel.path).name
        self.vhost = self.accelerator == "kvm" and accelerator.vhost_net()
        self.description = Description(
            runtime,
            kernel=version,
            accelerator=self.accelerator,
            vhost=self.vhost,
            digests={"kernel": kernel.sha256, "image": agent.sha256},
            offloads=offloads,
            capabilities=capabilities,
        )

    def compose(self, workload: Workload) -> None:
        if vcpus(workload) > 1 and not self.smp:
            raise Error(
                f"guest {workload.name!r} cannot have {vcpus(workload)} CPUs: its kernel "
                f"({self.description.kernel}) boots with one only",
                hint="give it one in resources.limits.cpu, or another kernel",
            )
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
        self._console_begin[place.console] = (
            place.console.stat().st_size if place.console.exists() else 0
        )
        arguments = [] if workload.program else ["--control-port", str(workload.control_port)]
        image = self._image(workload, loopback=place.loopback)
        return process.spawn(
            self._command(vm, image, arguments),
            cgroup=place.cgroup,
            netns=place.netns,
            cpus=workload.cpus,
            output=place.console,
        )

    def runs(self, place: Placement) -> bool:
        return True

    def exit_status(self, place: Placement, code: int) -> int:
        """What the console tells since the start, if the machine ended well (`code` is 0)."""
        if code:
            return code
        begin = self._console_begin.get(place.console, 0)
        last = place.console_end(SEARCHED_BYTES, since=begin)
        if told := re.findall(r"^guest ends: status (\d{1,3})\r?$", last, re.MULTILINE):
            return int(told[-1])
        key = self._key(place.workload, loopback=place.loopback)
        first = place.console_begin(SEARCHED_BYTES, since=begin)
        return self._untold_status(self._images.get(key), first, last)

    def is_of_program(self, line: str) -> bool:
        return not NOT_OF_PROGRAM.match(line)

    def _key(self, workload: Workload, *, loopback: bool) -> tuple[Program | None, bool]:
        """What images differ by: the program, and whether they have the hosts patch."""
        return workload.program, self._options.hosts_patch and loopback

    def _image(self, workload: Workload, *, loopback: bool = True) -> Image:
        """Image of the workload's program, or of the agent, which may lack the hosts patch.

        It stays in the cache while this object exists, for restarts: what it was composed from may
        change or vanish.
        """
        key = self._key(workload, loopback=loopback)
        if key not in self._images or not self._images[key].path.exists():
            etc = self._options.etc if workload.program else {}
            self._images[key] = image = self._compose(workload, hosts_patch=key[1], etc=etc)
            weakref.finalize(self, os.close, cache.hold(image.path))
        return self._images[key]

    @abstractmethod
    def _compose(self, workload: Workload, *, hosts_patch: bool, etc: Mapping[str, bytes]) -> Image:
        """Compose an image of the workload's program, or of the agent, for this kernel."""

    @abstractmethod
    def _command(self, vm: Vm, image: Image, arguments: Sequence[str]) -> list[str]:
        """QEMU's command line (argv). `arguments` follow those of the image."""

    def _untold_status(self, image: Image | None, first: str, last: str) -> int:
        """Exit status of a guest that ended and told none, from how its console begins and ends.

        `image`: the guest's, unless another supervisor process composed it.
        """
        return KILLED
