"""What differs between processor architectures, in one table: all else is the same on each.

Guests run on the processor of their host, so one entry serves for host and guest.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass

from testbed.model.errors import Error


@dataclass(frozen=True)
class Architecture:
    """A processor architecture, by the names that others have for it."""

    name: str
    """`uname -m`: what the kernel, ELF readers and Python call it."""
    debian: str
    """In names of Debian's packages."""
    kernel: str
    """Its folder under `arch/` in the sources of Linux."""
    qemu: str
    """QEMU's program."""
    qemu_package: str
    machine: str
    """QEMU's machine type with its options."""
    emulated_cpu: str
    """QEMU's CPU model under TCG; under KVM it is the host's."""
    console: str
    """The first serial port, as Linux calls it."""
    sys_bpf: int
    """Number of bpf(2), for which the C library has no function."""


X86_64 = Architecture(
    name="x86_64",
    debian="amd64",
    kernel="x86",
    qemu="qemu-system-x86_64",
    qemu_package="qemu-system-x86",
    # It has the clocks that kernels calibrate by (microvm has none under TCG: Linux hangs there now
    # and then, OSv always) and starts fast with its unused devices left out.
    machine="q35,sata=off,smbus=off,usb=off,vmport=off",
    emulated_cpu="qemu64",
    console="ttyS0",
    sys_bpf=321,
)
AARCH64 = Architecture(
    name="aarch64",
    debian="arm64",
    kernel="arm64",
    qemu="qemu-system-aarch64",
    qemu_package="qemu-system-arm",
    machine="virt,gic-version=max",  # the default is GICv2, which KVM on many servers has not
    # QEMU's default is a 32-bit CPU. Emulated pointer signatures of the architecture's own kind
    # take half of all time.
    emulated_cpu="max,pauth-impdef=on",
    console="ttyAMA0",
    sys_bpf=280,
)


def native() -> Architecture:
    """This machine's. Raises `Error` if it is neither of them."""
    known = {each.name: each for each in (X86_64, AARCH64)}
    name = platform.machine()
    if name not in known:
        raise Error(
            f"this machine is {name}; testbed knows {' and '.join(known)}",
            hint="add it to testbed/host/architecture.py",
        )
    return known[name]
