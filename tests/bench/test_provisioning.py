"""What it costs to build pods and take them down: namespaces, links, addresses, the datapath.

Pods of one native and two stand-ins, without the start of workloads, against making five veth pairs
by netlink. Programs are compiled before. What the kernel does after the last call
returned is not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from testbed import datapaths, runtimes
from testbed.datapaths.interface import Attachment
from testbed.host import namespaces
from testbed.host.ledger import Owner
from testbed.model.manifest import Manifest, Workload
from testbed.model.terms import Runtime, Transport
from testbed.pods.pod import Pod
from testbed.runtimes.interface import Options

from .gate import Ratio
from .references import netlink_round_trips

pytestmark = [pytest.mark.root, pytest.mark.bench]

MANY = 50
POD_GOAL_S, MANY_GOAL_S, ATTACH_GOAL_S = 0.05, 5.0, 0.05

DATAPATHS = pytest.mark.parametrize("datapath", ["direct", "bridge", "capture", "steer"])

MANIFEST = Manifest(
    (
        Workload("native", Runtime.PROCESS, ((Transport.TCP, 6000),)),
        Workload("guest1", Runtime.STANDIN, ((Transport.TCP, 5001),)),
        Workload("guest2", Runtime.STANDIN, ((Transport.TCP, 5002),)),
    )
)


class Site:
    """Where pods are built, and those that stand."""

    def __init__(self, owner: Owner, consoles: Path) -> None:
        self.owner, self._consoles = owner, consoles
        kinds = (Runtime.PROCESS, Runtime.STANDIN)
        self._runtimes = {r: runtimes.prepare(r, Options()) for r in kinds}
        self.pods: list[Pod] = []

    def build(self, datapath: str, count: int = 1) -> None:
        way = datapaths.get(datapath)
        for _ in range(count):
            name = f"pod{len(self.pods)}"
            self.pods.append(Pod(self.owner, name, MANIFEST, way, self._runtimes, self._consoles))

    def take_down(self) -> None:
        while self.pods:
            self.pods.pop().close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with Owner() as owner:
        site = Site(owner, tmp_path)
        site.build("capture")  # has the programs compiled
        site.build("steer")
        site.take_down()
        yield site
        site.take_down()


@pytest.fixture
def round_trips(site: Site) -> Iterator[Callable[[], float]]:
    with namespaces.create(site.owner, f"tb-{site.owner.id}-reference") as ip:
        yield netlink_round_trips(ip, links=5)


@DATAPATHS
def test_building_a_pod(
    ratio: Ratio, site: Site, round_trips: Callable[[], float], datapath: str
) -> None:
    ratio(
        f"build a pod of {datapath}",
        lambda: site.build(datapath),
        round_trips,
        teardown=site.take_down,
        goal_s=POD_GOAL_S,
    )


@DATAPATHS
def test_taking_a_pod_down(
    ratio: Ratio, site: Site, round_trips: Callable[[], float], datapath: str
) -> None:
    ratio(
        f"take a pod of {datapath} down",
        site.take_down,
        round_trips,
        setup=lambda: site.build(datapath),
        goal_s=POD_GOAL_S,
    )


@pytest.mark.parametrize("datapath", ["capture", "steer"])
def test_fifty_pods(
    ratio: Ratio, site: Site, round_trips: Callable[[], float], datapath: str
) -> None:
    def as_many_trips() -> float:
        return sum(round_trips() for _ in range(MANY))

    ratio(
        f"build {MANY} pods of {datapath}",
        lambda: site.build(datapath, MANY),
        as_many_trips,
        teardown=site.take_down,
        rounds=2,
        goal_s=MANY_GOAL_S,
    )


@pytest.mark.parametrize("datapath", ["capture", "steer"])
def test_attaching_to_a_pod(
    ratio: Ratio, site: Site, round_trips: Callable[[], float], datapath: str
) -> None:
    """To links that are there."""
    site.build("bridge" if datapath == "capture" else "direct")
    way, wiring = datapaths.get(datapath), site.pods[0].wiring()
    with Owner() as owner:
        attached: list[Attachment] = []
        ratio(
            f"attach {datapath}",
            lambda: attached.append(way.attach(wiring, owner)),
            round_trips,
            teardown=lambda: attached.pop().detach(),
            goal_s=ATTACH_GOAL_S,
        )
