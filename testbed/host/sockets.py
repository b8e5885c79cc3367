"""Sockets of a namespace: which ports are served, and connections that are ended."""

from __future__ import annotations

import subprocess
from pathlib import Path

from testbed.model.terms import Transport


def kill_connections(netns: str, expression: str) -> None:
    """End TCP connections that match an `ss` filter, as resets do (SOCK_DESTROY)."""
    command = ["nsenter", f"--net=/run/netns/{netns}", "ss", "--tcp", "--kill", expression]
    subprocess.run(command, check=True, capture_output=True)


def served_ports() -> set[tuple[Transport, int]]:
    """What is listened to (TCP) or bound (UDP) in this thread's namespace (proc_net_tcp)."""
    served = set()
    for transport, state in ((Transport.TCP, "0A"), (Transport.UDP, "07")):
        for suffix in ("", "6"):
            table = Path(f"/proc/thread-self/net/{transport}{suffix}").read_text()
            for line in table.splitlines()[1:]:
                _, local, _, is_in, *_ = line.split()
                if is_in == state:
                    served.add((transport, int(local.rpartition(":")[2], 16)))
    return served
