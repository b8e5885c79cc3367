"""Compiles eBPF programs of `bpf/` with bcc to bytecode, once per content and compiler.

A set of programs is one C file in `bpf/` with its headers. Compiling takes seconds, and is done in
a process of its own, since LLVM is large and bcc changes the working directory. The bytecode is
cached, from where the kernel loads it in a tenth of a second. Any kernel of the same architecture
can, since the programs use UAPI structures only. In cached bytecode, an instruction refers to a map
by its index in the set's list of maps.
"""

from __future__ import annotations

import base64
import ctypes
import hashlib
import json
import os
import platform
import re
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from testbed import paths
from testbed.bpf import syscall
from testbed.host import architecture
from testbed.host.cache import cache_folder, made
from testbed.model.errors import Error

PROGRAM_TYPES = {"sched_cls": 3, "cgroup_sock_addr": 18, "cgroup_sockopt": 25}
"""enum bpf_prog_type, by the name with which `bpf/common.h` declares an entry point."""
SCHED_CLS = PROGRAM_TYPES["sched_cls"]
"""The type of tc programs."""
SK_REUSEPORT, SK_DROP = 21, 0
"""The type of programs that choose among sockets that share a port, and a verdict of theirs."""
ATTACH_TYPES = {
    "bind4": 8,
    "bind6": 9,
    "connect4": 10,
    "connect6": 11,
    "sendmsg4": 14,
    "sendmsg6": 15,
    "recvmsg4": 19,
    "recvmsg6": 20,
    "getpeername4": 29,
    "getpeername6": 30,
    "getsockname4": 31,
    "getsockname6": 32,
    "setsockopt": 22,
}
"""enum bpf_attach_type of cgroup programs, which are named after their attach type."""

MAP_OF_MAPS = re.compile(r'^BPF_ARRAY_OF_MAPS\((\w+), "(\w+)"', re.MULTILINE)
"""Declaration of a map of maps: its name, and the name of the map that those in it are like."""

LD_IMM64, PSEUDO_MAP_FD = 0x18, 1
"""BPF_LD | BPF_IMM | BPF_DW, the opcode of a 64-bit load, which takes two instructions. Its source
register is BPF_PSEUDO_MAP_FD if it loads a map."""


@dataclass(frozen=True)
class MapShape:
    """Definition of a map: the arguments of `syscall.create_map`."""

    name: str
    shape: tuple[int, ...]
    types: tuple[int, int]
    """BTF type ids of key and value; zeros for none."""
    inner: int | None = None
    """Of a map of maps: index of the map that those in it are like."""


@dataclass(frozen=True)
class Program:
    name: str
    kind: int
    attach_type: int
    code: bytes
    """Instructions, which refer to maps by their index in the set's list."""


@dataclass(frozen=True)
class Bytecode:
    """The compiled programs of a set, and the definitions of their maps."""

    maps: tuple[MapShape, ...]
    programs: tuple[Program, ...]
    btf: bytes
    """Type information (BTF) of the maps."""

    def load(self, pins: Path, shared: Path | None = None) -> None:
        """Load the programs and maps into the kernel, and pin them in the folder `pins`.

        With `shared`, maps that are pinned there are used instead of new ones, and only the tc
        programs are loaded. Raises OSError with the verifier's message.
        """
        btf, fds = syscall.load_btf(self.btf) if self.btf else 0, [0] * len(self.maps)
        templates = {shape.inner for shape in self.maps}
        for i, shape in sorted(enumerate(self.maps), key=lambda m: m[1].inner is not None):
            if shared and (shared_map := shared / f"map_{shape.name}").exists():
                fds[i] = syscall.open_pin(shared_map)
            else:
                # Linux 5.15 to 6.2 take no map for like a template that has type information.
                has_types = any(shape.types) and i not in templates
                typed = (btf, *shape.types) if has_types else (0, 0, 0)
                inner = 0 if shape.inner is None else fds[shape.inner]
                fds[i] = syscall.create_map(shape.name, shape.shape, typed, inner)
                syscall.pin(fds[i], pins / f"map_{shape.name}")
        if btf:
            os.close(btf)
        for program in self.programs:
            if shared and program.kind != SCHED_CLS:
                continue
            code = _with_descriptors(program.code, fds)
            fd = syscall.load_program(program.name, program.kind, program.attach_type, code)
            syscall.pin(fd, pins / f"program_{program.name}")
            os.close(fd)
        for fd in fds:
            os.close(fd)

    def processed(self, pins: Path) -> dict[str, int]:
        """Number of instructions that the kernel's verifier processes, by program.

        `pins` is the folder where the set is loaded, for its maps.
        """
        fds = [syscall.open_pin(pins / f"map_{shape.name}") for shape in self.maps]
        try:
            return {
                p.name: syscall.processed(
                    p.name, p.kind, p.attach_type, _with_descriptors(p.code, fds)
                )
                for p in self.programs
            }
        finally:
            for fd in fds:
                os.close(fd)


def load_entry(name: str, classid: int, calls: int, number: int) -> int:
    """Load a tc program that sets a packet's class and tail-calls entry `number` of `calls`.

    Links need it that run programs by tcx, where no filter sets the class. It has eight
    instructions, so it loads fast. If the entry is empty, it does nothing (TCX_NEXT).
    Returns a file descriptor.
    """
    code = b"".join(
        struct.pack("=BBhi", *instruction)
        for instruction in (
            (0xB7, 2, 0, classid),  # r2 = classid
            (0x63, 0x21, 72, 0),  # skb->tc_classid = r2
            (LD_IMM64, PSEUDO_MAP_FD << 4 | 2, 0, calls),  # r2 = calls
            (0, 0, 0, 0),
            (0xB7, 3, 0, number),  # r3 = number
            (0x85, 0, 0, 12),  # bpf_tail_call(skb, r2, r3)
            (0xB7, 0, 0, -1),  # r0 = TCX_NEXT
            (0x95, 0, 0, 0),  # exit
        )
    )
    return syscall.load_program(name, SCHED_CLS, 0, code)


@contextmanager
def refusing() -> Iterator[int]:
    """File descriptor of a program for sockets that share a port: it chooses none of them."""
    code = struct.pack("=BBhiBBhi", 0xB7, 0, 0, SK_DROP, 0x95, 0, 0, 0)  # r0 = SK_DROP; exit
    fd = syscall.load_program("refuse", SK_REUSEPORT, 0, code)
    try:
        yield fd
    finally:
        os.close(fd)


TRACED = "-traced"
"""Suffix of the name of a set's traced variant (`bpf/trace.h`), which writes events."""


def source(name: str) -> str:
    """Text of `bpf/NAME.c` with our headers inserted: bcc finds maps only in the main file."""
    if name.endswith(TRACED):
        return f"#define TRACED\n{source(name.removesuffix(TRACED))}"
    seen: set[str] = set()

    def text(file: str) -> str:
        if file in seen:
            return ""
        seen.add(file)
        body = (paths.BPF / file).read_text()
        return re.sub(r'^#include "(\S+)"\n', lambda m: text(m[1]), body, flags=re.MULTILINE)

    return text(f"{name}.c")


def reasons(name: str) -> tuple[str, ...]:
    """Names of the reasons that a set counts packets under.

    They are those of `enum reason` in `bpf/NAME.c`, in its order, lower case, without the prefix.
    """
    found = re.findall(r"^\tREASON_(\w+),", (paths.BPF / f"{name}.c").read_text(), re.MULTILINE)
    return tuple(reason.lower() for reason in found)


@dataclass(frozen=True)
class Headers:
    """Kernel headers that bcc compiles with, and how to make it use them."""

    release: str
    exact: bool
    """Whether they are those of the running kernel."""
    environment: Mapping[str, str]
    cflags: tuple[str, ...]


def headers() -> Headers:
    """The running kernel's headers, or else the newest installed ones of Debian.

    The programs use UAPI structures only, so headers of another version will do. Raises `Error` if
    there are none.
    """
    running = platform.release()
    if (Path("/lib/modules") / running / "build/include/linux/kconfig.h").exists() or (
        Path("/lib/modules") / running / "source/include/linux/kconfig.h"
    ).exists():
        return Headers(running, True, {}, ())
    native = architecture.native()
    found = [
        p
        for p in Path("/usr/src").glob(f"linux-headers-*-{native.debian}")
        if _common(p).is_dir() and (p / "include/generated").is_dir()
    ]
    if not found:
        raise Error(
            f"no kernel headers for eBPF programs (running kernel: {running})",
            hint=f"apt-get install linux-headers-{native.debian}",
        )
    newest = max(found, key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)])
    arch = f"arch/{native.kernel}"
    included = (
        "include",
        f"{arch}/include/generated",
        "include/generated/uapi",
        f"{arch}/include/generated/uapi",
    )
    return Headers(
        release=newest.name.removeprefix("linux-headers-"),
        exact=False,
        environment={"BCC_KERNEL_SOURCE": str(_common(newest))},
        cflags=tuple(f"-I{newest / path}" for path in included),
    )


def _common(headers: Path) -> Path:
    """Folder of the headers that all flavors of a Debian kernel version share."""
    return headers.with_name(headers.name.rpartition("-")[0] + "-common")


def digest(name: str) -> str:
    """Key of a set in the cache: a hash of its text, the architecture and the compiler."""
    text = f"{platform.machine()} {_compiler()}\n{source(name)}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _compiler() -> str:
    """Names and sizes of bcc's library files: they tell its version without importing it."""
    folders = ("lib", "lib64", "lib/*-linux-gnu")
    found = (path for folder in folders for path in Path("/usr").glob(f"{folder}/libbcc.so.*"))
    return " ".join(f"{path.name} {path.stat().st_size}" for path in sorted(found))


def get(name: str) -> Bytecode:
    """Read a set from the cache, or compile it first. Raises `Error` if that fails."""
    file = _file(name)
    if not file.exists():
        compile(name)
    stored = json.loads(file.read_bytes())
    return Bytecode(
        tuple(
            MapShape(m["name"], tuple(m["shape"]), tuple(m["types"]), m.get("inner"))
            for m in stored["maps"]
        ),
        tuple(Program(**p | {"code": base64.b64decode(p["code"])}) for p in stored["programs"]),
        base64.b64decode(stored["btf"]),
    )


def compile(name: str) -> None:
    """Compile a set into the cache, even if it is there. Raises `Error` if that fails."""
    found = headers()

    def make(new: Path) -> None:
        done = subprocess.run(
            [sys.executable, "-m", __name__, name, new, *found.cflags],
            env=dict(os.environ, **found.environment),
            cwd=paths.BPF.parent,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise Error(
                f"bpf/{name}.c does not compile: {done.stderr.strip()[-2000:]}",
                hint="see what 'testbed doctor' says about eBPF",
            )

    made(_file(name), make, anew=True)


def _file(name: str) -> Path:
    return cache_folder() / "bpf" / f"{name}-{digest(name)}.json"


def _compile_here(name: str, file: Path, cflags: list[str]) -> None:
    """Compile a set with bcc in this process, and write it to `file`. Loads no program."""
    from bcc import BPF
    from bcc.libbcc import lib

    compiled = BPF(text=source(name), cflags=["-Wall", "-Wextra", *cflags])
    module = ctypes.c_void_p(compiled.module)
    lib.bpf_num_tables.restype, lib.bpf_table_name.restype = ctypes.c_size_t, ctypes.c_char_p
    tables = [ctypes.c_size_t(i) for i in range(lib.bpf_num_tables(module))]
    map_names = {lib.bpf_table_fd_id(module, i): lib.bpf_table_name(module, i) for i in tables}
    fds: list[int] = []
    programs = []
    for i in range(lib.bpf_num_functions(module)):
        function = lib.bpf_function_name(module, i)
        kind, _, program = function.decode().partition("__")
        code = _with_indices(compiled.dump_func(function), fds)
        programs.append(
            {
                "name": program,
                "kind": PROGRAM_TYPES[kind],
                "attach_type": 0 if kind == "sched_cls" else ATTACH_TYPES[program],
                "code": base64.b64encode(code).decode(),
            }
        )
    named = {map_name.decode(): fd for fd, map_name in map_names.items()}
    inner_fds = {named[outer]: named[inner] for outer, inner in MAP_OF_MAPS.findall(source(name))}
    fds += [fd for outer, fd in inner_fds.items() if outer in fds and fd not in fds]
    btf, maps = b"", []
    for fd in fds:
        its_btf, *types = syscall.btf_of(fd)
        btf = its_btf or btf
        maps.append(
            {
                "name": map_names[fd].decode(),
                "shape": syscall.shape(fd),
                "types": types,
                "inner": fds.index(inner_fds[fd]) if fd in inner_fds else None,
            }
        )
    stored = {"maps": maps, "programs": programs, "btf": base64.b64encode(btf).decode()}
    file.write_text(json.dumps(stored))


def _map_references(code: bytes) -> Iterator[int]:
    """Offsets in the code of the 32 bits that refer to a map."""
    skip = False
    for at in range(0, len(code), 8):
        if skip:
            skip = False
        elif code[at] == LD_IMM64:
            skip = True
            if code[at + 1] >> 4 == PSEUDO_MAP_FD:
                yield at + 4


def _with_indices(code: bytes, fds: list[int]) -> bytes:
    """Replace file descriptors of maps by their indices in `fds`, to which new ones are added."""
    changed = bytearray(code)
    for at in _map_references(code):
        (fd,) = struct.unpack_from("=i", code, at)
        if fd not in fds:
            fds.append(fd)
        struct.pack_into("=i", changed, at, fds.index(fd))
    return bytes(changed)


def _with_descriptors(code: bytes, fds: Sequence[int]) -> bytes:
    """Replace indices of maps by their file descriptors in `fds`: inverse of `_with_indices`."""
    changed = bytearray(code)
    for at in _map_references(code):
        (n,) = struct.unpack_from("=i", code, at)
        struct.pack_into("=i", changed, at, fds[n])
    return bytes(changed)


if __name__ == "__main__":
    _compile_here(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
