"""What pods' datapaths carry now: packets and bits per second of each pair, and what is counted.

Rates are of what the kernel counted between two looks, divided by the time between them. Natives of
a pod are one: the datapath does not tell them apart.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from testbed.pods import control


@dataclass(frozen=True)
class Look:
    """Counts of some pods at a moment: (pod, what) → packets, bytes."""

    at_s: float
    counts: dict[tuple[str, str], tuple[int, int]]


@dataclass(frozen=True)
class Rate:
    """One line: a pair (`natives→redis`), or a reason of the programs."""

    pod: str
    what: str
    packets_per_s: float
    bps: float
    packets: int
    """Since the pod stands."""

    @property
    def is_pair(self) -> bool:
        return "→" in self.what


def look(names: Sequence[str]) -> Look:
    """Ask the pods. Raises `Error` if one is not there."""
    counts = {}
    for pod in names:
        told = control.traffic(pod)
        for flow in told["traffic"]:
            counts[pod, f"{flow['client']}→{flow['server']}"] = flow["packets"], flow["bytes"]
        for reason, count in told["counters"].items():
            counts[pod, reason] = count["packets"], count["bytes"]
    return Look(time.monotonic(), counts)


def rates(before: Look, now: Look) -> list[Rate]:
    """Between two looks: pairs first, of each pod those that carry most; then reasons that were."""
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
    """For people."""
    made = Table("pod", "pair or reason", box=None, header_style="bold")
    for head in ("packets/s", "bit/s", "packets in all"):
        made.add_column(head, justify="right")
    for rate in found:
        made.add_row(
            rate.pod, rate.what, _short(rate.packets_per_s), _short(rate.bps), f"{rate.packets}"
        )
    return made


def data(found: Sequence[Rate]) -> list[dict[str, Any]]:
    """For `--json`."""
    return [vars(rate) for rate in found]


def _short(value: float) -> str:
    """With three digits and a prefix."""
    for prefix in ("", "k", "M", "G"):
        if value < 999.5:
            return f"{value:.3g} {prefix}".rstrip()
        value /= 1000
    return f"{value:.3g} T"
