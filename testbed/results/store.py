"""Store of a campaign: reads and writes the campaign's directory.

    campaign.json    the plan and the circumstances (`Campaign`), written once
    trials.jsonl     one line per trial, appended and on the disk before `append` returns
    consoles/        serial consoles of guests
    hosts/           one file per host of a campaign on other hosts: machine, versions, guests
    trials.parquet, trials.csv, histogram.parquet    derived: rewritten from trials.jsonl at will
    figures/         derived as well (`testbed.reports.figures.draw`)
    ro-crate-metadata.json, campaign.schema.json, trial.schema.json    derived: what the files are
                     (`testbed.reports.crate`)
    conformance.json output of `testbed conformance --json`, if somebody put it there

An archived campaign has trials.jsonl.gz in place of trials.jsonl: the same data, but compressed,
and no trials can be appended.

The process that appends holds a lock on trials.jsonl. The kernel drops the lock when the process
ends, however it ends. Reading takes no lock. Nothing is measured or summarised here.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from math import nan
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Self

import pandas as pd

from testbed.model.cells import Cell
from testbed.model.errors import Error
from testbed.model.trials import Status, Trial, percentile

FORMAT = 1
"""Version of the directory's layout, in campaign.json."""


@dataclass(frozen=True)
class Campaign:
    """Description of a campaign, in campaign.json: plan, machine, guests, versions."""

    __pydantic_config__: ClassVar[dict[str, bool]] = {"use_attribute_docstrings": True}

    name: str
    """Name of the plan."""
    plan: Mapping[str, Any]
    """The plan's other values: times, target width, claims."""
    cells: tuple[str, ...]
    """Ids of the cells to run in each block."""
    blocks: int
    seed: int
    references: Mapping[str, str]
    """Datapath → the datapath that its results are divided by. A reference names itself."""
    guest: str
    """Runtime of the guests."""
    guest_kernel: str
    accelerator: str
    """`kvm`, `tcg`, or `none` where guests are no virtual machines."""
    kernel: str
    cpu: str
    governor: str
    host: str
    revision: str
    """Git revision of this project, with `-dirty` if there were uncommitted changes."""
    congestion_control: str = "unknown"
    """TCP congestion control of the host."""
    offloads: str = ""
    """What of the guests' network device is not QEMU's default: its options, or `ipv6 checksums by
    host` where the host completes these."""
    versions: Mapping[str, str] = field(default_factory=dict)
    images: Mapping[str, str] = field(default_factory=dict)
    """Image → digest."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """Other conditions that may explain a number."""
    started: str = ""
    """Time of the start: UTC, ISO 8601."""
    guests: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Runtime of guests that cells name themselves → its `kernel` and `accelerator`."""
    looks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Datapath → its look: the fields of `model.looks.Look`."""

    @property
    def used_guests(self) -> tuple[str, ...]:
        """Guests that cells have: names that cells give, and `""` for the campaign's own."""
        cells = map(Cell.parse, self.cells)
        return tuple(dict.fromkeys(cell.guest for cell in cells if cell.pair.guests))

    @property
    def functional(self) -> bool:
        """Whether guests were emulated: then results prove function, and say nothing of speed."""
        return any(self.accelerator_of(guest) == "tcg" for guest in self.used_guests)

    def accelerator_of(self, guest: str) -> str:
        """Accelerator of guests that cells name, or of the campaign's own (`""`)."""
        named = self.guests.get(guest, {}).get("accelerator", "none")
        return named if guest else self.accelerator

    def is_functional(self, cell: Cell) -> bool:
        """Whether the guests of a cell were emulated."""
        return cell.pair.guests > 0 and self.accelerator_of(cell.guest) == "tcg"


class Store:
    """A campaign's directory, open for reading, or for appending too (`create`, `resume`)."""

    def __init__(self, path: Path, campaign: Campaign, log: BinaryIO | None = None) -> None:
        self.path = path
        self.campaign = campaign
        self._log = log

    def append(self, trial: Trial) -> None:
        """Append a trial. It is on disk when this returns; on an error the file is as before."""
        if self._log is None:
            raise ValueError(f"{self.path} is open for reading only")
        line = json.dumps(trial.as_json(), ensure_ascii=False, allow_nan=False) + "\n"
        log, rest = self._log.fileno(), line.encode()
        with _explained(self._log_path, resume=self.path):
            end = os.fstat(log).st_size
            try:
                while rest:  # A disk that fills up accepts a part of the data before it refuses.
                    rest = rest[os.write(log, rest) :]
                os.fsync(log)
            except OSError:
                os.ftruncate(log, end)
                raise

    def trials(self) -> list[Trial]:
        """The trials that count (`counted`). Raises `Error` for a line that is not a trial."""
        return counted(self.log())

    def log(self) -> list[Trial]:
        """Every trial, in the order in which they were run. An incomplete last line is left out."""
        lines = self.raw().split(b"\n")[:-1]
        trials = []
        for number, line in enumerate(lines, 1):
            try:
                trial = Trial.from_json(json.loads(line))
                Cell.parse(trial.cell)
            except (ValueError, TypeError, KeyError, AttributeError, Error) as e:
                raise Error(
                    f"{self._log_path} line {number}: not a trial ({e})",
                    f"delete that line; its trial is run again by testbed run --resume {self.path}",
                ) from e
            trials.append(trial)
        return trials

    def raw(self) -> bytes:
        """Content of trials.jsonl, decompressed if the campaign is archived."""
        kept = self.path / "trials.jsonl.gz"
        if not kept.exists():
            with _explained(self._log_path):
                return self._log_path.read_bytes()
        with _explained(kept):
            try:
                return gzip.decompress(kept.read_bytes())
            except (EOFError, zlib.error) as e:
                raise Error(f"{kept}: {e}", "fetch or copy it again") from e

    def digest(self) -> str:
        """SHA-256 of the files that are not derived. Derived files name it as their source."""
        parts = [(self.path / "campaign.json").read_bytes(), self.raw()]
        conformance = self.path / "conformance.json"
        parts += [conformance.read_bytes()] if conformance.exists() else []
        return "sha256:" + hashlib.sha256(b"\n".join(parts)).hexdigest()

    def done(self) -> set[tuple[str, int]]:
        """(cell id, block) of trials that need not be run again. Failed trials are run again."""
        return {(t.cell, t.block) for t in self.trials() if t.status is not Status.FAILED}

    def console(self, name: str) -> Path:
        """File of a guest's serial console."""
        return self.path / "consoles" / f"{name}.log"

    def write_host(self, name: str, facts: Mapping[str, Any]) -> None:
        """Write facts of a host of the campaign to hosts/."""
        with _explained(self.path / "hosts"):
            (self.path / "hosts").mkdir(exist_ok=True)
        with _replacing(self.path / "hosts" / f"{name}.json") as beside:
            beside.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")

    def derive(self) -> list[Path]:
        """Rewrite the tables from trials.jsonl; returns their files."""
        trials = self.trials()
        table, histogram = frame(trials), histograms(trials)
        written = []
        for name, write in (
            ("trials.parquet", partial(table.to_parquet, compression="zstd")),
            ("trials.csv", table.to_csv),
            ("histogram.parquet", partial(histogram.to_parquet, compression="zstd")),
        ):
            with _replacing(self.path / name) as beside:
                write(beside, index=False)
            written.append(self.path / name)
        return written

    def close(self) -> None:
        """Release the lock, if this store has one."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _log_path(self) -> Path:
        return self.path / "trials.jsonl"


def directory(plan: str, now: datetime | None = None) -> Path:
    """Default directory of a campaign: `results/<UTC time>-<plan>`."""
    return Path("results") / f"{(now or datetime.now(UTC)).astimezone(UTC):%Y%m%dT%H%M%SZ}-{plan}"


def create(path: Path, campaign: Campaign) -> Store:
    """Create a campaign at `path`, open for appending. Raises `Error` if there is one already."""
    with _explained(path):
        (path / "consoles").mkdir(parents=True, exist_ok=True)
    log = _lock(path)
    try:
        if (path / "campaign.json").exists():
            raise Error(
                f"{path}: there is a campaign already", f"continue it: testbed run --resume {path}"
            )
        with _replacing(path / "campaign.json") as beside:
            text = json.dumps({"format": FORMAT, **asdict(campaign)}, indent=1, ensure_ascii=False)
            beside.write_text(text + "\n")
    except BaseException:
        log.close()
        raise
    return Store(path, campaign, log)


def resume(path: Path) -> Store:
    """Open the campaign at `path` for appending. An incomplete last line is cut off."""
    campaign = open(path).campaign
    if (path / "trials.jsonl.gz").exists():
        raise Error(f"{path}: kept for reference, so it is finished", "start another")
    log = _lock(path)
    with _explained(path):
        text = (path / "trials.jsonl").read_bytes()
        os.ftruncate(log.fileno(), text.rfind(b"\n") + 1)
    return Store(path, campaign, log)


def open(path: Path) -> Store:
    """Open the campaign at `path` for reading. Raises `Error` if it is missing or unreadable."""
    file = path / "campaign.json"
    if not file.exists():
        raise Error(f"{path}: no campaign there (no campaign.json)", "campaigns are in results/")
    with _explained(file):
        text = file.read_text()
    try:
        data = json.loads(text)
        if (found := data.pop("format")) != FORMAT:
            raise Error(f"{file}: format {found}, and this testbed reads format {FORMAT}")
        data["cells"] = tuple(data["cells"])
        return Store(path, Campaign(**data))
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise Error(f"{file}: not a campaign ({e})") from e


def counted(log: Iterable[Trial]) -> list[Trial]:
    """The trials that count: one for each cell and block, in the order of blocks.

    If there are several, the last one that is ok and undisturbed counts, else the least disturbed
    one that is ok, else the last one.
    """
    kept: dict[tuple[str, int], Trial] = {}
    for trial in log:
        key = (trial.cell, trial.block)
        if key not in kept or _worth(trial) >= _worth(kept[key]):
            kept[key] = trial
    return sorted(kept.values(), key=lambda t: (t.block, t.order))


def frame(trials: Sequence[Trial]) -> pd.DataFrame:
    """Tidy table of trials: one row per trial.

    Columns: the cell's fields; block, order, status, reason; value in the metric's unit; p50_us and
    p99_us of the trial's histogram (NaN without one), or as it has them among its quantities, whose
    names are columns; loss, for trials with a rate search; the other fields of the trial.
    Dictionaries become columns such as `carried.packets`.
    """
    rows = []
    for trial in trials:
        row = {**vars(Cell.parse(trial.cell)), **vars(trial)}
        histogram, searched = row.pop("histogram_us"), row.pop("searched")
        row["loss"] = searched[-1][2] if searched else nan
        row["p50_us"], row["p99_us"] = percentile(histogram, 50), percentile(histogram, 99)
        row |= row.pop("quantities")
        for name in ("parts", "carried", "counters", "machine"):
            row.update({f"{name}.{key}": value for key, value in row.pop(name).items()})
        rows.append({k: str(v) if isinstance(v, str) else v for k, v in row.items()})
    table = pd.DataFrame(rows)
    table = table.reindex(columns=[*_COLUMNS, *sorted(set(table.columns) - set(_COLUMNS))])
    return table.astype({"value": float, "p50_us": float, "p99_us": float, "duration_s": float})


_COLUMNS = (
    "datapath",
    "pair",
    "family",
    "transport",
    "metric",
    "size_bytes",
    "streams",
    "rate_per_s",
    "guest",
    "guests",
    "pods",
    "application",
    "cell",
    "block",
    "order",
    "status",
    "reason",
    "value",
    "p50_us",
    "p99_us",
    "memory_bytes",
    "duration_s",
    "payload_bytes",
    "transactions",
    "errors",
    "unanswered",
    "unsent",
    "limited",
    "loss",
    "dialed",
    "started",
)


def histograms(trials: Sequence[Trial]) -> pd.DataFrame:
    """Long table of histograms, one row per bucket of each trial that is ok.

    Columns: cell, block, upper_us, count.
    """
    rows = [
        (trial.cell, trial.block, upper_us, count)
        for trial in trials
        if trial.status is Status.OK
        for upper_us, count in trial.histogram_us
    ]
    return pd.DataFrame(rows, columns=["cell", "block", "upper_us", "count"])


def _worth(trial: Trial) -> tuple[int, float]:
    """Sort key of the trials of one cell and block: of two that are disturbed, the one from which
    less of the CPUs' time was taken, by others or by a hypervisor, is worth more.
    """
    if trial.status is not Status.OK:
        return 0, 0.0
    if not trial.disturbed:
        return 2, 0.0
    machine = trial.machine
    taken_s = machine.get("steal_s", 0.0) + machine.get("others_s", 0.0)
    return 1, -taken_s / machine.get("elapsed_s", 1.0)


def _lock(path: Path) -> BinaryIO:
    """Open trials.jsonl for appending and lock it (flock(2)) as long as it is open."""
    with _explained(path):
        log = (path / "trials.jsonl").open("ab", buffering=0)
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        log.close()
        raise Error(f"{path}: another process is writing this campaign", "wait for it") from e
    return log


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which replaces `path` if the block raises nothing."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with _explained(path):
            yield beside
            with beside.open("rb") as written:
                os.fsync(written.fileno())
            beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def _explained(path: Path, resume: Path | None = None) -> Iterator[None]:
    """Turns an OSError into an `Error` about `path`."""
    try:
        yield
    except OSError as e:
        hint = f"then go on with testbed run --resume {resume}" if resume else None
        raise Error(f"{path}: {e.strerror or e}", hint) from e
