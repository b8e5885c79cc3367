"""SIGKILL at any moment while pods are built, run and taken down: `clean` removes what is left."""

from __future__ import annotations

import random
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed import bpf, ledger, process
from testbed.netlink import NETNS

from .conftest import Build

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("programs")]

ROUNDS, AT_ONCE = 5, 4
LIFE_S = 1.5
"""In which a process has built and taken down several pods."""

BUILDER = """
import sys
from pathlib import Path
from testbed import datapaths, runtimes
from testbed.ledger import Owner
from testbed.manifest import Manifest, Workload
from testbed.model import Runtime, Transport
from testbed.pod import Node, Pod

kinds = {r: runtimes.prepare(r, runtimes.Options()) for r in (Runtime.PROCESS, Runtime.STANDIN)}
manifest = Manifest(tuple(
    Workload(name, runtime, ((Transport.TCP, port),)) for name, runtime, port in
    (("native", Runtime.PROCESS, 6000), ("a", Runtime.STANDIN, 5001), ("b", Runtime.STANDIN, 5002))
))
with Owner() as owner:
    print(owner.id, flush=True)
    node = Node(owner)
    for turn in range(1000):
        with Pod(node, f"pod{turn}", manifest, datapaths.get("capture"), kinds,
                 Path(sys.argv[1])) as pod:
            pod.start()
"""


@pytest.fixture(scope="module")
def programs(build: Build) -> None:
    """Pins that all builders use: none of them has to compile."""
    build("killed")


def traces(mark: str) -> Iterator[str]:
    """All that bears an owner's mark: also processes, by their cgroup or command."""
    pins = bpf.PINS.rglob("*") if bpf.PINS.exists() else ()
    for paths in (NETNS.iterdir(), process.cgroup_mount().iterdir(), pins, ledger.ROOT.iterdir()):
        yield from (str(path) for path in paths if mark in path.name)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state = stat.read_text().rpartition(")")[2].split()[0]
            if state not in "ZX" and mark in stat.with_name("cgroup").read_text():
                yield str(stat.parent)
        except OSError:
            continue  # it just ended


def strays() -> set[int]:
    """Slots with rows in maps of `capture` that are nobody's. Slot 0 is for BPF_PROG_TEST_RUN."""
    found = set()
    for pins in bpf.PINS.glob("capture-*"):
        programs = bpf.ProgramSet(pins, 0)
        try:
            slots = {key >> 24 for (key,) in programs.map("owners", "=I", "=I")}
            slots |= {slot for slot, *_ in programs.map("carried", "=BBBx", "=QQ")}
        finally:
            programs.close()
        found |= slots - {int(p.name.partition("-")[0]) for p in (pins / "users").iterdir()} - {0}
    return found


def test_after_a_kill_at_any_moment_clean_leaves_nothing(tmp_path: Path) -> None:
    links = socket.if_nameindex()
    chance = random.Random(2)
    marks = []
    for _ in range(ROUNDS):
        builders = [
            subprocess.Popen(
                [sys.executable, "-c", BUILDER, str(tmp_path)],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
            )
            for _ in range(AT_ONCE)
        ]  # fmt: skip
        for builder in builders:
            assert builder.stdout
            marks.append(builder.stdout.readline().strip())
            assert re.fullmatch(r"[0-9a-f]{6}", marks[-1])
        timers = [threading.Timer(chance.uniform(0, LIFE_S), b.kill) for b in builders]
        for timer in timers:
            timer.start()
        for builder in builders:
            builder.communicate()
            assert builder.returncode == -9
        for _ in ledger.clean():
            pass
        left = [trace for mark in marks for trace in traces(mark)]
        assert left == []
    assert socket.if_nameindex() == links
    assert strays() == set()
