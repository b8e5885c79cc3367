"""Survey of hosts, in parallel: kernel, load and devices, or the doctor's findings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from testbed.model.errors import Error
from testbed.remote.inventory import Host
from testbed.remote.site import Site
from testbed.remote.ssh import Link


@dataclass(frozen=True)
class Seen:
    """Kernel, CPUs, load and devices of a host. Nothing is installed there to find them out."""

    kernel: str
    cpus: int
    load: tuple[float, float, float]
    """Load averages over 1, 5 and 15 minutes."""
    kvm: bool
    """Whether there is a /dev/kvm. Only the doctor finds out whether guests boot with it."""
    vhost_net: bool
    """Whether there is a /dev/vhost-net."""

    def __str__(self) -> str:
        load = " ".join(f"{average:.2f}" for average in self.load)
        devices = f"{'' if self.kvm else 'no '}KVM, {'' if self.vhost_net else 'no '}vhost-net"
        return f"Linux {self.kernel}, {self.cpus} CPUs, load {load}, {devices}"


_LOOK = """uname -r; nproc; cut -d' ' -f1-3 /proc/loadavg
for device in kvm vhost-net; do test -e /dev/$device && echo yes || echo no; done"""


def look(host: Host) -> Seen:
    """Look at a host. Raises `Error` if it cannot be reached, or refuses the login."""
    with Link(host) as link:
        kernel, cpus, load, kvm, vhost_net = link.run(_LOOK).decode().splitlines()
    one, five, fifteen = map(float, load.split())
    return Seen(kernel, int(cpus), (one, five, fifteen), kvm == "yes", vhost_net == "yes")


def examine(host: Host, *options: str) -> list[dict[str, str]]:
    """Run the doctor on a host, with this clone's files and these options of its command.

    Returns the fields of its findings.
    """
    with Link(host) as link:
        return Site(link, lambda _: None).findings(*options)


def each(hosts: Sequence[Host], ask: Callable[[Host], Any]) -> Iterator[tuple[Host, Any]]:
    """Call `ask` for all hosts in parallel; yields (host, answer or `Error`) in their order."""

    def answer(host: Host) -> Any:
        try:
            return ask(host)
        except Error as e:
            return e

    with ThreadPoolExecutor(len(hosts)) as pool:
        yield from zip(hosts, pool.map(answer, hosts), strict=True)
