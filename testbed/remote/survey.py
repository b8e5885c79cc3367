"""Looks at hosts: kernel, load, devices, doctor; nothing is measured."""

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
    """What a look at a host tells; nothing is carried there for it, and no guest booted."""

    kernel: str
    cpus: int
    load: tuple[float, float, float]
    """Averages over 1, 5 and 15 minutes."""
    kvm: bool
    """There is a /dev/kvm; whether guests boot with it is for the doctor to tell."""
    vhost_net: bool

    def __str__(self) -> str:
        load = " ".join(f"{average:.2f}" for average in self.load)
        devices = f"{'' if self.kvm else 'no '}KVM, {'' if self.vhost_net else 'no '}vhost-net"
        return f"Linux {self.kernel}, {self.cpus} CPUs, load {load}, {devices}"


_LOOK = """uname -r; nproc; cut -d' ' -f1-3 /proc/loadavg
for device in kvm vhost-net; do test -e /dev/$device && echo yes || echo no; done"""


def look(host: Host) -> Seen:
    """A look at a host. Raises `Error` if it cannot be reached, or refuses."""
    with Link(host) as link:
        kernel, cpus, load, kvm, vhost_net = link.run(_LOOK).decode().splitlines()
    one, five, fifteen = map(float, load.split())
    return Seen(kernel, int(cpus), (one, five, fifteen), kvm == "yes", vhost_net == "yes")


def examine(host: Host) -> list[dict[str, str]]:
    """What the doctor finds on a host, which is brought up to date for it."""
    with Link(host) as link:
        return Site(link, lambda _: None).findings()


def each(hosts: Sequence[Host], ask: Callable[[Host], Any]) -> Iterator[tuple[Host, Any]]:
    """Ask all hosts at once; (host, answer or `Error`), in their order."""

    def answer(host: Host) -> Any:
        try:
            return ask(host)
        except Error as e:
            return e

    with ThreadPoolExecutor(len(hosts)) as pool:
        yield from zip(hosts, pool.map(answer, hosts), strict=True)
