"""An OSv unikernel on QEMU, booted from a composed image."""

from __future__ import annotations

from pathlib import Path

from testbed import vm
from testbed.images import Image
from testbed.kernels import OsvKernel
from testbed.model import Error, Family
from testbed.vm import Vm

READY = b"{"
"""What OSv writes to the file `ready` when its network is set up; a program that listens says nothing."""


def command(machine: Vm, kernel: OsvKernel, image: Image, ready: Path) -> list[str]:
    """QEMU's argv. Addresses of a family that the kernel does not speak are left out."""
    return vm.command(
        machine, kernel.path, boot_line(machine, kernel.families, image.command),
        nic=kernel.virtio_net,
        extra=(
            "-drive", f"if=none,id=disk,format=raw,readonly=on,file={vm.value(image.path)}",
            "-device", "virtio-blk-pci,drive=disk",
            "-chardev", f"file,id=ready,path={vm.value(ready)}",
            "-device", "isa-debugcon,iobase=0x3f0,chardev=ready",
        ),
    )  # fmt: skip


def boot_line(machine: Vm, families: frozenset[Family], command: tuple[str, ...]) -> str:
    """OSv's command line: its own options, then the program's, word by word in quotes.

    The mask of an IPv4 address is dotted, of an IPv6 address a length. Raises `Error` for a word
    with `$`, which OSv takes for a variable even in quotes.
    """
    addresses = [a for a in machine.addresses if Family(f"ipv{a.version}") in families]
    gateways = [g for g in machine.gateways if Family(f"ipv{g.version}") in families]
    return " ".join((
        "--rootfs=rofs",
        *(f"--ip=eth0,{a.ip},{a.netmask if a.version == 4 else a.network.prefixlen}" for a in addresses),
        *(f"--defaultgw={gateway}" for gateway in gateways),
        "--power-off-on-abort",
        *map(_quoted, command),
    ))  # fmt: skip


def _quoted(word: str) -> str:
    if "$" in word or not word.isprintable():
        raise Error(f"OSv cannot be given the argument {word!r}", hint="put it into a file")
    escaped = word.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
