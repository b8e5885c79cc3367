"""Datapaths: ways of making `localhost` work in a pod. One module each, found by its name.

A datapath gets the finished links as plain data (`Wiring`), and attaches itself to them; it never
makes links between pod and guests. To add one: a module here whose `DATAPATH` is an
`interface.Datapath`, and at most one file in `bpf/`. Another distribution adds one by an entry
point of group `testbed.datapaths`, which has its name and refers to its `DATAPATH`.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module, metadata
from pkgutil import iter_modules

from testbed.datapaths.interface import Datapath
from testbed.model.errors import Error

SHARED = {"interface", "link_counters", "between_hosts", "ebpf"}
"""Modules here that are not datapaths."""


def get(name: str) -> Datapath:
    """The datapath of a name, of which a variant (`~…`) is ignored. Raises `Error` without one."""
    name = name.partition("~")[0]
    if name in _own():
        found = import_module(f"{__name__}.{name}").DATAPATH
    elif entries := metadata.entry_points(group=__name__, name=name):
        [entry] = entries
        found = entry.load()
    else:
        raise Error(f"no datapath {name!r}", hint=f"choose from {', '.join(_known())}")
    assert isinstance(found, Datapath)
    return found


def names() -> list[str]:
    """Names of all datapaths, in the order of rows in tables and bars in figures."""
    return sorted(_known(), key=lambda name: get(name).look.rank)


def reference(name: str) -> str:
    """Name of the datapath whose cells are the divisor; of a variant it is the datapath itself."""
    base, variant, _ = name.partition("~")
    return base if variant else get(name).reference


@cache
def _own() -> frozenset[str]:
    return frozenset(module.name for module in iter_modules(__path__)) - SHARED


def _known() -> list[str]:
    return sorted(_own() | metadata.entry_points(group=__name__).names)
