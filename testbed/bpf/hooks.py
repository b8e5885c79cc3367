"""Attaches eBPF programs to links (tc filters, tcx) and to cgroups.

A link runs a tc program by a filter of its qdisc clsact. Since Linux 6.6 it can also run one
directly (tcx), ahead of all filters. That takes 40 ns instead of 120 ns per packet. The difference
is more than what our programs take for packets that they leave alone. But attaching and detaching
by tcx waits for an RCU grace period, some 10 ms, during which nobody else can change links. So
programs are attached by filters first, and by tcx in their place later.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Iterator, Mapping
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
RTM_NEWQDISC, RTM_DELQDISC, RTM_NEWTFILTER, RTM_DELTFILTER, RTM_GETTFILTER = 36, 37, 44, 45, 46
NLM_F_REQUEST, NLM_F_DUMP = 0x1, 0x300
FILTER, PRIORITY = 0x7B, 1 << 16 | socket.htons(ETH_P_ALL)
"""Handle of our filters, which others hardly choose, and their priority and protocol."""
TCA_KIND, TCA_OPTIONS, TCA_BPF_CLASSID, TCA_BPF_FD, TCA_BPF_NAME, TCA_BPF_FLAGS = 1, 2, 3, 6, 7, 8
BPF_F_REPLACE, BPF_F_BEFORE = 4, 8


def attach_tc(
    owner: Scope, netns: str, ifindex: int, hook: int, program: int, name: str, classid: int
) -> None:
    """Attach a tc program to a link at a hook (INGRESS or EGRESS) by a filter that sets a class.

    A program that is attached already is replaced atomically. The program reads the minor number
    of the class, 16 bits. rtnetlink is spoken by hand, since pyroute2 takes five times as long, and
    a pod has a dozen programs.
    """
    owner.defer(detach_tc, netns=netns, ifindex=ifindex)
    replace_tc(netns, ifindex, hook, program, name, classid)


def replace_tc(netns: str, ifindex: int, hook: int, program: int, name: str, classid: int) -> None:
    """Attach a program at the place of `attach_tc`, or replace the one that is attached there.

    While it is replaced, no packet passes without a program.
    """
    options = b"".join(
        (
            _attribute(TCA_BPF_FD, struct.pack("=I", program)),
            _attribute(TCA_BPF_NAME, name.encode() + b"\0"),
            _attribute(TCA_BPF_CLASSID, struct.pack("=I", classid)),
            _attribute(TCA_BPF_FLAGS, struct.pack("=I", 1)),  # TCA_BPF_FLAG_ACT_DIRECT
        )
    )

    def attach() -> None:
        with suppress(FileExistsError):  # the other hook has it already
            _tc(RTM_NEWQDISC, ifindex, _attribute(TCA_KIND, b"clsact\0"), parent=CLSACT)
        _tc(
            RTM_NEWTFILTER,
            ifindex,
            BPF_KIND + _attribute(TCA_OPTIONS, options),
            parent=AT_CLSACT[hook],
            handle=FILTER,
            info=PRIORITY,
        )

    namespaces.inside(netns, attach)


def attached_tc(netns: str, places: Mapping[tuple[int, int], str]) -> set[tuple[int, int]]:
    """Those places (ifindex, hook) that have our filter, or a tcx program of this name."""

    def runs(place: tuple[int, int], name: str) -> bool:
        if (FILTER, PRIORITY) in _filters(*place):
            return True
        return has_tcx() and _runs_by_tcx(*place, name)

    return namespaces.inside(netns, lambda: {at for at, name in places.items() if runs(at, name)})


def runs_by_tcx(netns: str, ifindex: int, hook: int, name: str) -> bool:
    """Whether a link that is there runs a program of this name by tcx."""
    return namespaces.inside(netns, lambda: _runs_by_tcx(ifindex, hook, name))


def _runs_by_tcx(ifindex: int, hook: int, name: str) -> bool:
    with _running(ifindex, hook) as programs:
        return name in programs


@cache
def has_tcx() -> bool:
    """Whether this kernel has tcx, by which links run programs directly (Linux 6.6)."""
    try:
        with _running(1, INGRESS):
            return True
    except OSError:
        return False


def attach_tcx(netns: str, ifindex: int, hook: int, entry: int, *, first: bool = False) -> None:
    """Attach a program to a link by tcx, until the link is removed.

    It takes the place of an attached program of the same name, or else of our filter there. With
    `first` it runs before all others, and our filter stays. A missing link is no error.
    """

    def attach() -> None:
        with _running(ifindex, hook) as running:
            old = running.get(syscall.program_name(entry), 0)
            flags = BPF_F_REPLACE if old else BPF_F_BEFORE if first else 0
            syscall.call(syscall.ATTACH, "=IIIII", ifindex, entry, hook, flags, old)
        if not first:
            _remove_filter(ifindex, hook)

    try:
        namespaces.inside(netns, attach)
    except OSError as e:
        if e.errno != errno.ENODEV:
            raise


def detach_tcx(netns: str, ifindex: int, hook: int, name: str) -> None:
    """Detach the program with this name. A missing program, link or namespace is no error."""

    def detach() -> None:
        with _running(ifindex, hook) as running:
            if name in running:
                syscall.call(syscall.DETACH, "=IIII", ifindex, running[name], hook, 0)

    try:
        namespaces.inside(netns, detach)
    except OSError as e:
        if e.errno not in (errno.ENODEV, errno.ENOENT):
            raise


def running_tc(netns: str, ip: IPRoute, ifindex: int) -> list[str]:
    """All tc programs of a link, by tcx and by filters, as HOOK:NAME.

    `ip` is a socket in the link's namespace.
    """
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
            if filter.get("kind") == "bpf" and (options := filter.get("options"))
        ),
    ]


@contextmanager
def _running(ifindex: int, hook: int) -> Iterator[dict[str, int]]:
    """File descriptors of the tcx programs of a link in this thread's namespace, by name."""
    ids = (ctypes.c_uint32 * 64)()  # BPF_MPROG_MAX
    answer = syscall.bpf(
        syscall.QUERY, "=IIIxxxxQI", ifindex, hook, 0, syscall.address(ids), len(ids)
    )
    with ExitStack() as opened:
        programs = {}
        for id in ids[: struct.unpack_from("=4x24xI", answer)[0]]:
            with suppress(FileNotFoundError):  # somebody has just detached it
                fd = syscall.call(syscall.FD_BY_ID, "=I", id)
                opened.callback(os.close, fd)
                programs[syscall.program_name(fd)] = fd
        yield programs


def detach_tc(netns: str, ifindex: int) -> None:
    """Remove the filters of `attach_tc` from a link, and its clsact if it is empty then.

    A missing link or namespace is no error.
    """

    def detach() -> None:
        for hook in AT_CLSACT:
            _remove_filter(ifindex, hook)
        if not any(any(_filters(ifindex, hook)) for hook in AT_CLSACT):
            _tc(RTM_DELQDISC, ifindex, _attribute(TCA_KIND, b"clsact\0"), parent=CLSACT)

    try:
        namespaces.inside(netns, detach)
    except OSError as e:
        if e.errno not in (errno.ENODEV, errno.EINVAL, errno.ENOENT):  # EINVAL: no clsact
            raise


def _remove_filter(ifindex: int, hook: int) -> None:
    try:
        _tc(RTM_DELTFILTER, ifindex, BPF_KIND, AT_CLSACT[hook], FILTER, PRIORITY)
    except OSError as e:
        if e.errno not in (errno.ENOENT, errno.EINVAL):  # EINVAL: no clsact
            raise


def _attribute(kind: int, value: bytes) -> bytes:
    """A netlink attribute (struct nlattr), padded."""
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


BPF_KIND = _attribute(TCA_KIND, b"bpf\0")


def _filters(ifindex: int, hook: int) -> Iterator[tuple[int, int]]:
    """Handle, and priority with protocol, of all filters of a hook, whoever attached them."""
    body = struct.pack("=BxxxiIII", socket.AF_UNSPEC, ifindex, 0, AT_CLSACT[hook], 0)
    flags = NLM_F_REQUEST | NLM_F_DUMP
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as dump:
        dump.send(struct.pack("=IHHII", 16 + len(body), RTM_GETTFILTER, flags, 1, 0) + body)
        while True:
            data, at = dump.recv(65536), 0
            while at < len(data):
                length, message = struct.unpack_from("=IH", data, at)
                if message != RTM_NEWTFILTER:  # NLMSG_DONE, or NLMSG_ERROR: there is no such link
                    return
                yield struct.unpack_from("=I4xI", data, at + 16 + 8)
                at += length + -length % 4


def _tc(
    message: int,
    ifindex: int,
    attributes: bytes,
    parent: int,
    handle: int = 0xFFFF0000,
    info: int = 0,
) -> None:
    """Send a request about a qdisc or filter (struct tcmsg). Raises OSError if it is refused."""
    # NLM_F_REQUEST and _ACK; _CREATE and _EXCL, or _CREATE alone, which also replaces.
    flags = 5 | {RTM_NEWQDISC: 0x600, RTM_NEWTFILTER: 0x400}.get(message, 0)
    body = struct.pack("=BxxxiIII", socket.AF_UNSPEC, ifindex, handle, parent, info) + attributes
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink_socket:
        netlink_socket.send(struct.pack("=IHHII", 16 + len(body), message, flags, 1, 0) + body)
        code = -struct.unpack_from("=i", netlink_socket.recv(4096), 16)[0]
    if code:
        raise OSError(code, os.strerror(code))


def attach_cgroup(owner: Scope, cgroup: Path, name: str, program: int) -> None:
    """Attach a cgroup program, named after its hook, to a cgroup2 directory.

    Raises `Error` if another pod has attached it there or above: the first of both to detach it
    would detach it for both.
    """
    runs = runs_in_cgroup(cgroup, name, program)
    if runs and not owner.continues:
        raise Error(
            f"{cgroup}, or one above it, is the cgroup of another pod with this datapath",
            hint="give the pod's own",
        )
    owner.defer(detach_cgroup, cgroup=str(cgroup), name=name, id=_id(program))
    if not runs:
        _change_cgroup(syscall.ATTACH, cgroup, name, program)


def runs_in_cgroup(cgroup: Path, name: str, program: int) -> bool:
    """Whether a program is attached to a cgroup, or to one above it."""
    return _id(program) in _running_in(cgroup, name)


def detach_cgroup(cgroup: str, name: str, id: int) -> None:
    """Detach a program, given by its id, from a cgroup. It is no error if either is gone."""
    try:
        program = syscall.call(syscall.FD_BY_ID, "=I", id)
    except FileNotFoundError:
        return
    try:
        _change_cgroup(syscall.DETACH, Path(cgroup), name, program)
    except FileNotFoundError:
        pass  # the cgroup is gone, or the program was not attached
    finally:
        os.close(program)


def _id(program: int) -> int:
    return int(struct.unpack_from("=4xI", syscall.info(program, 128))[0])


def _running_in(cgroup: Path, name: str) -> list[int]:
    """Ids of the programs at a hook that run for a cgroup, with those attached above it."""
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
