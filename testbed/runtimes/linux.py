"""A microVM with a stock Linux kernel on QEMU, everything else in its initramfs."""

from __future__ import annotations

from testbed import vm
from testbed.images import Image
from testbed.kernels import LinuxKernel
from testbed.model import Error
from testbed.vm import Vm


def command(machine: Vm, kernel: LinuxKernel, image: Image) -> list[str]:
    """QEMU's argv."""
    append = boot_line(machine, image.command)
    return vm.command(machine, kernel.path, append, extra=("-initrd", str(image.path)))


def boot_line(machine: Vm, command: tuple[str, ...]) -> str:
    """Linux's command line; a panic ends the machine.

    What the kernel does not know, /init of the image gets as environment, and the words after `--`
    as arguments. Raises `Error` for a word that the kernel's quotes cannot hold.
    """
    return " ".join((
        "console=ttyS0 quiet panic=-1",
        _quoted(f"guest_addresses={' '.join(map(str, machine.addresses))}"),
        _quoted(f"guest_gateways={' '.join(map(str, machine.gateways))}"),
        "--", *map(_quoted, command),
    ))  # fmt: skip


def _quoted(word: str) -> str:
    if '"' in word or not word.isprintable():
        raise Error(f"a Linux guest cannot be given the argument {word!r}", hint="put it into a file")
    return f'"{word}"'
