"""The virtual machine of a guest as a QEMU command line: the part that OSv and Linux share.

A bare machine of the host's architecture (`architecture`). Pure functions; starting it is left to
`process`.
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
    """Where and as what a guest boots."""

    accelerator: str
    """`kvm` or `tcg`."""
    tap: str
    """Name of a tap device that exists in QEMU's network namespace."""
    mac: str
    addresses: tuple[IPv4Interface | IPv6Interface, ...]
    """At most one of each family."""
    console: Path
    """File that the serial console is appended to."""
    loopback: bool = True
    """Whether it has one; without, 127.0.0.0/8 takes the default route. (Linux alone heeds it.)"""
    gateways: tuple[Address, ...] = tuple(map(pod_link, Family))
    """Default routes, one of each family at most."""
    memory_mib: int = 256
    vhost: bool = False
    """The host's kernel moves packets between tap and guest. (Under KVM alone.)"""
    vcpus: int = 1
    queues: int = 1
    """Pairs of queues of the network device; more than one need a tap with IFF_MULTI_QUEUE."""
    socket: Path | None = None
    """Unix socket in the place of the tap: frames go to the program that listens there."""
    qmp: Path | None = None
    """Unix socket for QMP: `system_powerdown` (OSv alone heeds it), `quit`. SIGTERM ends it too."""


def link_addresses(n: int) -> tuple[IPv4Interface | IPv6Interface, ...]:
    """Guest n's addresses on its link, with their prefixes."""
    return tuple(ip_interface(f"{guest_link(f, n)}/{LINK_PREFIX[f]}") for f in Family)


def command(
    vm: Vm, kernel: Path, append: str, *, nic: Sequence[str] = (), extra: Sequence[str] = ()
) -> list[str]:
    """The argv. `append` is the kernel's command line, `nic` properties of the network device.

    Raises `Error` if an address is the alias.
    """
    compose.check_alias(address.ip for address in vm.addresses)
    vhost = "on" if vm.vhost else "off"
    netdev = f"tap,id=net,ifname={vm.tap},script=no,downscript=no,vhost={vhost}"
    if vm.queues > 1:
        netdev += f",queues={vm.queues}"
        # An interrupt for each queue, one for the control queue, one for changes of configuration.
        nic = (*nic, "mq=on", f"vectors={2 * vm.queues + 2}")
    if vm.socket:
        netdev = f"stream,id=net,server=off,addr.type=unix,addr.path={value(vm.socket)}"
    here = architecture.native()
    return [
        here.qemu,
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display",
        "none",
        "-machine",
        f"{here.machine},accel={vm.accelerator}",
        "-cpu",
        "host" if vm.accelerator == "kvm" else here.emulated_cpu,
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
    """A path as the value of a QEMU option, in which a comma is doubled."""
    return str(path).replace(",", ",,")
