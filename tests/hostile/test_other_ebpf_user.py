"""Another user of eBPF on the host: its programs and ours work beside each other."""

from __future__ import annotations

import errno
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from testbed.bpf import hooks, syscall
from testbed.datapaths.ebpf.attachment import EbpfAttachment
from testbed.host import namespaces
from testbed.model.terms import Family
from testbed.pods import reconciler
from testbed.pods.reconciler import Reconciler
from tests.integration.conftest import Build
from tests.integration.sockets import Bench, Pair, wait_until

pytestmark = pytest.mark.root

CGROUP_SOCKOPT, CGROUP_SETSOCKOPT = 25, 22
"""Type and attach type of programs at setsockopt(2) (linux/bpf.h)."""
ALLOW_MULTI, SCHED_CLS = 2, 3
THEIRS = 5


def instruction(code: int, to: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> bytes:
    return struct.pack("=BBhi", code, source << 4 | to, offset, value)


PRIORITY = b"".join(
    (
        instruction(0x79, 2, 1, 8),  # r2 = ctx->optval
        instruction(0x79, 3, 1, 16),  # r3 = ctx->optval_end
        instruction(0xBF, 4, 2),  # r4 = r2 + 4
        instruction(0x07, 4, value=4),
        instruction(0x2D, 4, 3, 3),  # too short
        instruction(0x61, 5, 1, 28),  # r5 = ctx->optname
        instruction(0x55, 5, 0, 1, socket.SO_PRIORITY),  # another option
        instruction(0x62, 2, value=THEIRS),  # *optval = THEIRS
        instruction(0xB7, 0, value=1),  # proceed
        instruction(0x95),
    )
)
"""A program that has its own opinion of SO_PRIORITY."""


UNSPECIFIC = instruction(0xB7, 0, value=-1) + instruction(0x95)
"""A tc program that leaves every packet to the next one (TC_ACT_UNSPEC)."""


@contextmanager
def attached(cgroup: Path, flags: int = ALLOW_MULTI) -> Iterator[None]:
    program = syscall.load_program("theirs", CGROUP_SOCKOPT, CGROUP_SETSOCKOPT, PRIORITY)
    at = os.open(cgroup, os.O_RDONLY)
    try:
        syscall.call(syscall.ATTACH, "=IIII", at, program, CGROUP_SETSOCKOPT, flags)
        yield
        syscall.call(syscall.DETACH, "=III", at, program, CGROUP_SETSOCKOPT)
    finally:
        os.close(at)
        os.close(program)


def priority_set(cgroup: Path) -> int:
    """What SO_PRIORITY is of a process in a cgroup that sets it to 1."""
    script = (
        "import socket as s; x = s.socket(); x.setsockopt(s.SOL_SOCKET, s.SO_PRIORITY, 1); "
        "print(x.getsockopt(s.SOL_SOCKET, s.SO_PRIORITY))"
    )
    join = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
    command = ["sh", "-c", join, str(cgroup), sys.executable, "-c", script]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("who", ["theirs first", "ours first"])
def test_what_another_program_makes_of_a_socket_option_holds(build: Build, who: str) -> None:
    name = f"options-{who.partition(' ')[0]}"
    pod = build(name, datapath="steer")
    group = pod.cgroup
    if who == "theirs first":
        pod.attachment.detach()
        with attached(group):
            pod.attachment = pod.datapath.attach(pod.wiring(), pod._owner)
            assert priority_set(group) == THEIRS
        return
    with attached(group):
        assert priority_set(group) == THEIRS
    assert priority_set(group) == 1


def tc(netns: str, *words: str) -> str:
    command = ["nsenter", f"--net={namespaces.NETNS / netns}", "tc", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("hook", ["ingress", "egress"])
def test_filters_of_others_outlive_ours(build: Build, when: str, hook: str) -> None:
    """Some of the same kind and priority, attached to a guest's port before or after ours."""
    pod = build(f"filters-{when}-{hook}", datapath="steer")
    at = ("dev", "g1", hook, "prio", "1", "handle", "1", "protocol", "all")
    theirs = Path("/sys/fs/bpf") / f"theirs-{os.getpid()}"
    program = syscall.load_program("theirs", SCHED_CLS, 0, UNSPECIFIC)
    syscall.pin(program, theirs)
    try:
        if when == "before":
            pod.attachment.detach()
            tc(pod.netns, "qdisc", "add", "dev", "g1", "clsact")
        tc(pod.netns, "filter", "add", *at, "bpf", "da", "pinned", str(theirs))
        if when == "before":
            pod.attachment = pod.datapath.attach(pod.wiring(), pod._owner)
        shown = tc(pod.netns, "filter", "show", "dev", "g1", hook)
        assert "theirs" in shown
        assert f"port_{hook}" in shown
        with Bench(pod).connected(Pair(0, 1), Family.IPV4) as (near, far):
            near.send(b"!")
            assert far.recv(1) == b"!"
        pod.attachment.detach()
        shown = tc(pod.netns, "filter", "show", "dev", "g1", hook)
        assert "theirs" in shown
        assert "port_" not in shown
    finally:
        theirs.unlink()
        os.close(program)


@pytest.mark.parametrize("datapath", ["steer", "capture", "broadcast"])
def test_tc_programs_that_others_remove_are_attached_again(build: Build, datapath: str) -> None:
    pod = build(f"cleared-{datapath}", datapath=datapath)
    with Reconciler(pod) as watching, Bench(pod).connected(Pair(0, 1), Family.IPV4) as ends:
        tc(pod.links.link_netns, "qdisc", "del", "dev", "g1", "clsact")
        tc(pod.netns, "qdisc", "del", "dev", "lo", "clsact")
        wait_until(lambda: bool(watching.mended) and not pod.missing_programs(), "they are back")
        for sender, receiver in (ends, ends[::-1]):
            sender.send(b"!")
            assert receiver.recv(1) == b"!"


@pytest.mark.parametrize("datapath", ["steer", "capture"])
def test_cgroup_programs_that_others_detach_are_attached_again(
    build: Build, datapath: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconciler, "CHECK_S", 0.1)
    pod = build(f"detached-{datapath}", datapath=datapath)
    assert isinstance(pod.attachment, EbpfAttachment)
    with Reconciler(pod) as watching:
        attached = pod.attachment._at_cgroup
        assert "getpeername4" in attached
        for hook, programs in attached.items():
            hooks.detach_cgroup(str(pod.cgroup), hook, hooks._id(programs.program(hook)))
        wait_until(lambda: bool(watching.mended) and not pod.missing_programs(), "they are back")
        assert set(watching.mended) <= set(attached)


def test_a_link_gets_its_programs_though_the_cgroup_refuses_ours(build: Build) -> None:
    """Somebody attaches a program where ours was, and lets no other beside it."""
    pod = build("refused", datapath="steer")
    assert isinstance(pod.attachment, EbpfAttachment)
    ours = pod.attachment._at_cgroup["setsockopt"].program("setsockopt")
    hooks.detach_cgroup(str(pod.cgroup), "setsockopt", hooks._id(ours))
    with attached(pod.cgroup, flags=0):
        pod.links.link_ip.link("del", ifname="g1")
        with pytest.raises(OSError, match=os.strerror(errno.EPERM)):
            pod.mend()
        assert pod.missing_programs() == {"setsockopt"}
        for hook in ("ingress", "egress"):
            assert f"port_{hook}" in tc(pod.netns, "filter", "show", "dev", "g1", hook)
