"""A virtual machine with a stock Linux kernel on QEMU, everything else in its initramfs."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from testbed.host import architecture, process
from testbed.images import compose, kernels
from testbed.images.compose import Definition, Image
from testbed.images.kernels import LinuxKernel
from testbed.model.addresses import guest_mac
from testbed.model.errors import Error
from testbed.model.manifest import Workload
from testbed.model.terms import Family, Runtime
from testbed.runtimes.interface import Absent, Description, Options, Placement
from testbed.runtimes.vm import accelerator, qemu
from testbed.runtimes.vm.guest import as_told, definition, memory_mib, vcpus
from testbed.runtimes.vm.qemu import Vm


def prepare(options: Options) -> Linux:
    """Gets the kernel and composes the initramfs. Raises `Absent` if there is no kernel."""
    try:
        kernel = kernels.linux_kernel()
    except Error as e:
        raise Absent(e.message, e.hint) from e
    image = compose.compose_linux(
        compose.load(compose.AGENT), kernel, hosts_patch=options.hosts_patch
    )
    return Linux(kernel, image, options)


class Linux:
    """A kernel, and the agent's initramfs."""

    families = frozenset(Family)
    uses_tap = multiqueue = True
    ready_limit_s = 30.0
    """2.2 s where nothing else runs, emulated."""

    def __init__(self, kernel: LinuxKernel, image: Image, options: Options) -> None:
        self.kernel, self.image = kernel, image
        self._hosts_patch, self._etc = options.hosts_patch, options.etc
        self._composed: dict[Definition, Image] = {}
        self.accelerator = accelerator.accelerator(kernel.path).name
        self.vhost = self.accelerator == "kvm" and accelerator.vhost_net()
        self.description = Description(
            Runtime.LINUX,
            kernel=kernel.release,
            accelerator=self.accelerator,
            vhost=self.vhost,
            digests={"kernel": kernel.sha256, "image": image.sha256},
        )

    def dialed(self, family: Family) -> str:
        return "localhost"

    def compose(self, workload: Workload) -> None:
        self._compose(workload)

    def enter(self, place: Placement) -> list[str]:
        raise Error(
            f"{place.workload.name!r} is a virtual machine: nothing can be started in it",
            hint="see its console: testbed logs",
        )

    def start(self, place: Placement) -> subprocess.Popen[bytes]:
        """Boot guest n of the pod, with the agent or the workload's program."""
        workload = place.workload
        machine = Vm(
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
        if not place.loopback:
            image = compose.compose_linux(
                compose.load(compose.AGENT), self.kernel, hosts_patch=False
            )
        if workload.program:
            image, arguments = self._compose(workload), []
        return process.spawn(
            command(machine, self.kernel, image, arguments),
            cgroup=place.cgroup,
            netns=place.netns,
            cpus=place.workload.cpus,
            output=place.console,
        )

    def _compose(self, workload: Workload) -> Image:
        wanted = definition(workload)
        if wanted not in self._composed:
            self._composed[wanted] = compose.compose_linux(
                wanted, self.kernel, hosts_patch=self._hosts_patch, etc=self._etc
            )
        return as_told(workload, self._composed[wanted])


def command(
    machine: Vm, kernel: LinuxKernel, image: Image, arguments: Sequence[str] = ()
) -> list[str]:
    """QEMU's argv. `arguments` follow the image's own."""
    line = boot_line(machine, (*image.command, *arguments))
    return qemu.command(machine, kernel.path, line, extra=("-initrd", str(image.path)))


def boot_line(machine: Vm, words: Sequence[str]) -> str:
    """Linux's command line; a panic ends the machine.

    What the kernel does not know, /init of the image gets as environment, and the words after `--`
    as arguments. Raises `Error` for a word that the kernel's quotes cannot hold.
    """
    return " ".join(
        (
            f"console={architecture.native().console} quiet panic=-1",
            _quoted(f"guest_addresses={' '.join(map(str, machine.addresses))}"),
            _quoted(f"guest_gateways={' '.join(map(str, machine.gateways))}"),
            *(() if machine.loopback else ("guest_loopback=none",)),
            "--",
            *map(_quoted, words),
        )
    )


def _quoted(word: str) -> str:
    if '"' in word or not word.isprintable():
        raise Error(f"a Linux guest cannot be given {word!r}", hint="put it into a file")
    return f'"{word}"'
