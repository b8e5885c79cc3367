"""SIGKILL at any moment of `up`, of a campaign and of `down`: `clean` removes what is left.

The command is killed, or a process that it started, or all of them: the whole harness. What goes on
living has to end by itself, or when asked. `--kills` says how often, `--kill-seed` has the same
moments again.
"""

from __future__ import annotations

import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import pytest

from testbed import bpf
from testbed.datapaths.ebpf import state
from testbed.host import ledger
from testbed.host.facts import slowness
from testbed.model.errors import Error
from testbed.pods import control
from tests.children import ending
from tests.conftest import others, snapshot

pytestmark = [pytest.mark.root, pytest.mark.timeout(1800)]  # 200 kills at night

AT_ONCE = 4
SLOTS = 2 * AT_ONCE
"""Slots that these take at most: a campaign has a pod of `capture` and one of `steer`."""
PATIENCE_S = 30 * slowness()
KINDS = {"up": 2.5, "campaign": 2.5, "down": 0.4, "start": 2.5}
"""About how long each takes, in seconds: when to kill it. A campaign's counts from when it has a
worker, and the start of one until then."""

TESTBED = (sys.executable, "-m", "testbed.cli")
MARK = "TESTBED_TEST_KILLED"
"""In the environment of a harness and of all that it starts."""

POD = """
apiVersion: v1
kind: Pod
metadata: {{name: {name}, annotations: {{testbed/runtime.guest: standin}}}}
spec:
  runtimeClassName: process
  containers:
  - {{name: native, image: "host:sleep", args: ["1000"]}}
  - {{name: guest, image: "host:sleep", args: ["1000"]}}
"""
PLAN = """
name = "killed"
blocks = 1
warmup_s = 0.05
duration_s = 0.1
[[cells]]
datapath = ["bridge", "capture", "steer"]
pair = "native-guest"
family = "ipv4"
transport = "tcp"
metric = "latency"
size_bytes = 64
"""


def harness(mark: str) -> Iterator[int]:
    """The processes of a command, but those of workloads, which are in cgroups of ours."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it just ended
            marked = f"{MARK}={mark}".encode() in (process / "environ").read_bytes()
            if marked and "tb-" not in (process / "cgroup").read_text():
                yield int(process.name)


def start(mark: str, *words: str | Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*TESTBED, *map(str, words)],
        env=os.environ | {MARK: mark},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def kill_once(number: int, seed: int, folder: Path) -> str | None:
    """One command killed, and what lives on ended; what was done. None: it was over before."""
    rng = random.Random(f"{seed}/{number}")
    kind = rng.choice(list(KINDS))
    moment_s = rng.uniform(0, KINDS[kind])
    mark = f"k{secrets.token_hex(3)}"
    manifest, plan = folder / f"{mark}.yaml", folder / f"{mark}.toml"
    manifest.write_text(POD.format(name=mark))
    plan.write_text(PLAN)
    up = ("up", manifest, "--wait", "10")
    run = ("run", "--plan", plan, "--guest", "standin", "--out", folder / mark)
    if kind == "down":
        with ending(start(mark, *up)) as standing:
            assert standing.wait(PATIENCE_S) == 0
    with ending(start(mark, *{"up": up, "down": ("down", mark)}.get(kind, run))) as running:
        assert running.stderr
        if kind == "campaign":
            running.stderr.readline()  # what its worker does first
        with suppress(subprocess.TimeoutExpired):
            running.wait(moment_s)
        victims = sorted(harness(mark))
        whole = len(victims)
        if rng.random() < 0.5:
            victims = [rng.choice(victims)] if victims else []
        for pid in victims:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        running.wait(PATIENCE_S)
    if mark in control.names():
        with suppress(Error):
            control.down(mark)
    deadline = time.monotonic() + PATIENCE_S
    while living := sorted(harness(mark)):
        assert time.monotonic() < deadline, f"{living} live on after {kind}"
        time.sleep(0.02)
    if not victims:
        return None
    return f"{number}: {kind} after {moment_s:.3f} s, {len(victims)} of {whole} processes"


def has_state(pins: Path, slot: int) -> bool:
    """Whether a slot's state says anything."""
    with closing(bpf.ProgramSet(pins, slot)) as programs, suppress(KeyError, OSError):
        return any(bytes(state.mapped(programs)))  # OSError: it is of another version
    return False


def strays() -> set[str]:
    """Slots with rows in maps that are nobody's. Slot 0 is for BPF_PROG_TEST_RUN."""
    found = set()
    for pins in [*bpf.PINS.glob("capture-*"), *bpf.PINS.glob("steer-*")]:
        programs = bpf.ProgramSet(pins, 0)
        try:
            slots = {key >> 24 for (key,) in programs.map("owners", "=I", "=I")}
            slots |= {slot for slot, *_ in programs.map("guest_counts", "=BBBx", "=QQ")}
            slots |= {slot for slot in range(256) if has_state(pins, slot)}
            users = {int(p.name.partition("-")[0]) for p in (pins / "users").iterdir()}
        except FileNotFoundError:
            continue  # its last user just left
        finally:
            programs.close()
        found |= {f"row of slot {slot} of {pins.name}" for slot in slots - users - {0}}
    return found


def left_behind(before: AbstractSet[str], slots: int) -> set[str]:
    """What was left since a snapshot. Programs that stood then keep the empty state of a slot.

    `slots`: how many slots of them were given out at most.
    """
    left = (snapshot() | strays()) - before - others()
    if any(thing.startswith(f"pin {bpf.PINS}") for thing in before):
        states = {thing for thing in left if thing.endswith(" pod_state")}
        left -= states if len(states) <= slots else set()
    return left


@pytest.mark.alone
def test_after_a_kill_at_any_moment_clean_leaves_nothing(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    wanted = pytestconfig.getoption("kills")
    seed = pytestconfig.getoption("kill_seed") or secrets.randbelow(10**6)
    print(f"--kill-seed {seed}")
    kills = number = 0
    before = snapshot()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        while kills < wanted:
            numbers = range(number, number := number + AT_ONCE)
            done = list(pool.map(lambda n: kill_once(n, seed, tmp_path), numbers))
            print(*filter(None, done), sep="\n")
            kills += sum(d is not None for d in done)
            said = ""
            try:
                list(ledger.clean())
            except Error as e:  # what cannot be cleaned is found below, if it is of ours
                said = str(e)
            deadline = time.monotonic() + PATIENCE_S
            while left := left_behind(before, SLOTS):
                assert time.monotonic() < deadline, (said, sorted(left))
                time.sleep(0.05)
    assert number < 4 * wanted, "most commands were over before they could be killed"
