"""Runtimes: what runs a workload. One module each; none imports another.

A runtime is prepared once (kernels found, images composed), then starts any number of workloads. It
is a module here with a function `prepare`, or such a function that an entry point of group
`testbed.runtimes` names (`model.terms.Runtime`).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module, metadata
from typing import cast

from testbed.model.terms import Runtime
from testbed.runtimes.interface import Absent, Options, Prepared


def prepare(runtime: Runtime, options: Options) -> Prepared:
    """Prepare a runtime. Raises `Error`, whose hint is what to type, if something is missing."""
    if others := metadata.entry_points(group=__name__, name=str(runtime)):
        [entry] = others
        prepare = entry.load()
    else:
        prepare = import_module(f"{__name__}.{runtime}").prepare
    return cast(Callable[[Options], Prepared], prepare)(options)


def choose(name: str, options: Options) -> tuple[Prepared, str]:
    """Prepare the runtime `name`, or for `best` the first available of OSv, Linux and stand-in.

    Returns it, and a line that says why none is better. The line is empty if it is the best, or was
    asked for by name. Raises `Error` if what was asked for is not available, such as a kernel that
    the user names.
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
    """The best available runtime of guests (`choose`). `options.say` gets a line on it."""
    guest, why = choose("best", options)
    found = guest.description
    words = " ".join(filter(None, (found.runtime, found.kernel, found.accelerator)))
    options.say(f"the best guest here: {words}{f'; {why}' if why else ''}")
    return found.runtime
