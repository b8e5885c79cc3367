"""Ledger of the resources made on this host (namespaces, cgroups, pins), for their clean-up.

Each owner (a process that builds: a pod's supervisor, a campaign's worker, a test run) has one
file. An entry is written before its resource is made. It is a call to make later: a module-level
function of this package, and its arguments as JSON. Entries are undone from the last to the first.
Undoing is idempotent: a resource that was never made is no error.

The files are under `/run/testbed`, which is emptied at boot, as the kernel objects are. A living
owner holds a lock on its file, so `clean` undoes the ledgers of dead owners only. A process may
also take a dead owner's place (`Owner(left)`): then entries that exist are not written again.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from testbed.host import interrupts, process
from testbed.model.errors import Error

ROOT = Path("/run/testbed")
LOCK_TIMEOUT_S = 1


# pyroute2 forks to enter namespaces, and ends the child by SIGTERM. With handlers that raise, the
# child would unwind its copy of the stack, and take down what its parent owns.
os.register_at_fork(after_in_child=interrupts.restore)


class Undoable(Protocol):
    def undo(self) -> None: ...


class _Ledger:
    """The file of a ledger, locked for as long as its owner lives."""

    def __init__(self, path: Path, file: TextIOWrapper) -> None:
        self.path, self._file = path, file
        self._numbers = 0
        self._lock = threading.Lock()
        self.standing: set[int] = set()
        """Numbers of the entries that are not struck."""
        self.left: list[Deferred] = []
        """Entries that a dead owner left, in the order in which they were made."""

    def record(self, call: str, arguments: dict[str, Any]) -> Deferred:
        with self._lock:
            self._numbers += 1
            entry = Deferred(self, self._numbers, call, arguments)
            self.standing.add(entry.number)
            self._write({"n": entry.number, "call": call, "arguments": arguments})
        return entry

    def strike(self, entry: Deferred) -> None:
        with self._lock:
            self._write({"struck": entry.number})
            self.standing.discard(entry.number)

    def remove(self) -> None:
        self.path.unlink()
        self.close()

    def close(self) -> None:
        self._file.close()

    def read(self) -> None:
        """Read the entries that a dead owner left into `left`."""
        text = self._file.read()
        # An owner killed in mid-line had not made the resource of that line yet.
        whole = text.rfind("\n") + 1
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
        self.standing |= left.keys()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


@dataclass(frozen=True)
class Deferred:
    """One entry of a ledger: a call that undoes what was made."""

    ledger: _Ledger
    number: int
    call: str
    arguments: dict[str, Any]

    def undo(self) -> None:
        """Make the call now, and strike the entry."""
        module, _, name = self.call.partition(":")
        getattr(importlib.import_module(module), name)(**self.arguments)
        self.ledger.strike(self)

    def __str__(self) -> str:
        words = " ".join(str(v) for v in self.arguments.values())
        return f"{self.call.rpartition(':')[2].removeprefix('remove_')} {words}"


def _call(undo: Callable[..., None]) -> str:
    return f"{undo.__module__}:{undo.__qualname__}"


class Scope:
    """Resources of one owner that are taken down together, as a context manager."""

    def __init__(self, ledger: _Ledger, whole: Scope | None = None) -> None:
        self._ledger = ledger
        self._entries: list[Undoable] = []
        self.whole = whole or self
        """The outermost scope that this is a part of, for resources that its parts share."""

    @property
    def id(self) -> str:
        """The owner's identifier (hexadecimal), for the names of its resources."""
        return self._ledger.path.stem

    def defer(self, undo: Callable[..., None], **arguments: Any) -> Deferred:
        """Write down how to undo a resource. Call it before the resource is made."""
        for entry in self.left(undo):
            if entry.arguments == json.loads(json.dumps(arguments)):
                return entry
        entry = self._ledger.record(_call(undo), arguments)
        self._entries.append(entry)
        return entry

    @property
    def continues(self) -> bool:
        """Whether this took a dead owner's place, and with it the resources of that owner."""
        return bool(self._ledger.left)

    def left(self, undo: Callable[..., None]) -> list[Deferred]:
        """Entries with this call that the dead owner left whose place this one took."""
        return [entry for entry in self._ledger.left if entry.call == _call(undo)]

    def part(self) -> Scope:
        """A part that can be taken down by itself. The whole takes down the parts that are left."""
        part = Scope(self._ledger, self.whole)
        self._entries.append(part)
        return part

    def undo(self) -> None:
        """Undo everything, the latest first.

        Goes on after a failure. The failed entry stays in the ledger, and `Error` names it.
        """
        failures = []
        while self._entries:
            entry = self._entries[-1]  # removed when it is undone, since we may be interrupted
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
    """All resources of this process, in a ledger of their own. Leaving the context undoes all.

    `left` is the ledger of a dead owner, whose place this one takes. Raises `Error` if that owner
    lives.
    """

    def __init__(self, left: Path | None = None) -> None:
        if left:
            dead = _dead(left)
            if dead is None:
                raise Error(f"another process owns what {left} lists")
            super().__init__(dead)
            self._entries += dead.left
        else:
            ROOT.mkdir(mode=0o700, exist_ok=True)
            path = ROOT / f"{secrets.token_hex(3)}.ledger"
            # The file is locked before it gets a name, since `clean` takes unlocked ones (open(2),
            # O_TMPFILE). Without a directory Python would call link(2), which links the symlink.
            file = os.fdopen(os.open(ROOT, os.O_TMPFILE | os.O_RDWR, 0o600), "w+")
            fcntl.flock(file, fcntl.LOCK_EX)
            os.link(f"/proc/self/fd/{file.fileno()}", path, src_dir_fd=file.fileno())
            super().__init__(_Ledger(path, file))
        self._leaves_standing = False

    def undo(self) -> None:
        super().undo()
        # Entries still stand if they failed in a part that was undone before.
        if not self._leaves_standing and not self._ledger.standing:
            self._ledger.remove()

    def leave_standing(self) -> None:
        """Undo nothing when this process ends. `clean` can do so later."""
        self._entries.clear()
        self._leaves_standing = True


def is_dead(path: Path) -> bool:
    """Whether the owner of a ledger died and left resources."""
    file = _open_of_dead(path)
    if file:
        file.close()
    return file is not None


def clean(only: Path | None = None) -> Iterator[str]:
    """Undo the ledgers of all dead owners, or the one ledger `only`.

    Yields the text of each entry that was undone. Goes on after a failure: the failed entry stays
    in its ledger, and `Error` names it.
    """
    failures: list[str] = []
    for path in [only] if only else sorted(ROOT.glob("*.ledger")):
        ledger = _dead(path)
        if not ledger:
            if only:
                raise Error(f"another process owns what {only} lists")
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
            hint="if it was made by another version, clean with that one",
        )


def _dead(path: Path) -> _Ledger | None:
    """The ledger of a dead owner, locked; None if the owner lives or another process has it."""
    file = _open_of_dead(path)
    if file is None:
        return None
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while not _lock(file, fcntl.LOCK_EX):  # `is_dead` in other processes holds it for a moment
        if time.monotonic() > deadline:
            break
        time.sleep(0.005)
    else:
        if os.fstat(file.fileno()).st_nlink:  # else another process has removed it meanwhile
            ledger = _Ledger(path, file)
            ledger.read()
            return ledger
    file.close()
    return None


def _open_of_dead(path: Path) -> TextIOWrapper | None:
    """Open the file of a dead owner with a shared lock; None if the owner lives."""
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
    """Make a folder beside the ledgers, for configuration and log files of programs."""
    path = ROOT / name
    owner.defer(remove_folder, path=str(path))
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def remove_folder(path: str) -> None:
    """Remove a folder and its contents. A missing folder is no error."""
    remove_tree(Path(path))


def remove_tree(path: Path) -> None:
    """Remove a folder, on this file system alone. A missing one is no error.

    By rm(1), since shutil.rmtree fails in trees that are too deep. Raises `Error`.
    """
    if path.exists():
        command = ["rm", "--recursive", "--force", "--one-file-system", "--", str(path)]
        process.run(command, f"{path} cannot be removed")
