"""The order of a campaign's cells: random within a block, those to be divided side by side."""

from __future__ import annotations

import random
from dataclasses import replace

from testbed.model.cells import Cell
from testbed.plan import Plan

Blocks = tuple[tuple[int, tuple[str, ...]], ...]
"""(number of the block, ids of its cells in the order to run them)."""


def order_blocks(plan: Plan, seed: int, numbers: range, done: set[tuple[str, int]]) -> Blocks:
    """These blocks' cells in their random order, without those that are done.

    Those that differ in their datapath alone follow each other: they are to be divided, and a
    machine changes within a block, too.
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
