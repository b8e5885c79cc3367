"""The pods that stand on this host, asked through their keepers' sockets; builds nothing.

A keeper listens at an abstract Unix socket named after its pod: the kernel's list of sockets is the
list of pods. Questions and answers are one line of JSON each. What a keeper would answer it also
writes down, for when it is killed: its pod then is an orphan, and stands until somebody takes it
over (`keeper.keep`) or down.
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

from testbed.host import ledger
from testbed.model.errors import Error

PREFIX = "testbed/pod/"
SO_ACCEPTCON = "00010000"
"""Flags of a socket that listens, in /proc/net/unix (linux/net.h)."""
PATIENCE_S = 5.0
DOWN_PATIENCE_S = TRACE_PATIENCE_S = 60.0


def socket_name(pod: str) -> str:
    """The socket of a pod's keeper, in the abstract namespace (unix(7))."""
    return f"\0{PREFIX}{pod}"


class NoKeeper(Error):
    """Nobody answers for a pod."""


@dataclass(frozen=True)
class Orphan:
    """A pod whose keeper was killed."""

    ledger: Path
    folder: Path
    """What the keeper wrote for itself."""
    status: dict[str, Any]
    """What it would last have answered, but for `keeper`, which is None."""


def folder_name(owner_id: str) -> str:
    """Of what an owner writes down about its pod, beside its ledger."""
    return f"{owner_id}.pod"


def write_down(folder: Path, status: dict[str, Any]) -> None:
    """Keep a status for whoever comes after this process."""
    new = folder / "status.new"
    new.write_text(json.dumps(status | {"keeper": None}))
    new.rename(folder / "status.json")


def orphans() -> dict[str, Orphan]:
    """By the pods' names."""
    found = {}
    for path in ledger.ROOT.glob("*.pod/status.json"):
        book = path.parent.with_suffix(".ledger")
        with suppress(FileNotFoundError):  # it is being taken down
            if ledger.is_dead(book):
                status = json.loads(path.read_text())
                found[status["name"]] = Orphan(book, path.parent, status)
    return found


def orphan(pod: str) -> Orphan:
    """One of them. Raises `Error` if there is none of that name."""
    if found := orphans().get(pod):
        return found
    there = names()
    if pod in there:
        raise Error(f"the keeper of pod {pod!r} is alive", hint=f"testbed describe {pod}")
    raise Error(f"no pod {pod!r}", hint=f"there are: {', '.join(there) or 'none'}")


def names() -> list[str]:
    """All pods of this host: from its list of Unix sockets, and orphans."""
    lines = Path("/proc/thread-self/net/unix").read_text().splitlines()
    # Those that listen: what they accepted has the same name, for as long as it is open.
    paths = [line.split()[-1] for line in lines if line.split()[3] == SO_ACCEPTCON]
    kept = {p.removeprefix(f"@{PREFIX}") for p in paths if p.startswith(f"@{PREFIX}")}
    return sorted(kept | orphans().keys())


def status(pod: str) -> dict[str, Any]:
    """What the keeper knows of its pod, as `ps --json` prints it."""
    try:
        return _ask(pod, "status", PATIENCE_S)
    except NoKeeper:
        return orphan(pod).status


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
        raise Error(
            f"pod {pod!r} has no workload {name!r}",
            hint=f"it has {', '.join(w['name'] for w in there)}",
        )
    return chosen


def describe(pod: str) -> dict[str, Any]:
    """Its wiring: links with addresses and programs, traffic, counters, events."""
    return _ask_keeper(pod, "describe")


def traffic(pod: str) -> dict[str, Any]:
    """What its datapath carried between each two, and what it counted."""
    return _ask_keeper(pod, "traffic")


def _ask_keeper(pod: str, question: str) -> dict[str, Any]:
    """Raises `Error` where there is none to ask."""
    try:
        return _ask(pod, question, PATIENCE_S)
    except NoKeeper:
        raise _unkept(pod) from None


def _unkept(pod: str) -> Error:
    """Of an orphan. Raises `Error` if there is no such pod at all."""
    orphan(pod)
    return Error(
        f"the keeper of pod {pod!r} was killed, and the pod goes on without",
        hint=f"testbed adopt {pod}, or testbed down {pod}",
    )


def down(pod: str) -> None:
    """Take a pod down; returns when nothing of it is left."""
    try:
        _ask(pod, "down", DOWN_PATIENCE_S)
    except NoKeeper:
        for _ in ledger.clean(orphan(pod).ledger):
            pass


def trusted(peer: socket.socket) -> bool:
    """Whether the other end is root or this user: abstract sockets have no permissions."""
    size = struct.calcsize("iii")
    _, uid, _ = struct.unpack("iii", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return uid in (0, os.getuid())


@contextmanager
def trace(pod: str) -> Iterator[dict[str, Any]]:
    """What is needed to read of its programs' events, which there are as long as this is held."""
    try:
        with _asking(pod, "trace", TRACE_PATIENCE_S) as answer:
            yield answer
    except NoKeeper:
        raise _unkept(pod) from None


def _ask(pod: str, question: str, patience_s: float) -> dict[str, Any]:
    with _asking(pod, question, patience_s) as answer:
        return answer


@contextmanager
def _asking(pod: str, question: str, patience_s: float) -> Iterator[dict[str, Any]]:
    """The answer, while connected.

    Raises `NoKeeper` if nobody listens, `Error` if the keeper has an error to tell.
    """
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
            raise NoKeeper(f"no keeper of pod {pod!r}") from e
        if not line:
            raise NoKeeper(f"the keeper of pod {pod!r} ended")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Error(answer["error"], answer.get("hint"))
        yield answer
