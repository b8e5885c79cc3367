"""Client of pods' control sockets: lists the pods of this host, asks for status, takes them down.

The supervisor process of a pod listens at an abstract Unix socket, which is named after the pod. So
the kernel's list of sockets is the list of pods. Questions and answers are one line of JSON each
(`server`). The supervisor process also writes its status down. If it is killed, its pod is an
orphan, which stands until it is taken over (`supervisor.supervise`) or down.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testbed.host import facts, ledger
from testbed.model.errors import Error

PREFIX = "testbed/pod/"
SO_ACCEPTCON = "00010000"
"""Flags of a listening socket in /proc/net/unix (linux/net.h)."""
TIMEOUT_S = 5.0
"""This and the next are multiplied by `facts.slowness`."""
DOWN_TIMEOUT_S = TRACE_TIMEOUT_S = 60.0


def socket_name(pod: str) -> str:
    """Name of a pod's control socket in the abstract namespace (unix(7))."""
    return f"\0{PREFIX}{pod}"


class NoSupervisor(Error):
    """No supervisor process answers for a pod."""


@dataclass(frozen=True)
class Orphan:
    """A pod whose supervisor process was killed."""

    ledger: Path
    folder: Path
    """Folder with the files of the supervisor process."""
    status: dict[str, Any]
    """The last status that it wrote down. `supervisor`, its pid, is None."""


def folder_name(owner_id: str) -> str:
    """Name of the folder of a supervisor process, beside its ledger."""
    return f"{owner_id}.pod"


def write_down(folder: Path, status: dict[str, Any]) -> None:
    """Write a status down, atomically, for a supervisor process that may take over."""
    new = folder / "status.new"
    new.write_text(json.dumps(status | {"supervisor": None}))
    new.rename(folder / "status.json")


def orphans() -> dict[str, Orphan]:
    """Orphans of this host, by the pods' names."""
    found = {}
    for path in ledger.ROOT.glob("*.pod/status.json"):
        book = path.parent.with_suffix(".ledger")
        with suppress(FileNotFoundError):  # it is being taken down
            if ledger.is_dead(book):
                status = json.loads(path.read_text())
                found[status["name"]] = Orphan(book, path.parent, status)
    return found


def orphan(pod: str) -> Orphan:
    """The orphan of a name. Raises `Error` if there is none."""
    if found := orphans().get(pod):
        return found
    standing = names()
    if pod in standing:
        raise Error(
            f"the supervisor process of pod {pod!r} is alive", hint=f"testbed describe {pod}"
        )
    raise Error(f"no pod {pod!r}", hint=f"there are: {', '.join(standing) or 'none'}")


def names() -> list[str]:
    """Names of all pods of this host: from the kernel's list of Unix sockets, and orphans."""
    lines = Path("/proc/thread-self/net/unix").read_text().splitlines()
    # Listening sockets only: accepted ones have the same name for as long as they are open.
    paths = [line.split()[-1] for line in lines if line.split()[3] == SO_ACCEPTCON]
    supervised = {p.removeprefix(f"@{PREFIX}") for p in paths if p.startswith(f"@{PREFIX}")}
    return sorted(supervised | orphans().keys())


def status(pod: str) -> dict[str, Any]:
    """Status of a pod, as `ps --json` prints it. Raises `Error` if there is no such pod."""
    try:
        return _ask(pod, "status", TIMEOUT_S)
    except NoSupervisor:
        return orphan(pod).status


def all() -> list[dict[str, Any]]:
    """Status of every pod."""
    found = []
    for name in names():
        with suppress(Error):  # it may go down meanwhile
            found.append(status(name))
    return found


def workloads(pod: str, name: str | None) -> list[dict[str, Any]]:
    """Status of one workload of a pod, or of all, in order. Raises `Error` if there is none."""
    existing = status(pod)["workloads"]
    chosen = [w for w in existing if name in (None, w["name"])]
    if not chosen:
        raise Error(
            f"pod {pod!r} has no workload {name!r}",
            hint=f"it has {', '.join(w['name'] for w in existing)}",
        )
    return chosen


def describe(pod: str) -> dict[str, Any]:
    """Status of a pod, its links with addresses and programs, traffic, counters and events."""
    return _ask_supervisor(pod, "describe")


def traffic(pod: str) -> dict[str, Any]:
    """Traffic of a pod's datapath by pair, and its counters."""
    return _ask_supervisor(pod, "traffic")


def _ask_supervisor(pod: str, question: str) -> dict[str, Any]:
    """Ask the supervisor process. Raises `Error` if there is none."""
    try:
        return _ask(pod, question, TIMEOUT_S)
    except NoSupervisor:
        raise _is_orphan(pod) from None


def _is_orphan(pod: str) -> Error:
    """The error for an orphan. Raises `Error` if there is no such pod at all."""
    orphan(pod)
    return Error(
        f"the supervisor of pod {pod!r} was killed, and the pod goes on without",
        hint=f"testbed adopt {pod}, or testbed down {pod}",
    )


def down(pod: str) -> None:
    """Take a pod down. Returns when nothing of it is left."""
    try:
        _ask(pod, "down", DOWN_TIMEOUT_S)
    except NoSupervisor:
        for _ in ledger.clean(orphan(pod).ledger):
            pass


def trusted(peer: socket.socket) -> bool:
    """Whether the other end is root or this user, since abstract sockets have no permissions."""
    size = struct.calcsize("iii")
    _, uid, _ = struct.unpack("iii", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return uid in (0, os.getuid())


@contextmanager
def trace(pod: str) -> Iterator[dict[str, Any]]:
    """Trace a pod while the context lasts. Yields the data by which its events are read."""
    try:
        with _asking(pod, "trace", TRACE_TIMEOUT_S) as answer:
            yield answer
    except NoSupervisor:
        raise _is_orphan(pod) from None


def _ask(pod: str, question: str, timeout_s: float) -> dict[str, Any]:
    with _asking(pod, question, timeout_s) as answer:
        return answer


@contextmanager
def _asking(pod: str, question: str, timeout_s: float) -> Iterator[dict[str, Any]]:
    """Ask the supervisor process. Yields the answer, and stays connected while the context lasts.

    Raises `NoSupervisor` if nobody listens, `Error` if the answer is an error.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.settimeout(timeout_s * facts.slowness())
        try:
            asking.connect(socket_name(pod))
            if not trusted(asking):
                raise Error(f"the socket of pod {pod!r} is another user's")
            asking.sendall(json.dumps({"ask": question}).encode() + b"\n")
            line = asking.makefile("rb").readline()
        except TimeoutError as e:
            raise Error(f"the supervisor process of pod {pod!r} does not answer") from e
        except OSError as e:
            raise NoSupervisor(f"pod {pod!r} has no supervisor process") from e
        if not line:
            raise NoSupervisor(f"the supervisor process of pod {pod!r} ended")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Error(answer["error"], answer.get("hint"))
        yield answer
