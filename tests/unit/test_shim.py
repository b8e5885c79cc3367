"""The shim: programs are bound to it first of all, the same way each time, or refused in words.

What it does in a guest is tested with real kernels, in integration.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from testbed import paths
from testbed.host import cache
from testbed.images import compose, elf, shim
from testbed.images.compose import Definition
from testbed.model.errors import Error

CALLS = {
    "__libc_start_main",
    "_Exit",
    "_exit",
    "exit",
    "accept",
    "accept4",
    "bind",
    "connect",
    "freeaddrinfo",
    "getaddrinfo",
    "getpeername",
    "getsockname",
    "recvfrom",
    "recvmmsg",
    "recvmsg",
    "sendmmsg",
    "sendmsg",
    "sendto",
    "__recvfrom_chk",
}


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def compiled(folder: Path, source: str, *options: str) -> Path:
    program = folder / "program"
    subprocess.run(
        ["cc", "-xc", "-", "-pie", "-fPIE", "-o", program, *options],
        input=source,
        text=True,
        check=True,
    )
    return program


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """One that needs a library besides libc."""
    return compiled(tmp_path, "int main(void) { return 0; }", "-Wl,--no-as-needed", "-lz")


def test_the_shim_compiles_without_a_warning_and_needs_only_libc(tmp_path: Path) -> None:
    output = tmp_path / "shim.so"
    strict = ("-Wall", "-Wextra", "-Werror")
    subprocess.run(
        ["cc", *shim.flags(), *strict, "-o", output, *shim.SOURCES.glob("*.c")], check=True
    )
    assert elf.read(output).needed == ("libc.so.6",)
    listed = subprocess.check_output(["nm", "-D", "--defined-only", output], text=True)
    assert {line.split()[-1] for line in listed.splitlines()} == CALLS


def test_the_shim_comes_before_every_other_library(program: Path, tmp_path: Path) -> None:
    before = elf.read_program(program)
    bound = tmp_path / "bound"
    bound.write_bytes(shim.bind(before))
    after = elf.read_program(bound)
    assert after.needed == (shim.SONAME, *before.needed)
    assert shim.SONAME not in before.needed


def test_a_bound_program_still_runs(tmp_path: Path) -> None:
    """On Linux too, where the shim's library is preferred by ld.so as it is by OSv."""
    source = """
        #include <arpa/inet.h>
        #include <stdio.h>
        #include <sys/socket.h>
        int main(void) {
            struct sockaddr_in name = { AF_INET };
            socklen_t size = sizeof(name);
            int fd = socket(AF_INET, SOCK_DGRAM, 0);
            bind(fd, (struct sockaddr *)&name, size);
            return getsockname(fd, (struct sockaddr *)&name, &size) || !name.sin_port;
        }"""
    bound = tmp_path / "bound"
    bound.write_bytes(shim.bind(elf.read(compiled(tmp_path, source))))
    bound.chmod(0o755)
    where = {"LD_LIBRARY_PATH": str(shim.build().parent)}
    subprocess.run([bound], env=where, check=True)


def test_a_bound_program_shows_no_main_and_still_runs(tmp_path: Path) -> None:
    """OSv would call it, and not the entry point, from which the shim tells the status."""
    source = "int main(void) { return 0; }\nint other(void) { return main(); }"
    program = compiled(tmp_path, source, "-rdynamic")
    assert {"main", "other"} <= elf.symbols([program])[1]
    bound = tmp_path / "bound"
    bound.write_bytes(shim.bind(elf.read(program)))
    bound.chmod(0o755)
    shown = elf.symbols([bound])[1]
    assert "other" in shown
    assert "main" not in shown
    subprocess.run([bound], env={"LD_LIBRARY_PATH": str(shim.build().parent)}, check=True)


@pytest.mark.usefixtures("own_cache")
def test_binding_gives_the_same_bytes_each_time(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digest() -> str:
        return hashlib.sha256(shim.bind(elf.read(program))).hexdigest()

    first = digest()
    assert digest() == first  # from the cache
    (kept,) = (cache.cache_folder() / "bound").iterdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert digest() == first
    assert hashlib.sha256(kept.read_bytes()).hexdigest() == first


def test_image_holds_the_shim_unless_it_is_left_out(program: Path) -> None:
    bound = compose.osv_tree(Definition(program))
    plain = compose.osv_tree(Definition(program, shim=False))
    path = f"/usr/lib/{shim.SONAME}"
    assert bound.keys() - plain.keys() == {path}
    assert bound[path] == shim.build().read_bytes()
    assert {name for name in plain if plain[name] != bound[name]} == {"/program"}
    assert plain["/program"] == program.read_bytes()


def test_the_agents_own_image_proves_the_hosts_patch_and_not_the_shim() -> None:
    definition = compose.load(compose.AGENT)
    assert f"/usr/lib/{shim.SONAME}" not in compose.osv_tree(definition)


GO = r""" __asm__(".section .note.go.buildid,\"a\",@note\n.balign 4\n"
    ".long 4,4,4\n.asciz \"Go\\0\"\n.ascii \"abcd\"\n.text");
    int main(void) { return 0; }"""


@pytest.mark.parametrize(
    ("source", "options", "reached"),
    [
        (GO, (), False),
        (GO, ("-static",), False),
        ("int main(void) { return 0; }", ("-static",), False),
        ("int main(void) { return 0; }", ("-static-pie",), False),
        ("int main(void) { return 0; }", ("-no-pie",), True),
    ],
)
def test_a_program_that_the_shim_does_not_reach_is_taken_as_it_is(
    tmp_path: Path, source: str, options: Sequence[str], reached: bool
) -> None:
    program = compiled(tmp_path, source, *options)
    tree = compose.osv_tree(Definition(program))
    assert (f"/usr/lib/{shim.SONAME}" in tree) is reached
    assert (tree["/program"] == program.read_bytes()) is not reached


@pytest.mark.parametrize("name", ["redis", "nginx", "iperf3", "curl"])
def test_definition_of_a_real_program_composes(name: str) -> None:
    path = paths.OSV / f"{name}.toml"
    try:
        definition = compose.load(path)
    except Error as e:
        pytest.skip(str(e))
    assert f"/usr/lib/{shim.SONAME}" in compose.osv_tree(definition)
