"""Plans: which cells an experiment has, how often, and for how long each is measured.

A plan is a TOML file under `experiments/`: `name`, `blocks`, `warmup_s`, `duration_s` and tables
`[[cells]]`, whose lists are multiplied with one another. This module reads and checks the file and
multiplies it out, always in the same order; it does not know which datapaths exist, what they can
carry, nor how to run anything. The random order within a block is the campaign's affair.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from itertools import product
from math import inf
from pathlib import Path
from typing import Any, TypeVar

from testbed import paths
from testbed.model.addresses import MAX_GUESTS
from testbed.model.cells import AGAIN, SLOW, Cell, Metric, Pair
from testbed.model.errors import Error
from testbed.model.terms import Family, Runtime, Transport

Choice = TypeVar("Choice", bound=StrEnum)


MAX_PODS = 200
"""Datapaths made of eBPF have 255 slots for pods on a host, and other cells need some."""
MAX_UDP_BYTES = 65507
"""Largest UDP payload in an IPv4 packet: 65535 - 20 (RFC 791) - 8 (RFC 768)."""


CPU_QUANTITY = "cpu"
QUANTITIES = ("value", "p50_us", "p99_us", CPU_QUANTITY)
"""What a claim may be about: columns of the tidy table, and what the host spends on the traffic."""


@dataclass(frozen=True)
class Claim:
    """What a plan claims of a ratio: see `testbed.reports.claims`."""

    text: str
    cells: str
    """Glob of the ids of those that are divided."""
    quantity: str = "value"
    to: Mapping[str, Any] = field(default_factory=dict)
    """What the divisor has otherwise, by fields of `Cell`; empty: the reference datapath."""
    at_least: float | None = None
    at_most: float | None = None


@dataclass(frozen=True)
class Plan:
    """A plan multiplied out. `warmup_s` precedes each trial of `duration_s`."""

    name: str
    blocks: int
    """How many at least."""
    warmup_s: float
    duration_s: float
    cells: tuple[Cell, ...]
    target_width: float | None = None
    """Blocks are added until no ratio's interval reaches further from its mean than this share."""
    limit_s: float = 0.0
    """No block is begun that would likely end later than this after the start."""
    claims: tuple[Claim, ...] = ()
    """About those cells that are among `cells`."""

    def select(self, globs: Sequence[str]) -> Plan:
        """The same plan with only those cells whose id matches one of `globs` (`*` spans slashes).

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


def load(name: str) -> Plan:
    """The plan of that name in `experiments/`, or in the TOML file at that path.

    Raises `Error` that names file, key and what was expected there.
    """
    path = Path(name) if name.endswith(".toml") else paths.EXPERIMENTS / f"{name}.toml"
    try:
        text = path.read_text()
    except OSError as e:
        known = ", ".join(sorted(p.stem for p in paths.EXPERIMENTS.glob("*.toml")))
        raise Error(f"plan {path}: {e.strerror}", f"plans here: {known}") from e
    except UnicodeDecodeError as e:
        raise Error(f"plan {path}: not text ({e.reason} at byte {e.start})") from e
    return parse(text, str(path))


def parse(text: str, where: str) -> Plan:
    """The plan that stands in `text`; `where` is what errors call it."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise Error(f"plan {where}: not TOML: {e}") from e
    if ("target_width" in table) != ("limit_s" in table):
        raise Error(
            f"plan {where}: target_width and limit_s: one without the other",
            "give both, or leave out both",
        )
    keys = (
        "name",
        "blocks",
        "warmup_s",
        "duration_s",
        "target_width",
        "limit_s",
        "cells",
        "claims",
    )
    _only(table, keys, where)
    groups = table.get("cells")
    if not (isinstance(groups, list) and groups and all(isinstance(g, dict) for g in groups)):
        raise _wrong(where, "cells", groups, "one or more [[cells]] tables")
    cells = [c for n, g in enumerate(groups, 1) for c in _multiply(g, f"{where}: [[cells]] {n}")]
    for cell in cells:
        if cells.count(cell) > 1:
            raise Error(f"plan {where}: cell {cell.id} stands there twice", "leave one out")
    return Plan(
        name=_word(table, "name", where),
        blocks=_integer(table, "blocks", where),
        warmup_s=_seconds(table, "warmup_s", where, least=0.0),
        duration_s=_seconds(table, "duration_s", where, least=0.1),
        target_width=_share(table, "target_width", where) if "target_width" in table else None,
        limit_s=_seconds(table, "limit_s", where, least=1, most=86400) if "limit_s" in table else 0,
        cells=tuple(cells),
        claims=tuple(
            _claim(claim, cells, f"{where}: [[claims]] {n}")
            for n, claim in enumerate(table.get("claims", ()), 1)
        ),
    )


def _claim(table: Mapping[str, Any], cells: Sequence[Cell], where: str) -> Claim:
    """A `[[claims]]` table; its cells and their divisors have to be in the plan."""
    _only(table, [field.name for field in fields(Claim)], where)
    claim = Claim(**{"text": "", "cells": "", **table})
    if not (isinstance(claim.text, str) and claim.text):
        raise _wrong(where, "text", table.get("text"), "what is claimed, in words")
    if claim.quantity not in QUANTITIES:
        raise _wrong(where, "quantity", claim.quantity, f"one of {', '.join(QUANTITIES)}")
    for key in ("at_least", "at_most"):
        if not isinstance(table.get(key, 1.0), int | float):
            raise _wrong(where, key, table[key], "a number")
    about = [cell for cell in cells if fnmatchcase(cell.id, str(claim.cells))]
    if not about:
        raise _wrong(where, "cells", claim.cells, "a glob of ids that some cell of the plan has")
    if claim.to:
        try:
            known = any(replace(cell, **claim.to) in cells for cell in about)
        except TypeError:
            known = False
        if not known:
            raise _wrong(where, "to", claim.to, "what a cell of the plan has in that place")
    return claim


_USUAL: dict[str, list[Any]] = {
    "streams": [1],
    "rate_per_s": [0],
    "guest": [""],
    "guests": [1],
    "pods": [1],
}


def _multiply(group: Mapping[str, Any], where: str) -> Iterable[Cell]:
    """The product of a `[[cells]]` table's lists; a single value is a list of one."""
    lists = {key: value if isinstance(value, list) else [value] for key, value in group.items()}
    lists = _USUAL | lists
    names = (
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
    )
    _only(lists, names, where)
    for key in names:
        values = lists.get(key)
        if not values:
            raise _wrong(where, key, values, "at least one value")
        if len(values) != len({str(v) for v in values}):
            raise _wrong(where, key, values, "each value once")
    for combination in product(*(lists[key] for key in names)):
        one = dict(zip(names, combination, strict=True))
        cell = Cell(
            datapath=_datapath(one, where),
            pair=_choice(one, "pair", Pair, where),
            family=_choice(one, "family", Family, where),
            transport=_choice(one, "transport", Transport, where),
            metric=_choice(one, "metric", Metric, where),
            size_bytes=_integer(one, "size_bytes", where),
            streams=_integer(one, "streams", where),
            rate_per_s=_integer(one, "rate_per_s", where, least=0),
            guest=_guest(one, where),
            guests=_integer(one, "guests", where, most=MAX_GUESTS),
            pods=_integer(one, "pods", where, most=MAX_PODS),
        )
        if cell.guests > 1 and cell.pair not in (Pair.NATIVE_GUEST, Pair.GUEST_NATIVE):
            raise _wrong(where, "pair", str(cell.pair), "native-guest or guest-native with guests")
        if cell.rate_per_s and cell.metric is not Metric.LATENCY:
            raise _wrong(where, "metric", str(cell.metric), "latency with a rate_per_s")
        if cell.transport is Transport.UDP and cell.size_bytes > MAX_UDP_BYTES:
            raise _wrong(where, "size_bytes", cell.size_bytes, f"at most {MAX_UDP_BYTES} with udp")
        if cell.transport is Transport.UDP and cell.metric is Metric.CONNECTIONS:
            raise _wrong(where, "transport", "udp", "tcp with metric connections")
        yield cell


def _wrong(where: str, key: str, value: object, expected: str) -> Error:
    found = "nothing" if value is None else repr(value)
    return Error(f"plan {where}: {key}: expected {expected}, found {found}")


def _only(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise Error(f"plan {where}: {key}: no such key", f"keys are {', '.join(known)}")


def _word(table: Mapping[str, Any], key: str, where: str) -> str:
    value = table.get(key)
    if isinstance(value, str) and re.fullmatch(r"[a-z0-9][a-z0-9_-]*", value):
        return value
    raise _wrong(where, key, value, "a word of lower-case letters, digits, - and _")


def _datapath(table: Mapping[str, Any], where: str) -> str:
    """A word, or with the variant of a control."""
    name, tilde, variant = str(table.get("datapath")).partition("~")
    if tilde and variant not in (AGAIN, SLOW):
        raise _wrong(where, "datapath", table.get("datapath"), f"{name}~{AGAIN} or {name}~{SLOW}")
    return _word({"datapath": name}, "datapath", where) + tilde + variant


def _guest(table: Mapping[str, Any], where: str) -> str:
    known = ["", *(runtime for runtime in Runtime if runtime.is_guest)]
    if table["guest"] in known:
        return str(table["guest"])
    raise _wrong(where, "guest", table["guest"], f"one of {', '.join(known[1:])}")


def _integer(
    table: Mapping[str, Any], key: str, where: str, least: int = 1, most: float = inf
) -> int:
    value = table.get(key)
    if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
        return value
    limit = f" and at most {most}" if most < inf else ""
    raise _wrong(where, key, value, f"an integer of at least {least}{limit}")


def _seconds(
    table: Mapping[str, Any], key: str, where: str, least: float, most: float = 3600
) -> float:
    value = table.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most:
        return float(value)
    raise _wrong(where, key, value, f"seconds from {least:g} to {most:g}")


def _share(table: Mapping[str, Any], key: str, where: str) -> float:
    value = table.get(key)
    if isinstance(value, float) and 0 < value < 1:
        return value
    raise _wrong(where, key, value, "a share between 0 and 1")


def _choice(table: Mapping[str, Any], key: str, kind: type[Choice], where: str) -> Choice:
    value = table.get(key)
    try:
        return kind(str(value))
    except ValueError:
        raise _wrong(where, key, value, f"one of {', '.join(kind)}") from None
