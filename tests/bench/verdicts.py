"""What may be said of a benchmark's ratio to its reference: the one place where that is judged.

Each round of a benchmark gives a ratio, as the reference is run in the same round. What is held
against the stored value is their median with its interval, so that one disturbed round says
nothing, and a machine that is too noisy is told apart from code that became slower.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from testbed.model.errors import Error

BANDS = Path(__file__).with_name("bands.toml")
SHARE = 0.25
"""Share by which a ratio may be off that has no band yet."""


class Verdict(StrEnum):
    WITHIN = "within"
    BETTER = "better"
    WORSE = "worse"
    UNKNOWN = "could not measure"


@dataclass(frozen=True)
class Band:
    """What a ratio was when somebody accepted it, and the share by which it may be off."""

    ratio: float
    share: float

    @property
    def low(self) -> float:
        return self.ratio / (1 + self.share)

    @property
    def high(self) -> float:
        return self.ratio * (1 + self.share)


@dataclass(frozen=True)
class Measured:
    """The median of ratios, and the ends of its 95 % interval."""

    median: float
    low: float
    high: float


def measured(ratios: Sequence[float]) -> Measured:
    """By order statistics: whatever the ratios' distribution is, its median is so often between.

    (The binomial count of ratios below the median, as a normal one; n of 8 or more.)
    """
    ordered = sorted(ratios)
    n = len(ordered)
    first = max(0, math.floor(n / 2 - 0.98 * math.sqrt(n)))
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    return Measured(middle, ordered[first], ordered[n - 1 - first])


def judge(of: Measured, band: Band | None) -> tuple[Verdict, str]:
    """The verdict, and why there is none. Ratios are of times: less is better, and what may be so
    without being surely so is within.
    """
    if band is None:
        return Verdict.UNKNOWN, "there is no band for it"
    if of.low > band.high:
        return Verdict.WORSE, ""
    if of.high < band.low:
        return Verdict.BETTER, ""
    if of.median <= band.high and of.high / of.low <= (1 + band.share) ** 2:
        return Verdict.WITHIN, ""
    return Verdict.UNKNOWN, f"the machine is too noisy: {of.low:.3g} to {of.high:.3g} by chance"


def bands(path: Path, cpu: str) -> dict[str, Band]:
    """The bands of a CPU by benchmark, empty for one that the file does not have.

    Raises `Error` if it is not a file of bands.
    """
    with _reading(path, "file of bands"):
        return {
            name: Band(float(row["ratio"]), float(row["band"]))
            for name, row in tomllib.loads(path.read_text()).get(cpu, {}).items()
        }


def bands_of_run(path: Path) -> dict[str, Band]:
    """Bands around the ratios of an earlier run, from its JSON (`--benchmark-json`).

    Raises `Error` if it is not the JSON of a run.
    """
    with _reading(path, "run of benchmarks"):
        found = {}
        for run in json.loads(path.read_text())["benchmarks"]:
            if (info := run["extra_info"]).get("ratio"):
                _, share = info["stored"] or (None, SHARE)
                found[run["name"]] = Band(float(info["ratio"]), float(share))
        return found


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as e:
        raise Error(f"{path}: not a {what} ({e})") from e
