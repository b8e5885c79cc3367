"""ELF: a program's closure is what ld.so would load, and unfit programs are refused in words."""

from __future__ import annotations

import platform
import struct
import subprocess
from pathlib import Path

import pytest

from testbed.images import elf
from testbed.model.errors import Error

X86_64 = 62
RISCV = 243
"""EM_RISCV (elf(5)): a machine that this one is not."""

MAIN = "int answer(void); int main(void) { return answer(); }"


def cc(folder: Path, name: str, source: str, *options: str) -> Path:
    """Compile C to `folder/name`."""
    out = folder / name
    out.parent.mkdir(parents=True, exist_ok=True)
    (folder / "source.c").write_text(source)
    subprocess.run(["cc", "-o", out, folder / "source.c", *options], check=True)
    return out


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A library in a folder that ld.so does not know, which needs another in that folder."""
    inner = cc(
        tmp_path,
        "lib/libinner.so.1",
        "int inner(void) { return 0; }",
        "-shared",
        "-fPIC",
        "-Wl,-soname,libinner.so.1",
    )
    outer = "int inner(void); int answer(void) { return inner(); }"
    return cc(
        tmp_path,
        "lib/libouter.so.2",
        outer,
        "-shared",
        "-fPIC",
        "-Wl,-soname,libouter.so.2",
        "-Wl,-rpath,$ORIGIN",
        str(inner),
    )


def test_closure_is_what_ldd_says(tmp_path: Path) -> None:
    program = Path("/usr/bin/python3").resolve()
    listed = {}
    for line in subprocess.check_output(["ldd", program], text=True).splitlines():
        words = line.split()
        if "=>" in words:
            listed[words[0]] = Path(words[2]).resolve()
    found = elf.closure(elf.read(program))
    loader = {name for name in found if name.startswith("ld-linux")}
    assert {n: p.resolve() for n, p in found.items() if n not in loader} == listed


@pytest.mark.parametrize("tag", ["--enable-new-dtags", "--disable-new-dtags"])
def test_origin_and_libraries_of_libraries_are_followed(
    tmp_path: Path, library: Path, tag: str
) -> None:
    program = cc(
        tmp_path,
        "bin/main",
        MAIN,
        "-pie",
        "-fPIE",
        f"-Wl,{tag}",
        "-Wl,-rpath,$ORIGIN/../lib",
        f"-Wl,-rpath-link,{library.parent}",
        str(library),
    )
    closure = elf.closure(elf.read_program(program), provided={"libc.so.6"})
    assert {name: path.resolve() for name, path in closure.items()} == {
        "libinner.so.1": library.parent / "libinner.so.1",
        "libouter.so.2": library,
    }


def test_missing_library_names_who_needs_it(tmp_path: Path, library: Path) -> None:
    program = cc(tmp_path, "main", MAIN, "-pie", f"-Wl,-rpath-link,{library.parent}", str(library))
    with pytest.raises(Error, match=r"main needs libouter\.so\.2, which is not found"):
        elf.closure(elf.read(program), provided={"libc.so.6"})


def test_library_of_another_machine_is_passed_over(tmp_path: Path, library: Path) -> None:
    program = cc(
        tmp_path,
        "main",
        MAIN,
        "-pie",
        f"-Wl,-rpath,{library.parent}",
        f"-Wl,-rpath-link,{library.parent}",
        str(library),
    )
    as_machine(library, RISCV)
    with pytest.raises(Error, match=r"libouter\.so\.2 is for riscv"):
        elf.closure(elf.read(program), provided={"libc.so.6"})


def test_library_of_half_the_bits_is_passed_over(tmp_path: Path, library: Path) -> None:
    """In the cache of ldconfig, Debian's libc6-x32 is before libc6."""
    program = cc(tmp_path, "main", MAIN, "-pie", f"-Wl,-rpath,{library.parent}", str(library))
    x32 = (b"\x7fELF", 1, 1, 1, 0, 3, X86_64, 1, 0, 0, 0, 0, 52, 0, 0, 0, 0, 0)
    library.write_bytes(struct.pack("<4s4B8xHHIIIIIHHHHHH", *x32))
    with pytest.raises(Error, match=r"libouter\.so\.2 is for x86_64 \(32 bits\)"):
        elf.closure(elf.read(program), provided={"libc.so.6"})


def as_machine(path: Path, machine: int) -> Path:
    """The same file, claiming to be for another machine (e_machine)."""
    data = bytearray(path.read_bytes())
    data[18:20] = machine.to_bytes(2, "little")
    path.write_bytes(data)
    return path


def test_program_of_another_machine_is_refused(tmp_path: Path) -> None:
    program = as_machine(cc(tmp_path, "main", "int main(void) { return 0; }", "-pie"), RISCV)
    with pytest.raises(Error, match=f"is for riscv, not {platform.machine()}"):
        elf.read_program(program)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("-shared", "-fPIC"), "is a shared library"),
        (("-c",), "an object file"),
    ],
)
def test_a_file_that_is_no_program_is_refused(
    tmp_path: Path, options: tuple[str, ...], complaint: str
) -> None:
    program = cc(tmp_path, "main", "int main(void) { return 0; }", *options)
    with pytest.raises(Error, match=complaint) as error:
        elf.read_program(program)
    assert error.value.hint


@pytest.mark.parametrize("option", ["-pie", "-no-pie", "-static", "-static-pie"])
def test_a_program_is_taken_however_it_is_linked(tmp_path: Path, option: str) -> None:
    program = elf.read_program(cc(tmp_path, "main", "int main(void) { return 0; }", option))
    assert (program.interpreter is None) is ("static" in option)


def test_a_damaged_program_is_refused_in_words(tmp_path: Path) -> None:
    """A note without the end of its name, the table of strings beyond the end of the file."""
    program = cc(tmp_path, "main", "int main(void) { return 0; }", "-pie")
    intact = program.read_bytes()
    program.write_bytes(intact.replace(b"GNU\0", b"GNU!"))
    with pytest.raises(Error, match="main is not an ELF file"):
        elf.read_program(program)
    program.write_bytes(intact[: len(intact) // 4])
    with pytest.raises(Error, match="main is not an ELF file"):
        elf.read_program(program)


def test_file_that_is_no_elf_is_refused(tmp_path: Path) -> None:
    script = tmp_path / "script"
    for content in (b"", b"#!/bin/sh\n", b"\x7fELF\x02\x01\x01"):
        script.write_bytes(content)
        with pytest.raises(Error, match="not an ELF file"):
            elf.read(script)
    with pytest.raises(Error, match="No such file"):
        elf.read(tmp_path / "nothing")
