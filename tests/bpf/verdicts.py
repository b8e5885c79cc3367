"""Running a program on a frame, and what it may say."""

from __future__ import annotations

import ctypes
import fcntl
from collections.abc import Iterator
from contextlib import closing, contextmanager

from testbed import bpf
from testbed.bpf import ProgramSet
from testbed.datapaths.capture import REASONS
from testbed.datapaths.ebpf import state
from testbed.datapaths.ebpf.rows import Rows, clear
from testbed.host import ledger
from testbed.host.ledger import Owner
from testbed.model.terms import Family, Transport

PASSED, DROPPED, REDIRECTED = 2**32 - 1, 2, 7
"""TC_ACT_UNSPEC, TC_ACT_SHOT, TC_ACT_REDIRECT."""

US, ANOTHER = 0, 3
OWN_PORT, ANOTHERS_PORT, NATIVE_PORT = 5000, 5003, 6000


@contextmanager
def in_slot_0(datapath: str, reasons: tuple[str, ...]) -> Iterator[ProgramSet]:
    """A datapath's programs with slot 0, which is nobody's pod: where BPF_PROG_TEST_RUN finds
    itself, at guest 0's port. Guest 0 (`US`) owns `OWN_PORT`, guest 3 (`ANOTHER`) `ANOTHERS_PORT`.
    """
    ports = {OWN_PORT: US, ANOTHERS_PORT: ANOTHER}
    owners = {(transport, port): n for transport in Transport for port, n in ports.items()}
    with Owner() as owner, (ledger.ROOT / f"slot0-{datapath}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of these programs, as of others, one test run has slot 0
        with closing(ProgramSet(bpf.load(datapath, owner).pins, slot=0)) as programs:
            # A run that was killed may have left rows.
            clear(str(programs.pins), slot=0, owners=[], guests=[US, ANOTHER])
            rows = Rows(programs, reasons)
            rows.fill(owner, owners, {US: set(Family), ANOTHER: set(Family)})
            for n in (US, ANOTHER):
                rows.set_port(n, ifindex=1)
            yield programs


class Programs:
    """The programs of a datapath (`capture`, unless its reasons say otherwise), in slot 0."""

    def __init__(self, loaded: ProgramSet, reasons: tuple[str, ...] = REASONS) -> None:
        self._loaded, self._reasons = loaded, reasons

    def run(self, name: str, frame: bytes) -> tuple[int, bytes]:
        """Verdict, and the frame afterwards."""
        verdict, after, _ = bpf.run(self._loaded.program(name), frame)
        return verdict, after

    def redirects(self, name: str, frame: bytes) -> bytes:
        """The frame afterwards, which must have been redirected."""
        verdict, after = self.run(name, frame)
        assert verdict == REDIRECTED
        return after

    def passes(self, name: str, frame: bytes) -> bool:
        """Passed on, untouched."""
        return self.run(name, frame) == (PASSED, frame)

    def drops(self, name: str, frame: bytes, reason: str) -> bool:
        """Dropped, and counted for that reason."""
        before = self.count(reason)
        return self.run(name, frame)[0] == DROPPED and self.count(reason) == before + 1

    def count(self, reason: str) -> int:
        """Packets counted."""
        return Rows(self._loaded, self._reasons).counters()[reason][0]

    def forget(self) -> None:
        """Empty the tables of what was seen."""
        seen = state.mapped(self._loaded)
        for table in state.TABLES:
            ctypes.memset(getattr(seen, table), 0, 8 * state.TABLE_ROWS)
