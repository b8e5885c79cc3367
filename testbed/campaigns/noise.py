"""How quiet a machine is: short A/A trials, and what they say of a plan's intervals.

Two pods of the datapath `loopback` are built. In each round both are measured once, in random
order, so the ratio of the two values differs from 1 by chance alone. The spread of these ratios
stands for that of a plan's block ratios. It is an estimate: a plan's trials are longer (their
values vary less), and its blocks build their pods anew (their values vary more).
"""

from __future__ import annotations

import random
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import log
from statistics import median, stdev

from testbed import datapaths, runtimes
from testbed.campaigns import roles, trial
from testbed.campaigns.isolation import OTHERS_SHARE, share
from testbed.host import ledger
from testbed.host.ledger import Owner
from testbed.model.cells import AGAIN, Cell, Pair
from testbed.model.errors import Error
from testbed.model.metrics import Metric
from testbed.model.terms import Family, Runtime, Transport
from testbed.model.trials import Status
from testbed.pods.pod import Pod
from testbed.results.statistics import blocks_needed, half_width
from testbed.runtimes.interface import Options

MEASURE_S = 10.0
"""Duration of the A/A of the doctor and of a campaign, with its warm-ups."""
SHARE = 0.1
"""Largest part of a campaign's trials that its A/A may take as long as."""
LEAST_S = 3.0
"""An A/A that would be shorter is left out: its spread would be of too few ratios."""
WARMUP_S, DURATION_S = 0.05, 0.2
"""Of a trial of the A/A."""
MOST_BLOCKS = 1000
CELL = Cell("loopback", Pair.NATIVE_NATIVE, Family.IPV4, Transport.TCP, Metric.LATENCY, 64)


@dataclass(frozen=True)
class Noise:
    """What an A/A found."""

    ratios: int
    spread: float
    """Standard deviation of the logarithms of the ratios."""
    others: float
    """Share of the CPUs' time that others used in a trial: the median."""

    @property
    def quiet(self) -> bool:
        """Whether most trials are undisturbed (`isolation.OTHERS_SHARE`)."""
        return self.others <= OTHERS_SHARE

    def text(self, blocks: int, target_width: float | None) -> str:
        """What it means for a plan with this number of blocks and this target."""
        width = half_width(self.spread, blocks)
        reach = f"±{width:.1%}" if width < 1 else "more than ±100%"
        said = (
            f"others use {self.others:.1%} of the CPUs, and A/A ratios of {DURATION_S:g} s trials "
            f"spread by {self.spread:.1%}: expect {reach} after {blocks} blocks"
        )
        if target_width is None:
            return said
        needed = blocks_needed(self.spread, target_width, MOST_BLOCKS)
        return f"{said}; ±{target_width:.1%} takes {needed or f'more than {MOST_BLOCKS}'} blocks"


def duration_s(trials_s: float) -> float:
    """Duration of the A/A at the start of a campaign whose trials take `trials_s`; 0: none."""
    wanted_s = min(MEASURE_S, SHARE * trials_s)
    return wanted_s if wanted_s >= LEAST_S else 0.0


def measure(limit_s: float = MEASURE_S) -> Noise:
    """Run A/A trials for about `limit_s`. Raises `Error` if fewer than three rounds are ok."""
    native = runtimes.prepare(Runtime.PROCESS, Options())
    manifest = roles.manifest({CELL.pair}, Runtime.STANDIN)
    cells = (CELL, replace(CELL, datapath=f"{CELL.datapath}~{AGAIN}"))
    rng = random.Random(0)
    logs, shares, reason = [], [], None
    with Owner() as owner, ExitStack() as stack:
        consoles = ledger.create_folder(owner, f"{owner.id}-consoles")
        pods = {}
        for number, cell in enumerate(cells):
            datapath, kinds = datapaths.get(cell.datapath), {Runtime.PROCESS: native}
            pod = Pod(owner, f"noise{number}", manifest, datapath, kinds, consoles)
            stack.enter_context(pod).start()
            pods[cell] = pod
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            found = {
                cell: trial.run(cell, [pods[cell]], native, WARMUP_S, DURATION_S)
                for cell in rng.sample(cells, len(cells))
            }
            first, second = (found[cell].value for cell in cells)
            if first and second:
                logs.append(log(first / second))
            for result in found.values():
                reason = result.reason if result.status is not Status.OK else reason
                if "others_s" in (spent := result.machine):
                    shares.append(share(spent, "others_s"))
    if len(logs) < 3:
        raise Error(f"an A/A of {limit_s:g} s has {len(logs)} ratios: {reason or 'too slow'}")
    return Noise(len(logs), stdev(logs), median(shares))
