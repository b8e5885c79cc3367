"""tc programs at a link's hooks: run by the link itself (tcx), and by clsact before Linux 6.6."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from testbed import bpf, netlink
from testbed.bpf import hooks
from testbed.datapaths import get
from testbed.ledger import Owner
from testbed.localhost import LO_IFINDEX
from testbed.model import Family, Transport

from .bed import Bed, Echo, ask, localhost, open_socket

pytestmark = pytest.mark.root


@pytest.fixture(params=["tcx", "clsact"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "clsact":
        monkeypatch.setattr(hooks, "has_tcx", lambda: False)
    elif not bpf.has_tcx():
        pytest.skip("tcx: Linux 6.6")
    return str(request.param)


@pytest.fixture
def owner() -> Iterator[Owner]:
    with Owner() as owner:
        yield owner


def running(netns: str, ifindex: int = LO_IFINDEX) -> list[str]:
    with netlink.open_socket(netns) as ip:
        return bpf.running_tc(netns, ip, ifindex)


def test_a_pod_works_either_way(way: str, owner: Owner) -> None:
    with closing(Bed(owner, way)) as bed:
        port = bed.wiring.ports[0].ifindex
        attachment = get("capture").attach(bed.wiring, owner)
        assert running(bed.pod) == ["egress:lo_egress"]
        assert running(bed.links, port) == ["ingress:port_ingress", "egress:bridge_egress"]
        for family in Family:
            for client, server, number in ((None, 1, 5001), (1, 200, 5002), (200, None, 6000)):
                before = attachment.carried(client, server)
                with closing(Echo(bed.netns(server), family, Transport.TCP, number)):
                    dialing = open_socket(bed.netns(client), family, Transport.TCP)
                    ask(dialing, (localhost(client, family), number), b"whole")
                assert (attachment.carried(client, server) - before).packets >= 6
        attachment.detach()
        assert running(bed.pod) == running(bed.links, port) == []


def test_one_stands_at_a_place_and_is_replaced(way: str, owner: Owner) -> None:
    netlink.create_netns(owner, f"hooks-{owner.id}").close()
    netns, programs = f"hooks-{owner.id}", bpf.load("probe", owner)
    place = bpf.Place(netns, LO_IFINDEX, bpf.INGRESS, tcx=True)
    with owner.part() as part:
        for classid in (1, 2):
            bpf.attach_tc(part, place, programs, "redirect_peer", classid)
        assert running(netns) == ["ingress:redirect_peer"]
    assert running(netns) == []
    programs.close()


def test_what_others_attached_stays(owner: Owner) -> None:
    if not bpf.has_tcx():
        pytest.skip("tcx: Linux 6.6")
    netlink.create_netns(owner, f"hooks-{owner.id}").close()
    netns = f"hooks-{owner.id}"
    place = bpf.Place(netns, LO_IFINDEX, bpf.EGRESS, tcx=True)
    ours, others = bpf.load("steer", owner), bpf.load("probe", owner)
    bpf.attach_tc(owner, place, others, "redirect_peer", 1)
    with owner.part() as part:
        bpf.attach_tc(part, place, ours, "lo_egress", 1)
        assert running(netns) == ["egress:redirect_peer", "egress:lo_egress"]
    assert running(netns) == ["egress:redirect_peer"]
    ours.close()
    others.close()
