"""Runtime `linux`: a virtual machine on QEMU with Debian's kernel and a composed initramfs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from testbed.host import architecture
from testbed.images import compose, kernels, rootfs
from testbed.images.compose import Image
from testbed.images.kernels import LinuxKernel
from testbed.model.errors import Error
from testbed.model.manifest import Workload
from testbed.model.terms import Family, Runtime
from testbed.runtimes.interface import Absent, Options, Placement, process_of, refuse_isolation
from testbed.runtimes.vm import qemu
from testbed.runtimes.vm.guest import VirtualMachines
from testbed.runtimes.vm.qemu import Vm

DEFAULTS = {"PATH": rootfs.PATH, "HOME": "/root"}
"""Variables of a program that neither its image nor the manifest sets."""


def prepare(options: Options) -> Linux:
    """Find the kernel and compose the initramfs. Raises `Absent` if there is no kernel."""
    try:
        kernel = kernels.linux_kernel()
    except Error as e:
        raise Absent(e.message, e.hint) from e
    return Linux(kernel, options)


class Linux(VirtualMachines):
    """A Linux kernel and its initramfs images."""

    families = frozenset(Family)
    multiqueue = smp = has_shell = True
    ready_limit_s = 30.0
    """An emulated boot takes 2.2 s on an idle machine."""

    def __init__(self, kernel: LinuxKernel, options: Options) -> None:
        self.kernel = kernel
        super().__init__(Runtime.LINUX, kernel, options, version=kernel.release)

    def dialed(self, family: Family) -> str:
        return "localhost"

    def enter(self, place: Placement, *, terminal: bool = False) -> list[str]:
        raise Error(f"{place.workload.name!r} is a virtual machine: nothing can be started in it")

    def _compose(self, workload: Workload, *, hosts_patch: bool, etc: Mapping[str, bytes]) -> Image:
        refuse_isolation(workload, has_users=True)
        name = workload.program.image if workload.program else rootfs.AGENT
        root = compose.root_of_image(name)
        process = process_of(workload, root.process, DEFAULTS)
        root = replace(root, process=process)
        with rootfs.reading(name):
            compose.program_path(root.path, process)  # raises Error if there is no such program
            return compose.compose_linux(root, self.kernel, hosts_patch=hosts_patch, etc=etc)

    def _command(self, vm: Vm, image: Image, arguments: Sequence[str]) -> list[str]:
        return command(vm, self.kernel, image, arguments)


def command(
    machine: Vm, kernel: LinuxKernel, image: Image, arguments: Sequence[str] = ()
) -> list[str]:
    """QEMU's command line (argv). `arguments` follow those of the image's process.

    The machine has memory for the image besides that for its program: while it boots, it has it
    twice, and the root file system may have half of the memory.
    """
    image_mib = -(-image.size_bytes // 2**20)
    machine = replace(machine, memory_mib=machine.memory_mib + 3 * image_mib)
    line = boot_line(machine, arguments)
    return qemu.command(machine, kernel.path, line, extra=("-initrd", str(image.path)))


def boot_line(machine: Vm, words: Sequence[str]) -> str:
    """Linux's kernel command line. After a panic the machine ends.

    The image's init gets options that the kernel does not know as environment, and the words after
    `--` as arguments.
    """
    return " ".join(
        (
            f"{architecture.native().linux_options} quiet panic=-1 rdinit=/.guest/init",
            f'"guest_addresses={" ".join(map(str, machine.addresses))}"',
            f'"guest_gateways={" ".join(map(str, machine.gateways))}"',
            *(() if machine.loopback else ("guest_loopback=none",)),
            "--",
            *(f'"{word}"' for word in words),
        )
    )
