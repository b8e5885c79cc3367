"""What stands beside a trial, and what else the machine does during it, is known and bounded."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from testbed import runtimes
from testbed.campaigns import isolation, noise, roles, trial, worker
from testbed.campaigns.protocol import Job
from testbed.host import cgroups, facts
from testbed.model.cells import Cell, Pair
from testbed.model.metrics import Metric
from testbed.model.terms import Family, Runtime, Transport
from testbed.model.trials import Status
from testbed.results import store
from testbed.runtimes.interface import Options, Prepared

from .conftest import Build
from .sockets import wait_until

pytestmark = pytest.mark.root

BLOCK = os.getpid()
"""Number of the block, by which its pods are known among others of this machine."""
BOOTED = Cell("bridge", Pair.NATIVE_GUEST, Family.IPV4, Transport.TCP, Metric.LATENCY, 64)
STANDIN = replace(BOOTED, guest="standin")
CAMPAIGN = {
    "datapath": "loopback",
    "pair": "native-native",
    "family": "ipv4",
    "transport": "tcp",
    "metric": "latency",
}


def standing() -> set[str]:
    """Datapaths of the pods of the block that stand now; each pod has a cgroup."""
    names = (
        re.fullmatch(rf"tb-\w+-block{BLOCK}-([a-z]+)(-standin)?(-\d+)?", path.name)
        for path in cgroups.mount_point().iterdir()
    )
    return {name[1] for name in names if name}


def test_pods_stand_during_their_own_trials_and_those_of_cells_compared_with_them(
    tmp_path: Path,
) -> None:
    """With the best guest of this machine, which is a stand-in where nothing boots."""
    guest, _ = runtimes.choose("best", Options())
    boots = guest.description.runtime.is_machine
    cells = [
        replace(cell, datapath=datapath)
        for cell in (STANDIN, BOOTED, replace(STANDIN, pair=Pair.GUEST_GUEST))
        for datapath in ("bridge", "capture")
    ]
    ids = tuple(cell.id for cell in cells)
    job = Job(((BLOCK, ids),), 0, 0.1, "best", str(tmp_path))
    seen = {}
    for event in worker.work(job):
        if event["event"] == "step" and (id := event["text"].rpartition(": ")[2]) in ids:
            seen[id] = standing()
    for cell in cells:
        own = {cell.datapath} if boots and not cell.guest else {"bridge", "capture"}
        assert seen[cell.id] == own
    assert standing() == set()


@pytest.fixture
def spinning() -> Iterator[list[int]]:
    """Processes that do nothing but use CPU time, one for eight CPUs: their pids."""
    spin = ["sh", "-c", "while :; do :; done"]
    running = [subprocess.Popen(spin) for _ in range(max(1, len(facts.cpus()) // 8))]
    yield [process.pid for process in running]
    for process in running:
        process.kill()
        process.wait()


def cpu_s(pids: list[int]) -> float:
    """User and system time of processes (proc_pid_stat(5))."""
    stats = (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids)
    return sum(int(words[11]) + int(words[12]) for words in stats) / os.sysconf("SC_CLK_TCK")


def test_a_process_that_spins_beside_a_trial_disturbs_it(
    build: Build, prepared: dict[Runtime, Prepared], spinning: list[int]
) -> None:
    guest = prepared[Runtime.STANDIN]
    pod = build("spin", roles.manifest({STANDIN.pair}, Runtime.STANDIN), STANDIN.datapath)
    pod.start()
    before = cpu_s(spinning)
    result = trial.run(STANDIN, [pod], guest, 0.1, 0.5)
    took_s = cpu_s(spinning) - before
    assert result.status is Status.OK, result.reason
    assert result.disturbed
    if "stolen" not in result.disturbed:  # a hypervisor took more than a stated share, too
        assert re.fullmatch(r"\d+\.\d% of the CPUs' time was used by others", result.disturbed)
    assert result.machine["others_s"] > isolation.OTHERS_SHARE * result.machine["elapsed_s"]
    assert result.machine["others_s"] > 0.5 * took_s


def test_a_process_that_spins_in_the_pod_of_a_trial_is_the_trials_own(
    build: Build, spinning: list[int]
) -> None:
    """Read with and without the pod over one and the same time, whatever else runs."""
    pod = build("own", roles.manifest({STANDIN.pair}, Runtime.STANDIN), STANDIN.datapath)
    for pid in spinning:
        (pod.cgroup / "cgroup.procs").write_text(str(pid))
    all_before, before = isolation.Reading.now([]), isolation.Reading.now([pod.cgroup.parent])
    start = cpu_s(spinning)
    wait_until(lambda: cpu_s(spinning) - start > 0.5, "they spin")
    after, all_after = isolation.Reading.now([pod.cgroup.parent]), isolation.Reading.now([])
    spent = all_after.user_s - all_before.user_s + all_after.system_s - all_before.system_s
    others = after.user_s - before.user_s + after.system_s - before.system_s
    assert spent - others == pytest.approx(0.5, abs=0.2)


# --- how quiet the machine is ---------------------------------------------------------------


def test_short_trials_of_two_equal_pods_say_how_much_ratios_spread() -> None:
    found = noise.measure(3)
    assert found.ratios >= 3
    assert found.spread > 0
    assert 0 <= found.others <= 1
    assert not list(cgroups.mount_point().glob("tb-*-noise[01]"))


def test_a_campaign_says_at_its_start_how_quiet_the_machine_is(tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.toml", tmp_path / "out"
    cell = (f'{key} = "{value}"' for key, value in CAMPAIGN.items())
    plan.write_text(
        'name = "long"\nblocks = 5\nwarmup_s = 0\nduration_s = 12\ntarget_width = 0.05\n'
        "limit_s = 60\n[[cells]]\nsize_bytes = 64\n" + "\n".join(cell)
    )
    command = [sys.executable, "-P", "-m", "testbed.cli", "run", "--guest", "standin"]
    with subprocess.Popen(
        [*command, "--plan", plan, "--out", out],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stderr
        said = next((line for line in running.stderr if "A/A" in line), "")
        running.send_signal(signal.SIGINT)
        running.communicate()
    assert re.search(r"others use .*: expect .* after 5 blocks; ±5.0% takes .* blocks", said)
    assert noise.Noise(**store.open(out).campaign.environment["noise"]).ratios >= 3


def test_the_doctor_says_how_quiet_the_machine_is_and_leaves_it_out_if_asked() -> None:
    def findings(*options: str) -> dict[str, str]:
        command = [sys.executable, "-P", "-m", "testbed.cli", "doctor", "--json", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return {finding["name"]: finding["detail"] for finding in json.loads(done.stdout)}

    assert "quiet" not in findings("--fast")
    said = findings("--plan", "quick")["quiet"]
    assert re.fullmatch(r"others use .*: expect .* after 3 blocks \(plan quick\)", said)
