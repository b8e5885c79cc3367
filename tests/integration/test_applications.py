"""Applications in pods of stand-ins: each that is shipped is measured for real, both ways."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from testbed import application, paths, plan, runtimes
from testbed.application import Application
from testbed.campaigns import applications
from testbed.campaigns.provisioning import READY_S
from testbed.campaigns.roles import unsupported
from testbed.datapaths import get
from testbed.host.ledger import Owner
from testbed.model.cells import Cell, Pair
from testbed.model.metrics import Metric
from testbed.model.terms import Family, Runtime, Transport
from testbed.model.trials import Status, Trial, percentile
from testbed.pods.pod import Pod
from testbed.runtimes.interface import Options, Prepared

pytestmark = pytest.mark.root

NAMES = ("redis.get", "redis.set-pipelined", "nginx.rate", "postgres", "sidecar.rate")
RATE_PER_S = 200


def load(name: str) -> Application:
    return application.load(name, [paths.EXPERIMENTS])


def cell_of(name: str, datapath: str, pair: Pair, family: Family) -> Cell:
    told = application.takes(load(name))
    return Cell(
        datapath,
        pair,
        family,
        Transport.TCP,
        Metric.REQUESTS,
        64 if "size_bytes" in told else 0,
        4,
        RATE_PER_S if "rate_per_s" in told else 0,
        application=name,
    )


def measured(
    cell: Cell, told: Application, owner: Owner, kinds: dict[Runtime, Prepared], consoles: Path
) -> Trial:
    """The trial of a cell in a pod of its own."""
    datapath, guest = get(cell.datapath), kinds[Runtime.STANDIN]
    assert (unsupported(datapath, cell, guest)) is None
    assert applications.unsupported(cell, told, datapath, guest) is None
    manifest = applications.manifest(told, cell.pair, cell.family, datapath, Runtime.STANDIN)
    with Pod(owner, "application", manifest, datapath, kinds, consoles) as pod:
        pod.launch()
        pod.wait({cell.family}, READY_S)
        return applications.run(cell, told, pod, guest, 0.1, 1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("datapath", "pair", "family"),
    [
        ("direct", Pair.NATIVE_GUEST, Family.IPV4),
        ("direct", Pair.GUEST_NATIVE, Family.IPV6),
        ("steer", Pair.NATIVE_GUEST, Family.IPV6),
        ("steer", Pair.GUEST_NATIVE, Family.IPV4),
    ],
)
def test_an_application_is_measured_over_the_datapath(
    name: str,
    datapath: str,
    pair: Pair,
    family: Family,
    owner: Owner,
    prepared: dict[Runtime, Prepared],
    tmp_path: Path,
) -> None:
    cell, told = cell_of(name, datapath, pair, family), load(name)
    trial = measured(cell, told, owner, prepared, tmp_path)
    assert trial.status is Status.OK, trial.reason
    assert trial.value
    assert trial.transactions > 10
    assert trial.carried["bytes"] > trial.transactions * told.request_bytes
    found = trial.quantities
    if trial.histogram_us:
        assert sum(count for _, count in trial.histogram_us) == trial.transactions
        found = found | {f"p{n}_us": percentile(trial.histogram_us, n) for n in (50, 99)}
    assert 0 < found["p50_us"] <= found["p99_us"]
    assert found["memory_bytes"] > 1 << 20
    assert trial.machine["cpu_s"] > 0


@pytest.mark.parametrize("pair", [Pair.CONTAINER_GUEST, Pair.GUEST_CONTAINER], ids=str)
@pytest.mark.parametrize("name", ["redis.get", "sidecar.rate"])
def test_the_native_end_can_be_a_container(
    name: str, pair: Pair, owner: Owner, prepared: dict[Runtime, Prepared], tmp_path: Path
) -> None:
    cell = cell_of(name, "steer", pair, Family.IPV4)
    kinds = prepared | {Runtime.CONTAINER: runtimes.prepare(Runtime.CONTAINER, Options())}
    trial = measured(cell, load(name), owner, kinds, tmp_path)
    assert trial.status is Status.OK, trial.reason


def test_an_application_that_goes_elsewhere_fails(
    owner: Owner, prepared: dict[Runtime, Prepared], tmp_path: Path
) -> None:
    """Its client asks a server of its own, so no packet takes the datapath."""
    told = load("redis.get")
    server = "redis-server --port 7777 --save '' --dir /tmp > /dev/null 2>&1 &"
    beside = f"{server}\nsleep 1\n{told.client.run}"
    client = told.client.model_copy(
        update={
            "programs": ["redis-benchmark", "redis-server"],
            "run": beside.replace("{host} -p {port}", "127.0.0.1 -p 7777"),
        }
    )
    cell = cell_of("redis.get", "steer", Pair.NATIVE_GUEST, Family.IPV4)
    elsewhere = told.model_copy(update={"client": client})
    trial = measured(cell, elsewhere, owner, prepared, tmp_path)
    assert trial.status is Status.FAILED
    assert "traffic went elsewhere" in (trial.reason or "")


def test_a_client_that_fails_fails_the_trial_with_what_it_said(
    owner: Owner, prepared: dict[Runtime, Prepared], tmp_path: Path
) -> None:
    told = load("redis.get")
    run = f"{told.client.run} --nonsense"
    broken = told.model_copy(
        update={"client": told.client.model_copy(update={"run": run.replace("\n", " ")})}
    )
    cell = cell_of("redis.get", "direct", Pair.GUEST_NATIVE, Family.IPV4)
    trial = measured(cell, broken, owner, prepared, tmp_path)
    assert trial.status is Status.FAILED
    assert "client" in (trial.reason or "")


def test_a_program_that_is_missing_makes_the_cell_unsupported(
    prepared: dict[Runtime, Prepared],
) -> None:
    told = load("postgres")
    client = told.client.model_copy(update={"programs": ["no-such-program"]})
    cell = cell_of("postgres", "steer", Pair.NATIVE_GUEST, Family.IPV4)
    guest = prepared[Runtime.STANDIN]
    lacking = told.model_copy(update={"client": client})
    reason = applications.unsupported(cell, lacking, get("steer"), guest)
    assert reason == "this host has no program no-such-program: apt-get install postgresql"
    for pair in (Pair.GUEST_SELF, Pair.WASM_GUEST):
        assert applications.unsupported(replace(cell, pair=pair), told, get("steer"), guest)


def test_shipped_cells_are_supported_by_stand_ins(prepared: dict[Runtime, Prepared]) -> None:
    shipped = plan.load("applications")
    for cell in shipped.cells:
        told, datapath = shipped.applications[cell.application], get(cell.datapath)
        assert unsupported(datapath, cell, prepared[Runtime.STANDIN]) is None
        assert not applications.unsupported(cell, told, datapath, prepared[Runtime.STANDIN])
