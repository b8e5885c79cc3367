"""What it costs to build pods and take them down: namespaces, links, addresses, the datapath.

Pods of one native and two stand-ins, without the start of workloads. Nothing is compiled but once.
What the kernel does after the last call returned is not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from testbed import datapaths, runtimes
from testbed.datapaths import Attachment
from testbed.ledger import Owner, Scope
from testbed.manifest import Manifest, Workload
from testbed.model import Runtime, Transport
from testbed.pod import Pod
from testbed.runtimes import Options

pytestmark = [pytest.mark.root, pytest.mark.bench]

ROUNDS, MANY = 10, 50
POD_LIMIT_S, MANY_LIMIT_S, ATTACH_LIMIT_S = 0.05, 5.0, 0.05
"""Of the mean round."""

MANIFEST = Manifest(
    (
        Workload("native", Runtime.PROCESS, ((Transport.TCP, 6000),)),
        Workload("guest1", Runtime.STANDIN, ((Transport.TCP, 5001),)),
        Workload("guest2", Runtime.STANDIN, ((Transport.TCP, 5002),)),
    )
)


class Site:
    """Where pods are built, and those that stand."""

    def __init__(self, owner: Scope, consoles: Path) -> None:
        self._owner, self._consoles = owner, consoles
        kinds = (Runtime.PROCESS, Runtime.STANDIN)
        self._runtimes = {r: runtimes.prepare(r, Options()) for r in kinds}
        self.pods: list[Pod] = []

    def build(self, datapath: str, count: int = 1) -> None:
        way = datapaths.get(datapath)
        for _ in range(count):
            name = f"pod{len(self.pods)}"
            self.pods.append(Pod(self._owner, name, MANIFEST, way, self._runtimes, self._consoles))

    def take_down(self, *_: object) -> None:
        while self.pods:
            self.pods.pop().close()


def run(benchmark: BenchmarkFixture, call: Callable[..., object], **options: Any) -> None:
    benchmark.pedantic(call, **options)  # type: ignore[no-untyped-call]


def mean_s(benchmark: BenchmarkFixture) -> float:
    assert benchmark.stats
    return float(benchmark.stats.stats.mean)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with Owner() as owner:
        site = Site(owner, tmp_path)
        yield site
        site.take_down()


@pytest.mark.parametrize("datapath", ["direct", "bridge"])
def test_building_a_pods_links(benchmark: BenchmarkFixture, site: Site, datapath: str) -> None:
    run(benchmark, site.build, args=(datapath,), teardown=site.take_down, rounds=ROUNDS)
    assert mean_s(benchmark) < POD_LIMIT_S


@pytest.mark.parametrize("datapath", ["direct", "bridge", "capture"])
def test_taking_a_pod_down(benchmark: BenchmarkFixture, site: Site, datapath: str) -> None:
    run(
        benchmark,
        site.take_down,
        setup=lambda: site.build(datapath),
        rounds=ROUNDS,
        warmup_rounds=1,
    )
    assert mean_s(benchmark) < POD_LIMIT_S


@pytest.mark.parametrize("datapath", ["direct", "bridge", "capture"])
def test_building_fifty_pods(benchmark: BenchmarkFixture, site: Site, datapath: str) -> None:
    """Programs compiled in this time, too."""
    run(benchmark, site.build, args=(datapath, MANY), teardown=site.take_down, rounds=2)
    assert mean_s(benchmark) < MANY_LIMIT_S


@pytest.mark.parametrize("datapath", ["direct", "bridge", "capture"])
def test_taking_fifty_pods_down(benchmark: BenchmarkFixture, site: Site, datapath: str) -> None:
    run(benchmark, site.take_down, setup=lambda: site.build(datapath, MANY), rounds=2)
    assert mean_s(benchmark) < MANY_LIMIT_S


def test_attaching_capture_to_a_second_pod(benchmark: BenchmarkFixture, site: Site) -> None:
    """To links that are there: a first pod has had the programs compiled."""
    site.build("capture")
    site.build("bridge")
    capture, (_, pod) = datapaths.get("capture"), site.pods
    with Owner() as owner:
        attached: list[Attachment] = []

        def attach() -> None:
            attached.append(capture.attach(pod.wiring(), owner))

        run(benchmark, attach, teardown=lambda: attached.pop().detach(), rounds=ROUNDS)
    assert mean_s(benchmark) < ATTACH_LIMIT_S
