"""bpf(2), the system call: maps and programs as the kernel knows them, by file descriptor."""

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
INFO, QUERY, BTF_LOAD, BTF_BY_ID = 15, 16, 18, 19
"""enum bpf_cmd."""


def bpf(command: int, layout: str, *values: int | bytes) -> bytes:
    """bpf(2) with `union bpf_attr` by struct layout: the result, then the attributes afterwards."""
    attributes = ctypes.create_string_buffer(struct.pack(layout, *values), 128)
    result = libc.syscall(architecture.native().sys_bpf, command, attributes, len(attributes))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return struct.pack("=i", result) + attributes.raw


def call(command: int, layout: str, *values: int | bytes) -> int:
    return int(struct.unpack_from("=i", bpf(command, layout, *values))[0])


def address(buffer: Any) -> int:
    return ctypes.addressof(buffer)


def _text(path: object) -> Any:
    return ctypes.create_string_buffer(str(path).encode())


LOG_BYTES = 1 << 24
"""Of the verifier's. Before Linux 6.4 a program whose log does not fit is refused for that."""
LOG_ALL, LOG_STATISTICS = 1, 4
"""What is in it: BPF_LOG_LEVEL1, BPF_LOG_STATS."""


def pin(fd: int, path: Path) -> None:
    """Give a map or program a name in bpffs (BPF_OBJ_PIN)."""
    name = _text(path)
    call(PIN, "=QI", address(name), fd)


def open_pin(path: Path) -> int:
    """File descriptor of a pinned map or program (BPF_OBJ_GET)."""
    name = _text(path)
    return call(GET, "=QI", address(name), 0)


@dataclass(frozen=True)
class Map:
    """A map; keys and values are struct layouts. Values of per-CPU maps are read as their sum."""

    fd: int
    key: struct.Struct
    value: struct.Struct
    cpus: int = 0
    """Copies of each value; 0 if the map is not per CPU."""

    def __setitem__(self, key: tuple[int, ...], value: tuple[int, ...]) -> None:
        self._update(key, value, 0)

    def add(self, key: tuple[int, ...], value: tuple[int, ...]) -> None:
        """Set a value where there is none."""
        with suppress(FileExistsError):
            self._update(key, value, 1)  # BPF_NOEXIST

    def _update(self, key: tuple[int, ...], value: tuple[int, ...], flags: int) -> None:
        data = self.value.pack(*value)
        if self.cpus:  # in the first copy; the others are zero
            data = data.ljust(self._stride * self.cpus, b"\0")
        k, v = ctypes.create_string_buffer(self.key.pack(*key)), ctypes.create_string_buffer(data)
        call(UPDATE, "=IxxxxQQQ", self.fd, address(k), address(v), flags)

    def __getitem__(self, key: tuple[int, ...]) -> tuple[int, ...]:
        """The value; KeyError if there is none."""
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
        """All keys, as of the start."""
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
    """Run a tc program on an Ethernet frame, outside of any link (BPF_PROG_TEST_RUN).

    Returns its verdict, the frame afterwards, and nanoseconds per run.
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


def create_map(name: str, shape: tuple[int, int, int, int, int], btf: tuple[int, int, int]) -> int:
    """File descriptor of a new map (BPF_MAP_CREATE).

    `shape`: type, key size, value size, entries, flags. `btf`: descriptor of its type information,
    in it the key's and the value's type; zeros for none.
    """
    return call(CREATE, "=IIIIIII16sIIII", *shape, 0, 0, name.encode()[:15], 0, *btf)


def load_program(name: str, kind: int, attach_type: int, code: bytes) -> int:
    """File descriptor of a program that the kernel has verified (BPF_PROG_LOAD).

    Raises OSError with the verifier's reason and the instruction that it is about.
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
    """What the verifier says after the last instruction that it looked at, and that instruction.

    The reason itself is a line; Linux 7.3 has suggestions after it.
    """
    lines = [line.strip() for line in log.splitlines() if not line.startswith("processed ")]
    at = max((i for i, line in enumerate(lines) if re.match(r"\d+: \(", line)), default=0)
    return "; ".join(filter(None, (*lines[at + 1 :], *lines[at : at + 1])))[:500]


def processed(name: str, kind: int, attach_type: int, code: bytes) -> int:
    """How many instructions the verifier goes through; it refuses more than a million."""
    log = ctypes.create_string_buffer(LOG_BYTES)
    os.close(_load(name, kind, attach_type, code, LOG_STATISTICS, log))
    found = re.search(rb"processed (\d+) insns", log.value)
    assert found is not None, log.value
    return int(found[1])


def _load(
    name: str, kind: int, attach_type: int, code: bytes, level: int = 0, log: Any = None
) -> int:
    instructions, licence = ctypes.create_string_buffer(code, len(code)), _text("GPL")
    said = (level, len(log), address(log)) if log else (0, 0, 0)
    return call(
        LOAD,
        "=IIQQIIQII16sII",
        kind,
        len(code) // 8,
        address(instructions),
        address(licence),
        *said,
        0,
        0,
        name.encode()[:15],
        0,
        attach_type,
    )


def program_name(fd: int) -> str:
    """The first 15 characters of a program's name, which are what the kernel keeps."""
    name: bytes = struct.unpack_from("=64x16s", info(fd, 128))[0]  # struct bpf_prog_info
    return name.rstrip(b"\0").decode()


def load_btf(data: bytes) -> int:
    """File descriptor of type information (BPF_BTF_LOAD)."""
    buffer = ctypes.create_string_buffer(data, len(data))
    return call(BTF_LOAD, "=QQII", address(buffer), 0, len(data), 0)


def btf_of(map_fd: int) -> tuple[bytes, int, int]:
    """Type information of a map, in it the key's and the value's type; empty if it has none."""
    id, key, value = struct.unpack_from("=III", info(map_fd, 128), 64)  # struct bpf_map_info
    if not id:
        return b"", 0, 0
    fd = call(BTF_BY_ID, "=I", id)
    size = struct.unpack_from("=8xI", info(fd, 16))[0]  # struct bpf_btf_info
    data = ctypes.create_string_buffer(size)
    about = ctypes.create_string_buffer(struct.pack("=QII", address(data), size, 0), 16)
    call(INFO, "=IIQ", fd, len(about), address(about))
    os.close(fd)
    return data.raw, key, value


def info(fd: int, size: int) -> bytes:
    """What the kernel says about a map, program or type information (BPF_OBJ_GET_INFO_BY_FD)."""
    buffer = ctypes.create_string_buffer(size)
    call(INFO, "=IIQ", fd, size, address(buffer))
    return buffer.raw
