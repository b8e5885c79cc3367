"""Ways of making `localhost` work in a pod: one file each, found by its name.

A datapath is told the finished wiring as plain data and attaches itself; it never builds links. To
add one: a module here whose `DATAPATH` is an `interface.Datapath`, and at most one file in `bpf/`.
Another distribution adds one by an entry point of group `testbed.datapaths`: its name, and where
its `DATAPATH` is.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module, metadata
from pkgutil import iter_modules

from testbed.datapaths.interface import Datapath
from testbed.model.errors import Error

SHARED = {"interface", "link_counters", "between_hosts", "ebpf"}
"""Modules here that are no datapath."""


def get(name: str) -> Datapath:
    """The datapath of that name, whichever variant. Raises `Error` if there is none."""
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
    """Of all datapaths, in the order of rows and bars."""
    return sorted(_known(), key=lambda name: get(name).look.rank)


def reference(name: str) -> str:
    """What a datapath's cells are divided by; those of a variant, by the datapath itself."""
    base, variant, _ = name.partition("~")
    return base if variant else get(name).reference


@cache
def _own() -> frozenset[str]:
    return frozenset(module.name for module in iter_modules(__path__)) - SHARED


def _known() -> list[str]:
    return sorted(_own() | metadata.entry_points(group=__name__).names)
