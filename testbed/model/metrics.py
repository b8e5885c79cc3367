"""Metrics of trials, and how each is measured, stored and shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from testbed.model.terms import Open
from testbed.model.trials import percentile

TAIL = "p999_us"
"""Name of the quantity that is the 99.9th percentile of the samples of all blocks together."""
CPU_QUANTITY = "cpu"
"""Name of the quantity that is the host's CPU time per unit of traffic (`analysis.costs`)."""


class Sample(Protocol):
    """What the traffic agents counted in one trial."""

    @property
    def bytes(self) -> int: ...
    @property
    def transactions(self) -> int: ...
    @property
    def duration_s(self) -> float: ...
    @property
    def histogram_us(self) -> Sequence[tuple[float, int]]: ...


@dataclass(frozen=True)
class Measure:
    """How a metric is measured, stored and shown."""

    unit: str
    """Unit of stored values."""
    shown_unit: str
    """Unit in tables and figures."""
    scale: float
    """Divisor that converts a stored value to `shown_unit`."""
    columns: Mapping[str, str]
    """Column of the tidy table (`results.store.frame`), or `TAIL` → its heading in tables."""
    units: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    """Column in another unit → the divisor that converts a stored value, and the unit's name."""
    higher_is_better: bool = False
    mode: Literal["stream", "rr", "crr"] = "rr"
    """Mode of the traffic agent: stream, request/response, or connect/request/close."""
    value: Callable[[Sample], float] = field(default=lambda s: percentile(s.histogram_us, 50))
    """Computes the value of a trial, in `unit`. Not used if `of_building`."""
    of_building: bool = False
    """Whether the building of pods is measured, and not the traffic of pods that are built."""

    def is_better_higher(self, quantity: str) -> bool:
        """Whether higher values of a quantity are better. Of times and memory, lower ones are."""
        return quantity == "value" and self.higher_is_better


class Metric(Open):
    """Name of what a trial measures; `measure` says how.

    Another Python distribution adds a metric by an entry point of group `testbed.metrics`: the name
    of the metric, and the object reference of its `Measure`.
    """

    THROUGHPUT = "throughput"
    """TCP: goodput of a stream. UDP: the highest rate with at most 0.1 % loss
    (`campaigns.rate_search`)."""
    LATENCY = "latency"
    """Round-trip time of a request and its response."""
    CONNECTIONS = "connections"
    """Connections per second: connect, one request and response, close."""
    STARTUP = "startup"
    """Time until every guest of every pod has answered a first request at `localhost`."""
    MEMORY = "memory"
    """Memory of a pod after that first answer."""
    REQUESTS = "requests"
    """Requests of an application (`testbed.application`) per second, the time that one takes, and
    the memory of the pod's processes afterwards."""

    @property
    def measure(self) -> Measure:
        """How the metric is measured, from `MEASURES` or from another distribution."""
        if self not in MEASURES:
            from importlib import metadata

            [entry] = metadata.entry_points(group="testbed.metrics", name=self.value)
            MEASURES[self] = entry.load()
        return MEASURES[self]

    @property
    def of_building(self) -> bool:
        """Whether the building of pods is measured, and not the traffic of pods that are built."""
        return self.measure.of_building


MEASURES = {
    Metric.THROUGHPUT: Measure(
        "bps",
        "Gbit/s",
        1e9,
        {"value": "throughput"},
        higher_is_better=True,
        mode="stream",
        value=lambda sample: sample.bytes * 8 / sample.duration_s,
    ),
    Metric.LATENCY: Measure(
        "us",
        "µs",
        1,
        {"p50_us": "latency p50", "p99_us": "latency p99", TAIL: "latency p99.9"},
    ),
    Metric.CONNECTIONS: Measure(
        "per_s",
        "k/s",
        1e3,
        {"value": "connections"},
        higher_is_better=True,
        mode="crr",
        value=lambda sample: sample.transactions / sample.duration_s,
    ),
    Metric.STARTUP: Measure("ms", "ms", 1, {"value": "first answer"}, of_building=True),
    Metric.MEMORY: Measure("bytes", "MiB", 2**20, {"value": "memory"}, of_building=True),
    Metric.REQUESTS: Measure(
        "per_s",
        "k/s",
        1e3,
        {
            "value": "requests",
            "p50_us": "request p50",
            "p99_us": "request p99",
            "memory_bytes": "memory",
        },
        units={"p50_us": (1, "µs"), "p99_us": (1, "µs"), "memory_bytes": (2**20, "MiB")},
        higher_is_better=True,
    ),
}
"""The metrics of the testbed itself, in the order of table columns."""
