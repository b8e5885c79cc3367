"""Trial: one measured run of a cell, as it is stored. Frozen data; nothing is read or written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from math import ceil, nan
from typing import Any, ClassVar


class Status(StrEnum):
    """How a trial ended."""

    OK = "ok"
    FAILED = "failed"
    UNSUPPORTED = "unsupported"


class Limit(StrEnum):
    """What a value is limited by, other than by the datapath under test."""

    SENDER = "sender"
    SATURATED = "saturated"

    @property
    def meaning(self) -> str:
        """How to read a value with this limit."""
        return {
            Limit.SENDER: "the sender's own speed: what it sent arrived, the datapath may do more",
            Limit.SATURATED: "saturated: requests queue, and times are as long as the trial",
        }[self]


@dataclass(frozen=True)
class Trial:
    """One measured run of a cell in a block: a line of `trials.jsonl`.

    `value` is in the unit of the metric (`metrics.Measure`): bits per second of goodput at the
    receiver, microseconds of median round-trip time, connections per second, milliseconds until the
    first answer, bytes per pod, requests per second.
    """

    __pydantic_config__: ClassVar[dict[str, bool]] = {"use_attribute_docstrings": True}

    cell: str
    block: int
    order: int
    """Position in which it was run in its block. Unsupported cells come first."""
    status: Status
    reason: str | None = None
    """Why it failed or is unsupported."""
    value: float | None = None
    duration_s: float | None = None
    payload_bytes: int = 0
    transactions: int = 0
    errors: int = 0
    unanswered: int = 0
    """Requests at a given rate that were due and had no response at the end."""
    unsent: int = 0
    """Requests at a given rate that were due while too many before them waited, and not sent."""
    limited: Limit | None = None
    """`sender`: the rate of UDP is that of the sender at full speed. `saturated`: of requests at a
    given rate, fewer were answered per second than were due."""
    histogram_us: tuple[tuple[float, int], ...] = ()
    """Round-trip times (or connect/request/close times): (upper bound of bucket in µs, count)."""
    searched: tuple[tuple[float, float, float], ...] = ()
    """All attempts of a rate search: bits per second sent, bits per second received, share of
    datagrams lost. The last attempt is the trial itself."""
    quantities: dict[str, float] = field(default_factory=dict)
    """What the trial of an application has besides: `memory_bytes`, and percentiles `p50_us` and
    `p99_us` that its client printed."""
    parts: dict[str, float] = field(default_factory=dict)
    """Terms that `value` is the sum of: steps of a start, or owners of memory."""
    dialed: str | None = None
    """The name or address that the client was told to dial."""
    carried: dict[str, int] = field(default_factory=dict)
    """Packets and bytes that the datapath under test counted during the trial."""
    counters: dict[str, int] = field(default_factory=dict)
    """Reason → packets that the datapath's programs counted during the trial, without zeros."""
    machine: dict[str, float] = field(default_factory=dict)
    """The host during the trial: cpu_s and its parts, steal_s (`host.facts.busy`), load1,
    elapsed_s, active_s (the part of it with traffic), and frequency_mhz where it is known. others_s
    (`campaigns.isolation`; older trials lack it): CPU time of what is not the trial's own."""
    disturbed: str | None = None
    """What else on the machine spoiled the trial. It was run once more, and both are stored."""
    started: str = ""
    """Time of the start: UTC, ISO 8601."""
    host: str = ""
    """Name of the host in the inventory. Empty: the machine that the campaign was started on."""

    def as_json(self) -> dict[str, Any]:
        """The trial as plain data for a line of `trials.jsonl`, without fields at their default."""
        default = Trial(cell="", block=-1, order=-1, status=Status.OK)
        always = ("cell", "block", "order", "status")
        return {k: v for k, v in vars(self).items() if k in always or v != getattr(default, k)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Trial:
        """The inverse of `as_json`."""
        data = dict(data, status=Status(data["status"]))
        data["limited"] = Limit(data["limited"]) if data.get("limited") else None
        data["histogram_us"] = tuple((float(u), int(c)) for u, c in data.get("histogram_us", ()))
        data["searched"] = tuple((s, a, lost) for s, a, lost in data.get("searched", ()))
        return cls(**data)


def percentile(histogram: Sequence[tuple[float, int]], percent: float) -> float:
    """Percentile of a histogram of (upper bound of bucket, count), by nearest rank.

    The result is the upper bound of the bucket that holds the ⌈percent · n / 100⌉-th smallest
    sample. So it is never below that sample, and above it by at most the width of the bucket (as in
    HdrHistogram). NaN for an empty histogram.
    """
    samples = sum(count for _, count in histogram)
    rank = max(1, ceil(percent * samples / 100))
    seen = 0
    for upper, count in sorted(histogram):
        seen += count
        if seen >= rank:
            return upper
    return nan
