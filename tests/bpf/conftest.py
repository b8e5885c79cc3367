"""`capture` and `steer` in slot 0, for the tests of their programs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from testbed.bpf import ProgramSet
from testbed.datapaths import capture, steer

from .verdicts import Programs, in_slot_0


@pytest.fixture(scope="module")
def loaded() -> Iterator[ProgramSet]:
    with in_slot_0("capture", capture.REASONS) as programs:
        programs.map("pods", "=I", "=II")[0,] = (1, 1)
        yield programs


@pytest.fixture(scope="module")
def loaded_steer() -> Iterator[ProgramSet]:
    with in_slot_0("steer", steer.REASONS) as programs:
        yield programs


@pytest.fixture
def programs(loaded: ProgramSet) -> Programs:
    return Programs(loaded)
