"""Datapath `steer`: eBPF directs sockets and packets to guests with links in the pod's namespace.

`bpf/steer.c` describes the programs. They are attached here: to `lo`, to guests' ports, and to the
pod's cgroup. Ports that no guest owns are left to the kernel's own loopback.

Sockets of the pod's cgroup bypass `lo`. Their programs recognize the pod's namespace by its cookie,
which user space can read since Linux 5.14. Before, and for processes outside of the cgroup, all
packets go by `lo`, and peers' names are shown as in `capture`.
"""

from __future__ import annotations

import errno
import socket
import sys
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
"""Names of the counters, in the order of `enum reason`."""

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
    """eBPF on `lo`, guests' taps and the pod's cgroup."""

    name = "steer"
    look = Look(60, "#0072B2", hatch="----", marker="v")
    reference = "direct"
    programs = ("steer", "names")
    pairs = frozenset(Pair)

    def attach(self, wiring: Wiring, owner: Scope) -> Attachment:
        return _Attachment(wiring, owner)


class _Attachment(EbpfAttachment):
    deferred = EbpfAttachment.deferred | AT_PORTS.keys()

    def __init__(self, wiring: Wiring, owner: Scope) -> None:
        super().__init__("steer", REASONS, wiring, owner, local=ALIASES)

    def _attach_lo(self) -> None:
        super()._attach_lo()
        self._steer_sockets()

    def _steer_sockets(self) -> None:
        """Attach the cgroup programs, and put the pod's namespace into their map."""
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
            self._attach_cgroup(hook, self._programs)


def _cookie() -> int:
    """Cookie of this thread's network namespace. Raises OSError before Linux 5.14."""
    with socket.socket() as any_socket:
        option = any_socket.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8)
    return int.from_bytes(option, sys.byteorder)


def _namespaces(programs: ProgramSet) -> bpf.Map:
    return programs.map("namespaces", "=Q", "=I")


def forget_namespace(pins: str, slot: int, cookie: int) -> None:
    """Remove a namespace from the map `namespaces`. It is no error if the programs are gone."""
    if Path(pins, "users").exists():
        programs = ProgramSet(Path(pins), slot)
        with suppress(KeyError):
            del _namespaces(programs)[cookie,]
        programs.close()


DATAPATH = Steer()
