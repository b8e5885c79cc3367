"""Programs are compiled once, shared, and gone with their last user; also when that was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from testbed import bpf
from testbed.bpf import bytecode, syscall
from testbed.bpf.programs import remove_user
from testbed.host import ledger
from testbed.host.ledger import Owner
from tests.children import ending

pytestmark = pytest.mark.root

NAME = "names"

USE_AND_WAIT = f"""
import sys
from testbed import bpf
from testbed.host.ledger import Owner
with Owner() as owner:
    print(owner.id, bpf.load({NAME!r}, owner).slot, flush=True)
    sys.stdin.read()
"""


def user() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", USE_AND_WAIT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def users() -> set[str]:
    return {p.name for p in bpf.PINS.glob(f"{NAME}-*/users/*")}


def test_a_second_user_finds_the_pins_and_loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with Owner() as owner:
        first = bpf.load(NAME, owner)
        monkeypatch.setattr(bytecode.Bytecode, "load", None)
        second = bpf.load(NAME, owner)
        assert second.pins == first.pins
        assert second.slot != first.slot
        assert second.program("getpeername4") > 0
        second.close()
        assert users() >= {f"{first.slot}-{owner.id}", f"{second.slot}-{owner.id}"}


def test_what_was_compiled_once_is_loaded_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled = bytecode.get(NAME)
    monkeypatch.setattr(bytecode, "compile", None)
    assert bytecode.get(NAME) == compiled
    pins = bpf.PINS / f"test-{os.getpid()}"
    with Owner() as owner:
        bpf.load(NAME, owner).close()  # bpffs is mounted
        owner.defer(remove_user, pins=str(pins), user="")
        pins.mkdir()
        compiled.load(pins)
        assert {p.name for p in pins.iterdir()} == {
            *(f"program_{p.name}" for p in compiled.programs),
            *(f"map_{m.name}" for m in compiled.maps),
        }


def test_what_the_kernel_refuses_is_told_in_its_own_words() -> None:
    with pytest.raises(OSError, match="R0 !read_ok"):
        syscall.load_program("bad", bytecode.SCHED_CLS, 0, bytes([0x95, *bytes(7)]))


def test_programs_outlive_a_part_but_not_the_whole() -> None:
    with Owner() as owner:
        with owner.part() as part:
            first = bpf.load(NAME, part)
        assert f"{first.slot}-{owner.id}" not in users()
        assert first.pins.exists()
    assert not [name for name in users() if owner.id in name]
    if not users():
        assert not first.pins.exists()


def test_processes_at_once_get_slots_of_their_own() -> None:
    with ExitStack() as stack:
        started = [stack.enter_context(ending(user())) for _ in range(4)]
        with ThreadPoolExecutor() as pool:
            lines = list(pool.map(lambda p: p.stdout.readline().split(), started))
        slots = [slot for _, slot in lines]
        assert len(set(slots)) == len(slots)
        for process in started:
            process.communicate()
            assert process.returncode == 0
    assert not [name for name in users() if any(id in name for id, _ in lines)]


def test_a_killed_users_slot_is_taken_back_by_clean() -> None:
    with ending(user()) as process:
        assert process.stdout
        id, slot = process.stdout.readline().split()
        assert f"{slot}-{id}" in users()
        os.kill(process.pid, signal.SIGKILL)
    assert any(id in word for word in list(ledger.clean()))
    assert f"{slot}-{id}" not in users()


def test_headers_are_the_running_kernels_or_serve_for_it() -> None:
    found = bpf.headers()
    assert found.exact == (found.release == os.uname().release)
    assert found.exact or found.environment


def test_layouts_of_maps_are_checked() -> None:
    with Owner() as owner:
        programs = bpf.load("capture", owner)
        with pytest.raises(AssertionError):
            programs.map("pods", "=I", "=I")
        programs.close()
