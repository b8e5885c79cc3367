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
from dataclasses import dataclass, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from testbed.model import Cell, Error, Family, Metric, Pair, Transport

Choice = TypeVar("Choice", bound=StrEnum)

FOLDER = Path(__file__).resolve().parent.parent / "experiments"

MAX_UDP_BYTES = 65507
"""Largest UDP payload in an IPv4 packet: 65535 - 20 (RFC 791) - 8 (RFC 768)."""


@dataclass(frozen=True)
class Plan:
    """A plan multiplied out. `warmup_s` precedes each trial of `duration_s`."""

    name: str
    blocks: int
    warmup_s: float
    duration_s: float
    cells: tuple[Cell, ...]

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
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    try:
        text = path.read_text()
    except OSError as e:
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.toml")))
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
    _only(table, ("name", "blocks", "warmup_s", "duration_s", "cells"), where)
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
        cells=tuple(cells),
    )


def _multiply(group: Mapping[str, Any], where: str) -> Iterable[Cell]:
    """The product of a `[[cells]]` table's lists; a single value is a list of one."""
    lists = {key: value if isinstance(value, list) else [value] for key, value in group.items()}
    lists.setdefault("streams", [1])
    names = ("datapath", "pair", "family", "transport", "metric", "size_bytes", "streams")
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
            datapath=_word(one, "datapath", where),
            pair=_choice(one, "pair", Pair, where),
            family=_choice(one, "family", Family, where),
            transport=_choice(one, "transport", Transport, where),
            metric=_choice(one, "metric", Metric, where),
            size_bytes=_integer(one, "size_bytes", where),
            streams=_integer(one, "streams", where),
        )
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


def _integer(table: Mapping[str, Any], key: str, where: str) -> int:
    value = table.get(key)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise _wrong(where, key, value, "an integer of at least 1")


def _seconds(table: Mapping[str, Any], key: str, where: str, least: float) -> float:
    value = table.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= 3600:
        return float(value)
    raise _wrong(where, key, value, f"seconds from {least:g} to 3600")


def _choice(table: Mapping[str, Any], key: str, kind: type[Choice], where: str) -> Choice:
    value = table.get(key)
    try:
        return kind(str(value))
    except ValueError:
        raise _wrong(where, key, value, f"one of {', '.join(kind)}") from None
