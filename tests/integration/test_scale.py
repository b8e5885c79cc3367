"""Many guests and many pods at work at once, what building took, and guests that cells name."""

from __future__ import annotations

import resource
import socket
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from testbed.campaigns import worker
from testbed.campaigns.protocol import Job
from testbed.datapaths.ebpf.attachment import EbpfAttachment
from testbed.host import namespaces
from testbed.model import addresses
from testbed.model.cells import Cell
from testbed.model.cells import Pair as Kinds
from testbed.model.manifest import Manifest
from testbed.model.metrics import Metric
from testbed.model.terms import Family, Runtime, Transport
from testbed.model.trials import Status, Trial
from testbed.pods.pod import Pod

from .conftest import Build
from .sockets import PATIENCE_S, Bench, Pair, workload

pytestmark = pytest.mark.root

ONE = Cell("capture", Kinds.NATIVE_GUEST, Family.IPV4, Transport.TCP, Metric.LATENCY, 64)
THREE = replace(ONE, guests=3)
BUILDING = [replace(THREE, metric=metric) for metric in (Metric.STARTUP, Metric.MEMORY)]
CELLS = [
    replace(THREE, metric=Metric.THROUGHPUT, size_bytes=65536),
    THREE,
    *BUILDING,
    replace(ONE, pods=2, guests=2, pair=Kinds.GUEST_NATIVE, guest="standin"),
    replace(ONE, guest="standin"),
]


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> dict[Cell, Trial]:
    ids = tuple(cell.id for cell in CELLS)
    job = Job(((0, ids),), 0.05, 0.3, Runtime.STANDIN, str(tmp_path_factory.mktemp("out")))
    found = (Trial.from_json(e["trial"]) for e in worker.work(job) if e["event"] == "trial")
    return {Cell.parse(trial.cell): trial for trial in found}


def test_every_cell_is_measured_once_in_its_place(trials: dict[Cell, Trial]) -> None:
    assert {cell: (t.status, t.reason) for cell, t in trials.items()} == dict.fromkeys(
        CELLS, (Status.OK, None)
    )
    assert [trials[cell].order for cell in CELLS] == list(range(len(CELLS)))


def test_what_flows_carried_at_once_is_summed_up(trials: dict[Cell, Trial]) -> None:
    for cell in CELLS:
        if not cell.metric.of_building:
            trial = trials[cell]
            assert trial.carried["bytes"] >= trial.payload_bytes > 0
    latency = trials[THREE]
    assert sum(count for _, count in latency.histogram_us) == latency.transactions


def test_a_start_is_the_sum_of_its_steps_and_memory_that_of_its_owners(
    trials: dict[Cell, Trial],
) -> None:
    startup, memory = (trials[cell] for cell in BUILDING)
    assert list(startup.parts) == ["image", "links", "datapath", "launch", "boot", "answer"]
    assert list(memory.parts) == ["processes", "kernel"]
    for trial in (startup, memory):
        assert trial.value == pytest.approx(sum(trial.parts.values()))
    assert all(step >= 0 for step in startup.parts.values())
    assert memory.parts["processes"] > 4 * 100_000  # four agents, of some 1 MB each


def test_a_runtime_that_cannot_be_had_fails_nothing_but_its_cells(tmp_path: Path) -> None:
    cells = [replace(ONE, guest="osv"), replace(ONE, datapath="loopback", pair=Kinds.NATIVE_NATIVE)]
    job = Job(((0, tuple(cell.id for cell in cells)),), 0, 0.1, Runtime.STANDIN, str(tmp_path))
    job = replace(job, osv_kernel=str(tmp_path / "nonsuch"))
    found = [Trial.from_json(e["trial"]) for e in worker.work(job) if e["event"] == "trial"]
    reasons = {trial.cell: trial.reason for trial in found}
    assert "nonsuch" in str(reasons[cells[0].id])
    assert reasons[cells[1].id] is None


# --- as many as a node holds ------------------------------------------------------------------

MANY = 250
FIRST_PORT = 5000


def serve_and_dial(pod: Pod, native: int) -> None:
    """Each guest dials the next one and a native by UDP, and a native dials each guest."""
    guests = [f"{pod.netns}-g{n}" for n in range(1, MANY + 1)]
    alias, loopback = (str(a(Family.IPV4)) for a in (addresses.alias, addresses.loopback))

    def socket_at(netns: str, port: int) -> socket.socket:
        def make() -> socket.socket:
            made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            made.settimeout(PATIENCE_S)
            made.bind(("", port))
            return made

        return namespaces.inside(netns, make)

    with ExitStack() as opened:
        here = opened.enter_context(socket_at(pod.netns, native))
        there = [
            opened.enter_context(socket_at(netns, FIRST_PORT + n))
            for n, netns in enumerate(guests, 1)
        ]
        for i, sender in enumerate(there):
            following = (i + 1) % MANY
            sender.sendto(b"guest", (alias, FIRST_PORT + following + 1))
            assert there[following].recv(100) == b"guest"
            sender.sendto(b"native", (alias, native))
            assert here.recv(100) == b"native"
            here.sendto(b"guest", (loopback, FIRST_PORT + i + 1))
            assert sender.recv(100) == b"guest"


@pytest.mark.parametrize("datapath", ["steer", "capture"])
def test_250_guests_dial_and_each_pair_is_counted(build: Build, datapath: str) -> None:
    native = FIRST_PORT - 1
    guests = [workload(f"guest{n}", Runtime.STANDIN, FIRST_PORT + n) for n in range(1, MANY + 1)]
    manifest = Manifest((workload("native1", Runtime.PROCESS, native), *guests))
    pod = build(f"guests-{datapath}", manifest, datapath)
    serve_and_dial(pod, native)
    counted = {
        pair: pod.attachment.carried(*pair).packets
        for n in range(1, MANY + 1)
        for pair in ((n, n % MANY + 1), (n, None), (None, n))
    }
    assert set(counted.values()) == {1}
    assert pod.attachment.carried(1, 3).packets == 0


def test_500_pods_of_two_guests_work(build: Build) -> None:
    """More than a set of programs has slots: it is loaded twice."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # each pod has 24 files in this process
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    benches = [Bench(build(f"p{number}", datapath="capture")) for number in range(500)]
    assert len({pod_pins(bench) for bench in benches}) == 2
    for bench in benches[::50]:
        for pair in (Pair(0, 1), Pair(1, 2), Pair(2, 0)):
            with bench.connected(pair, Family.IPV6):
                pass


def pod_pins(bench: Bench) -> Path:
    """Where the programs of a pod are pinned."""
    assert isinstance(bench.pod.attachment, EbpfAttachment)
    return bench.pod.attachment._programs.pins
