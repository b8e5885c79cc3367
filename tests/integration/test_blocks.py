"""How many blocks a campaign has: as many as its intervals need, within the time it may take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from testbed.host import facts
from testbed.model.trials import Trial
from testbed.results import store

pytestmark = pytest.mark.root

PLAN = """
name = "narrow"
blocks = 2
warmup_s = 0
duration_s = 0.1
target_width = {width}
limit_s = {limit}

[[cells]]
datapath = ["loopback", "loopback~again", "loopback~slow"]
pair = "native-native"
family = "ipv4"
transport = "tcp"
metric = "latency"
size_bytes = 64
"""


def blocks(folder: Path, width: float, limit: float, *arguments: str) -> list[Trial]:
    """Trials of a campaign with that target and that limit."""
    plan, out = folder / "narrow.toml", folder / "out"
    plan.write_text(PLAN.format(width=width, limit=limit))
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            "-m",
            "testbed.cli",
            "run",
            "--plan",
            plan,
            "--guest",
            "standin",
            "--out",
            out,
            *arguments,
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120 * facts.slowness(),
    )
    assert done.returncode == 0, done.stderr
    assert "Servers that wait 50 µs" in done.stdout
    return store.open(out).trials()


def test_blocks_are_added_until_time_is_up(tmp_path: Path) -> None:
    trials = blocks(tmp_path, width=0.0001, limit=6 * facts.slowness())
    numbers = sorted({trial.block for trial in trials})
    assert len(numbers) > 2
    assert numbers == list(range(len(numbers)))
    assert len(trials) == 3 * len(numbers)


def test_a_number_that_was_asked_for_is_kept_to(tmp_path: Path) -> None:
    asked = blocks(tmp_path, 0.0001, 3600, "--blocks", "3")
    assert {trial.block for trial in asked} == {0, 1, 2}


def test_a_known_delay_and_a_split_of_the_cpus_time_are_in_what_is_stored(tmp_path: Path) -> None:
    trials = blocks(tmp_path, 0.99, 1)
    assert {trial.block for trial in trials} == {0, 1}
    for trial in trials:
        spent = trial.machine
        parts = sum(spent[f"{part}_s"] for part in ("softirq", "system", "user", "guest"))
        assert parts == pytest.approx(spent["cpu_s"])
    fastest = {t.cell.partition("/")[0]: min(t.histogram_us)[0] for t in trials if t.block == 0}
    assert fastest["loopback~slow"] > 50 > fastest["loopback"]
