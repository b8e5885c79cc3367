"""Text that reports share: units, columns, sizes, intervals, warnings, notes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

from testbed.model.cells import SLOW_US, UDP_LOSS, Cell
from testbed.model.metrics import TAIL, Metric
from testbed.model.terms import UNPACED, Transport
from testbed.model.trials import Limit, Status
from testbed.results.analysis import EXCEEDANCES, Ratio, Summary, controls
from testbed.results.results import Results
from testbed.results.statistics import SHAKEN_SHARE, Estimate
from testbed.results.store import Campaign

UDP_RATE = (Metric.THROUGHPUT, Transport.UDP)
UDP_RATE_MEANS = f"UDP: the highest rate at which at most {UDP_LOSS:.1%} of datagrams are lost"
FUNCTIONAL = "emulated guest: functional, not a speed claim"


UNBOUNDED = 1000
"""Multiple of the mean above which an interval's end is not shown: blocks then differ too much, or
are too few, to say how large the mean may be."""


class Unit(NamedTuple):
    """Unit of shown values, and the divisor that converts stored values to it."""

    scale: float
    name: str


def unit_of(metric: Metric, quantity: str = "value") -> Unit:
    """The unit that a quantity of a metric is shown in."""
    measure = metric.measure
    return Unit(*measure.units.get(quantity, (measure.scale, measure.shown_unit)))


def plain(value: Any) -> Any:
    """The value with None for NaN, which strict JSON does not have."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def shown_columns() -> list[tuple[Metric, str, str]]:
    """(metric, column of the tidy table, heading) of all shown quantities, in order."""
    return [(m, column, name) for m in Metric for column, name in m.measure.columns.items()]


class Row(Protocol):
    """A row of a table or figure: one quantity of one cell."""

    @property
    def cell(self) -> Cell: ...
    @property
    def quantity(self) -> str: ...


def columns_of(rows: Iterable[Row]) -> list[tuple[Metric, str, str]]:
    """Those of `shown_columns` that some of the rows have."""
    found = {(row.cell.metric, row.quantity) for row in rows}
    return [column for column in shown_columns() if column[:2] in found]


def interval(of: Estimate, scale: float, wide: bool) -> str:
    """`3.21 [3.10, 3.33]`, or `3.21 ±4%` by the wider side; only the mean without an interval."""
    mean = number(of.mean / scale, of.mean / scale)
    if math.isnan(of.low):
        return mean
    low, high = (end(x, of.mean, scale) for x in (of.low, of.high))
    if wide:
        return f"{mean} [{low}, {high}]"
    side = 100 * (of.high / of.mean - 1)
    return f"{mean} ±{side:.0f}%" if side < 999.5 else f"{mean} >±999%"


UNSHAKEN = f"at most {SHAKEN_SHARE:.0%} of the blocks were disturbed"
"""What holds of a ratio that is shown as sound, for legends (`Estimate.shaken`)."""


def conclusive(row: Ratio, campaign: Campaign) -> bool:
    """Whether a ratio is shown as sound, bold or filled.

    Its interval excludes 1, its guests are not emulated, and few blocks of it were disturbed.
    """
    sound = not row.ratio.shaken and not campaign.is_functional(row.cell)
    return sound and row.ratio.excludes_1


def disturbed_of(of: Estimate) -> str:
    """How many blocks of an estimate were disturbed: `1 of 3 blocks disturbed`; or empty."""
    return f"{of.disturbed} of {of.blocks} blocks disturbed" if of.disturbed else ""


def notes_of(row: Summary) -> str:
    """All that is said beside the value and the ratio of a row; or empty."""
    most = max((row.estimate, row.ratio), key=lambda of: of.disturbed)
    return "; ".join(filter(None, (row.reason, row.limited, row.no_ratio, disturbed_of(most))))


def better_of(metric: Metric, quantity: str) -> str:
    """On which side of an axis the better values of a quantity are."""
    return "→ better" if metric.measure.is_better_higher(quantity) else "better ←"


def end(x: float, mean: float, scale: float) -> str:
    """An end of an interval; `no bound` if it is so far from the mean that it bounds nothing."""
    return number(x / scale, mean / scale) if x < UNBOUNDED * mean else "no bound"


def warnings_of(results: Results) -> list[str]:
    """What makes a campaign's numbers no speed claim, too small or unsure: a line each."""
    campaign = results.campaign
    warnings = (
        _emulated(campaign),
        pacing_warning(campaign.congestion_control),
        _disturbed(results),
        *(_limited(results, limit) for limit in Limit),
    )
    return list(filter(None, warnings))


def _disturbed(results: Results) -> str:
    """The warning that values are those of disturbed trials; or empty."""
    values = [trial for trial in results.trials if trial.value is not None]
    disturbed = sum(trial.disturbed is not None for trial in values)
    return f"{disturbed} of {len(values)} values are of disturbed trials" if disturbed else ""


def _limited(results: Results, limit: Limit) -> str:
    """The warning that something else than the datapath limits values; or empty."""
    limited = sum(t.limited is limit for t in results.trials if t.value is not None)
    return f"{limited} values: {limit.meaning}" if limited else ""


def pacing_warning(congestion_control: str) -> str:
    """The warning that TCP's congestion control may pace, which slows streams; or empty."""
    if congestion_control in (*UNPACED, "unknown"):
        return ""
    return (
        f"TCP's congestion control is {congestion_control}, not cubic: if it paces, as bbr does, "
        "throughput over TCP is too low"
    )


def _emulated(campaign: Campaign) -> str:
    """The warning that guests are emulated, with their names if others are not; or empty."""
    guests = {name or campaign.guest: name for name in campaign.used_guests}
    emulated = [guest for guest, name in guests.items() if campaign.accelerator_of(name) == "tcg"]
    which = f"{', '.join(emulated)}: " if 0 < len(emulated) < len(guests) else ""
    return which + FUNCTIONAL if emulated else ""


def meanings_of(rows: Iterable[Summary]) -> list[str]:
    """Explanations of quantities that need one, a line each."""
    rows, lines = list(rows), []
    if any(row.quantity == TAIL for row in rows):
        lines.append(
            f"p99.9: of all blocks together, where {EXCEEDANCES} samples or more lie above it."
        )
    if any((r.cell.metric, r.cell.transport) == UDP_RATE for r in rows):
        lines.append(f"{UDP_RATE_MEANS}.")
    return lines


def controls_of(rows: Iterable[Summary]) -> list[str]:
    """Outcome of the campaign's controls, a line for each kind."""
    rows = list(rows)
    found, lines = controls(rows), []
    if found and found.same:
        verdict = "as it should be" if found.differing <= found.bound else "too many"
        lines.append(
            f"A/A: {found.differing} of {found.same} intervals exclude 1, at most "
            f"{found.bound} would by chance: {verdict}."
        )
    if found and found.slow:
        verdict = "as it should be" if found.found == found.slow else "this campaign is too coarse"
        delays = {SLOW_US[row.cell.variant] for row in rows if row.cell.variant in SLOW_US}
        waits = " or ".join(f"{delay:g}" for delay in sorted(delays))
        lines.append(
            f"Servers that wait {waits} µs: found in {found.found} of {found.slow} "
            f"cells: {verdict}."
        )
    return lines


def superscript(number: int) -> str:
    """A number in superscript digits, for footnotes."""
    return str(number).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def number(value: float, like: float) -> str:
    """A number with the decimals that give `like` three significant digits."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(like)))}f}"


def absence(status: Status) -> str:
    """Text in the place of a value that is missing."""
    return "n/a" if status is Status.UNSUPPORTED else str(status)


def names(*words: str) -> str:
    """Families and transports as people write them: `IPv4 TCP`."""
    return " ".join(w.replace("ipv", "IPv") if w.startswith("ipv") else w.upper() for w in words)


def guest_of(campaign: Campaign, named: str = "") -> str:
    """Runtime, kernel and accelerator of the campaign's guests, or of guests that cells name.

    For the campaign's own, also how their checksums are other than by default: the first option of
    their device, from which the others follow.
    """
    kernel = campaign.guest_kernel
    if named:
        kernel = campaign.guests.get(named, {}).get("kernel", "")
    accelerator = campaign.accelerator_of(named)
    text = f"{named or campaign.guest}{f' ({kernel})' if kernel else ''}, accelerator {accelerator}"
    offloads = "" if named else campaign.offloads.partition(",")[0]
    return f"{text}, {offloads}" if offloads else text


def guests_of(campaign: Campaign) -> str:
    """All guests that cells of the campaign have (`guest_of`): `guest osv, …; guest standin, …`."""
    found = dict.fromkeys(guest_of(campaign, guest) for guest in campaign.used_guests)
    return "; ".join(f"guest {text}" for text in found) or "no guests"


def blocks_of(campaign: Campaign) -> str:
    """Number of blocks: `10 blocks`, `at least 10 blocks`."""
    least = "at least " if campaign.plan.get("target_width") else ""
    return f"{least}{campaign.blocks} block{'s' if campaign.blocks > 1 else ''}"


def size_of(cell: Cell) -> str:
    """Message size, then parameters that differ from the default: `64 KiB, 4 streams`."""
    kib, rest = divmod(cell.size_bytes, 1024)
    words = [cell.application] if cell.application else []
    words += [f"{cell.size_bytes} B" if rest else f"{kib} KiB"] if cell.size_bytes else []
    words += [f"{cell.streams} streams"] if cell.streams > 1 else []
    words += [f"{cell.rate_per_s}/s"] if cell.rate_per_s else []
    words += [f"{cell.guests} guests"] if cell.guests > 1 else []
    words += [f"{cell.pods} pods"] if cell.pods > 1 else []
    return ", ".join(words)
