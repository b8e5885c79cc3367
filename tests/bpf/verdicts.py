"""Running a program on a frame, and what it may say."""

from __future__ import annotations

from testbed import bpf
from testbed.bpf import ProgramSet
from testbed.datapaths.capture import REASONS

PASSED, DROPPED, REDIRECTED = 0, 2, 7
"""TC_ACT_OK, TC_ACT_SHOT, TC_ACT_REDIRECT."""

US, ANOTHER = 0, 3
OWN_PORT, ANOTHERS_PORT, NATIVE_PORT = 5000, 5003, 6000


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
        return self._loaded.map("counters", "=I", "=QQ")[self._reasons.index(reason),][0]

    def forget_fragments(self) -> None:
        """As if no fragment had ever been seen."""
        fragments = self._loaded.map("fragments", "=40s", "=HH")
        for key in fragments:
            del fragments[key]
