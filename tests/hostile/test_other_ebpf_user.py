"""Another user of eBPF on the host: its programs and ours work beside each other."""

from __future__ import annotations

import errno
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from testbed import bpf
from testbed.bpf import hooks, syscall
from testbed.datapaths.ebpf.attachment import EbpfAttachment
from testbed.host import namespaces
from testbed.model.addresses import pod_link
from testbed.model.terms import Family, Transport
from testbed.pods import reconciler
from testbed.pods.reconciler import Reconciler
from tests.integration.conftest import Build
from tests.integration.sockets import Bench, Pair, wait_until

pytestmark = pytest.mark.root

CGROUP_SOCKOPT, CGROUP_SETSOCKOPT = 25, 22
"""Type and attach type of programs at setsockopt(2) (linux/bpf.h)."""
ALLOW_MULTI, SCHED_CLS, ARRAY = 2, 3, 2
BEFORE, AFTER = 8, 16
"""Flags of tcx: where among its programs."""
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


def counts(map_fd: int) -> bytes:
    """A tc program that counts packets in the map, and leaves them to the next one."""
    return b"".join(
        (
            instruction(0x62, 10, offset=-4),  # u32 key = 0, on the stack
            instruction(0xBF, 2, 10),
            instruction(0x07, 2, value=-4),  # r2 = &key
            instruction(0x18, 1, 1, value=map_fd),  # r1 = the map
            instruction(0),
            instruction(0x85, value=1),  # bpf_map_lookup_elem
            instruction(0x15, 0, 0, 2),
            instruction(0xB7, 1, value=1),
            instruction(0xDB, 0, 1),  # *count += 1, atomically
            UNSPECIFIC,
        )
    )


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


@contextmanager
def pinned(program: int) -> Iterator[str]:
    """Path of a program in bpffs."""
    path = Path("/sys/fs/bpf") / f"theirs-{os.getpid()}"
    syscall.pin(program, path)
    try:
        yield str(path)
    finally:
        path.unlink()


def tc(netns: str, *words: str) -> str:
    command = ["nsenter", f"--net={namespaces.NETNS / netns}", "tc", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("hook", ["ingress", "egress"])
def test_filters_of_others_outlive_ours(build: Build, when: str, hook: str) -> None:
    """Some of the same kind and priority, attached to a guest's port before or after ours."""
    pod = build(f"filters-{when}-{hook}", datapath="steer")
    at = ("dev", "g1", hook, "prio", "1", "handle", "1", "protocol", "all")
    program = syscall.load_program("theirs", SCHED_CLS, 0, UNSPECIFIC)
    with pinned(program) as theirs:
        if when == "before":
            pod.attachment.detach()
            tc(pod.netns, "qdisc", "add", "dev", "g1", "clsact")
        tc(pod.netns, "filter", "add", *at, "bpf", "da", "pinned", theirs)
        if when == "before":
            pod.attachment = pod.datapath.attach(pod.wiring(), pod._owner)
        port = pod.wiring().ports[0].ifindex
        assert f"{hook}:port_{hook}" in bpf.running_tc(pod.netns, pod.links.link_ip, port)
        assert "theirs" in tc(pod.netns, "filter", "show", "dev", "g1", hook)
        with Bench(pod).connected(Pair(0, 1), Family.IPV4) as (near, far):
            near.send(b"!")
            assert far.recv(1) == b"!"
        pod.attachment.detach()
        shown = tc(pod.netns, "filter", "show", "dev", "g1", hook)
        assert "theirs" in shown
        assert "port_" not in shown
    os.close(program)


@pytest.mark.parametrize("datapath", ["steer", "capture"])
@pytest.mark.parametrize("how", ["filter", "tcx before ours", "tcx after ours"])
def test_others_see_what_ours_let_pass(build: Build, datapath: str, how: str) -> None:
    """At the port of a guest that sends to the pod's own address on the link."""
    if how != "filter" and not hooks.has_tcx():
        pytest.skip("links run programs by themselves: Linux 6.6")
    pod = build(f"seen-{datapath}-{how.replace(' ', '-')}", datapath=datapath)
    pod.attach_deferred()
    netns, port = pod.links.link_netns, pod.wiring().ports[0].ifindex
    map_fd = syscall.create_map("seen", (ARRAY, 4, 8, 1, 0))
    seen = syscall.Map(map_fd, struct.Struct("=I"), struct.Struct("=Q"))
    program = syscall.load_program("theirs", SCHED_CLS, 0, counts(map_fd))

    def attach() -> None:
        where = BEFORE if how == "tcx before ours" else AFTER
        syscall.call(syscall.ATTACH, "=IIII", port, program, hooks.INGRESS, where)

    try:
        if how == "filter":
            with suppress(subprocess.CalledProcessError):  # it is there, with ours
                tc(netns, "qdisc", "add", "dev", "g1", "clsact")
            with pinned(program) as theirs:
                at = ("dev", "g1", "ingress", "prio", "2")
                tc(netns, "filter", "add", *at, "bpf", "da", "pinned", theirs)
        else:
            namespaces.inside(netns, attach)
        bench = Bench(pod)
        for family in Family:
            seen[0,] = (0,)
            with bench.open(1, family, Transport.UDP) as guest:
                guest.sendto(b"!", (str(pod_link(family)), 9))
            wait_until(lambda: seen[0,] > (0,), "they see it")
            with bench.connected(Pair(1, 0), family) as (near, far):
                near.send(b"!")
                assert far.recv(1) == b"!"
    finally:
        os.close(program)
        os.close(map_fd)


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


def test_a_program_that_others_remove_from_tcx_is_attached_again(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hooks.has_tcx():
        pytest.skip("links run programs by themselves: Linux 6.6")
    monkeypatch.setattr(reconciler, "CHECK_S", 0.1)
    pod = build("tcx", datapath="steer")
    pod.attach_deferred()
    port = pod.wiring().ports[0].ifindex

    def remove() -> None:
        with hooks._running(port, hooks.INGRESS) as programs:
            ours = programs["port_ingress"]
            syscall.call(syscall.DETACH, "=III", port, ours, hooks.INGRESS)

    with Reconciler(pod) as watching:
        namespaces.inside(pod.netns, remove)
        wait_until(lambda: bool(watching.mended) and not pod.missing_programs(), "it is back")
        running = bpf.running_tc(pod.netns, pod.links.link_ip, port)
        assert running == ["ingress:port_ingress", "egress:port_egress"]


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
