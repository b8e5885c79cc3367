"""Ways of making `localhost` work in a pod: one file each, all with the interface below.

A datapath is told the finished wiring as plain data and attaches itself; it never builds links.
To add one: a module here with a `DATAPATH` that satisfies `Datapath`, at most one file in `bpf/`,
and its name in `NAMES`.
"""

from __future__ import annotations

from importlib import import_module
from typing import cast

from testbed.datapaths.interface import Datapath
from testbed.model.errors import Error

NAMES = (
    "loopback",
    "direct",
    "bridge",
    "capture",
    "steer",
    "dnat",
    "proxy",
    "tcredirect",
    "broadcast",
    "passt",
    "tun",
    "routed",
)


def reference(name: str) -> str:
    """What a datapath's cells are divided by; those of a variant, by the datapath itself."""
    base, variant, _ = name.partition("~")
    return base if variant else get(name).reference


def get(name: str) -> Datapath:
    """The datapath of that name, whichever variant. Raises `Error` if there is none."""
    name = name.partition("~")[0]
    if name not in NAMES:
        raise Error(f"no datapath {name!r}", hint=f"choose from {', '.join(NAMES)}")
    return cast(Datapath, import_module(f"{__name__}.{name}").DATAPATH)
