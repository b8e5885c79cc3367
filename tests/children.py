"""Child processes of tests: they end with the block that they are for, however it ends."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from testbed.host import process

GRACE_S = 5
"""For what a child takes down itself."""

Child = TypeVar("Child", bound="subprocess.Popen[Any]")


@contextmanager
def ending(child: Child) -> Iterator[Child]:
    """A child that is asked to end when the block ends, if it lives then, and soon killed.

    `with Popen(…)` alone waits for it, for ever if an assertion failed before it was told to end.
    """
    with child:
        try:
            yield child
        finally:
            process.end(child, GRACE_S)
