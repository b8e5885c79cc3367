"""What each set of programs is made of agrees with what Python and the documentation say."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from testbed import bpf, datapaths, paths
from testbed.bpf import bytecode, syscall
from testbed.datapaths.ebpf import state
from testbed.datapaths.ebpf.state import PodState
from testbed.host.ledger import Owner
from testbed.model.errors import Error

from .test_verifier import SETS, TRACED

pytestmark = pytest.mark.root

COUNTING = [name for name in SETS if name in datapaths.names()]


@pytest.mark.parametrize("name", [*SETS, *TRACED])
def test_bccs_compiler_has_no_warning(name: str, tmp_path: Path) -> None:
    """About our own text. The kernel's headers are not ours."""
    found = bpf.headers()
    command = [sys.executable, "-m", bytecode.__name__, name, str(tmp_path / "set"), *found.cflags]
    done = subprocess.run(
        command,
        env=os.environ | found.environment,
        cwd=paths.ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not re.findall(r"^/virtual/main\.c:.*", done.stderr, re.MULTILINE)


def test_every_map_is_in_the_table_and_every_map_of_the_table_exists() -> None:
    text = (paths.ROOT / "docs/architecture.md").read_text()
    section = re.search(r"^## eBPF maps$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section
    table = re.findall(r"^\| `(\w+)` \|", section[1], re.MULTILINE)
    maps = {shape.name for name in (*SETS, *TRACED) for shape in bytecode.get(name).maps}
    assert sorted(table) == sorted(maps)


@pytest.mark.parametrize("name", COUNTING)
def test_each_reason_has_a_counter(name: str) -> None:
    reasons = bpf.reasons(name)
    assert 0 < len(set(reasons)) == len(reasons) <= len(PodState().counters)


@pytest.mark.parametrize("name", COUNTING)
def test_python_knows_the_layout_of_a_pods_state(name: str) -> None:
    """The size is the same in Python and in C; tests that use a field see its place."""
    [shape] = [shape.shape for shape in bytecode.get(name).maps if shape.name == state.TEMPLATE]
    assert shape[2] == ctypes.sizeof(PodState)


POD_BYTES, SET_BYTES = 64 << 10, 4 << 20
NO_PREALLOC = 1
"""A flag of maps, BPF_F_NO_PREALLOC."""
TELLS_WHAT_IS_TAKEN = tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 4)
"""Whether the kernel tells what a map takes. Before, it told what the map would take if full."""


def memory(fd: int) -> int:
    """Bytes that the kernel says a map or a program takes."""
    found = re.search(
        r"^memlock:\s+(\d+)$", Path(f"/proc/self/fdinfo/{fd}").read_text(), re.MULTILINE
    )
    assert found
    return int(found[1])


@pytest.mark.parametrize("name", COUNTING)
def test_a_pod_takes_little_memory_on_any_number_of_cpus(name: str) -> None:
    """Beyond the programs and the maps that all pods share. No map has copies for CPUs."""
    shapes = bytecode.get(name).maps
    assert not [shape.name for shape in shapes if shape.shape[0] in syscall.PER_CPU]
    with Owner() as owner, closing(bpf.load(name, owner)) as programs:
        state.create(programs)
        pod = programs.open_inner(state.OUTER, programs.slot)
        taken = memory(pod)
        os.close(pod)
        maps = sum(
            memory(programs._open(f"map_{shape.name}"))
            for shape in shapes
            if TELLS_WHAT_IS_TAKEN or not shape.shape[4] & NO_PREALLOC
        )
    print(f"{name}: {taken >> 10} KiB a pod, {maps >> 10} KiB for all pods")
    assert taken <= POD_BYTES
    assert maps <= SET_BYTES


def test_a_map_that_others_are_like_has_no_types() -> None:
    """Linux 5.15 to 6.2 would take none for like it: ours are made without types."""
    with Owner() as owner, closing(bpf.load("steer", owner)) as programs:
        assert any(syscall.btf_of(programs._open("map_guests")))
        assert not any(syscall.btf_of(programs._open(f"map_{state.TEMPLATE}")))


def test_pins_are_put_into_no_folder_of_another_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who may write to a bpffs may have made it before."""
    theirs = bpf.PINS.with_name("testbed-of-another-user")
    monkeypatch.setattr(bpf.programs, "PINS", theirs)
    theirs.mkdir()
    try:
        os.chown(theirs, 65534, 65534)
        with Owner() as owner, pytest.raises(Error, match=f"{theirs} is not a folder of root's"):
            bpf.load("names", owner)
    finally:
        theirs.rmdir()


@pytest.mark.parametrize("name", COUNTING)
def test_the_traced_variant_has_the_same_programs(name: str) -> None:
    def kinds(name: str) -> set[tuple[str, int, int]]:
        return {(p.name, p.kind, p.attach_type) for p in bytecode.get(name).programs}

    assert kinds(name + bytecode.TRACED) == kinds(name)
