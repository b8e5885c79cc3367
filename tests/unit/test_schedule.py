"""The order of cells, and which pods stand at the same time: no others than those compared."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from math import sqrt

import pytest

from testbed import plan
from testbed.campaigns import roles, schedule
from testbed.campaigns.provisioning import Deployment
from testbed.model.cells import Cell, Pair
from testbed.model.metrics import Metric
from testbed.model.terms import Family, Transport
from testbed.plan import Plan

PLANS = ["quick", "standard", "paper", "proof", "costs", "baselines"]
ONE = Cell("steer", Pair.NATIVE_GUEST, Family.IPV4, Transport.TCP, Metric.LATENCY, 64)


def order(of: Plan, number: int, done: set[tuple[str, int]] | None = None) -> list[Cell]:
    (block,) = schedule.order_blocks(of, 1, range(number, number + 1), done or set())
    assert block[0] == number
    return [Cell.parse(id) for id in block[1]]


def boots(cell: Cell) -> bool:
    """As on a machine whose guests are OSv: all boot that are not said to be stand-ins."""
    return cell.pair.guests > 0 and cell.guest != "standin"


def alike(cell: Cell) -> Cell:
    return replace(cell, datapath="")


@pytest.mark.parametrize("name", PLANS)
def test_a_block_has_every_cell_once_and_depends_on_seed_and_number_alone(name: str) -> None:
    of = plan.load(name)
    found = [cell for together in schedule.rounds(order(of, 0), boots) for cell in together]
    assert sorted(found) == sorted(of.cells)
    assert order(of, 0) == order(of, 0) != order(of, 1)
    assert schedule.order_blocks(of, 2, range(1), set()) != schedule.order_blocks(
        of, 1, range(1), set()
    )
    some = {(cell.id, 0) for cell in of.cells[::3]}
    assert order(of, 0, some) == [cell for cell in order(of, 0) if (cell.id, 0) not in some]


@pytest.mark.parametrize("name", PLANS)
def test_compared_cells_follow_each_other(name: str) -> None:
    cells = order(plan.load(name), 0)
    assert len([key for key, _ in groupby(cells, alike)]) == len(set(map(alike, cells)))


@pytest.mark.parametrize("name", PLANS)
def test_during_a_trial_no_pods_stand_but_those_of_cells_compared_with_it(name: str) -> None:
    of = plan.load(name)
    for together in schedule.rounds(order(of, 0), boots):
        standing = {Deployment.of(cell) for cell in together}
        for cell in together:
            compared = [other for other in of.cells if alike(other) == alike(cell)]
            assert standing <= {Deployment.of(other) for other in compared}


@pytest.mark.parametrize("name", PLANS)
def test_a_guest_that_boots_stands_in_no_cells_but_its_own_and_is_booted_once(name: str) -> None:
    booted = []
    for together in schedule.rounds(order(plan.load(name), 0), boots):
        if any(map(boots, together)):
            (deployment,) = {Deployment.of(cell) for cell in together}
            booted.append(deployment)
            workloads = {name for cell in together for name in roles.heavy(cell.pair)}
            for cell in together:
                assert boots(cell)
                assert set(roles.heavy(cell.pair)) == workloads
    assert len(set(booted)) == len(booted)


def test_stand_ins_share_pods_where_booted_guests_do_not() -> None:
    cells = [replace(ONE, datapath=name, guest="standin") for name in ("direct", "steer")]
    assert schedule.rounds(cells, boots) == [cells]
    assert schedule.rounds(cells, lambda _: True) == [[cell] for cell in cells]


def test_what_a_resumed_block_lacks_has_only_its_own_pods() -> None:
    of = plan.load("proof")
    lacking = order(of, 0, {(cell.id, 0) for cell in of.cells[1:]})
    assert schedule.rounds(lacking, boots) == [[of.cells[0]]]


def test_each_order_is_as_likely_as_another_whatever_the_size_of_groups() -> None:
    """A group of one cell is first in half of the blocks, beside one of eight; cells likewise."""
    sizes = (64, 128, 256, 512)
    of = Plan("p", 1, 0, 1, (replace(ONE, pair=Pair.GUEST_GUEST), *eight(sizes)))
    blocks = 1000
    orders = [order(of, number) for number in range(blocks)]
    assert near(sum(cells[0].pair is Pair.GUEST_GUEST for cells in orders), blocks / 2, blocks)
    for size in sizes:
        first = sum(
            next(c for c in cells if c.pair is ONE.pair).size_bytes == size for cells in orders
        )
        assert near(first, blocks / len(sizes), blocks)
    before = sum(cells.index(of.cells[1]) < cells.index(of.cells[2]) for cells in orders)
    assert near(before, blocks / 2, blocks)


def eight(sizes: tuple[int, ...]) -> list[Cell]:
    return [
        replace(ONE, size_bytes=size, datapath=datapath)
        for size in sizes
        for datapath in ("steer", "direct")
    ]


def near(found: int, expected: float, of: int) -> bool:
    """Within four standard deviations of a binomial count."""
    share = expected / of
    return abs(found - expected) < 4 * sqrt(of * share * (1 - share))
