"""Many guests and many pods at work at once, what building took, and guests that cells name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from testbed.campaigns import worker
from testbed.campaigns.protocol import Job
from testbed.model.cells import Cell, Pair
from testbed.model.metrics import Metric
from testbed.model.terms import Family, Runtime, Transport
from testbed.model.trials import Status, Trial

pytestmark = pytest.mark.root

ONE = Cell("capture", Pair.NATIVE_GUEST, Family.IPV4, Transport.TCP, Metric.LATENCY, 64)
THREE = replace(ONE, guests=3)
BUILDING = [replace(THREE, metric=metric) for metric in (Metric.STARTUP, Metric.MEMORY)]
CELLS = [
    replace(THREE, metric=Metric.THROUGHPUT, size_bytes=65536),
    THREE,
    *BUILDING,
    replace(ONE, pods=2, guests=2, pair=Pair.GUEST_NATIVE, guest="standin"),
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
    cells = [replace(ONE, guest="osv"), replace(ONE, datapath="loopback", pair=Pair.NATIVE_NATIVE)]
    job = Job(((0, tuple(cell.id for cell in cells)),), 0, 0.1, Runtime.STANDIN, str(tmp_path))
    job = replace(job, osv_kernel=str(tmp_path / "nonsuch"))
    found = [Trial.from_json(e["trial"]) for e in worker.work(job) if e["event"] == "trial"]
    reasons = {trial.cell: trial.reason for trial in found}
    assert "nonsuch" in str(reasons[cells[0].id])
    assert reasons[cells[1].id] is None
