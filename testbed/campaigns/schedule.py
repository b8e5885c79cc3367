"""Order of a campaign's cells, and which of their pods stand at the same time.

A block is cut into *groups*. The cells of a group need the same kinds of workloads and are measured
with the same set of datapaths, which are those that are compared with each other. The pods of a
group are built at its start and taken down at its end, so no other pods stand during its trials.

A virtual machine takes CPU time also while it waits: an emulated OSv 0.025 CPUs, an emulated Linux
0.005, where stand-ins and WASM components take none and gVisor 0.0001. So it stands during no cells
but those of its pod. Pods with virtual machines stand one after the other, each once in a block.
Their cells that are divided by one another are then not side by side, but the pods are.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace

from testbed.campaigns.provisioning import Deployment
from testbed.model.cells import Cell
from testbed.plan import Plan

Blocks = tuple[tuple[int, tuple[str, ...]], ...]
"""(number of the block, ids of its cells in the order in which they run)."""


def order_blocks(plan: Plan, seed: int, numbers: range, done: set[tuple[str, int]]) -> Blocks:
    """The cells of the blocks with these numbers, in random order, without those that are done.

    The order depends on `seed` and block alone. It is random at four levels: kinds of pods, the
    groups of a kind, the sets of cells of a group that differ only in their datapath, and the cells
    of a set. At each level every order is equally likely. The cells of a set follow each other:
    they are divided by one another, and a machine can change even within a block.
    """
    groups = _groups(plan.cells)
    blocks = []
    for number in numbers:
        rng = random.Random(f"{seed}/{number}")
        levels = {cell: (_kind(cell), groups[cell], _alike(cell), cell) for cell in plan.cells}
        names = dict.fromkeys(level for cell in plan.cells for level in levels[cell])
        drawn: dict[Hashable, float] = {name: rng.random() for name in names}
        places = {cell: [drawn[level] for level in levels[cell]] for cell in plan.cells}
        order = (cell.id for cell in sorted(plan.cells, key=places.__getitem__))
        if left := tuple(id for id in order if (id, number) not in done):
            blocks.append((number, left))
    return tuple(blocks)


def rounds(cells: Iterable[Cell], is_machine: Callable[[Cell], bool]) -> list[list[Cell]]:
    """The cells of a block, in their order, as lists of those whose pods stand at the same time.

    `is_machine`: whether guests of a cell are virtual machines. Pods of such cells, and deployments
    that are to be alone, stand by themselves.
    """
    cells = list(cells)
    groups = _groups(cells)
    found: dict[Hashable, list[Cell]] = {}
    for cell in cells:
        deployment = Deployment.of(cell)
        single = deployment.alone or is_machine(cell)
        found.setdefault(deployment if single else groups[cell], []).append(cell)
    return list(found.values())


def _groups(cells: Iterable[Cell]) -> dict[Cell, Hashable]:
    """Cell → its group: the kind of its pods, and the datapaths that it is compared with."""
    compared: dict[Cell, set[str]] = {}
    cells = list(cells)
    for cell in cells:
        compared.setdefault(_alike(cell), set()).add(cell.datapath)
    return {cell: (_kind(cell), frozenset(compared[_alike(cell)])) for cell in cells}


def _kind(cell: Cell) -> Deployment:
    """What pods have in common that differ only in their datapath."""
    return replace(Deployment.of(cell), datapath="")


def _alike(cell: Cell) -> Cell:
    """What cells have in common that differ only in their datapath."""
    return replace(cell, datapath="")
