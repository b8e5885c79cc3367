"""What a host counts while a trial's traffic runs: packets of the datapath, CPU time, load."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from testbed.campaigns.isolation import Reading
from testbed.datapaths.interface import Count
from testbed.host import facts
from testbed.pods.pod import Pod


@dataclass
class Observation:
    """What was counted, once the context of `observing` has ended."""

    carried: list[Count] = field(default_factory=list)
    """Packets and bytes that the datapath carried, for each flow."""
    counters: Counter[str] = field(default_factory=Counter)
    """Reason → packets that the datapath's programs counted."""
    machine: dict[str, float] = field(default_factory=dict)
    """The host meanwhile (`Trial.machine`, without `active_s`)."""


@contextmanager
def observing(
    flows: Sequence[Callable[[], Count]], pods: Iterable[Pod], machines: Sequence[Path]
) -> Iterator[Observation]:
    """Count while the context lasts.

    `flows` tell what the datapath has carried so far, each for one flow. `machines` are cgroups of
    virtual machines, whose CPU time is that of guests.
    """
    pods, seen = list(pods), Observation()
    carried, counters = [flow() for flow in flows], _counters(pods)
    own = [pod.cgroup.parent for pod in pods]
    others, busy, began = Reading.now(own), facts.busy(machines), time.monotonic()
    yield seen
    elapsed_s = time.monotonic() - began
    seen.machine = {key: value - busy[key] for key, value in facts.busy(machines).items()}
    seen.machine["others_s"] = Reading.now(own).since(others)
    seen.carried = [flow() - before for flow, before in zip(flows, carried, strict=True)]
    seen.counters = _counters(pods) - counters
    seen.machine |= {"load1": facts.load1(), "elapsed_s": elapsed_s}
    if frequency := facts.frequency_mhz():
        seen.machine["frequency_mhz"] = frequency


def _counters(pods: Iterable[Pod]) -> Counter[str]:
    """Packets per reason, summed over all pods."""
    total = Counter[str]()
    for pod in pods:
        total.update({why: count.packets for why, count in pod.attachment.counters().items()})
    return total
