"""Finds out what a guest's kernel can do on the network, by booting it once with the traffic agent.

The guest has two CPUs and a network device with two pairs of queues, on a tap in a namespace of its
own. There it is asked, by TCP and UDP of both families, in packets with complete checksums, and in
such as checksum offload makes: then their checksum is partial, and the device is to complete it.

The result is kept in the cache by the kernel's digest, so that a kernel is used for all that it can
do, whatever it is called.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from testbed.agent import Agent
from testbed.host import cache, cgroups, facts, ledger, namespaces, netlink, process
from testbed.host.ledger import Owner
from testbed.model.addresses import CONTROL_PORT, LINK_PREFIX, guest_link, guest_mac, pod_link
from testbed.model.errors import Error
from testbed.model.terms import Family
from testbed.runtimes.vm import qemu
from testbed.runtimes.vm.qemu import Vm

GUEST, TAP = 1, "probe"
SEVERAL = 2
"""Number of CPUs, and of pairs of queues."""
BOOT_LIMIT_S = 30.0
ANSWER_LIMIT_S = 3.0
"""Time after which a family counts as lacking. IPv6's duplicate address detection takes a second
after the boot. Both times are multiplied by `facts.slowness`."""
PER_BOOT = 3
"""Or so many times the time of the boot, if that is more: on a busy machine all takes longer."""
ATTEMPTS = 6
"""At least so often a family is asked in this time."""
CONNECT_S = 0.5
"""Time for an attempt to connect to a guest that may be booting still."""

Boot = Callable[[Vm], Sequence[str]]
"""Returns QEMU's command line (argv) that boots the kernel in a machine with the traffic agent,
addresses of both families, and all that QEMU's network device offers."""


@dataclass(frozen=True)
class Capabilities:
    """What a guest's kernel can do."""

    families: frozenset[Family]
    """IP versions of its network stack."""
    partial_checksums: frozenset[Family]
    """Families of which it takes packets with a partial checksum, as checksum offload makes."""
    multiqueue: bool
    """Whether its driver serves several pairs of queues."""
    smp: bool
    """Whether it boots with several CPUs."""

    @classmethod
    def of(cls, data: dict[str, Any]) -> Self:
        """The capabilities from plain data (`plain`)."""
        return cls(
            frozenset(map(Family, data["families"])),
            frozenset(map(Family, data["partial_checksums"])),
            bool(data["multiqueue"]),
            bool(data["smp"]),
        )

    def plain(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "families": sorted(self.families),
            "partial_checksums": sorted(self.partial_checksums),
            "multiqueue": self.multiqueue,
            "smp": self.smp,
        }

    def __str__(self) -> str:
        return (
            f"{_names(self.families)}; partial checksums of {_names(self.partial_checksums)}; "
            f"{'several pairs' if self.multiqueue else 'one pair'} of queues; "
            f"{'several CPUs' if self.smp else 'one CPU'}"
        )


ALL = Capabilities(frozenset(Family), frozenset(Family), multiqueue=True, smp=True)
"""What is tried."""


def cached(sha256: str) -> Capabilities | None:
    """What a kernel can do, if it was found out before."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return Capabilities.of(json.loads(_file(sha256).read_text()))
    return None


def probe(sha256: str, boot: Boot, accelerator: str) -> Capabilities:
    """Find out what a kernel can do, and keep it in the cache. Takes a boot and some seconds.

    Raises `Error`, which says how the boot ended, if the agent does not answer.
    """
    try:
        with _booted(boot, accelerator, SEVERAL) as guest:
            found = guest.capabilities(smp=True)
    except _Silent:
        with _booted(boot, accelerator, 1) as guest:
            found = guest.capabilities(smp=False)
        with suppress(_Silent), _booted(boot, accelerator, SEVERAL) as guest:  # was it chance?
            found = guest.capabilities(smp=True)
    if facts.families() == ALL.families:  # else there was no way to try all of it
        data = json.dumps(found.plain(), indent=1)
        cache.made(_file(sha256), lambda new: new.write_text(data), anew=True)
    return found


def _file(sha256: str) -> Path:
    return cache.cache_folder() / "kernels" / "capabilities" / f"{sha256}.json"


def _names(families: frozenset[Family]) -> str:
    return " and ".join(family.replace("ip", "IP") for family in sorted(families)) or "no family"


class _Silent(Error):
    """The agent of the guest does not answer."""


@dataclass(frozen=True)
class _Guest:
    """The booting guest, and the namespace from which it is asked."""

    netns: str
    machine: subprocess.Popen[bytes]
    console: Path

    def capabilities(self, *, smp: bool) -> Capabilities:
        """Wait for the agent, and ask for all but `smp`."""
        began = time.monotonic()
        with self._agent() as agent:
            spoken = agent.hello().families & facts.families()
        boot_s = time.monotonic() - began
        limit_s = max(ANSWER_LIMIT_S * facts.slowness(), PER_BOOT * boot_s)

        def answered(families: AbstractSet[Family], *, partial: bool) -> frozenset[Family]:
            self._offload(on=partial)
            return frozenset(family for family in families if self._answers(family, limit_s))

        families = answered(spoken, partial=False)
        if families != spoken:
            silent = ", ".join(sorted(spoken - families))
            raise Error(f"the guest has {silent}, but did not answer in it: {self._said()}")
        partial = answered(families, partial=True)
        refused = families - partial
        if answered(refused, partial=False) != refused:
            raise Error(f"the guest did not survive packets with partial checksums: {self._said()}")
        return Capabilities(families, partial, self._queues() > 1, smp)

    def _agent(self) -> Agent:
        """Connect to the agent as soon as it listens."""
        began, limit_s = time.monotonic(), BOOT_LIMIT_S * facts.slowness()
        address = guest_link(Family.IPV4, GUEST)
        while time.monotonic() < began + limit_s:
            if self.machine.poll() is not None:
                raise _Silent(f"QEMU ended with status {self.machine.returncode}: {self._said()}")
            with suppress(Error):
                self._offload(on=False)  # anew each time: QEMU switches it on with the driver
                return namespaces.inside(
                    self.netns, lambda: Agent.connect(address, timeout_s=CONNECT_S)
                )
            time.sleep(0.05)
        raise _Silent(f"no answer after {limit_s:.0f} s: {self._said()}")

    def _said(self) -> str:
        """The last line of QEMU and the console."""
        lines = self.console.read_text(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")

    def _answers(self, family: Family, limit_s: float) -> bool:
        """Whether it answers in both transports of a family."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            with suppress(OSError):
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                    self._ask(family, kind, limit_s / ATTEMPTS)
                return True
            time.sleep(0.05)
        return False

    def _offload(self, *, on: bool) -> None:
        """Whether packets to the guest have partial checksums."""
        netlink.set_checksum_offload(self.netns, TAP, on=on, received=False)

    def _ask(self, family: Family, kind: socket.SocketKind, limit_s: float) -> None:
        """Connect to the agent by TCP, or have a datagram refused, since no program serves it."""
        with namespaces.inside(self.netns, lambda: socket.socket(family.domain, kind)) as asking:
            asking.settimeout(limit_s)
            asking.connect((str(guest_link(family, GUEST)), CONTROL_PORT))
            if kind is socket.SOCK_DGRAM:
                asking.send(b"?")
                with suppress(ConnectionRefusedError):
                    asking.recv(1)

    def _queues(self) -> int:
        """Pairs of queues that the guest has switched on.

        Those that it has not are taken from the tap (drivers/net/tun.c), which sysfs alone tells.
        """
        look = f"mount -t sysfs sysfs /sys && ls -d /sys/class/net/{TAP}/queues/tx-*"
        enter = ("nsenter", f"--net={namespaces.NETNS / self.netns}", "unshare", "--mount")
        return len(process.run([*enter, "sh", "-c", look], "no queues of a tap").split())


@contextmanager
def _booted(boot: Boot, accelerator: str, vcpus: int) -> Iterator[_Guest]:
    """Start the guest. What it is made of is in a ledger."""
    with Owner() as owner:
        name = f"tb-{owner.id}-probe"
        console = ledger.create_folder(owner, name) / "console"
        with namespaces.create(owner, name) as ip:
            tap = netlink.create_link(ip, TAP, kind="tuntap", mode="tap", ifr={"multi_queue": 1})
            ip.link("set", index=tap, state="up")
            for family in Family:
                netlink.add_address(ip, tap, pod_link(family), LINK_PREFIX[family])
                netlink.add_neighbor(ip, tap, guest_link(family, GUEST), guest_mac(GUEST))
        vm = Vm(
            accelerator,
            TAP,
            guest_mac(GUEST),
            qemu.link_addresses(GUEST),
            console,
            vcpus=vcpus,
            queues=SEVERAL,
        )
        cgroup = cgroups.create(owner, name)
        machine = process.spawn(boot(vm), cgroup=cgroup, netns=name, output=console)
        try:
            yield _Guest(name, machine, console)
        finally:
            process.end(machine)
