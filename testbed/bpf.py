"""eBPF programs: compiled once per host and content, pinned, found again in a millisecond.

A set of programs is one C file in `bpf/` with its headers. The first user compiles it with bcc, in
a process of its own (LLVM is large, and bcc changes the working directory); later users open the
pins under `/sys/fs/bpf/testbed`. Every user gets a slot, a number for its rows in the maps. When
the last user has gone, so have the pins. What programs mean, and what is in a map, is their
datapath's business.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import platform
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from testbed import ledger, netlink
from testbed.ledger import Scope
from testbed.model import Error

SOURCES = Path(__file__).parent.parent / "bpf"
BPFFS = Path("/sys/fs/bpf")
PINS = BPFFS / "testbed"
BPF_FS_MAGIC = 0xCAFE4A11
MAX_SLOTS = 255

CLSACT, INGRESS, EGRESS = 0xFFFFFFF1, 0xFFFFFFF2, 0xFFFFFFF3
"""Handles (linux/pkt_sched.h) of the qdisc clsact and its two hooks."""
ETH_P_ALL = 3
RTM_NEWQDISC, RTM_DELQDISC, RTM_NEWTFILTER = 36, 37, 44
TCA_KIND, TCA_OPTIONS, TCA_BPF_CLASSID, TCA_BPF_FD, TCA_BPF_NAME, TCA_BPF_FLAGS = 1, 2, 3, 6, 7, 8

TYPES = {"skb": 3, "address": 18, "option": 25}
"""enum bpf_prog_type: SCHED_CLS, CGROUP_SOCK_ADDR, CGROUP_SOCKOPT."""
ATTACH_TYPES = {
    "bind4": 8, "bind6": 9, "connect4": 10, "connect6": 11, "sendmsg4": 14, "sendmsg6": 15,
    "recvmsg4": 19, "recvmsg6": 20, "getpeername4": 29, "getpeername6": 30,
    "getsockname4": 31, "getsockname6": 32, "setsockopt": 22,
}  # fmt: skip
"""enum bpf_attach_type of cgroup programs, which are named after where they attach."""


# --- bpf(2) ---------------------------------------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)
_SYS_BPF = {"x86_64": 321, "aarch64": 280}

LOOKUP, UPDATE, DELETE, NEXT_KEY, PIN, GET, ATTACH, DETACH, TEST_RUN, FD_BY_ID, INFO = (
    1, 2, 3, 4, 6, 7, 8, 9, 10, 13, 15,
)  # fmt: skip
"""enum bpf_cmd."""


def _bpf(command: int, layout: str, *values: int) -> bytes:
    """bpf(2) with `union bpf_attr` by struct layout: the result, then the attributes afterwards."""
    attributes = ctypes.create_string_buffer(struct.pack(layout, *values), 128)
    result = _libc.syscall(_SYS_BPF[platform.machine()], command, attributes, len(attributes))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return struct.pack("=i", result) + attributes.raw


def _call(command: int, layout: str, *values: int) -> int:
    return int(struct.unpack_from("=i", _bpf(command, layout, *values))[0])


def _address(buffer: Any) -> int:
    return ctypes.addressof(buffer)


def _path(path: Path) -> Any:
    return ctypes.create_string_buffer(str(path).encode())


def pin(fd: int, path: Path) -> None:
    """Give a map or program a name in bpffs (BPF_OBJ_PIN)."""
    name = _path(path)
    _call(PIN, "=QI", _address(name), fd)


def open_pin(path: Path) -> int:
    """File descriptor of a pinned map or program (BPF_OBJ_GET)."""
    name = _path(path)
    return _call(GET, "=QI", _address(name), 0)


@dataclass(frozen=True)
class Map:
    """A map; keys and values are struct layouts. Values of per-CPU maps are read as their sum."""

    fd: int
    key: struct.Struct
    value: struct.Struct
    cpus: int = 0
    """Copies of each value; 0 if the map is not per CPU."""

    def __setitem__(self, key: tuple[int, ...], value: tuple[int, ...]) -> None:
        data = self.value.pack(*value)
        if self.cpus:  # in the first copy; the others are zero
            data = data.ljust(self._stride * self.cpus, b"\0")
        k, v = ctypes.create_string_buffer(self.key.pack(*key)), ctypes.create_string_buffer(data)
        _call(UPDATE, "=IxxxxQQQ", self.fd, _address(k), _address(v), 0)

    def __getitem__(self, key: tuple[int, ...]) -> tuple[int, ...]:
        """The value; KeyError if there is none."""
        k = ctypes.create_string_buffer(self.key.pack(*key))
        v = ctypes.create_string_buffer(self._stride * (self.cpus or 1))
        try:
            _call(LOOKUP, "=IxxxxQQQ", self.fd, _address(k), _address(v), 0)
        except OSError as e:
            if e.errno == errno.ENOENT:
                raise KeyError(key) from e
            raise
        if not self.cpus:
            return self.value.unpack_from(v)
        copies = [self.value.unpack_from(v, i * self._stride) for i in range(self.cpus)]
        return tuple(map(sum, zip(*copies, strict=True)))

    def __delitem__(self, key: tuple[int, ...]) -> None:
        k = ctypes.create_string_buffer(self.key.pack(*key))
        try:
            _call(DELETE, "=IxxxxQ", self.fd, _address(k))
        except OSError as e:
            if e.errno == errno.ENOENT:
                raise KeyError(key) from e
            raise

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        """All keys, as of the start."""
        keys: list[tuple[int, ...]] = []
        previous, following = None, ctypes.create_string_buffer(self.key.size)
        while True:
            try:
                _call(NEXT_KEY, "=IxxxxQQ", self.fd, _address(previous) if previous else 0,
                      _address(following))  # fmt: skip
            except OSError as e:
                if e.errno == errno.ENOENT:
                    return iter(keys)
                raise
            keys.append(self.key.unpack(following.raw))
            previous = ctypes.create_string_buffer(following.raw)

    @property
    def _stride(self) -> int:
        return (self.value.size + 7) // 8 * 8 if self.cpus else self.value.size


def run(program: int, frame: bytes, repeat: int = 1) -> tuple[int, bytes, int]:
    """Run a tc program on an Ethernet frame, outside of any link (BPF_PROG_TEST_RUN).

    Returns its verdict, the frame afterwards, and nanoseconds per run.
    """
    data = ctypes.create_string_buffer(frame, len(frame))
    out = ctypes.create_string_buffer(len(frame) + 256)
    attributes = _bpf(TEST_RUN, "=IIIIQQII", program, 0, len(frame), len(out), _address(data),
                      _address(out), repeat, 0)  # fmt: skip
    _, _, verdict, _, size, _, _, _, duration_ns = struct.unpack_from("=iIIIIQQII", attributes)
    return verdict, out.raw[:size], duration_ns


# --- headers --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Headers:
    """Kernel headers that bcc compiles with."""

    release: str
    exact: bool
    """Those of the running kernel."""
    environment: Mapping[str, str]
    cflags: tuple[str, ...]


def headers() -> Headers:
    """The running kernel's headers, or else the newest of Debian's that are installed.

    Programs of the network touch only UAPI structures, so headers of another version serve.
    Raises `Error` if there are none.
    """
    running = platform.release()
    if (Path("/lib/modules") / running / "build/include/linux/kconfig.h").exists() or (
        Path("/lib/modules") / running / "source/include/linux/kconfig.h"
    ).exists():
        return Headers(running, True, {}, ())
    arch = {"x86_64": ("amd64", "x86"), "aarch64": ("arm64", "arm64")}[platform.machine()]
    found = [
        p for p in Path("/usr/src").glob(f"linux-headers-*-{arch[0]}")
        if _common(p).is_dir() and (p / "include/generated").is_dir()
    ]  # fmt: skip
    if not found:
        raise Error(
            f"no kernel headers for eBPF programs (running kernel: {running})",
            hint=f"apt-get install linux-headers-{arch[0]}",
        )
    newest = max(found, key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)])
    generated = ("include", f"arch/{arch[1]}/include/generated", "include/generated/uapi",
                 f"arch/{arch[1]}/include/generated/uapi")  # fmt: skip
    return Headers(
        release=newest.name.removeprefix("linux-headers-"),
        exact=False,
        environment={"BCC_KERNEL_SOURCE": str(_common(newest))},
        cflags=tuple(f"-I{newest / path}" for path in generated),
    )


def _common(headers: Path) -> Path:
    """Debian keeps what all flavors of a version share in a folder of its own."""
    return headers.with_name(headers.name.rpartition("-")[0] + "-common")


# --- program sets ---------------------------------------------------------------------------


def source(name: str) -> str:
    """The text of `bpf/NAME.c` with our headers in it: bcc knows maps in the main file only."""
    seen: set[str] = set()

    def text(file: str) -> str:
        if file in seen:
            return ""
        seen.add(file)
        body = (SOURCES / file).read_text()
        return re.sub(r'^#include "(\S+)"\n', lambda m: text(m[1]), body, flags=re.MULTILINE)

    return text(f"{name}.c")


@dataclass(frozen=True)
class ProgramSet:
    """Loaded programs and their maps, with one user's slot. `close` closes the descriptors."""

    pins: Path
    slot: int

    def program(self, name: str) -> int:
        """File descriptor of a program."""
        return self._open(f"program_{name}")

    def map(self, name: str, key: str, value: str) -> Map:
        """A map by name; key and value are layouts of the module struct."""
        fd = self._open(f"map_{name}")
        info = ctypes.create_string_buffer(128)
        _bpf(INFO, "=IIQ", fd, len(info), _address(info))
        kind, _, key_size, value_size = struct.unpack_from("=IIII", info)
        layouts = struct.Struct(key), struct.Struct(value)
        assert (layouts[0].size, layouts[1].size) == (key_size, value_size), name
        per_cpu = kind in (5, 6, 10, 21)  # enum bpf_map_type
        return Map(fd, *layouts, cpus=_possible_cpus() if per_cpu else 0)

    def close(self) -> None:
        """Close the file descriptors; pins and attached programs stay."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def _open(self, pin: str) -> int:
        if pin not in self._fds:
            self._fds[pin] = open_pin(self.pins / pin)
        return self._fds[pin]

    @cached_property
    def _fds(self) -> dict[str, int]:
        return {}


def _possible_cpus() -> int:
    last = Path("/sys/devices/system/cpu/possible").read_text().strip().rpartition("-")[2]
    return int(last.rpartition(",")[2]) + 1


def load(name: str, owner: Scope) -> ProgramSet:
    """Programs of `bpf/NAME.c`, compiled if nobody has yet, with a slot of this user's own.

    They stay for as long as the whole that `owner` is a part of: pods that follow each other share
    them, too. Raises `Error` where the kernel or its headers do not allow it, or no slot is free.
    """
    text = source(name)
    digest = hashlib.sha256(f"{platform.release()}\n{text}".encode()).hexdigest()[:16]
    pins = PINS / f"{name}-{digest}"
    users = pins / "users"  # made last: without it, whoever compiled was killed
    with _lock():
        _mount_bpffs()
        taken = {int(p.name.partition("-")[0]) for p in users.glob("*")}
        slot = min(set(range(1, MAX_SLOTS + 1)) - taken, default=None)
        if slot is None:
            raise Error(f"all {MAX_SLOTS} slots of the programs {name!r} are taken",
                        hint="take down a pod, or run 'testbed clean'")  # fmt: skip
        keeper, user = users / f"0-{owner.id}", users / f"{slot}-{owner.id}"
        if not keeper.exists():
            owner.whole.defer(remove_user, pins=str(pins), user=keeper.name)
        owner.defer(remove_user, pins=str(pins), user=user.name)
        if not users.exists():
            _remove(pins)
            _compile(name, pins)
            users.mkdir()
        keeper.mkdir(exist_ok=True)
        user.mkdir()
    return ProgramSet(pins, slot)


def remove_user(pins: str, user: str) -> None:
    """Give a slot back; with the last one the pins go, too."""
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
    """One process at a time makes or removes pins on this host."""
    ledger.ROOT.mkdir(mode=0o700, exist_ok=True)
    with (ledger.ROOT / "bpf.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _mount_bpffs() -> None:
    """As systemd does at boot, where nobody did."""
    buffer = ctypes.create_string_buffer(256)
    if _libc.statfs(str(BPFFS).encode(), buffer):
        raise Error(f"{BPFFS} is missing: the kernel has no eBPF", hint="use Linux 5.10 or later")
    if struct.unpack_from("=q", buffer)[0] != BPF_FS_MAGIC and _libc.mount(
        b"bpf", str(BPFFS).encode(), b"bpf", 0, b"mode=0700"
    ):
        raise Error(f"cannot mount bpffs on {BPFFS}: {os.strerror(ctypes.get_errno())}",
                    hint="run as root")  # fmt: skip
    PINS.mkdir(exist_ok=True)


def _compile(name: str, pins: Path) -> None:
    found = headers()
    done = subprocess.run(
        [sys.executable, "-m", "testbed.bpf", name, str(pins), *found.cflags],
        env=dict(os.environ, **found.environment),
        cwd=SOURCES.parent,
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        _remove(pins)
        raise Error(f"bpf/{name}.c does not load: {done.stderr.strip()[-2000:]}",
                    hint="see what 'testbed doctor' says of eBPF")  # fmt: skip


def _compile_here(name: str, pins: Path, cflags: list[str]) -> None:
    """Compile, load and pin; in a process of its own."""
    from bcc import BPF

    text = source(name)
    module = BPF(text=text, cflags=["-w", *cflags])
    pins.mkdir()
    for function in re.findall(r"^int (\w+)\(struct \w+ \*\w+\)$", text, re.MULTILINE):
        if function in ATTACH_TYPES:
            kind = TYPES["option" if function == "setsockopt" else "address"]
            loaded = module.load_func(function, kind, attach_type=ATTACH_TYPES[function])
        else:
            loaded = module.load_func(function, TYPES["skb"])
        pin(loaded.fd, pins / f"program_{function}")
    # (What sockets hold has no pin: it is nobody's to open, and bcc has no table for it.)
    tables = r'^BPF_(?!SK_)\w+\((?:"\w+", [\w ]+, [\w ]+, )?(\w+),'
    for table in re.findall(tables, text, re.MULTILINE):
        pin(module[table].map_fd, pins / f"map_{table}")


# --- attaching ------------------------------------------------------------------------------


def attach_tc(
    owner: Scope, netns: str, ifindex: int, hook: int, program: int, name: str, classid: int
) -> None:
    """Run a tc program on a link's packets (`hook`: INGRESS or EGRESS), with a class to read.

    Only the 16 bits of the class's minor number reach it. rtnetlink by hand: pyroute2 needs five
    times as long for it, and a pod has a dozen.
    """
    owner.defer(detach_tc, netns=netns, ifindex=ifindex)
    kind, options = _attribute(TCA_KIND, b"bpf\0"), b"".join((
        _attribute(TCA_BPF_FD, struct.pack("=I", program)),
        _attribute(TCA_BPF_NAME, name.encode() + b"\0"),
        _attribute(TCA_BPF_CLASSID, struct.pack("=I", classid)),
        _attribute(TCA_BPF_FLAGS, struct.pack("=I", 1)),  # TCA_BPF_FLAG_ACT_DIRECT
    ))  # fmt: skip

    def attach() -> None:
        with suppress(FileExistsError):  # the other hook has it already
            _tc(RTM_NEWQDISC, ifindex, _attribute(TCA_KIND, b"clsact\0"), parent=CLSACT)
        _tc(RTM_NEWTFILTER, ifindex, kind + _attribute(TCA_OPTIONS, options), parent=hook,
            handle=1, info=1 << 16 | socket.htons(ETH_P_ALL))  # fmt: skip

    netlink.inside(netns, attach)


def detach_tc(netns: str, ifindex: int) -> None:
    """Take all our programs off a link. A link or namespace that is gone is no error."""

    def detach() -> None:
        _tc(RTM_DELQDISC, ifindex, _attribute(TCA_KIND, b"clsact\0"), parent=CLSACT)

    try:
        netlink.inside(netns, detach)
    except OSError as e:
        if e.errno not in (errno.ENODEV, errno.EINVAL, errno.ENOENT):  # EINVAL: no clsact
            raise


def _attribute(kind: int, value: bytes) -> bytes:
    """A netlink attribute (struct nlattr), padded."""
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def _tc(
    message: int,
    ifindex: int,
    attributes: bytes,
    parent: int,
    handle: int = 0xFFFF0000,
    info: int = 0,
) -> None:
    """One request about a qdisc or filter (struct tcmsg) and the kernel's answer, as OSError."""
    flags = 1 | 4 | (0x600 if message != RTM_DELQDISC else 0)  # REQUEST, ACK; CREATE, EXCL
    body = struct.pack("=BxxxiIII", socket.AF_UNSPEC, ifindex, handle, parent, info) + attributes
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink_socket:
        netlink_socket.send(struct.pack("=IHHII", 16 + len(body), message, flags, 1, 0) + body)
        code = -struct.unpack_from("=i", netlink_socket.recv(4096), 16)[0]
    if code:
        raise OSError(code, os.strerror(code))


def attach_cgroup(owner: Scope, cgroup: Path, name: str, program: int) -> None:
    """Run a cgroup program, named after its hook, for the processes of a cgroup2 directory."""
    info = ctypes.create_string_buffer(128)
    _bpf(INFO, "=IIQ", program, len(info), _address(info))
    id = struct.unpack_from("=4xI", info)[0]
    owner.defer(detach_cgroup, cgroup=str(cgroup), name=name, id=id)
    _change_cgroup(ATTACH, cgroup, name, program)


def detach_cgroup(cgroup: str, name: str, id: int) -> None:
    """Take a program, known by its id, off a cgroup. That either is gone is no error."""
    try:
        program = _call(FD_BY_ID, "=I", id)
    except FileNotFoundError:
        return
    try:
        _change_cgroup(DETACH, Path(cgroup), name, program)
    except FileNotFoundError:
        pass  # the cgroup, or it was not attached
    finally:
        os.close(program)


def _change_cgroup(command: int, cgroup: Path, name: str, program: int) -> None:
    fd = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
    try:
        flags = 2 if command == ATTACH else 0  # BPF_F_ALLOW_MULTI: others may attach theirs
        _call(command, "=IIII", fd, program, ATTACH_TYPES[name], flags)
    finally:
        os.close(fd)


if __name__ == "__main__":
    _compile_here(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
