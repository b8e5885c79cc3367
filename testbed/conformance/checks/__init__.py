"""The conformance checks, one file per subject.

Another Python distribution adds checks by an entry point of group `testbed.checks` that names a
module.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from importlib import import_module, metadata
from pkgutil import iter_modules

from testbed.conformance.check import Check, registered
from testbed.model.errors import Error


def matching(globs: Iterable[str] = ("*",)) -> list[Check]:
    """Checks whose names match, sorted by file. Raises `Error` for a glob that matches none."""
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
    for entry in metadata.entry_points(group="testbed.checks"):
        entry.load()
    globs = list(globs)
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in registered):
            raise Error(f"no check is named {glob!r}", hint="see testbed conformance --list")
    by_file = sorted(registered.values(), key=lambda c: c.body.__module__)
    return [c for c in by_file if any(fnmatchcase(c.name, glob) for glob in globs)]
