"""Metrics: what trials measure, and for each how it is measured, stored and shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from testbed.model.terms import Open
from testbed.model.trials import percentile

TAIL = "p999_us"
"""The 99.9th percentile of all blocks' samples together."""


class Sample(Protocol):
    """What the traffic agents counted in a trial."""

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
    """Of stored values."""
    shown_unit: str
    scale: float
    """What stored values are divided by, to be in `shown_unit`."""
    columns: Mapping[str, str]
    """Column of the tidy table (`results.store.frame`), or `TAIL` → what people call it."""
    higher_is_better: bool = False
    mode: Literal["stream", "rr", "crr"] = "rr"
    """The traffic agent's."""
    value: Callable[[Sample], float] = field(default=lambda s: percentile(s.histogram_us, 50))
    """The value of a trial, in `unit`. Of no use where pods being built are measured."""
    of_building: bool = False
    """It is pods being built that is measured, and not those that stand."""


class Metric(Open):
    """What a trial measures; `measure` says how.

    Another distribution adds one by an entry point of group `testbed.metrics`: its name, and where
    its `Measure` is.
    """

    THROUGHPUT = "throughput"
    """TCP: of a stream. UDP: at the highest rate with hardly any loss (`campaigns.rate_search`)."""
    LATENCY = "latency"
    CONNECTIONS = "connections"
    STARTUP = "startup"
    """From nothing to the first request answered at `localhost`, for all guests of all pods."""
    MEMORY = "memory"
    """What a pod takes then."""

    @property
    def measure(self) -> Measure:
        """How it is measured: of `MEASURES`, or of another distribution."""
        if self not in MEASURES:
            from importlib import metadata

            [entry] = metadata.entry_points(group="testbed.metrics", name=self.value)
            MEASURES[self] = entry.load()
        return MEASURES[self]

    @property
    def of_building(self) -> bool:
        """Whether it is pods being built that is measured, and not those that stand."""
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
}
"""In the order of columns."""
