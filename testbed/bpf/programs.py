"""Loads sets of eBPF programs and pins them, so that all pods of a host share them.

The first user of a set loads it and pins it under `/sys/fs/bpf/testbed`. Later users open the pins,
which takes a millisecond. Each user gets a slot, the number of its rows in the maps. When all slots
are taken, the set is loaded once more. The last user removes the pins. The meaning of programs and
maps is known to their datapath alone.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import stat
import struct
from collections.abc import Collection, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, count
from pathlib import Path
from typing import Any

from testbed.bpf import bytecode, syscall
from testbed.bpf.bytecode import Bytecode
from testbed.host import ledger
from testbed.host.ledger import Scope
from testbed.model.errors import Error

BPFFS = Path("/sys/fs/bpf")
PINS = BPFFS / "testbed"
BPF_FS_MAGIC = 0xCAFE4A11
MAX_SLOTS = 255
PROG_ARRAY = 3
"""enum bpf_map_type."""


@dataclass(frozen=True)
class ProgramSet:
    """A loaded set of programs and maps, with one user's slot. `close` closes the descriptors."""

    pins: Path
    slot: int

    def program(self, name: str) -> int:
        """File descriptor of a program."""
        return self._open(f"program_{name}")

    def make_calls(self, owner: Scope, size: int) -> None:
        """Pin a program array of `size` tc programs for this user's slot (see `entry`)."""
        owner.defer(remove_calls, pin=str(self._calls))
        remove_calls(str(self._calls))  # that of a supervisor process that was killed
        fd = syscall.create_map("calls", (PROG_ARRAY, 4, 4, size, 0), (0, 0, 0))
        syscall.pin(fd, self._calls)
        os.close(fd)

    def set_calls(self, programs: ProgramSet, names: Iterable[str]) -> None:
        """Put programs into the program array of the slot, if there is one (`make_calls`)."""
        with suppress(FileNotFoundError), _opened_calls(self._calls) as calls:
            for number, name in enumerate(names):
                calls[number,] = (programs.program(name),)

    @contextmanager
    def entry(self, name: str, classid: int, number: int) -> Iterator[int]:
        """File descriptor of a program that tail-calls entry `number` of the program array."""
        with _opened_calls(self._calls) as calls:
            fd = bytecode.load_entry(name, classid, calls.fd, number)
        try:
            yield fd
        finally:
            os.close(fd)

    @property
    def _calls(self) -> Path:
        return self.pins / f"calls-{self.slot}"

    def map(self, name: str, key: str, value: str) -> syscall.Map:
        """A map by name; `key` and `value` are layouts of the module struct."""
        fd = self._open(f"map_{name}")
        kind, key_size, value_size, *_ = syscall.shape(fd)
        layouts = struct.Struct(key), struct.Struct(value)
        assert (layouts[0].size, layouts[1].size) == (key_size, value_size), name
        cpus = _possible_cpus() if kind in syscall.PER_CPU else 0
        return syscall.Map(fd, *layouts, cpus=cpus)

    def put_inner(self, outer: str, key: int, template: str) -> None:
        """Put a new, empty map like `template` into a map of maps."""
        fd = syscall.create_map(template, syscall.shape(self._open(f"map_{template}")))
        try:
            self.map(outer, "=I", "=I")[key,] = (fd,)
        finally:
            os.close(fd)

    def open_inner(self, outer: str, key: int) -> int:
        """File descriptor of a map in a map of maps. Raises KeyError if there is none."""
        (id,) = self.map(outer, "=I", "=I")[key,]
        return syscall.call(syscall.MAP_FD_BY_ID, "=I", id)

    def close(self) -> None:
        """Close the file descriptors. Pins and attached programs stay."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def _open(self, pin: str) -> int:
        if pin not in self._fds:
            self._fds[pin] = syscall.open_pin(self.pins / pin)
        return self._fds[pin]

    @cached_property
    def _fds(self) -> dict[str, int]:
        return {}


def _possible_cpus() -> int:
    last = Path("/sys/devices/system/cpu/possible").read_text().strip().rpartition("-")[2]
    return int(last.rpartition(",")[2]) + 1


def load(name: str, owner: Scope) -> ProgramSet:
    """Load the programs of `bpf/NAME.c`, unless they are loaded, and take a slot.

    The slot is given back with `owner`. The programs stay until the outermost scope of `owner` is
    undone, so pods that follow each other share them. When all slots are taken, the programs are
    loaded once more. Raises `Error` if the kernel or its headers do not allow it.
    """
    # Kernels before 5.11 count maps as locked memory. Others need no limit, so it may fail.
    with suppress(ValueError):
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, unlimited)
    with _lock():
        _mount_bpffs()
        pins, slot = _free_slot(name, owner)
        users = pins / "users"  # made last: if it is missing, the loading process was killed
        holder, user = users / f"0-{owner.id}", users / f"{slot}-{owner.id}"
        if not holder.exists():
            owner.whole.defer(remove_user, pins=str(pins), user=holder.name)
        owner.defer(remove_user, pins=str(pins), user=user.name)
        if not users.exists():
            _remove(pins)
            _load(name, pins)
            users.mkdir()
        holder.mkdir(exist_ok=True)
        user.mkdir(exist_ok=True)
    return ProgramSet(pins, slot)


def _free_slot(name: str, owner: Scope) -> tuple[Path, int]:
    """Pins and slot that a killed process of this owner left, or else the first that are free."""
    first = PINS / f"{name}-{bytecode.digest(name)}"
    left = [
        (Path(entry.arguments["pins"]), slot)
        for entry in owner.left(remove_user)
        if entry.arguments["pins"].startswith(str(first))
        and (slot := _slot(entry.arguments["user"]))
    ]
    if left:
        return min(left)
    copies = chain([first], (first.with_name(f"{first.name}_{copy}") for copy in count(2)))
    return next(
        (pins, min(free))
        for pins in copies
        if (free := set(range(1, MAX_SLOTS + 1)) - {_slot(p.name) for p in pins.glob("users/*")})
    )


def _slot(user: str) -> int:
    """Slot of a user, whose name is SLOT-OWNER.

    Slot 0 has no rows. It holds the programs while none of the owner's pods does.
    """
    return int(user.partition("-")[0])


def own_rows(
    owner: Scope, programs: ProgramSet, name: str, value: str, guests: Collection[int]
) -> None:
    """Have a pod's rows of a map, one for each guest (`slot << 8 | n`), removed with the pod.

    They are removed now, too: another pod may have left them.
    """
    keys = [programs.slot << 8 | n for n in guests]
    rows: dict[str, Any] = {"pins": str(programs.pins), "name": name, "value": value, "keys": keys}
    owner.defer(remove_rows, **rows)
    if not owner.continues:
        remove_rows(**rows)


def remove_rows(pins: str, name: str, value: str, keys: list[int]) -> None:
    """Remove rows of a map. Missing programs and rows are no error."""
    if Path(pins, "users").exists():
        with closing(ProgramSet(Path(pins), 0)) as programs:
            rows = programs.map(name, "=I", value)
            for key in keys:
                with suppress(KeyError):
                    del rows[key,]


def load_traced(programs: ProgramSet, owner: Scope) -> ProgramSet:
    """Load the traced variant of a set's tc programs, with the same slot and maps.

    Only the maps of `bpf/trace.h`, such as `events`, are its own.
    """
    name = programs.pins.name.rpartition("-")[0] + bytecode.TRACED
    compiled = bytecode.get(name)
    pins = programs.pins / f"traced-{programs.slot}"
    owner.defer(remove_traced, pins=str(pins))
    _remove(pins)  # those of a supervisor process that was killed meanwhile
    pins.mkdir()
    _verify(compiled, name, pins, programs.pins)
    return ProgramSet(pins, programs.slot)


@contextmanager
def _opened_calls(pin: Path) -> Iterator[syscall.Map]:
    fd = syscall.open_pin(pin)
    try:
        yield syscall.Map(fd, struct.Struct("=I"), struct.Struct("=I"))
    finally:
        os.close(fd)


def remove_calls(pin: str) -> None:
    """Empty and unpin a program array of `make_calls`. Programs of `entry` do nothing then."""
    with suppress(FileNotFoundError), _opened_calls(Path(pin)) as calls:
        for key in calls:
            with suppress(KeyError):
                del calls[key]
        Path(pin).unlink()


def remove_traced(pins: str) -> None:
    """Remove the pins of a traced variant. Missing pins are no error."""
    _remove(Path(pins))


def remove_user(pins: str, user: str) -> None:
    """Give a slot back. The last user removes the pins."""
    with _lock():
        users = Path(pins, "users")
        if (users / user).exists():
            (users / user).rmdir()
        if not users.exists() or not any(users.iterdir()):
            _remove(Path(pins))
        if PINS.exists() and not any(PINS.iterdir()):
            PINS.rmdir()


def _remove(pins: Path) -> None:
    if pins.exists():
        for path in pins.iterdir():
            if path.is_dir():
                path.rmdir()
            else:
                path.unlink()
        pins.rmdir()


@contextmanager
def _lock() -> Iterator[None]:
    """Lock for the pins of this host: one process at a time makes or removes them."""
    ledger.ROOT.mkdir(mode=0o700, exist_ok=True)
    with (ledger.ROOT / "bpf.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _mount_bpffs() -> None:
    """Mount bpffs and make the folder of pins, unless systemd has mounted it at boot."""
    buffer = ctypes.create_string_buffer(256)
    if syscall.libc.statfs(str(BPFFS).encode(), buffer):
        raise Error(f"{BPFFS} is missing: the kernel has no eBPF", hint="use Linux 5.10 or later")
    if struct.unpack_from("=q", buffer)[0] != BPF_FS_MAGIC and syscall.libc.mount(
        b"bpf", str(BPFFS).encode(), b"bpf", 0, b"mode=0700"
    ):
        raise Error(
            f"cannot mount bpffs on {BPFFS}: {os.strerror(ctypes.get_errno())}", hint="run as root"
        )
    # A bpffs that others mounted may be open to everybody: then somebody may have made it before.
    with suppress(FileExistsError):
        PINS.mkdir(mode=0o700)
    made = PINS.lstat()
    if not stat.S_ISDIR(made.st_mode) or made.st_uid:
        raise Error(f"{PINS} is not a folder of root's", hint=f"rm -r {PINS}")
    PINS.chmod(0o700)


def _load(name: str, pins: Path) -> None:
    compiled = bytecode.get(name)
    pins.mkdir()
    _verify(compiled, name, pins)


def _verify(compiled: Bytecode, name: str, pins: Path, shared: Path | None = None) -> None:
    try:
        compiled.load(pins, shared)
    except OSError as e:
        _remove(pins)
        raise Error(
            f"bpf/{name}.c does not load: {e.strerror}",
            hint="see what 'testbed doctor' says about eBPF",
        ) from e
