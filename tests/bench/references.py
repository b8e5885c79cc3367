"""Plain operations of the machine, which benchmarks are measured against. None is code of ours."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

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


def netlink_round_trips(ip: IPRoute, links: int) -> Callable[[], float]:
    """Make so many veth pairs, in seconds.

    That they go is not in it: then the kernel waits for all CPUs, at times four times as long.
    """

    def trips() -> float:
        began = perf_counter()
        for i in range(links):
            ip.link("add", ifname=f"reference{i}", kind="veth", peer={"ifname": f"other{i}"})
        took_s = perf_counter() - began
        for i in range(links):
            ip.link("del", ifname=f"reference{i}")
        return took_s

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
