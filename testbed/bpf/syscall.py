"""The system call bpf(2): creates, reads, loads and pins maps and programs by file descriptor."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testbed.host import architecture

libc = ctypes.CDLL(None, use_errno=True)

CREATE, LOOKUP, UPDATE, DELETE, NEXT_KEY, LOAD, PIN, GET, ATTACH, DETACH, TEST_RUN, FD_BY_ID = (
    0,
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    9,
    10,
    13,
)
MAP_FD_BY_ID, INFO, QUERY, BTF_LOAD, BTF_BY_ID = 14, 15, 16, 18, 19
"""enum bpf_cmd."""


def bpf(command: int, layout: str, *values: int | bytes) -> bytes:
    """Call bpf(2) with a `union bpf_attr` of the given struct layout and values.

    Returns the result as 4 bytes, then the attributes as the kernel left them. Raises OSError.
    """
    attributes = ctypes.create_string_buffer(struct.pack(layout, *values), 128)
    result = libc.syscall(architecture.native().sys_bpf, command, attributes, len(attributes))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return struct.pack("=i", result) + attributes.raw


def call(command: int, layout: str, *values: int | bytes) -> int:
    """Call bpf(2) like `bpf`, and return the result alone."""
    return int(struct.unpack_from("=i", bpf(command, layout, *values))[0])


def address(buffer: Any) -> int:
    """Address of a ctypes buffer."""
    return ctypes.addressof(buffer)


def _text(path: object) -> Any:
    return ctypes.create_string_buffer(str(path).encode())


LOG_BYTES = 1 << 24
"""Size of the verifier's log. Before Linux 6.4 a program is refused if its log does not fit."""
LOG_ALL, LOG_STATISTICS = 1, 4
"""Contents of the log: BPF_LOG_LEVEL1, BPF_LOG_STATS."""


def pin(fd: int, path: Path) -> None:
    """Give a map or program a name in bpffs (BPF_OBJ_PIN)."""
    name = _text(path)
    call(PIN, "=QI", address(name), fd)


def open_pin(path: Path) -> int:
    """File descriptor of a pinned map or program (BPF_OBJ_GET)."""
    name = _text(path)
    return call(GET, "=QI", address(name), 0)


PER_CPU = (5, 6, 10, 21)
"""Types of maps that have a copy of each value for each CPU (enum bpf_map_type)."""


@dataclass(frozen=True)
class Map:
    """A map in the kernel, used like a dictionary of tuples, which have struct layouts.

    Of a per-CPU map, reading gives the sum of all CPUs' values; writing sets one and clears the
    others.
    """

    fd: int
    key: struct.Struct
    value: struct.Struct
    cpus: int = 0
    """Copies of each value; 0 if the map is not per CPU."""

    def __setitem__(self, key: tuple[int, ...], value: tuple[int, ...]) -> None:
        self._update(key, value, 0)

    def add(self, key: tuple[int, ...], value: tuple[int, ...]) -> None:
        """Set the value of a key that has none."""
        with suppress(FileExistsError):
            self._update(key, value, 1)  # BPF_NOEXIST

    def _update(self, key: tuple[int, ...], value: tuple[int, ...], flags: int) -> None:
        data = self.value.pack(*value)
        if self.cpus:  # in the first copy; the others are zero
            data = data.ljust(self._stride * self.cpus, b"\0")
        k, v = ctypes.create_string_buffer(self.key.pack(*key)), ctypes.create_string_buffer(data)
        call(UPDATE, "=IxxxxQQQ", self.fd, address(k), address(v), flags)

    def __getitem__(self, key: tuple[int, ...]) -> tuple[int, ...]:
        """The value of a key. Raises KeyError if there is none."""
        k = ctypes.create_string_buffer(self.key.pack(*key))
        v = ctypes.create_string_buffer(self._stride * (self.cpus or 1))
        try:
            call(LOOKUP, "=IxxxxQQQ", self.fd, address(k), address(v), 0)
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
            call(DELETE, "=IxxxxQ", self.fd, address(k))
        except OSError as e:
            if e.errno == errno.ENOENT:
                raise KeyError(key) from e
            raise

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        """Iterate over a copy of the keys, made at the start."""
        keys: list[tuple[int, ...]] = []
        previous, following = None, ctypes.create_string_buffer(self.key.size)
        while True:
            try:
                call(
                    NEXT_KEY,
                    "=IxxxxQQ",
                    self.fd,
                    address(previous) if previous else 0,
                    address(following),
                )
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
    """Run a tc program on an Ethernet frame without a link (BPF_PROG_TEST_RUN).

    Returns its verdict, the frame afterwards, and the time in nanoseconds per run.
    """
    data = ctypes.create_string_buffer(frame, len(frame))
    out = ctypes.create_string_buffer(len(frame) + 256)
    attributes = bpf(
        TEST_RUN,
        "=IIIIQQII",
        program,
        0,
        len(frame),
        len(out),
        address(data),
        address(out),
        repeat,
        0,
    )
    _, _, verdict, _, size, _, _, _, duration_ns = struct.unpack_from("=iIIIIQQII", attributes)
    return verdict, out.raw[:size], duration_ns


def create_map(
    name: str, shape: tuple[int, ...], btf: tuple[int, int, int] = (0, 0, 0), inner: int = 0
) -> int:
    """Create a map (BPF_MAP_CREATE), and return its file descriptor.

    `shape`: type, key size, value size, entries, flags. `btf`: file descriptor of its type
    information, type id of the key, type id of the value; zeros for none. `inner`: file descriptor
    of a map like those that are put into a map of maps.
    """
    return call(CREATE, "=IIIIIII16sIIII", *shape, inner, 0, name.encode()[:15], 0, *btf)


def shape(map_fd: int) -> tuple[int, ...]:
    """Type, key size, value size, entries, flags of a map."""
    kind, _, *rest = struct.unpack_from("=IIIIII", info(map_fd, 128))  # struct bpf_map_info
    return kind, *rest


def load_program(name: str, kind: int, attach_type: int, code: bytes) -> int:
    """Load a program, which the kernel verifies (BPF_PROG_LOAD), and return its file descriptor.

    Raises OSError with the verifier's reason and the instruction that it rejects.
    """
    try:
        return _load(name, kind, attach_type, code)
    except OSError:
        log = ctypes.create_string_buffer(LOG_BYTES)
        try:
            return _load(name, kind, attach_type, code, LOG_ALL, log)
        except OSError as e:
            raise OSError(e.errno, _reason(log.value.decode(errors="replace")) or e.strerror) from e


def _reason(log: str) -> str:
    """The verifier's reason and the rejected instruction, from its log.

    The reason follows the last instruction of the log. It is one line; Linux 7.3 adds suggestions.
    """
    lines = [line.strip() for line in log.splitlines() if not line.startswith("processed ")]
    at = max((i for i, line in enumerate(lines) if re.match(r"\d+: \(", line)), default=0)
    return "; ".join(filter(None, (*lines[at + 1 :], *lines[at : at + 1])))[:500]


def processed(name: str, kind: int, attach_type: int, code: bytes) -> int:
    """Number of instructions that the verifier processes. It rejects more than a million."""
    log = ctypes.create_string_buffer(LOG_BYTES)
    os.close(_load(name, kind, attach_type, code, LOG_STATISTICS, log))
    found = re.search(rb"processed (\d+) insns", log.value)
    assert found is not None, log.value
    return int(found[1])


def _load(
    name: str, kind: int, attach_type: int, code: bytes, level: int = 0, log: Any = None
) -> int:
    instructions, licence = ctypes.create_string_buffer(code, len(code)), _text("GPL")
    log_arguments = (level, len(log), address(log)) if log else (0, 0, 0)
    return call(
        LOAD,
        "=IIQQIIQII16sII",
        kind,
        len(code) // 8,
        address(instructions),
        address(licence),
        *log_arguments,
        0,
        0,
        name.encode()[:15],
        0,
        attach_type,
    )


def program_name(fd: int) -> str:
    """A program's name as the kernel stores it: the first 15 characters."""
    name: bytes = struct.unpack_from("=64x16s", info(fd, 128))[0]  # struct bpf_prog_info
    return name.rstrip(b"\0").decode()


def load_btf(data: bytes) -> int:
    """Load type information (BPF_BTF_LOAD), and return its file descriptor."""
    buffer = ctypes.create_string_buffer(data, len(data))
    return call(BTF_LOAD, "=QQII", address(buffer), 0, len(data), 0)


def btf_of(map_fd: int) -> tuple[bytes, int, int]:
    """Type information of a map: BTF, type id of the key, type id of the value.

    Empty and zeros if the map has none.
    """
    id, key, value = struct.unpack_from("=III", info(map_fd, 128), 64)  # struct bpf_map_info
    if not id:
        return b"", 0, 0
    fd = call(BTF_BY_ID, "=I", id)
    size = struct.unpack_from("=8xI", info(fd, 16))[0]  # struct bpf_btf_info
    data = ctypes.create_string_buffer(size)
    request = ctypes.create_string_buffer(struct.pack("=QII", address(data), size, 0), 16)
    call(INFO, "=IIQ", fd, len(request), address(request))
    os.close(fd)
    return data.raw, key, value


def info(fd: int, size: int) -> bytes:
    """Information on a map, program or BTF (BPF_OBJ_GET_INFO_BY_FD): the first `size` bytes."""
    buffer = ctypes.create_string_buffer(size)
    call(INFO, "=IIQ", fd, size, address(buffer))
    return buffer.raw
