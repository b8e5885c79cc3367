"""`capture` in slot 0, for the tests of its programs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from testbed.bpf import ProgramSet
from testbed.datapaths.capture import REASONS

from .verdicts import Programs, in_slot_0


@pytest.fixture(scope="session")
def loaded() -> Iterator[ProgramSet]:
    with in_slot_0("capture", REASONS) as programs:
        programs.map("pods", "=I", "=II")[0,] = (1, 1)
        yield programs


@pytest.fixture
def programs(loaded: ProgramSet) -> Programs:
    return Programs(loaded)
