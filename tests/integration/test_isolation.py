"""What stands beside a trial, and what else the machine does during it, is known and bounded."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from testbed import runtimes
from testbed.campaigns import worker
from testbed.campaigns.protocol import Job
from testbed.host import cgroups
from testbed.model.cells import Cell, Pair
from testbed.model.metrics import Metric
from testbed.model.terms import Family, Transport
from testbed.runtimes.interface import Options

pytestmark = pytest.mark.root

BLOCK = os.getpid()
"""Number of the block, by which its pods are known among others of this machine."""
BOOTED = Cell("bridge", Pair.NATIVE_GUEST, Family.IPV4, Transport.TCP, Metric.LATENCY, 64)
STANDIN = replace(BOOTED, guest="standin")


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
    boots = not guest.kernel_has_sockets
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
