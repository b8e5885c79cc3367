"""What runs a workload: one file each, never importing each other.

A runtime is prepared once (images composed, kernels found), then starts any number of workloads.
Each is a module here with `prepare`, or that of an entry point of group `testbed.runtimes`
(`model.terms.Runtime`).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module, metadata
from typing import cast

from testbed.model.terms import Runtime
from testbed.runtimes.interface import Absent, Options, Prepared


def prepare(runtime: Runtime, options: Options) -> Prepared:
    """Make a runtime ready. Raises `Error` with what to type if something is missing."""
    if others := metadata.entry_points(group=__name__, name=str(runtime)):
        [entry] = others
        prepare = entry.load()
    else:
        prepare = import_module(f"{__name__}.{runtime}").prepare
    return cast(Callable[[Options], Prepared], prepare)(options)


def choose(name: str, options: Options) -> tuple[Prepared, str]:
    """The runtime of that name, or for `best` the first of OSv, Linux and stand-in that is there.

    Second value: why it is not a better one, in a line; empty if it is the best or was asked for.
    Raises `Error` if what was asked for cannot be had, a kernel named by the user too.
    """
    if name != "best":
        return prepare(Runtime(name), options), ""
    why: list[str] = []
    for runtime in (Runtime.OSV, Runtime.LINUX):
        try:
            return prepare(runtime, options), "; ".join(why)
        except Absent as e:
            why.append(f"no {runtime} guest: {e.message}")
    return prepare(Runtime.STANDIN, options), "; ".join(why)


def best(options: Options) -> Runtime:
    """The best guest that is there, as `choose` has it; `options.say` is told which, in a line."""
    guest, why = choose("best", options)
    found = guest.description
    words = " ".join(filter(None, (found.runtime, found.kernel, found.accelerator)))
    options.say(f"the best guest here: {words}{f'; {why}' if why else ''}")
    return found.runtime
