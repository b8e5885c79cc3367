"""Context manager for child processes of tests: it ends the child however its block ends."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from testbed.host import process

GRACE_S = 5
"""Time for a child to take down what it made."""

Child = TypeVar("Child", bound="subprocess.Popen[Any]")


@contextmanager
def ending(child: Child) -> Iterator[Child]:
    """Terminate a child when the block ends, and kill it after `GRACE_S`.

    `with Popen(…)` alone only waits: forever, if an assertion failed before the child was told
    to end.
    """
    with child:
        try:
            yield child
        finally:
            process.end(child, GRACE_S)
