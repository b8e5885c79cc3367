"""Table of the supported processor architectures (x86-64, AArch64), and how they differ.

Guests run on the processor of their host, so host and guest share one entry.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass

from testbed.model.errors import Error


@dataclass(frozen=True)
class Architecture:
    """Names of a processor architecture in uname, Debian, Linux and QEMU, and its QEMU options."""

    name: str
    """`uname -m`: what the kernel, ELF readers and Python call it."""
    debian: str
    """Architecture in the names of Debian's packages."""
    kernel: str
    """Folder under `arch/` in the sources of Linux."""
    qemu: str
    """The system emulator's program."""
    qemu_package: str
    machine: str
    """QEMU's machine type with its options."""
    emulated_cpu: str
    """QEMU's CPU model under TCG; under KVM it is the host's."""
    linux_options: str
    """Of Linux's command line: the first serial port as console, and what an emulator needs."""
    sys_bpf: int
    """Number of bpf(2), for which the C library has no function."""


X86_64 = Architecture(
    name="x86_64",
    debian="amd64",
    kernel="x86",
    qemu="qemu-system-x86_64",
    qemu_package="qemu-system-x86",
    # q35 has the clocks that kernels calibrate by. (microvm has none under TCG: Linux hangs there
    # now and then, OSv always.) Without its unused devices it starts fast.
    machine="q35,sata=off,smbus=off,usb=off,vmport=off",
    emulated_cpu="qemu64",
    # Without the latter, Linux counts timer ticks while it boots, and panics where the host has had
    # no time for the emulator just then.
    linux_options="console=ttyS0 no_timer_check",
    sys_bpf=321,
)
AARCH64 = Architecture(
    name="aarch64",
    debian="arm64",
    kernel="arm64",
    qemu="qemu-system-aarch64",
    qemu_package="qemu-system-arm",
    machine="virt,gic-version=max",  # the default is GICv2, which KVM on many servers lacks
    # QEMU's default is a 32-bit CPU. Emulating pointer authentication with the architecture's own
    # algorithm would take half of the time, so QEMU's own is used.
    emulated_cpu="max,pauth-impdef=on",
    linux_options="console=ttyAMA0",
    sys_bpf=280,
)


def native() -> Architecture:
    """The architecture of this machine. Raises `Error` if it is not in the table."""
    known = {each.name: each for each in (X86_64, AARCH64)}
    name = platform.machine()
    if name not in known:
        raise Error(
            f"this machine is {name}; testbed knows {' and '.join(known)}",
            hint="add it to testbed/host/architecture.py",
        )
    return known[name]
