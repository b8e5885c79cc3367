"""Routing rules in the pod's namespace, which natives' datagrams to guests' ports need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from testbed.datapaths.ebpf import loopback_side
from testbed.datapaths.ebpf.loopback_side import GUESTS_TABLE, MOST_RULES, RT_TABLE_LOCAL
from testbed.host import namespaces
from testbed.host.ledger import Owner
from testbed.model.terms import Family, Transport

pytestmark = [pytest.mark.root, pytest.mark.parametrize("family", Family, ids=str)]

OWNERS = {(Transport.UDP, port): 1 for port in (5001, 5002, 7000)}


@pytest.fixture
def netns(owner: Owner) -> Iterator[str]:
    name = f"rules-{owner.id}"
    with owner.part() as part, namespaces.create(part, name) as ip:
        ip.link("set", index=loopback_side.LO_IFINDEX, state="up")
        yield name


def rules(netns: str, family: Family) -> list[tuple[int, int, str | None]]:
    """Priority, table and ports of the rules that lead to what is local, or to guests."""

    with namespaces.open_socket(netns) as ip:
        return [
            (rule.get("priority") or 0, rule.get("table"), rule.get("dport_range"))
            for rule in ip.get_rules(family=family.domain)
            if rule.get("table") in (RT_TABLE_LOCAL, GUESTS_TABLE)
        ]


def test_they_come_before_what_is_local_and_go_again(
    owner: Owner, netns: str, family: Family
) -> None:
    before = rules(netns, family)
    assert before == [(0, RT_TABLE_LOCAL, None)]
    with owner.part() as part:
        loopback_side.prepare_lo(part, netns, OWNERS)
        assert rules(netns, family) == [
            (0, GUESTS_TABLE, "5001:5002"),
            (0, GUESTS_TABLE, "7000:7000"),
            (1, RT_TABLE_LOCAL, None),
        ]
    assert rules(netns, family) == before


def test_what_somebody_else_moved_stays_where_it_is(
    owner: Owner, netns: str, family: Family
) -> None:
    with namespaces.open_socket(netns) as ip:
        ip.rule("add", family=family.domain, priority=100, table=RT_TABLE_LOCAL)
        ip.rule("del", family=family.domain, priority=0, table=RT_TABLE_LOCAL)
    with owner.part() as part:
        loopback_side.prepare_lo(part, netns, OWNERS)
        assert (100, RT_TABLE_LOCAL, None) in rules(netns, family)
    assert rules(netns, family) == [(100, RT_TABLE_LOCAL, None)]


def test_many_scattered_ports_are_one_rule(owner: Owner, netns: str, family: Family) -> None:
    scattered = {(Transport.UDP, 5000 + 2 * n): 1 for n in range(MOST_RULES + 1)}
    with owner.part() as part:
        loopback_side.prepare_lo(part, netns, scattered)
        assert (0, GUESTS_TABLE, f"5000:{5000 + 2 * MOST_RULES}") in rules(netns, family)
        assert len(rules(netns, family)) == 2
