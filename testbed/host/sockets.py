"""Lists the served ports of a namespace, and ends TCP connections in it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from testbed.model.terms import Transport


def kill_connections(netns: str, expression: str) -> None:
    """Reset the TCP connections that match an `ss` filter (SOCK_DESTROY)."""
    command = ["nsenter", f"--net=/run/netns/{netns}", "ss", "--tcp", "--kill", expression]
    subprocess.run(command, check=True, capture_output=True, process_group=0)


def served_ports() -> set[tuple[Transport, int]]:
    """Ports of this thread's network namespace that are served.

    They have a listening TCP socket, or a bound, unconnected UDP socket.
    """
    serving = {Transport.TCP: "0A", Transport.UDP: "07"}
    return {(t, each.port) for t in serving for each in rows(t) if each.state == serving[t]}


class Row(NamedTuple):
    """What the kernel's table of sockets says about one."""

    port: int
    state: str
    """Two hexadecimal digits."""
    uid: int
    """User that it belongs to."""


def rows(transport: Transport) -> Iterator[Row]:
    """Row of each socket of this thread's network namespace, at any address.

    Source: /proc/net/tcp and its kin (proc_net_tcp(5)). A kernel without IPv6 has no tables of it.
    """
    for suffix in ("", "6"):
        with suppress(FileNotFoundError):
            table = Path(f"/proc/thread-self/net/{transport}{suffix}").read_text()
            for line in table.splitlines()[1:]:
                _, local, _, state, _, _, _, uid, *_ = line.split()
                yield Row(int(local.rpartition(":")[2], 16), state, int(uid))
