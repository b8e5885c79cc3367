"""The KVM path: guests that KVM executes, and whose packets vhost threads of the kernel move.

For a machine whose KVM works. pytest does not collect it by its name: `nox -s kvm` runs it, where
KVM does not work in an emulated machine whose KVM does. Speed is not looked at.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from testbed import datapaths, doctor, runtimes
from testbed.campaigns import roles, trial
from testbed.doctor import State
from testbed.host.ledger import Owner
from testbed.images import kernels
from testbed.model.cells import Cell, Pair
from testbed.model.manifest import Manifest
from testbed.model.metrics import Metric
from testbed.model.terms import Family, Runtime, Transport
from testbed.model.trials import Status
from testbed.pods.pod import Pod
from testbed.results import store
from testbed.runtimes.interface import Options, Prepared

from .commands import run

pytestmark = pytest.mark.root

GUESTS = ("linux", *(f"osv-{flavor}" for flavor in kernels.FLAVORS))
PAIRS = (Pair.NATIVE_GUEST, Pair.GUEST_NATIVE)
CELLS = [f"{datapath}/native-guest/ipv4/tcp/latency/64x1" for datapath in ("steer", "capture")]
CPUS = 2
WARMUP_S, DURATIONS_S = 0.2, (1.0, 4.0, 10.0)


def test_the_doctor_finds_kvm_and_vhost_net_and_nothing_missing() -> None:
    findings = {finding.name: finding for finding in doctor.probe()}
    assert doctor.ready(findings.values())
    for name in ("accelerator", "vhost-net"):
        assert findings[name].state is State.FINE, str(findings[name])
    assert findings["accelerator"].detail.startswith("KVM: ")


@pytest.fixture(scope="module")
def guest(request: pytest.FixtureRequest) -> Prepared:
    """A runtime of `GUESTS`."""
    runtime, _, flavor = request.param.partition("-")
    if not flavor:
        return runtimes.prepare(Runtime(runtime), Options())
    kernel = kernels.find_osv(flavor=flavor, download=False)
    if kernel is None:
        pytest.skip(f"no OSv kernel of flavor {flavor} in the cache")
    return runtimes.prepare(Runtime(runtime), Options(osv_kernel=kernel.path))


@pytest.mark.parametrize("datapath", ["steer", "capture"])
@pytest.mark.parametrize("guest", GUESTS, indirect=True)
def test_cells_of_a_guest_go_through_a_vhost_thread(
    guest: Prepared,
    datapath: str,
    owner: Owner,
    prepared: dict[Runtime, Prepared],
    tmp_path: Path,
) -> None:
    assert not guest.description.functional_only
    runtime = guest.description.runtime
    manifest, kinds = roles.manifest(PAIRS, runtime), {**prepared, runtime: guest}
    with Pod(owner, "kvm", manifest, datapaths.get(datapath), kinds, tmp_path) as pod:
        pod.start()
        assert_is_of_kvm(pod)
        for pair in PAIRS:
            for family in guest.families:
                cell = Cell(datapath, pair, family, Transport.TCP, Metric.LATENCY, 64)
                [work_s] = vhost_work(pod, guest, cell)
                assert work_s > 0


def test_each_pair_of_queues_of_a_guest_with_two_cpus_has_a_vhost_thread(
    owner: Owner, prepared: dict[Runtime, Prepared], tmp_path: Path
) -> None:
    guest = runtimes.prepare(Runtime.LINUX, Options())
    usual = roles.manifest(PAIRS, Runtime.LINUX)
    manifest = Manifest(
        tuple(
            replace(w, cpus=tuple(range(CPUS)) if w.runtime.is_guest else w.cpus)
            for w in usual.workloads
        )
    )
    kinds = {**prepared, Runtime.LINUX: guest}
    with Pod(owner, "kvm", manifest, datapaths.get("capture"), kinds, tmp_path) as pod:
        pod.start()
        assert_is_of_kvm(pod)
        way = ("capture", Pair.GUEST_NATIVE, Family.IPV4, Transport.TCP)
        work_s = vhost_work(pod, guest, Cell(*way, Metric.THROUGHPUT, 16384, streams=8))
        assert len(work_s) == CPUS
        assert all(work_s)


def test_a_campaign_of_the_quick_plan_says_that_guests_ran_by_kvm(tmp_path: Path) -> None:
    out = tmp_path / "campaign"
    only = [word for cell in CELLS for word in ("--cells", cell)]
    run("run", "--plan", "quick", *only, "--blocks", "1", "--guest", "linux", "--out", out)
    found = store.open(out)
    assert (found.campaign.accelerator, found.campaign.functional) == ("kvm", False)
    assert found.campaign.environment["vhost"]
    assert {trial.cell: trial.status for trial in found.trials()} == dict.fromkeys(CELLS, Status.OK)


def assert_is_of_kvm(pod: Pod) -> None:
    """By QEMU's command line."""
    argv = Path(f"/proc/{pod.processes['guest1'].pid}/cmdline").read_text().split("\0")
    said = dict(pairwise(argv))
    assert "accel=kvm" in said["-machine"].split(",")
    assert said["-cpu"] == "host"
    assert "vhost=on" in said["-netdev"].split(",")


def vhost_work(pod: Pod, guest: Prepared, cell: Cell) -> list[float]:
    """Seconds that each vhost thread of the pod's guest was at work, in a trial that went well.

    On a slow machine a short trial may get nothing done, and is followed by a longer one.
    """
    threads = vhost_threads(pod.processes["guest1"].pid)
    before = [worked_s(thread) for thread in threads]
    for duration_s in DURATIONS_S:
        result = trial.run(cell, [pod], guest, WARMUP_S, duration_s)
        if result.status is Status.OK:
            break
    assert result.status is Status.OK, result.reason
    return [worked_s(thread) - s for thread, s in zip(threads, before, strict=True)]


def vhost_threads(pid: int) -> list[Path]:
    """Those that serve QEMU: threads of its own since Linux 6.4, the kernel's before."""
    names = [*Path(f"/proc/{pid}/task").glob("*/comm"), *Path("/proc").glob("[0-9]*/comm")]
    return [name.parent for name in names if name.read_text().strip() == f"vhost-{pid}"]


def worked_s(thread: Path) -> float:
    """Time on a CPU (Documentation/scheduler/sched-stats.rst); that of `stat` is in ticks."""
    return int((thread / "schedstat").read_text().split()[0]) / 1e9
