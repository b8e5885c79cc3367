"""Experiment plans: which cells are measured, how often, and for how long each.

A plan is a TOML file in `experiments/`: `name`, `blocks`, `warmup_s`, `duration_s` and tables
`[[cells]]`. The lists of a `[[cells]]` table are multiplied with one another. This module reads and
checks the file and multiplies it out, always in the same order. It does not know which datapaths
exist, what they support, or how to run anything. `campaigns.schedule` makes the random order within
a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from testbed import application, paths, schema
from testbed.application import Application
from testbed.model.addresses import MAX_GUESTS
from testbed.model.cells import AGAIN, SLOW_US, Cell, Pair
from testbed.model.errors import Error
from testbed.model.metrics import CPU_QUANTITY, Metric
from testbed.model.terms import Family, Runtime, Transport
from testbed.schema import Table

MAX_PODS = 200
"""Largest number of pods of a cell: eBPF datapaths have 255 slots for pods on a host, and other
cells need some of them."""
MAX_UDP_BYTES = 65507
"""Largest UDP payload in an IPv4 packet: 65535 - 20 (RFC 791) - 8 (RFC 768)."""
QUANTITIES = ("value", "p50_us", "p99_us", "memory_bytes", CPU_QUANTITY)
"""Quantities that a claim can be about: columns of the tidy table, and the host's CPU time."""


class Estimator(StrEnum):
    """How a claim's ratio is estimated over blocks."""

    SIGNED_RANK = "signed-rank"
    """`results.statistics.pseudomedian`"""
    T = "t"
    """`results.statistics.estimate`"""

    @property
    def other(self) -> Estimator:
        """The estimator that does not decide then."""
        return next(each for each in Estimator if each is not self)


@dataclass(frozen=True)
class Claim:
    """A claim of a plan about a ratio of two cells; `testbed.reports.claims` judges it."""

    text: str
    cells: str
    """Glob of the ids of the cells that are divided."""
    quantity: str = "value"
    to: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Cell` in which the divisor differs. Empty: divide by the reference datapath."""
    at_least: float | None = None
    at_most: float | None = None

    @property
    def bounded(self) -> bool:
        """Whether the claim has a bound; else it only states the ratio."""
        return self.at_least is not None or self.at_most is not None


@dataclass(frozen=True)
class Preregistration:
    """What is laid down about the claims of a plan before there are data to judge them by."""

    estimator: Estimator
    seed: int
    """Seed of the campaign's random order."""
    revision: str
    """Git revision of the tree that the claims are about. That of the campaign is a later one, as
    the plan is committed after it."""
    blocks: int
    """Number of blocks: that of the plan's file."""
    cells: int
    """Number of cells: that of the plan's file. Some are the controls."""


@dataclass(frozen=True)
class Plan:
    """A plan, multiplied out into cells. `warmup_s` precedes each trial of `duration_s`."""

    name: str
    blocks: int
    """Number of blocks; the minimum if there is a `target_width`."""
    warmup_s: float
    duration_s: float
    cells: tuple[Cell, ...]
    target_width: float | None = None
    """Blocks are added until no interval of a ratio reaches further from its mean than this share
    of the mean."""
    limit_s: float = 0.0
    """No block is started that would probably end later than this, counted from the start."""
    claims: tuple[Claim, ...] = ()
    """Claims about cells; those that are not in `cells` are ignored."""
    preregistration: Preregistration | None = None
    """None: no claim has a bound."""
    applications: Mapping[str, Application] = field(default_factory=dict)
    """Applications by the names that cells have for them."""
    sha256: str = ""
    """Digest of the plan's file."""

    def select(self, globs: Sequence[str]) -> Plan:
        """The plan with only those cells whose id matches one of `globs` (`*` also matches `/`).

        Raises `Error` for a glob that matches no cell.
        """
        for glob in globs:
            if not any(fnmatchcase(cell.id, glob) for cell in self.cells):
                raise Error(
                    f"no cell of plan {self.name} matches {glob!r}",
                    f"cells look like {self.cells[0].id}",
                )
        chosen = (c for c in self.cells if any(fnmatchcase(c.id, glob) for glob in globs))
        return replace(self, cells=tuple(chosen))


class _Plan(Table):
    """Schema of a plan file."""

    name: str = schema.word()
    blocks: int = schema.integer(1)
    warmup_s: float = schema.seconds(0)
    duration_s: float = schema.seconds(0.1)
    target_width: float | None = Field(None, gt=0, lt=1, description="a share between 0 and 1")
    limit_s: float = schema.seconds(1, 86400, 0.0)
    cells: list[dict[str, Any]]
    claims: list[dict[str, Any]] = Field([], description="[[claims]] tables")
    preregistration: dict[str, Any] = Field({}, description="a table [preregistration]")


class _Preregistration(Table):
    """Schema of the table `[preregistration]`, which a plan needs whose claims have bounds."""

    estimator: Estimator = schema.one_of(Estimator)
    seed: int = Field(description="an integer")
    revision: str = Field(
        pattern="^[0-9a-f]{7,40}$", description="the git revision that the claims are about"
    )


class _Claim(Table):
    """Schema of a `[[claims]]` table."""

    text: str = Field(min_length=1, description="what is claimed, in words")
    cells: str = Field(description="a glob of ids that some cell of the plan has")
    quantity: str = Field(
        "value",
        pattern=f"^({'|'.join(QUANTITIES)})$",
        description=f"one of {', '.join(QUANTITIES)}",
    )
    to: dict[str, Any] = Field({}, description="what a cell of the plan has in that place")
    at_least: float | None = Field(None, description="a number")
    at_most: float | None = Field(None, description="a number")


class _Cell(Table):
    """Schema of one cell of a `[[cells]]` table."""

    datapath: str = Field(
        pattern=rf"^[a-z0-9][a-z0-9_-]*(~({'|'.join((AGAIN, *SLOW_US))}))?$",
        description="a word of lower-case letters, digits, - and _; as a control, with a variant: "
        + ", ".join(f"capture~{variant}" for variant in (AGAIN, *SLOW_US)),
    )
    pair: Pair = schema.one_of(Pair)
    family: Family = schema.one_of(Family)
    transport: Transport = schema.one_of(Transport)
    metric: Metric = schema.one_of(Metric)
    size_bytes: int = schema.integer(1, default=0)
    streams: int = schema.integer(1, default=1)
    rate_per_s: int = schema.integer(0, default=0)
    guest: str = Field("", description=f"one of {', '.join(r for r in Runtime if r.boots)}")
    guests: int = schema.integer(1, MAX_GUESTS, 1)
    pods: int = schema.integer(1, MAX_PODS, 1)
    application: str = Field(
        "",
        pattern="^([a-z0-9_-]+([.][a-z0-9_-]+)?)?$",
        description="the name of an application, and of its case after a dot",
    )

    @field_validator("guest")
    @classmethod
    def _is_guest(cls, value: str) -> str:
        assert not value or Runtime(value).boots
        return value


def load(name: str) -> Plan:
    """Read a plan, by its name in `experiments/` or by the path of a TOML file.

    Raises an `Error` that names the file, the key and what was expected.
    """
    path = Path(name) if name.endswith(".toml") else paths.EXPERIMENTS / f"{name}.toml"
    stems = sorted(file.stem for file in paths.EXPERIMENTS.glob("*.toml"))
    known = ", ".join(stem for stem in stems if "." not in stem)  # hosts.example.toml is none
    return parse(schema.text(path, "plan", f"plans here: {known}"), str(path), path.parent)


def parse(text: str, where: str, folder: Path = paths.EXPERIMENTS) -> Plan:
    """Parse the TOML text of a plan. Errors call the plan `where`.

    Its applications are looked for in `folder`, then in this clone's `experiments/`.
    """
    plan = _plan(schema.parse(text, f"plan {where}"), f"plan {where}")
    named = dict.fromkeys(cell.application for cell in plan.cells if cell.application)
    applications = {name: application.load(name, (folder, paths.EXPERIMENTS)) for name in named}
    for cell in plan.cells:
        if cell.application:
            _check_told(cell, applications[cell.application], f"plan {where}: cell {cell.id}")
    digest = sha256(text.encode()).hexdigest()
    return replace(plan, sha256=digest, applications=applications)


def claims_of(stored: Mapping[str, Any]) -> tuple[Claim, ...]:
    """Claims that a campaign stored of its plan (`Campaign.plan`)."""
    return tuple(Claim(**claim) for claim in stored.get("claims", ()))


def applications_of(stored: Mapping[str, Any]) -> dict[str, Application]:
    """Applications that a campaign stored of its plan."""
    found = stored.get("applications", {})
    return {name: Application.model_validate(data) for name, data in found.items()}


def preregistration_of(stored: Mapping[str, Any]) -> Preregistration | None:
    """What a campaign stored of its plan's preregistration; None if there was none."""
    given = stored.get("preregistration")
    if not given:
        return None
    return Preregistration(**{**given, "estimator": Estimator(given["estimator"])})


def _plan(table: Mapping[str, Any], where: str) -> Plan:
    groups = schema.tables(table, "cells", where)
    given = schema.read(_Plan, table, where)
    if ("target_width" in table) != ("limit_s" in table):
        raise Error(
            f"{where}: target_width and limit_s: one without the other",
            "give both, or leave out both",
        )
    if given.preregistration and given.target_width:
        raise Error(
            f"{where}: target_width and [preregistration], which lays down the number of blocks",
            "leave out one of them",
        )
    cells = [c for n, g in enumerate(groups, 1) for c in _multiply(g, f"{where}: [[cells]] {n}")]
    for cell in cells:
        if cells.count(cell) > 1:
            raise Error(f"{where}: cell {cell.id} stands there twice", "leave one out")
    claims = tuple(
        _claim(claim, cells, f"{where}: [[claims]] {n}") for n, claim in enumerate(given.claims, 1)
    )
    preregistration = None
    if given.preregistration or any(claim.bounded for claim in claims):
        title = f"{where}: [preregistration], which claims with bounds need"
        read = dict(schema.read(_Preregistration, given.preregistration, title))
        preregistration = Preregistration(**read, blocks=given.blocks, cells=len(cells))
    values = {"cells": tuple(cells), "claims": claims, "preregistration": preregistration}
    return Plan(**{**dict(given), **values})


def _claim(table: Mapping[str, Any], cells: Sequence[Cell], where: str) -> Claim:
    """Parse a `[[claims]]` table. Its cells and their divisors must be in the plan."""
    claim = Claim(**dict(schema.read(_Claim, table, where)))
    about = [cell for cell in cells if fnmatchcase(cell.id, claim.cells)]
    if not about:
        expected = "a glob of ids that some cell of the plan has"
        raise schema.wrong(where, "cells", claim.cells, expected)
    if claim.to:
        try:
            known = any(replace(cell, **claim.to) in cells for cell in about)
        except TypeError:
            known = False
        if not known:
            expected = "what a cell of the plan has in that place"
            raise schema.wrong(where, "to", claim.to, expected)
    return claim


def _multiply(group: Mapping[str, Any], where: str) -> Iterable[Cell]:
    """Cartesian product of the lists of a `[[cells]]` table; a single value is a list of one."""
    lists = {key: value if isinstance(value, list) else [value] for key, value in group.items()}
    for key, values in lists.items():
        if not values:
            raise schema.wrong(where, key, values, "at least one value")
        if len(values) != len({str(v) for v in values}):
            raise schema.wrong(where, key, values, "each value once")
    order = [*_Cell.model_fields, *lists]
    names = sorted(lists, key=order.index)
    for combination in product(*(lists[name] for name in names)):
        cell = Cell(**dict(schema.read(_Cell, dict(zip(names, combination, strict=True)), where)))
        if cell.guests > 1 and cell.pair not in (Pair.NATIVE_GUEST, Pair.GUEST_NATIVE):
            expected = "native-guest or guest-native with guests"
            raise schema.wrong(where, "pair", str(cell.pair), expected)
        _check_application(cell, where)
        if cell.rate_per_s and cell.metric not in (Metric.LATENCY, Metric.REQUESTS):
            expected = "latency or requests with a rate_per_s"
            raise schema.wrong(where, "metric", str(cell.metric), expected)
        if cell.transport is Transport.UDP and cell.size_bytes > MAX_UDP_BYTES:
            expected = f"at most {MAX_UDP_BYTES} with udp"
            raise schema.wrong(where, "size_bytes", cell.size_bytes, expected)
        if cell.transport is Transport.UDP and cell.metric is Metric.CONNECTIONS:
            raise schema.wrong(where, "transport", "udp", "tcp with metric connections")
        yield cell


def _check_application(cell: Cell, where: str) -> None:
    """Raises `Error` for what only cells with an application can be, or cannot be."""
    if cell.metric is not Metric.REQUESTS:
        if cell.application:
            raise schema.wrong(where, "metric", str(cell.metric), "requests with an application")
        if not cell.size_bytes:
            raise schema.wrong(where, "size_bytes", None, "an integer of at least 1")
        return
    if not cell.application:
        raise schema.wrong(where, "application", None, "an application with metric requests")
    if cell.transport is not Transport.TCP:
        raise schema.wrong(where, "transport", str(cell.transport), "tcp with an application")
    if cell.guests > 1 or cell.pods > 1:
        raise Error(f"{where}: an application runs in one pod with one guest", "leave out the rest")
    if cell.variant in SLOW_US:
        raise schema.wrong(where, "datapath", cell.datapath, f"~{AGAIN} at most: no server waits")


def _check_told(cell: Cell, told: Application, where: str) -> None:
    """Raises `Error` for a parameter of the cell that its client is not told, or has to be."""
    takes = application.takes(told)
    for name, default in (("size_bytes", 0), ("streams", 1), ("rate_per_s", 0)):
        is_given = getattr(cell, name) != default
        if is_given and name not in takes:
            raise Error(f"{where}: {cell.application} takes no {name}", "leave it out")
        if name in takes and not is_given and not default:
            raise Error(f"{where}: {cell.application} needs a {name}", "give the cell one")
