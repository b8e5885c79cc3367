"""Trial: one measured run of a cell, as stored. Frozen data, without input or output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from math import ceil, nan
from typing import Any


class Status(StrEnum):
    """How a trial ended."""

    OK = "ok"
    FAILED = "failed"
    UNSUPPORTED = "unsupported"


@dataclass(frozen=True)
class Trial:
    """One measured run of a cell in a block: a line of `trials.jsonl`.

    `value` is in the unit of the metric (`metrics.Measure`): bits per second of goodput at the
    receiver, microseconds of median round-trip time, connections per second, milliseconds until the
    first answer, bytes per pod.
    """

    cell: str
    block: int
    order: int
    """Position in the block's random order."""
    status: Status
    reason: str | None = None
    """Why it failed or is unsupported."""
    value: float | None = None
    duration_s: float | None = None
    payload_bytes: int = 0
    transactions: int = 0
    errors: int = 0
    histogram_us: tuple[tuple[float, int], ...] = ()
    """Round-trip times (or connect/request/close times): (upper bound of bucket in µs, count)."""
    searched: tuple[tuple[float, float, float], ...] = ()
    """Of a search for a rate all attempts: bits per second sent and arrived, share of datagrams
    lost. The last is the trial."""
    parts: dict[str, float] = field(default_factory=dict)
    """What the value is the sum of: of a start the steps, of memory whose it is."""
    dialed: str | None = None
    """The name or address that the client was told to dial."""
    carried: dict[str, int] = field(default_factory=dict)
    """What the datapath under test counted during the trial: packets, bytes."""
    counters: dict[str, int] = field(default_factory=dict)
    """Packets per reason of the datapath's programs during the trial (only those that moved)."""
    machine: dict[str, float] = field(default_factory=dict)
    """Of the host during the trial: cpu_s and what it is made of, steal_s (`machine.busy`), load1,
    elapsed_s, of it active_s with traffic, frequency_mhz where it is known."""
    disturbed: str | None = None
    """What came in between, if anything did: the trial was run once more, and both are kept."""
    started: str = ""
    """UTC, ISO 8601."""
    host: str = ""
    """The host's name in the inventory; empty: the machine that the campaign was started on."""

    def as_json(self) -> dict[str, Any]:
        """Plain data for one line of `trials.jsonl`, defaults left out."""
        default = Trial(cell="", block=-1, order=-1, status=Status.OK)
        always = ("cell", "block", "order", "status")
        return {k: v for k, v in vars(self).items() if k in always or v != getattr(default, k)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Trial:
        """The inverse of `as_json`."""
        data = dict(data, status=Status(data["status"]))
        data["histogram_us"] = tuple((float(u), int(c)) for u, c in data.get("histogram_us", ()))
        data["searched"] = tuple((s, a, lost) for s, a, lost in data.get("searched", ()))
        return cls(**data)


def percentile(histogram: Sequence[tuple[float, int]], percent: float) -> float:
    """Value at a percentile, from (upper bound of bucket, count): nearest rank.

    The upper bound of the bucket that holds the ⌈percent · n / 100⌉-th smallest sample, so it is
    never below the sample itself and above it by no more than the bucket is wide (as HdrHistogram
    does). NaN for an empty histogram.
    """
    samples = sum(count for _, count in histogram)
    rank = max(1, ceil(percent * samples / 100))
    seen = 0
    for upper, count in sorted(histogram):
        seen += count
        if seen >= rank:
            return upper
    return nan
