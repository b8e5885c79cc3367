"""QEMU's command line for the virtual machine of a guest, OSv or Linux.

It is a bare machine of the host's architecture (`testbed.host.architecture`). All functions are
pure; `testbed.host.process` starts the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Interface, ip_interface
from pathlib import Path

from testbed.host import architecture
from testbed.images import compose
from testbed.model.addresses import LINK_PREFIX, Address, guest_link, pod_link
from testbed.model.terms import Family


@dataclass(frozen=True)
class Vm:
    """Properties of a guest's virtual machine."""

    accelerator: str
    """kvm or tcg."""
    tap: str
    """Name of a tap device that exists in QEMU's network namespace."""
    mac: str
    addresses: tuple[IPv4Interface | IPv6Interface, ...]
    """At most one of each family."""
    console: Path
    """File to which the serial console is appended."""
    loopback: bool = True
    """Whether it has a loopback interface. Without, 127.0.0.0/8 takes the default route. Linux
    guests only; OSv always has one."""
    gateways: tuple[Address, ...] = tuple(map(pod_link, Family))
    """Default gateways, at most one of each family."""
    memory_mib: int = 256
    vhost: bool = False
    """Whether the host's kernel moves packets between tap and guest (vhost-net; KVM only)."""
    vcpus: int = 1
    queues: int = 1
    """Pairs of queues of the network device. More than one needs a tap with IFF_MULTI_QUEUE."""
    socket: Path | None = None
    """Unix socket that takes the place of the tap: frames go to the program that listens there."""
    qmp: Path | None = None
    """Unix socket for QMP, to order system_powerdown (which only OSv obeys) or quit. SIGTERM ends
    the machine, too."""


def link_addresses(n: int) -> tuple[IPv4Interface | IPv6Interface, ...]:
    """Addresses of guest n on its link, with prefix lengths."""
    return tuple(ip_interface(f"{guest_link(f, n)}/{LINK_PREFIX[f]}") for f in Family)


def command(
    vm: Vm, kernel: Path, append: str, *, nic: Sequence[str] = (), extra: Sequence[str] = ()
) -> list[str]:
    """QEMU's command line (argv).

    `append` is the kernel's command line, `nic` are properties of the network device, `extra` more
    options of QEMU. Raises `Error` if an address is the alias.
    """
    compose.check_alias(address.ip for address in vm.addresses)
    vhost = "on" if vm.vhost else "off"
    netdev = f"tap,id=net,ifname={vm.tap},script=no,downscript=no,vhost={vhost}"
    if vm.queues > 1:
        netdev += f",queues={vm.queues}"
        # Interrupts: one for each queue, the control queue, and changes of the configuration.
        nic = (*nic, "mq=on", f"vectors={2 * vm.queues + 2}")
    if vm.socket:
        netdev = f"stream,id=net,server=off,addr.type=unix,addr.path={value(vm.socket)}"
    native = architecture.native()
    return [
        native.qemu,
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display",
        "none",
        "-machine",
        f"{native.machine},accel={vm.accelerator}",
        "-cpu",
        "host" if vm.accelerator == "kvm" else native.emulated_cpu,
        "-smp",
        str(vm.vcpus),
        "-m",
        f"{vm.memory_mib}M",
        "-kernel",
        str(kernel),
        "-append",
        append,
        "-chardev",
        f"file,id=console,append=on,path={value(vm.console)}",
        "-serial",
        "chardev:console",
        *(("-qmp", f"unix:{value(vm.qmp)},server=on,wait=off") if vm.qmp else ()),
        "-netdev",
        netdev,
        "-device",
        ",".join(("virtio-net-pci,netdev=net", f"mac={vm.mac}", "romfile=", *nic)),
        *extra,
    ]


def value(path: Path) -> str:
    """A path as the value of a QEMU option, with commas doubled."""
    return str(path).replace(",", ",,")
