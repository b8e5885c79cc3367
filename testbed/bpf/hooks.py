"""Where programs run: at the tc hooks of links, and in cgroups.

A link comes to a program by a filter of its qdisc clsact. Since Linux 6.6 it can also run one by
itself (tcx), ahead of any filter: that takes 40 ns in place of 120, which is more than what our
programs take for packets that they leave alone. But whoever attaches or detaches one waits for a
grace period of RCU, some 10 ms, while nobody else can change links.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

from pyroute2 import IPRoute

from testbed.bpf import syscall
from testbed.bpf.bytecode import ATTACH_TYPES
from testbed.host import namespaces
from testbed.host.ledger import Scope
from testbed.model.errors import Error

INGRESS, EGRESS = 46, 47
"""Hooks of a link: enum bpf_attach_type, BPF_TCX_INGRESS and BPF_TCX_EGRESS."""
CLSACT, AT_CLSACT = 0xFFFFFFF1, {INGRESS: 0xFFFFFFF2, EGRESS: 0xFFFFFFF3}
"""Handles (linux/pkt_sched.h) of the qdisc clsact and its two hooks."""
ETH_P_ALL = 3
RTM_NEWQDISC, RTM_DELQDISC, RTM_NEWTFILTER = 36, 37, 44
TCA_KIND, TCA_OPTIONS, TCA_BPF_CLASSID, TCA_BPF_FD, TCA_BPF_NAME, TCA_BPF_FLAGS = 1, 2, 3, 6, 7, 8
BPF_F_REPLACE = 4


def attach_tc(
    owner: Scope, netns: str, ifindex: int, hook: int, program: int, name: str, classid: int
) -> None:
    """Run a tc program on a link's packets (`hook`: INGRESS or EGRESS), with a class to read.

    One that is there already is replaced at once. Only the 16 bits of the class's minor number
    reach it. rtnetlink by hand: pyroute2 needs five times as long for it, and a pod has a dozen.
    """
    owner.defer(detach_tc, netns=netns, ifindex=ifindex)
    replace_tc(netns, ifindex, hook, program, name, classid)


def replace_tc(netns: str, ifindex: int, hook: int, program: int, name: str, classid: int) -> None:
    """Put a program into the place of the one that `attach_tc` attached: no packet is missed."""
    kind, options = (
        _attribute(TCA_KIND, b"bpf\0"),
        b"".join(
            (
                _attribute(TCA_BPF_FD, struct.pack("=I", program)),
                _attribute(TCA_BPF_NAME, name.encode() + b"\0"),
                _attribute(TCA_BPF_CLASSID, struct.pack("=I", classid)),
                _attribute(TCA_BPF_FLAGS, struct.pack("=I", 1)),  # TCA_BPF_FLAG_ACT_DIRECT
            )
        ),
    )

    def attach() -> None:
        with suppress(FileExistsError):  # the other hook has it already
            _tc(RTM_NEWQDISC, ifindex, _attribute(TCA_KIND, b"clsact\0"), parent=CLSACT)
        _tc(
            RTM_NEWTFILTER,
            ifindex,
            kind + _attribute(TCA_OPTIONS, options),
            parent=AT_CLSACT[hook],
            handle=1,
            info=1 << 16 | socket.htons(ETH_P_ALL),
        )

    namespaces.inside(netns, attach)


@cache
def has_tcx() -> bool:
    """Whether links can run programs by themselves."""
    try:
        with _running(1, INGRESS):
            return True
    except OSError:
        return False


def attach_tcx(netns: str, ifindex: int, hook: int, entry: int) -> None:
    """Have a link run a program by itself, in place of one of that name, until the link goes.

    One that is gone already is no error.
    """

    def attach() -> None:
        with _running(ifindex, hook) as running:
            old = running.get(syscall.program_name(entry), 0)
            flags = BPF_F_REPLACE if old else 0
            syscall.call(syscall.ATTACH, "=IIIII", ifindex, entry, hook, flags, old)

    try:
        namespaces.inside(netns, attach)
    except OSError as e:
        if e.errno != errno.ENODEV:
            raise


def running_tc(netns: str, ip: IPRoute, ifindex: int) -> list[str]:
    """The tc programs of a link as HOOK:NAME, whoever attached them; `ip` is in its namespace."""
    hooks = {"ingress": INGRESS, "egress": EGRESS}

    def by_tcx() -> Iterator[str]:
        for at, hook in hooks.items():
            with _running(ifindex, hook) as programs:
                yield from (f"{at}:{name}" for name in programs)

    return [
        *(namespaces.inside(netns, lambda: list(by_tcx())) if has_tcx() else ()),
        *(
            f"{at}:{options.get_attr('TCA_BPF_NAME')}"
            for at, hook in hooks.items()
            for filter in ip.get_filters(index=ifindex, parent=AT_CLSACT[hook])
            if (options := filter.get("options"))
        ),
    ]


@contextmanager
def _running(ifindex: int, hook: int) -> Iterator[dict[str, int]]:
    """File descriptors of what a link of this thread's namespace runs by itself, by name."""
    ids = (ctypes.c_uint32 * 64)()  # BPF_MPROG_MAX
    answer = syscall.bpf(
        syscall.QUERY, "=IIIxxxxQI", ifindex, hook, 0, syscall.address(ids), len(ids)
    )
    with ExitStack() as opened:
        programs = {}
        for id in ids[: struct.unpack_from("=4x24xI", answer)[0]]:
            fd = syscall.call(syscall.FD_BY_ID, "=I", id)
            opened.callback(os.close, fd)
            programs[syscall.program_name(fd)] = fd
        yield programs


def detach_tc(netns: str, ifindex: int) -> None:
    """Take all our programs off a link. A link or namespace that is gone is no error."""

    def detach() -> None:
        _tc(RTM_DELQDISC, ifindex, _attribute(TCA_KIND, b"clsact\0"), parent=CLSACT)

    try:
        namespaces.inside(netns, detach)
    except OSError as e:
        if e.errno not in (errno.ENODEV, errno.EINVAL, errno.ENOENT):  # EINVAL: no clsact
            raise


def _attribute(kind: int, value: bytes) -> bytes:
    """A netlink attribute (struct nlattr), padded."""
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def _tc(
    message: int,
    ifindex: int,
    attributes: bytes,
    parent: int,
    handle: int = 0xFFFF0000,
    info: int = 0,
) -> None:
    """One request about a qdisc or filter (struct tcmsg) and the kernel's answer, as OSError."""
    # NLM_F_REQUEST and _ACK; _CREATE and _EXCL, or _CREATE alone, which also replaces.
    flags = 5 | {RTM_NEWQDISC: 0x600, RTM_NEWTFILTER: 0x400}.get(message, 0)
    body = struct.pack("=BxxxiIII", socket.AF_UNSPEC, ifindex, handle, parent, info) + attributes
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink_socket:
        netlink_socket.send(struct.pack("=IHHII", 16 + len(body), message, flags, 1, 0) + body)
        code = -struct.unpack_from("=i", netlink_socket.recv(4096), 16)[0]
    if code:
        raise OSError(code, os.strerror(code))


def attach_cgroup(owner: Scope, cgroup: Path, name: str, program: int) -> None:
    """Run a cgroup program, named after its hook, for the processes of a cgroup2 directory.

    Raises `Error` if it does so for somebody else: whoever was first to detach it, would for both.
    """
    id = struct.unpack_from("=4xI", syscall.info(program, 128))[0]
    runs = id in _running_in(cgroup, name)
    if runs and not owner.continues:
        raise Error(
            f"{cgroup}, or one above it, is the cgroup of another pod with this datapath",
            hint="give the pod's own",
        )
    owner.defer(detach_cgroup, cgroup=str(cgroup), name=name, id=id)
    if not runs:
        _change_cgroup(syscall.ATTACH, cgroup, name, program)


def detach_cgroup(cgroup: str, name: str, id: int) -> None:
    """Take a program, known by its id, off a cgroup. That either is gone is no error."""
    try:
        program = syscall.call(syscall.FD_BY_ID, "=I", id)
    except FileNotFoundError:
        return
    try:
        _change_cgroup(syscall.DETACH, Path(cgroup), name, program)
    except FileNotFoundError:
        pass  # the cgroup, or it was not attached
    finally:
        os.close(program)


def _running_in(cgroup: Path, name: str) -> list[int]:
    """Ids of the programs at a hook that run for a cgroup, also those attached above it."""
    ids = (ctypes.c_uint32 * 64)()  # BPF_CGROUP_MAX_PROGS
    with _directory(cgroup) as fd:
        answer = syscall.bpf(
            syscall.QUERY, "=IIIxxxxQI", fd, ATTACH_TYPES[name], 1, syscall.address(ids), len(ids)
        )
    return ids[: struct.unpack_from("=4x24xI", answer)[0]]


def _change_cgroup(command: int, cgroup: Path, name: str, program: int) -> None:
    with _directory(cgroup) as fd:
        flags = 2 if command == syscall.ATTACH else 0  # BPF_F_ALLOW_MULTI: others may attach theirs
        syscall.call(command, "=IIII", fd, program, ATTACH_TYPES[name], flags)


@contextmanager
def _directory(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)
