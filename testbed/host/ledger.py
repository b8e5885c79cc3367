"""What this host was given, and how to take it back: written down before each thing is made.

A ledger is one file per owner (a process that builds: a campaign's worker, a test run) under
`/run/testbed`, which lives exactly as long as the kernel objects that it lists. An entry is a call
to make later: a module-level function of this package and its arguments as JSON. Undoing is
idempotent and goes backwards; whatever was never made is no error. `clean` does it for owners that
died: a living one holds a lock on its file. Another process may also go on in a dead owner's place
(`Owner(left)`): what that one has written down already is not written down again.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from testbed.host import ledger
from testbed.model.errors import Error

ROOT = Path("/run/testbed")
PATIENCE_S = 1


def _die_of_signals() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# pyroute2 forks to enter namespaces, and ends the child by SIGTERM. With handlers that raise, the
# child would unwind its copy of the stack, and take down what its parent owns.
os.register_at_fork(after_in_child=_die_of_signals)


class Undoable(Protocol):
    def undo(self) -> None: ...


class _Ledger:
    """The file. Its open lock says that the owner lives."""

    def __init__(self, path: Path, file: TextIOWrapper) -> None:
        self.path, self._file = path, file
        self._numbers = 0
        self._lock = threading.Lock()
        self.left: list[Deferred] = []
        """What a dead owner left, in the order of making."""

    def record(self, call: str, arguments: dict[str, Any]) -> Deferred:
        with self._lock:
            self._numbers += 1
            entry = Deferred(self, self._numbers, call, arguments)
            self._write({"n": entry.number, "call": call, "arguments": arguments})
        return entry

    def strike(self, entry: Deferred) -> None:
        with self._lock:
            self._write({"struck": entry.number})

    def remove(self) -> None:
        self.path.unlink()
        self.close()

    def close(self) -> None:
        self._file.close()

    def read(self) -> None:
        """Find what a dead owner left."""
        text = self._file.read()
        whole = text.rfind("\n") + 1  # killed in mid-line: that thing was not made yet
        self._file.truncate(whole)
        self._file.seek(whole)
        left: dict[int, Deferred] = {}
        for line in map(json.loads, text[:whole].splitlines()):
            if "struck" in line:
                del left[line["struck"]]
            else:
                self._numbers = line["n"]
                left[line["n"]] = Deferred(self, line["n"], line["call"], line["arguments"])
        self.left = list(left.values())

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


@dataclass(frozen=True)
class Deferred:
    """One entry of a ledger."""

    ledger: _Ledger
    number: int
    call: str
    arguments: dict[str, Any]

    def undo(self) -> None:
        """Take the thing back now, and strike the entry."""
        module, _, name = self.call.partition(":")
        getattr(importlib.import_module(module), name)(**self.arguments)
        self.ledger.strike(self)

    def __str__(self) -> str:
        words = " ".join(str(v) for v in self.arguments.values())
        return f"{self.call.rpartition(':')[2].removeprefix('remove_')} {words}"


def _call(undo: Callable[..., None]) -> str:
    return f"{undo.__module__}:{undo.__qualname__}"


class Scope:
    """Things of one owner that are taken down together, as a context manager."""

    def __init__(self, ledger: _Ledger, whole: Scope | None = None) -> None:
        self._ledger = ledger
        self._entries: list[Undoable] = []
        self.whole = whole or self
        """What this is a part of, for things that its parts share."""

    @property
    def id(self) -> str:
        """The owner's mark, for the names of what is made."""
        return self._ledger.path.stem

    def defer(self, undo: Callable[..., None], **arguments: Any) -> Deferred:
        """Write down how to undo what is about to be made. Call it before making it."""
        for entry in self.left(undo):
            if entry.arguments == json.loads(json.dumps(arguments)):
                return entry
        entry = self._ledger.record(_call(undo), arguments)
        self._entries.append(entry)
        return entry

    @property
    def goes_on(self) -> bool:
        """In a dead owner's place, with what that one made."""
        return bool(self._ledger.left)

    def left(self, undo: Callable[..., None]) -> list[Deferred]:
        """Entries with this call that a dead owner left, in whose place this one goes on."""
        return [entry for entry in self._ledger.left if entry.call == _call(undo)]

    def part(self) -> Scope:
        """A part that can be taken down by itself, and goes with the whole at the latest."""
        part = Scope(self._ledger, self.whole)
        self._entries.append(part)
        return part

    def undo(self) -> None:
        """Undo everything, latest first.

        Goes on past what fails; that stays in the ledger, and `Error` names it.
        """
        failures = []
        while self._entries:
            entry = self._entries[-1]  # goes from the list when it is undone: we may be interrupted
            try:
                entry.undo()
            except Exception as e:
                failures.append(f"{entry}: {e}")
            self._entries.remove(entry)
        if failures:
            raise Error(f"left behind: {'; '.join(failures)}", hint="run 'testbed clean'")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.undo()


class Owner(Scope):
    """Everything that this process made. Leaving it takes all of it down.

    `left` is the ledger of a dead owner to go on with. Raises `Error` if that one lives.
    """

    def __init__(self, left: Path | None = None) -> None:
        if left:
            dead = _dead(left)
            if dead is None:
                raise Error(f"somebody else is at what {left} lists")
            super().__init__(dead)
            self._entries += dead.left
        else:
            ROOT.mkdir(mode=0o700, exist_ok=True)
            path = ROOT / f"{secrets.token_hex(3)}.ledger"
            # It gets its name when it is locked: `clean` takes unlocked ones. (open(2), O_TMPFILE;
            # a directory has to be given, or Python calls link(2), which links the symlink.)
            file = os.fdopen(os.open(ROOT, os.O_TMPFILE | os.O_RDWR, 0o600), "w+")
            fcntl.flock(file, fcntl.LOCK_EX)
            os.link(f"/proc/self/fd/{file.fileno()}", path, src_dir_fd=file.fileno())
            super().__init__(_Ledger(path, file))
        self._kept = False

    def undo(self) -> None:
        super().undo()
        if not self._kept:
            self._ledger.remove()

    def keep(self) -> None:
        """Leave everything standing when this process ends; `clean` will take it down."""
        self._entries.clear()
        self._kept = True


def is_dead(path: Path) -> bool:
    """Whether the owner of a ledger died, and left what it made."""
    file = _seen(path)
    if file:
        file.close()
    return file is not None


def clean(only: Path | None = None) -> Iterator[str]:
    """Take down what dead owners left, and only that; or one of them, by its ledger.

    Yields a word on each thing removed. Goes on past what fails; that stays, and `Error` names it.
    """
    failures: list[str] = []
    for path in [only] if only else sorted(ROOT.glob("*.ledger")):
        ledger = _dead(path)
        if not ledger:
            if only:
                raise Error(f"somebody else is at what {only} lists")
            continue
        before = len(failures)
        for entry in reversed(ledger.left):
            try:
                entry.undo()
            except Exception as e:
                failures.append(f"{entry}: {e}")
            else:
                yield str(entry)
        if len(failures) == before:
            ledger.remove()
        else:
            ledger.close()
    if failures:
        raise Error(
            f"left behind: {'; '.join(failures)}",
            hint="if another version of testbed made it, clean with that one",
        )


def _dead(path: Path) -> _Ledger | None:
    """The ledger of a dead owner; None if it is alive, or somebody else is at it."""
    file = _seen(path)
    if file is None:
        return None
    deadline = time.monotonic() + PATIENCE_S
    while not _lock(file, fcntl.LOCK_EX):  # who only looks (`is_dead`) is gone soon
        if time.monotonic() > deadline:
            break
        time.sleep(0.005)
    else:
        if os.fstat(file.fileno()).st_nlink:  # else somebody was faster
            ledger = _Ledger(path, file)
            ledger.read()
            return ledger
    file.close()
    return None


def _seen(path: Path) -> TextIOWrapper | None:
    """The file of a dead owner, to look at: others may do so as well."""
    with suppress(FileNotFoundError):
        file = path.open("r+")
        if _lock(file, fcntl.LOCK_SH):
            return file
        file.close()
    return None


def _lock(file: TextIOWrapper, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def create_folder(owner: Scope, name: str) -> Path:
    """Make a folder beside the ledgers, for what programs are told and tell in files."""
    path = ledger.ROOT / name
    owner.defer(remove_folder, path=str(path))
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def remove_folder(path: str) -> None:
    """Remove a folder with all that is in it. One that is gone is no error."""
    if Path(path).exists():
        shutil.rmtree(path)
