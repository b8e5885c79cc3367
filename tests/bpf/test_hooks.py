"""tc programs at links: by filters, and by entries of which the links themselves run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from testbed import bpf
from testbed.bpf import ProgramSet
from testbed.datapaths.ebpf.attachment import AT_PORTS
from testbed.datapaths.ebpf.loopback_side import LO_IFINDEX
from testbed.host import namespaces
from testbed.host.ledger import Owner

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not bpf.has_tcx(), reason="links run programs by themselves: Linux 6.6"),
]


@pytest.fixture
def owner() -> Iterator[Owner]:
    with Owner() as owner:
        yield owner


@pytest.fixture
def netns(owner: Owner) -> str:
    name = f"hooks-{owner.id}"
    namespaces.create(owner, name).close()
    return name


@pytest.fixture
def programs(owner: Owner) -> Iterator[ProgramSet]:
    programs = bpf.load("steer", owner)
    yield programs
    programs.close()


def running(netns: str) -> list[str]:
    with namespaces.open_socket(netns) as ip:
        return bpf.running_tc(netns, ip, LO_IFINDEX)


def test_an_entry_takes_the_place_of_the_filter_and_of_an_entry_before(
    owner: Owner, netns: str, programs: ProgramSet
) -> None:
    name, place = "lo_egress", (netns, LO_IFINDEX, bpf.EGRESS)
    bpf.attach_tc(owner, *place, programs.program(name), name, 1)
    programs.make_calls(owner, 1)
    for classid in (1, 2):
        with programs.entry(name, classid, 0) as entry:
            bpf.attach_tcx(*place, entry)
        assert running(netns) == ["egress:lo_egress"]
    assert bpf.attached_tc(netns, {place[1:]: name}) == {place[1:]}
    assert not bpf.attached_tc(netns, {place[1:]: "another"})


def test_an_entry_goes_on_for_as_long_as_there_is_something_to_go_on_with(
    owner: Owner, programs: ProgramSet
) -> None:
    does_nothing, drop, frame = 2**32 - 1, 2, bytes(60)  # TCX_NEXT is -1
    names = list(AT_PORTS)  # the first drops what no guest sends
    with owner.part() as part:
        programs.make_calls(part, len(names))
        with programs.entry(names[0], programs.slot << 8 | 1, 0) as entry:
            assert bpf.run(entry, frame)[0] == does_nothing
            programs.set_calls(programs, names)
            assert bpf.run(entry, frame)[0] == drop
            part.undo()
            assert bpf.run(entry, frame)[0] == does_nothing
    programs.set_calls(programs, names)  # of no entries: nothing
