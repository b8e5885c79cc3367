"""The pods that stand on this host, asked through their keepers' sockets; builds nothing.

A keeper listens at an abstract Unix socket named after its pod: the kernel's list of sockets is the
list of pods, and no file has to be kept true. Questions and answers are one line of JSON each.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

from testbed.model import Error

PREFIX = "testbed/pod/"
PATIENCE_S = 5.0
DOWN_PATIENCE_S = 60.0


def socket_name(pod: str) -> str:
    """The socket of a pod's keeper, in the abstract namespace (unix(7))."""
    return f"\0{PREFIX}{pod}"


def names() -> list[str]:
    """All pods of this host, from its list of Unix sockets."""
    paths = (line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines())
    return sorted({p.removeprefix(f"@{PREFIX}") for p in paths if p.startswith(f"@{PREFIX}")})


def status(pod: str) -> dict[str, Any]:
    """What the keeper knows of its pod, as `ps --json` prints it."""
    return _ask(pod, "status", PATIENCE_S)


def all() -> list[dict[str, Any]]:
    """Status of every pod."""
    found = []
    for name in names():
        with suppress(Error):  # it may go down meanwhile
            found.append(status(name))
    return found


def workloads(pod: str, name: str | None) -> list[dict[str, Any]]:
    """Status of one workload of a pod, or of all, in their order. Raises `Error` if it has none."""
    there = status(pod)["workloads"]
    chosen = [w for w in there if name in (None, w["name"])]
    if not chosen:
        raise Error(f"pod {pod!r} has no workload {name!r}",
                    hint=f"it has {', '.join(w['name'] for w in there)}")  # fmt: skip
    return chosen


def describe(pod: str) -> dict[str, Any]:
    """Its wiring: links with addresses and programs, counters, events."""
    return _ask(pod, "describe", PATIENCE_S)


def down(pod: str) -> None:
    """Take a pod down; returns when nothing of it is left."""
    _ask(pod, "down", DOWN_PATIENCE_S)


def trusted(peer: socket.socket) -> bool:
    """Whether the other end is root or this user: abstract sockets have no permissions."""
    size = struct.calcsize("iii")
    _, uid, _ = struct.unpack("iii", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return uid in (0, os.getuid())


def _ask(pod: str, question: str, patience_s: float) -> dict[str, Any]:
    """Raises `Error` if there is no such pod, or its keeper has an error to tell."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.settimeout(patience_s)
        try:
            asking.connect(socket_name(pod))
            if not trusted(asking):
                raise Error(f"the socket of pod {pod!r} is another user's")
            asking.sendall(json.dumps({"ask": question}).encode() + b"\n")
            line = asking.makefile("rb").readline()
        except TimeoutError as e:
            raise Error(f"the keeper of pod {pod!r} does not answer") from e
        except OSError as e:
            raise Error(f"no pod {pod!r}", hint=f"there are: {', '.join(names()) or 'none'}") from e
    if not line:
        raise Error(f"the keeper of pod {pod!r} ended", hint="testbed clean")
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise Error(answer["error"], answer.get("hint"))
    return answer
