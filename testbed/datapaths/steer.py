"""eBPF steers `localhost` between natives and guests whose links end in the pod's own namespace.

What the programs do is told in `bpf/steer.c`; here they are attached, to `lo` and to guests' ports.
The kernel's own loopback serves whatever no guest owns.

Past `lo` go sockets of the pod's cgroup. Programs at them know the pod's namespace by its cookie,
which Linux tells since 5.14; before, and for processes from elsewhere, everything goes by `lo`, and
names are shown as in `capture`.
"""

from __future__ import annotations

import errno
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path

from testbed import bpf
from testbed.bpf import ProgramSet
from testbed.datapaths.ebpf.attachment import AT_PORTS, EbpfAttachment
from testbed.datapaths.interface import Attachment, Datapath, Wiring
from testbed.host import namespaces
from testbed.host.ledger import Scope
from testbed.model import addresses
from testbed.model.cells import Pair
from testbed.model.looks import Look
from testbed.model.terms import Family

REASONS = bpf.reasons("steer")
"""What counters say, in the order of `enum reason`."""

ALIASES = tuple(str(addresses.alias(family)) for family in Family)
HOOKS = (
    "setsockopt",
    *(
        f"{call}{version}"
        for call in ("bind", "connect", "sendmsg", "recvmsg", "getpeername", "getsockname")
        for version in (4, 6)
    ),
)

SO_NETNS_COOKIE = 71


class Steer(Datapath):
    name = "steer"
    look = Look(60, "#0072B2", hatch="----", marker="v")
    reference = "direct"
    programs = ("steer", "names")
    pairs = frozenset(Pair)

    def attach(self, wiring: Wiring, owner: Scope) -> Attachment:
        return _Attachment(wiring, owner)


class _Attachment(EbpfAttachment):
    def __init__(self, wiring: Wiring, owner: Scope) -> None:
        super().__init__("steer", REASONS, wiring, owner, local=ALIASES)

    def _attach_lo(self) -> None:
        super()._attach_lo()
        self._steer_sockets()

    def attach_deferred(self) -> None:
        """Have ports run their programs by themselves, ahead of the filters, where Linux can."""
        if not bpf.has_tcx():
            return
        self._programs.make_calls(self._links, len(AT_PORTS))
        self._programs.set_calls(self._at_work, AT_PORTS)
        for port in self._wiring.ports:
            for number, (name, hook) in enumerate(AT_PORTS.items()):
                with self._programs.entry(name, self._class_of(port.n), number) as entry:
                    bpf.attach_tcx(self._wiring.netns, port.ifindex, hook, entry)

    def _replace(self, programs: ProgramSet, lock: threading.RLock) -> None:
        super()._replace(programs, lock)
        self._programs.set_calls(programs, AT_PORTS)

    def _steer_sockets(self) -> None:
        """Attach to the pod's cgroup, and say which namespace is the pod's."""
        try:
            cookie = namespaces.inside(self._wiring.netns, _cookie)
        except OSError as e:
            if e.errno != errno.ENOPROTOOPT:
                raise
            self._show_names()
            return
        pins = str(self._programs.pins)
        self._scope.defer(forget_namespace, pins=pins, slot=self._programs.slot, cookie=cookie)
        _namespaces(self._programs)[cookie,] = (self._programs.slot,)
        for hook in HOOKS:
            bpf.attach_cgroup(self._scope, self._wiring.cgroup, hook, self._programs.program(hook))


def _cookie() -> int:
    """The network namespace's cookie."""
    with socket.socket() as any_socket:
        option = any_socket.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8)
    return int.from_bytes(option, sys.byteorder)


def _namespaces(programs: ProgramSet) -> bpf.Map:
    return programs.map("namespaces", "=Q", "=I")


def forget_namespace(pins: str, slot: int, cookie: int) -> None:
    """Steer no more sockets of a namespace; programs that are gone are no error."""
    if Path(pins, "users").exists():
        programs = ProgramSet(Path(pins), slot)
        with suppress(KeyError):
            del _namespaces(programs)[cookie,]
        programs.close()


DATAPATH = Steer()
