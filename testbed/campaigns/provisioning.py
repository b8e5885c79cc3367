"""Pods that are built together to be measured: which cells share them, and what building took.

Ordinary cells of a datapath share one pod that has what all their pairs need, and stands as long as
the block. Cells of several guests or pods, and those that are about building itself, have pods of
exactly what they say, for themselves. What is measured in pods that stand is `trial`'s affair.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from testbed.campaigns import trial
from testbed.host import cgroups, facts, process
from testbed.model.cells import Cell, Pair
from testbed.model.metrics import Metric
from testbed.model.terms import Family
from testbed.model.trials import Status, Trial
from testbed.pods.pod import Pod
from testbed.runtimes.interface import Prepared

POLL_S = 0.001
SETTLE_S, SETTLE_LIMIT_S, SETTLED_BYTES = 0.1, 3.0, 64 << 10
"""Memory that shrinks by less in that time has settled."""


@dataclass(frozen=True)
class Deployment:
    """What cells have in common that are measured in the same pods."""

    datapath: str
    guest: str
    guests: int
    pods: int
    pair: Pair | None
    """None: whichever, of pods that stand from the beginning of a block to its end."""

    @classmethod
    def of(cls, cell: Cell) -> Deployment:
        stands = cell.guests == cell.pods == 1 and not cell.metric.of_building
        pair = None if stands else cell.pair
        return cls(cell.datapath, cell.guest, cell.guests, cell.pods, pair)

    @property
    def stands(self) -> bool:
        return self.pair is None

    @property
    def name(self) -> str:
        """Of its pods, unique in a block."""
        parts = [self.datapath, self.guest]
        parts += [f"{self.pair}-{self.guests}x{self.pods}"] if self.pair else []
        return "-".join(part for part in parts if part)


@dataclass
class Built:
    """The pods of a deployment, and what building them took."""

    pods: list[Pod] = field(default_factory=list)
    started: str = ""
    took_ms: dict[str, float] = field(default_factory=dict)
    """Of each step in turn, of all pods together."""
    answered_ms: dict[Cell, float] = field(default_factory=dict)
    """Of cells about building: how long all of their first requests took after that."""
    memory_bytes: dict[str, float] = field(default_factory=dict)
    """Of processes and of the kernel, per pod, at last."""

    def build(
        self,
        cells: Sequence[Cell],
        guest: Prepared,
        image: Callable[[], object],
        pods: Iterable[Pod],
    ) -> None:
        """Build pods, from their `image` on if cells are about building, until all are ready.

        `pods` makes them one by one. Raises `Error`, as they do; those that there are by then are
        in `self.pods`, which is not closed here.
        """
        cells = [cell for cell in cells if cell.metric.of_building]
        self.started = datetime.now(UTC).isoformat(timespec="milliseconds")
        kernel_bytes, began = _settled_kernel_bytes(), time.monotonic()

        def passed_ms() -> float:
            nonlocal began
            before, began = began, time.monotonic()
            return (began - before) * 1e3

        if cells:
            image()
        self.took_ms = {"image": passed_ms()}
        for pod in pods:
            self.pods.append(pod)
        attached_ms = 1e3 * sum(pod.attached_s for pod in self.pods)
        self.took_ms |= {"links": passed_ms() - attached_ms, "datapath": attached_ms}
        for pod in self.pods:
            pod.launch()
        for pod in self.pods:
            while not all(map(process.launched, pod.processes.values())):
                time.sleep(POLL_S)
        self.took_ms["launch"] = passed_ms()
        for pod in self.pods:
            pod.wait({cell.family for cell in cells} or set(Family))
        self.took_ms["boot"] = passed_ms()
        for cell in cells:
            with trial.flows(cell, self.pods, guest) as flows:
                trial.at_once(flows, cell, bytes=cell.size_bytes)
                self.answered_ms[cell] = passed_ms()
        for pod in self.pods:
            pod.wait()
        processes = sum(cgroups.resident_bytes(pod.cgroup.parent) for pod in self.pods)
        kernel = facts.kernel_bytes() - kernel_bytes
        self.memory_bytes = {
            "processes": processes / len(self.pods),
            "kernel": kernel / len(self.pods),
        }

    def measured(self, cell: Cell) -> Trial:
        """The trial of a cell about building."""
        parts = self.memory_bytes
        if cell.metric is Metric.STARTUP:
            parts = self.took_ms | {"answer": self.answered_ms[cell]}
        return Trial(
            cell.id, 0, 0, Status.OK, value=sum(parts.values()), parts=parts, started=self.started
        )


def _settled_kernel_bytes() -> int:
    """The kernel's memory once it has let go of what pods that are gone had: it takes its time."""
    least, deadline = facts.kernel_bytes(), time.monotonic() + SETTLE_LIMIT_S
    while time.monotonic() < deadline:
        time.sleep(SETTLE_S)
        now = facts.kernel_bytes()
        if now > least - SETTLED_BYTES:
            return now
        least = now
    return least
