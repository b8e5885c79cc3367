"""Plain operations of the machine, which benchmarks are measured against. None is code of ours."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pyroute2 import IPRoute

from testbed.bpf.syscall import load_program

SCHED_CLS = 3
"""enum bpf_prog_type."""


@contextmanager
def redirect_program() -> Iterator[int]:
    """Descriptor of a tc program that does nothing but redirect: `return bpf_redirect(1, 0)`."""
    code = bytes.fromhex(
        "b701000001000000"  # r1 = 1
        "b702000000000000"  # r2 = 0
        "8500000017000000"  # call BPF_FUNC_redirect (23)
        "9500000000000000"  # exit
    )
    program = load_program("redirect", SCHED_CLS, 0, code)
    try:
        yield program
    finally:
        os.close(program)


def netlink_round_trips(ip: IPRoute, links: int) -> Callable[[], None]:
    """Make so many veth pairs, one after the other, and take each away again."""

    def trips() -> None:
        for _ in range(links):
            ip.link("add", ifname="reference", kind="veth", peer={"ifname": "other"})
            ip.link("del", ifname="reference")

    return trips


def file_write(path: Path, size_bytes: int) -> Callable[[], None]:
    """Write a new file of so many bytes."""
    data = os.urandom(size_bytes)

    def write() -> None:
        path.unlink(missing_ok=True)
        path.write_bytes(data)

    return write


def start_of_python() -> None:
    """Start a Python that ends at once."""
    subprocess.run([sys.executable, "-S", "-c", ""], check=True)
