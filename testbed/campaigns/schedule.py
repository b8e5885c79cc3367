"""Order of a campaign's cells: random within a block, with compared cells next to each other."""

from __future__ import annotations

import random
from dataclasses import replace

from testbed.model.cells import Cell
from testbed.plan import Plan

Blocks = tuple[tuple[int, tuple[str, ...]], ...]
"""(number of the block, ids of its cells in the order in which they run)."""


def order_blocks(plan: Plan, seed: int, numbers: range, done: set[tuple[str, int]]) -> Blocks:
    """The cells of the blocks with these numbers, in random order, without those that are done.

    The order depends on `seed` and block alone. Cells that differ only in their datapath follow
    each other: they are divided by one another, and a machine can change even within a block.
    """
    blocks = []
    for number in numbers:
        rng = random.Random(f"{seed}/{number}")
        alike: dict[Cell, list[str]] = {}
        for cell in rng.sample(plan.cells, len(plan.cells)):
            alike.setdefault(replace(cell, datapath=""), []).append(cell.id)
        order = (id for ids in alike.values() for id in ids)
        if left := tuple(id for id in order if (id, number) not in done):
            blocks.append((number, left))
    return tuple(blocks)
