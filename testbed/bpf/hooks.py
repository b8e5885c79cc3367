"""Where programs run: at the tc hooks of links (clsact), and in cgroups."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from testbed import netlink
from testbed.bpf import syscall
from testbed.bpf.bytecode import ATTACH_TYPES
from testbed.ledger import Scope
from testbed.model import Error

CLSACT, INGRESS, EGRESS = 0xFFFFFFF1, 0xFFFFFFF2, 0xFFFFFFF3
"""Handles (linux/pkt_sched.h) of the qdisc clsact and its two hooks."""
ETH_P_ALL = 3
RTM_NEWQDISC, RTM_DELQDISC, RTM_NEWTFILTER = 36, 37, 44
TCA_KIND, TCA_OPTIONS, TCA_BPF_CLASSID, TCA_BPF_FD, TCA_BPF_NAME, TCA_BPF_FLAGS = 1, 2, 3, 6, 7, 8


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
    kind, options = _attribute(TCA_KIND, b"bpf\0"), b"".join((
        _attribute(TCA_BPF_FD, struct.pack("=I", program)),
        _attribute(TCA_BPF_NAME, name.encode() + b"\0"),
        _attribute(TCA_BPF_CLASSID, struct.pack("=I", classid)),
        _attribute(TCA_BPF_FLAGS, struct.pack("=I", 1)),  # TCA_BPF_FLAG_ACT_DIRECT
    ))  # fmt: skip

    def attach() -> None:
        with suppress(FileExistsError):  # the other hook has it already
            _tc(RTM_NEWQDISC, ifindex, _attribute(TCA_KIND, b"clsact\0"), parent=CLSACT)
        _tc(RTM_NEWTFILTER, ifindex, kind + _attribute(TCA_OPTIONS, options), parent=hook,
            handle=1, info=1 << 16 | socket.htons(ETH_P_ALL))  # fmt: skip

    netlink.inside(netns, attach)


def detach_tc(netns: str, ifindex: int) -> None:
    """Take all our programs off a link. A link or namespace that is gone is no error."""

    def detach() -> None:
        _tc(RTM_DELQDISC, ifindex, _attribute(TCA_KIND, b"clsact\0"), parent=CLSACT)

    try:
        netlink.inside(netns, detach)
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
    runs = id in _running(cgroup, name)
    if runs and not owner.goes_on:
        raise Error(f"{cgroup}, or one above it, is the cgroup of another pod with this datapath",
                    hint="give the pod's own")  # fmt: skip
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


def _running(cgroup: Path, name: str) -> list[int]:
    """Ids of the programs at a hook that run for a cgroup, also those attached above it."""
    ids = (ctypes.c_uint32 * 64)()  # BPF_CGROUP_MAX_PROGS
    with _directory(cgroup) as fd:
        answer = syscall.bpf(syscall.QUERY, "=IIIxxxxQI", fd, ATTACH_TYPES[name], 1,
                             syscall.address(ids), len(ids))  # fmt: skip
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
