"""Another user of eBPF on the host: its programs and ours work beside each other."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from testbed.bpf import syscall
from tests.integration.conftest import Build

pytestmark = pytest.mark.root

CGROUP_SOCKOPT, CGROUP_SETSOCKOPT = 25, 22
"""Type and attach type of programs at setsockopt(2) (linux/bpf.h)."""
ALLOW_MULTI = 2
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


@contextmanager
def attached(cgroup: Path) -> Iterator[None]:
    program = syscall.load_program("theirs", CGROUP_SOCKOPT, CGROUP_SETSOCKOPT, PRIORITY)
    at = os.open(cgroup, os.O_RDONLY)
    try:
        syscall.call(syscall.ATTACH, "=IIII", at, program, CGROUP_SETSOCKOPT, ALLOW_MULTI)
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
