"""Reads ELF files: checks whether a guest can run a program, and finds its shared libraries.

Libraries are found as ld.so(8) does: RPATH, RUNPATH, the cache of ldconfig, the default
folders. LD_LIBRARY_PATH is ignored, since an image must not depend on the shell in which it is
composed. Nothing is written here.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from elftools.common.exceptions import ELFError
from elftools.construct import ConstructError
from elftools.elf.dynamic import DynamicSegment
from elftools.elf.elffile import ELFFile
from elftools.elf.enums import ENUM_DT_FLAGS_1
from elftools.elf.segments import InterpSegment, NoteSegment

from testbed.host import architecture, process
from testbed.model.errors import Error

MACHINES = {
    "EM_X86_64": "x86_64",
    "EM_AARCH64": "aarch64",
    "EM_386": "i386",
    "EM_ARM": "arm",
    "EM_RISCV": "riscv",
    "EM_S390": "s390x",
    "EM_PPC64": "ppc64",
}
DEFAULT_FOLDERS = ("/lib64", "/usr/lib64", "/lib", "/usr/lib")


@dataclass(frozen=True)
class Elf:
    """The parts of an ELF file that decide where it can run."""

    path: Path
    machine: str
    """In the words of `uname -m`: x86_64, aarch64."""
    kind: str
    """ELF type: ET_EXEC, ET_DYN (position independent), ET_REL (object file)."""
    interpreter: str | None
    """Path of ld.so; None unless it is a dynamically linked program."""
    needed: tuple[str, ...] = ()
    """Sonames in the order of the file."""
    rpath: tuple[str, ...] = ()
    """Applies to libraries of libraries, too. Ignored if there is a RUNPATH."""
    runpath: tuple[str, ...] = ()
    is_pie: bool = False
    """Whether it is marked as a program (DF_1_PIE): all that tells a static one from a library."""
    is_go: bool = False
    """Whether Go's compiler made it, which leaves a note in the file."""


def read(path: Path, machine: str | None = None) -> Elf:
    """Read an ELF file. Raises `Error` if it is none, or not for `machine` (default: this one)."""
    elf = _parse(path)
    machine = machine or architecture.native().name
    if elf.machine != machine:
        raise Error(f"{path} is for {elf.machine}, not {machine}", hint=f"build it for {machine}")
    return elf


def is_elf(path: Path) -> bool:
    """Whether a file says that it is an ELF file."""
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def read_program(path: Path) -> Elf:
    """Read a program: as `read`, and raises `Error` if it is an object file or a shared library."""
    elf = read(path)
    if elf.kind not in ("ET_EXEC", "ET_DYN"):
        raise Error(f"{path} is an object file, not a program", hint="link it")
    if elf.kind == "ET_DYN" and elf.interpreter is None and not elf.is_pie:
        raise Error(f"{path} is a shared library, not a program", hint="link it with -pie")
    return elf


def closure(program: Elf, provided: Iterable[str] = ()) -> dict[str, Path]:
    """Soname → file of all libraries that `program` needs, directly or indirectly.

    `provided` are sonames that the target itself has; they and their dependencies are left out.
    Raises `Error` for a library that is missing or exists only for another machine.
    """
    found: dict[str, Path] = {}
    done = set(provided)
    pending: list[tuple[Elf, tuple[str, ...]]] = [(program, ())]
    while pending:
        elf, inherited = pending.pop(0)
        rpath = () if elf.runpath else (*_expand(elf.rpath, elf.path), *inherited)
        for soname in elf.needed:
            if soname not in done:
                done.add(soname)
                library = _find(soname, elf, rpath)
                found[soname] = library.path
                pending.append((library, rpath))
    return dict(sorted(found.items()))


def symbols(files: Iterable[Path]) -> tuple[set[str], set[str]]:
    """Symbols that ELF files need of others, and those that they have for others, by `nm`.

    The first are without those that may be missing (weak). Versions are left out.
    """
    needed, given = set[str](), set[str]()
    listing = process.run(["nm", "--dynamic", *files], "cannot read symbols")
    for words in map(str.split, listing.splitlines()):
        match words:
            case ["U", name]:
                needed.add(name.partition("@")[0])
            case [_, _, name]:
                given.add(name.partition("@")[0])
    return needed, given


def _parse(path: Path) -> Elf:
    try:
        with path.open("rb") as file:
            elf = ELFFile(file)
            interpreter, tags, is_go = None, [], False
            for segment in elf.iter_segments():
                if isinstance(segment, InterpSegment):
                    interpreter = segment.get_interp_name()
                elif isinstance(segment, DynamicSegment):
                    tags = list(segment.iter_tags())
                elif isinstance(segment, NoteSegment):
                    is_go |= any(note["n_name"] == "Go" for note in segment.iter_notes())
            strings = {
                kind: tuple(getattr(t, kind) for t in tags if t.entry.d_tag == f"DT_{kind.upper()}")
                for kind in ("needed", "rpath", "runpath")
            }
            flags = [tag.entry.d_val for tag in tags if tag.entry.d_tag == "DT_FLAGS_1"]
            return Elf(
                path=path,
                machine=_machine(elf),
                kind=elf["e_type"],
                interpreter=interpreter,
                needed=strings["needed"],
                rpath=_split(strings["rpath"]),
                runpath=_split(strings["runpath"]),
                is_pie=any(each & ENUM_DT_FLAGS_1["DF_1_PIE"] for each in flags),
                is_go=is_go,
            )
    except OSError as e:
        raise Error(f"cannot read {path}: {e.strerror}") from e
    except (ELFError, ConstructError, MemoryError, ValueError) as e:  # by sizes that cannot be
        raise Error(f"{path} is not an ELF file ({e})") from e


def _machine(elf: ELFFile) -> str:
    name = MACHINES.get(elf["e_machine"], str(elf["e_machine"]))
    # x32 is for x86-64, but of 32 bits: ld.so skips that, too.
    return f"{name} (32 bits)" if name in ("x86_64", "aarch64") and elf.elfclass == 32 else name


def _split(paths: Iterable[str]) -> tuple[str, ...]:
    return tuple(folder for path in paths for folder in path.split(":") if folder)


def _expand(folders: Iterable[str], owner: Path) -> tuple[str, ...]:
    origin = str(owner.resolve().parent)
    return tuple(f.replace("$ORIGIN", origin).replace("${ORIGIN}", origin) for f in folders)


def _find(soname: str, user: Elf, rpath: tuple[str, ...]) -> Elf:
    others = []
    for path in _candidates(soname, user, rpath):
        if path.is_file():
            # ld.so skips files of another machine, too.
            library = _parse(path)
            if library.machine == user.machine:
                return library
            others.append(f"{path} is for {library.machine}")
    known = f" ({', '.join(others)})" if others else ""
    raise Error(
        f"{user.path} needs {soname}, which is not found{known}",
        hint=f"install the {user.machine} package that holds {soname} (apt-file search {soname})",
    )


def _candidates(soname: str, user: Elf, rpath: tuple[str, ...]) -> Iterator[Path]:
    if "/" in soname:
        yield Path(soname)
        return
    for folder in (*rpath, *_expand(user.runpath, user.path)):
        yield Path(folder, soname)
    yield from _ld_cache().get(soname, ())
    for folder in DEFAULT_FOLDERS:
        yield Path(folder, soname)


@cache
def _ld_cache() -> dict[str, tuple[Path, ...]]:
    """Soname → files, from `ldconfig -p`: lines `libz.so.1 (libc6,x86-64) => /lib/…/libz.so.1`."""
    ldconfig = shutil.which("ldconfig") or shutil.which("ldconfig", path="/sbin:/usr/sbin")
    if ldconfig is None:
        return {}
    listing = subprocess.run([ldconfig, "-p"], capture_output=True, text=True, check=False).stdout
    libraries: dict[str, tuple[Path, ...]] = {}
    for line in listing.splitlines():
        name, arrow, path = line.partition(" => ")
        if arrow:
            soname = name.split()[0]
            libraries[soname] = (*libraries.get(soname, ()), Path(path))
    return libraries
