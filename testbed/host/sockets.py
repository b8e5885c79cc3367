"""Lists the served ports of a namespace, and ends TCP connections in it."""

from __future__ import annotations

import subprocess
from pathlib import Path

from testbed.model.terms import Transport


def kill_connections(netns: str, expression: str) -> None:
    """Reset the TCP connections that match an `ss` filter (SOCK_DESTROY)."""
    command = ["nsenter", f"--net=/run/netns/{netns}", "ss", "--tcp", "--kill", expression]
    subprocess.run(command, check=True, capture_output=True)


def served_ports() -> set[tuple[Transport, int]]:
    """Ports with a listening TCP socket or a bound, unconnected UDP socket.

    Those of this thread's network namespace. Source: /proc/net/tcp and its kin (proc_net_tcp(5)).
    """
    served = set()
    for transport, state in ((Transport.TCP, "0A"), (Transport.UDP, "07")):
        for suffix in ("", "6"):
            table = Path(f"/proc/thread-self/net/{transport}{suffix}").read_text()
            for line in table.splitlines()[1:]:
                _, local, _, is_in, *_ = line.split()
                if is_in == state:
                    served.add((transport, int(local.rpartition(":")[2], 16)))
    return served
