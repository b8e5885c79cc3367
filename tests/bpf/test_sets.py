"""What each set of programs is made of agrees with what Python and the documentation say."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from testbed import bpf, datapaths, paths
from testbed.bpf import bytecode
from testbed.datapaths.ebpf import state
from testbed.datapaths.ebpf.state import PodState

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
    """It has the size that it has in C, and a test of each part uses it."""
    [shape] = [shape.shape for shape in bytecode.get(name).maps if shape.name == state.TEMPLATE]
    assert shape[2] == ctypes.sizeof(PodState)


@pytest.mark.parametrize("name", COUNTING)
def test_the_traced_variant_has_the_same_programs(name: str) -> None:
    def kinds(name: str) -> set[tuple[str, int, int]]:
        return {(p.name, p.kind, p.attach_type) for p in bytecode.get(name).programs}

    assert kinds(name + bytecode.TRACED) == kinds(name)
