"""A pod's rows in the maps that all pods share: what there is no room for is told in one line."""

from __future__ import annotations

import pytest

from testbed import bpf
from testbed.datapaths.ebpf.rows import Rows
from testbed.host.ledger import Owner
from testbed.model.addresses import MAX_GUESTS
from testbed.model.errors import Error
from testbed.model.terms import Family

pytestmark = pytest.mark.root


def test_more_pairs_of_guests_than_there_is_room_for_are_refused() -> None:
    with Owner() as owner:
        programs = bpf.load("capture", owner)
        rows = Rows(programs, bpf.reasons("capture"))
        with pytest.raises(Error, match="no room to count what each pair of 250 guests carries"):
            rows.fill(owner, {}, {n: tuple(Family) for n in range(1, MAX_GUESTS + 1)})
        programs.close()
