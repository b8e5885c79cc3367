"""What this host was given, and how to take it back: written down before each thing is made.

A ledger is one file per owner (a process that builds: a campaign's worker, a test run) under
`/run/testbed`, which lives exactly as long as the kernel objects that it lists. An entry is a call
to make later: a module-level function of this package and its arguments as JSON. Undoing is
idempotent and goes backwards; whatever was never made is no error. `clean` does it for owners that died.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from testbed.model import Error

ROOT = Path("/run/testbed")


def start_time(pid: int) -> int | None:
    """Start of a process in clock ticks since boot; None if there is no such process.

    With the pid it names a process for good (proc(5), field 22 of /proc/PID/stat).
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


@dataclass
class Deferred:
    """One entry of a ledger."""

    owner: Owner
    number: int
    call: str
    arguments: dict[str, Any]

    def undo(self) -> None:
        """Take the thing back now, and strike the entry."""
        module, _, name = self.call.partition(":")
        getattr(importlib.import_module(module), name)(**self.arguments)
        self.owner._strike(self)

    def __str__(self) -> str:
        words = " ".join(f"{v}" for v in self.arguments.values())
        return f"{self.call.rpartition(':')[2].removeprefix('remove_')} {words}"


class Owner:
    """Everything that one process made, as a context manager: leaving it takes all of it down.

    `Owner.id` marks the names of what is made.
    """

    def __init__(self) -> None:
        ROOT.mkdir(mode=0o700, exist_ok=True)
        self.id = secrets.token_hex(3)
        self._path = ROOT / f"{self.id}.ledger"
        self._entries: list[Deferred] = []
        self._numbers = 0
        self._lock = threading.RLock()
        self._file = self._path.open("x")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self._write({"pid": os.getpid(), "start": start_time(os.getpid())})

    def defer(self, undo: Callable[..., None], **arguments: Any) -> Deferred:
        """Write down how to undo what is about to be made. Call it before making it."""
        with self._lock:
            self._numbers += 1
            call = f"{undo.__module__}:{undo.__qualname__}"
            entry = Deferred(self, self._numbers, call, arguments)
            self._write({"n": entry.number, "call": call, "arguments": arguments})
            self._entries.append(entry)
            return entry

    def close(self) -> None:
        """Undo everything, latest first, and remove the ledger.

        Goes on past entries that fail; these stay in the ledger, and `Error` names them.
        """
        if self._file.closed:
            return
        failures = []
        for entry in reversed(self._entries.copy()):
            try:
                entry.undo()
            except Exception as e:
                failures.append(f"{entry}: {e}")
        if not failures:
            self._path.unlink()
        self._file.close()
        if failures:
            raise Error(f"left behind: {'; '.join(failures)}", hint="run 'testbed clean'")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def _strike(self, entry: Deferred) -> None:
        with self._lock:
            self._write({"struck": entry.number})
            self._entries.remove(entry)

    @classmethod
    def _inherit(cls, path: Path) -> Owner | None:
        """Take over a dead owner's ledger; None if the owner lives or another clean is at it."""
        self = cls.__new__(cls)
        try:
            self._file = path.open("r+")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, FileNotFoundError):
            return None
        self.id, self._path = path.stem, path
        self._entries, self._numbers, self._lock = [], 0, threading.RLock()
        for text in self._file:
            if not text.endswith("\n"):
                break  # killed in mid-line: that thing was not made yet
            line = json.loads(text)
            if "n" in line:
                self._entries.append(Deferred(self, line["n"], line["call"], line["arguments"]))
            elif "struck" in line:
                self._entries = [e for e in self._entries if e.number != line["struck"]]
        self._file.seek(0, os.SEEK_END)
        return self


def clean() -> Iterator[str]:
    """Take down what dead owners left, and only that. Yields a word on each thing removed."""
    for path in sorted(ROOT.glob("*.ledger")):
        owner = Owner._inherit(path)
        if owner is None:
            continue
        left = [str(e) for e in reversed(owner._entries)]
        owner.close()
        yield from left
