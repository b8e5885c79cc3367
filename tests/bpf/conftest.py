"""Programs in slot 0, which is nobody's pod: where a program stands in BPF_PROG_TEST_RUN.

There it is always guest 0's port; guest 3 is another one. Guest 0 owns port 5000, guest 3 5003.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator

import pytest

from testbed import bpf, ledger, localhost
from testbed.bpf import ProgramSet
from testbed.datapaths.capture import REASONS
from testbed.ledger import Owner

from .verdicts import ANOTHER, ANOTHERS_PORT, OWN_PORT, US, Programs

PROTOCOLS = (6, 17)


@pytest.fixture(scope="session")
def loaded() -> Iterator[ProgramSet]:
    with Owner() as owner, (ledger.ROOT / "slot0-capture.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one test run at a time has slot 0
        programs = bpf.load("capture", owner)
        owners = [
            [protocol << 16 | port] for protocol in PROTOCOLS for port in (OWN_PORT, ANOTHERS_PORT)
        ]
        owner.defer(
            localhost.clear, pins=str(programs.pins), slot=0, owners=owners, guests=[US, ANOTHER],
            reasons=len(REASONS),
        )  # fmt: skip
        programs.map("pods", "=I", "=II")[0,] = (1, 1)
        for n in (US, ANOTHER):
            programs.map("guests", "=I", "=I")[n,] = (1,)
        for protocol in PROTOCOLS:
            for port, n in ((OWN_PORT, US), (ANOTHERS_PORT, ANOTHER)):
                programs.map("owners", "=I", "=I")[protocol << 16 | port,] = (n,)
        yield programs
        programs.close()


@pytest.fixture
def programs(loaded: ProgramSet) -> Programs:
    return Programs(loaded)
