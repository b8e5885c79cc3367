"""Rates of pods' datapaths for `testbed top`: packets and bits per second by pair, and counters.

Rates are differences of the kernel's counters between two snapshots, divided by the time between
them. All natives of a pod count as one, since the datapath does not distinguish them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from testbed.pods import control


@dataclass(frozen=True)
class Snapshot:
    """Counters of some pods at one time: (pod, pair or reason) → packets, bytes."""

    at_s: float
    counts: dict[tuple[str, str], tuple[int, int]]


@dataclass(frozen=True)
class Rate:
    """A row: the rate of a pair (`natives→redis`), or of a reason of the programs."""

    pod: str
    what: str
    packets_per_s: float
    bps: float
    packets: int
    """Packets since the pod was built."""

    @property
    def is_pair(self) -> bool:
        return "→" in self.what


def snapshot(names: Sequence[str]) -> Snapshot:
    """Read the counters of pods. Raises `Error` if there is no such pod."""
    counts = {}
    for pod in names:
        answer = control.traffic(pod)
        for flow in answer["traffic"]:
            counts[pod, f"{flow['client']}→{flow['server']}"] = flow["packets"], flow["bytes"]
        for reason, count in answer["counters"].items():
            counts[pod, reason] = count["packets"], count["bytes"]
    return Snapshot(time.monotonic(), counts)


def rates(before: Snapshot, now: Snapshot) -> list[Rate]:
    """Rates between two snapshots: of each pod the pairs, fastest first, then reasons not zero."""
    passed_s = now.at_s - before.at_s
    found = []
    for (pod, what), (packets, size) in now.counts.items():
        was = before.counts.get((pod, what), (0, 0))
        found.append(
            Rate(pod, what, (packets - was[0]) / passed_s, (size - was[1]) * 8 / passed_s, packets)
        )
    shown = [rate for rate in found if rate.is_pair or rate.packets]
    return sorted(shown, key=lambda r: (r.pod, not r.is_pair, -r.bps, -r.packets, r.what))


def table(found: Sequence[Rate]) -> Table:
    """Table of rates for the terminal."""
    made = Table("pod", "pair or reason", box=None, header_style="bold")
    for head in ("packets/s", "bit/s", "packets in all"):
        made.add_column(head, justify="right")
    for rate in found:
        made.add_row(
            rate.pod, rate.what, _short(rate.packets_per_s), _short(rate.bps), f"{rate.packets}"
        )
    return made


def data(found: Sequence[Rate]) -> list[dict[str, Any]]:
    """Rates as plain data, for `--json`."""
    return [vars(rate) for rate in found]


def _short(value: float) -> str:
    """A number with three digits and an SI prefix."""
    for prefix in ("", "k", "M", "G"):
        if value < 999.5:
            return f"{value:.3g} {prefix}".rstrip()
        value /= 1000
    return f"{value:.3g} T"
