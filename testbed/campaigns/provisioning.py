"""Builds the pods that cells are measured in, and measures the building (startup, memory).

Cells that need the same guests, WASM components and containers can share a pod (`Deployment`).
Cells with several guests or pods, and cells that measure building, have pods of their own.
`campaigns.schedule` decides which pods stand at the same time. `campaigns.trial` measures traffic
in the pods that are built here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from testbed.campaigns import roles, trial
from testbed.host import cgroups, facts, process
from testbed.model.cells import Cell, Pair
from testbed.model.metrics import Metric
from testbed.model.terms import Family
from testbed.model.trials import Status, Trial
from testbed.pods.pod import Pod
from testbed.runtimes.interface import Prepared

POLL_S = 0.001
READY_S = 30.0
"""Time in which a server of an application has to answer: it may have to make its data first."""
SETTLE_S, SETTLE_LIMIT_S, SETTLED_BYTES = 0.1, 3.0, 64 << 10
"""Memory has settled when it shrinks by less than `SETTLED_BYTES` in `SETTLE_S`."""


@dataclass(frozen=True)
class Deployment:
    """The pods that a group of cells shares: key of the group, and description of the pods."""

    datapath: str
    guest: str
    guests: int
    pods: int
    heavy: tuple[str, ...]
    """Names of the workloads that are no plain processes (`roles.heavy`)."""
    pair: Pair | None
    """The pair, if the pods stand alone. None: any pair with these workloads."""
    application: str = ""
    """The application whose programs are the workloads, with any case of its client. Empty: they
    are traffic agents."""
    family: Family | None = None
    """The family that an application's programs are told."""

    @classmethod
    def of(cls, cell: Cell) -> Deployment:
        """The deployment that a cell is measured in."""
        ordinary = cell.guests == cell.pods == 1 and not cell.metric.of_building
        ordinary = ordinary and not cell.application
        pair, heavy = None if ordinary else cell.pair, roles.heavy(cell.pair)
        application, _, _ = cell.application.partition(".")
        family = cell.family if application else None
        return cls(
            cell.datapath,
            cell.guest,
            cell.guests,
            cell.pods,
            heavy,
            pair,
            application,
            family,
        )

    @property
    def alone(self) -> bool:
        """Whether no other pods may stand beside these, whatever their guests are."""
        return self.pair is not None

    @property
    def name(self) -> str:
        """Name of its pods. Deployments that differ in `heavy` alone have the same."""
        parts = [self.datapath, self.guest]
        parts += [self.application] if self.application else []
        parts += [f"{self.pair}-{self.guests}x{self.pods}"] if self.pair else []
        return "-".join(part for part in parts if part)


@dataclass
class Built:
    """The pods of a deployment, with the time and memory that building them took."""

    pods: list[Pod] = field(default_factory=list)
    started: str = ""
    """Time at which building began: UTC, ISO 8601."""
    took_ms: dict[str, float] = field(default_factory=dict)
    """Step → its duration, for all pods together, in the order of steps."""
    answered_ms: dict[Cell, float] = field(default_factory=dict)
    """Cell that measures building → duration of its first requests after the last step."""
    memory_bytes: dict[str, float] = field(default_factory=dict)
    """Memory per pod after the first requests: `processes` and `kernel`."""

    def build(
        self,
        cells: Sequence[Cell],
        guest: Prepared,
        image: Callable[[], object],
        pods: Iterable[Pod],
    ) -> None:
        """Build the pods until all are ready, and measure each step.

        Iterating over `pods` builds their links one by one. If any of the `cells` measures
        building, `image` is called first, to prepare images anew. Raises the `Error` of a pod that
        fails. The caller closes the pods in `self.pods`, also after an error.
        """
        of_applications = {cell.family for cell in cells if cell.application}
        families, least_s = of_applications or set(Family), READY_S if of_applications else 0
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
            while cells and not all(map(process.launched, pod.processes.values())):
                time.sleep(POLL_S)
        self.took_ms["launch"] = passed_ms()
        for pod in self.pods:
            pod.wait({cell.family for cell in cells} or families, least_s)
        self.took_ms["boot"] = passed_ms()
        for cell in cells:
            with trial.flows(cell, self.pods, guest) as flows:
                trial.at_once(flows, cell, bytes=cell.size_bytes)
                self.answered_ms[cell] = passed_ms()
        if cells:
            for pod in self.pods:
                pod.wait(families)
        processes = sum(cgroups.resident_bytes(pod.cgroup.parent) for pod in self.pods)
        kernel = facts.kernel_bytes() - kernel_bytes
        self.memory_bytes = {
            "processes": processes / len(self.pods),
            "kernel": kernel / len(self.pods),
        }

    def measured(self, cell: Cell) -> Trial:
        """The trial of a cell that measures building."""
        parts = self.memory_bytes
        if cell.metric is Metric.STARTUP:
            parts = self.took_ms | {"answer": self.answered_ms[cell]}
        return Trial(
            cell.id, 0, 0, Status.OK, value=sum(parts.values()), parts=parts, started=self.started
        )


def _settled_kernel_bytes() -> int:
    """The kernel's memory once it has settled: memory of removed pods is freed with a delay."""
    least, deadline = facts.kernel_bytes(), time.monotonic() + SETTLE_LIMIT_S
    while time.monotonic() < deadline:
        time.sleep(SETTLE_S)
        now = facts.kernel_bytes()
        if now > least - SETTLED_BYTES:
            return now
        least = now
    return least
