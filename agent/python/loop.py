# SPDX-License-Identifier: Apache-2.0
"""Event loop of tasks, which are generators that yield what they wait for."""

from __future__ import annotations

import errno
import select
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import socket

T = TypeVar("T")

now_ns = time.monotonic_ns

Wait = tuple["socket.socket", int, int | None]
"""A socket, the events of poll() to wait for, and a deadline in ns of `now_ns`, or None."""
Task = Generator[Wait, None, T]
"""A generator that yields waits, and finally returns a T."""


class Loop:
    """Runs tasks to their ends. An `OSError` of a task ends only that task.

    A task that waits past its deadline gets `TimeoutError` where it waits.
    """

    def __init__(self) -> None:
        self._poll = select.poll()
        self._waiting: dict[int, tuple[Task[Any], int | None]] = {}
        """File descriptor → the task that waits for it, and its deadline."""

    def start(self, task: Task[Any]) -> None:
        """Run a task up to its first wait."""
        self._resume(task, late=False)

    def cancel(self, task: Task[Any]) -> None:
        """End a task that waits."""
        for fd, (waiting, _) in list(self._waiting.items()):
            if waiting is task:
                self._forget(fd)
        task.close()

    def run(self, until: Callable[[], bool]) -> None:
        """Resume tasks when their sockets are ready, until a condition holds.

        A task may call it, too: then the other tasks run within that call.
        """
        while not until():
            ready = [fd for fd, _ in self._poll.poll(self._timeout_ms())]
            now = now_ns()
            late = [fd for fd, (_, at) in self._waiting.items() if at is not None and at <= now]
            seen = dict(self._waiting)
            for fd in dict.fromkeys(ready + late):
                # An earlier task of this round may have cancelled or resumed this one.
                if fd in seen and self._waiting.get(fd) is seen[fd]:
                    task, _ = seen[fd]
                    self._forget(fd)
                    self._resume(task, late=fd not in ready)

    def _timeout_ms(self) -> int:
        """Time-out of poll(), rounded up; -1: none."""
        deadlines = [at for _, at in self._waiting.values() if at is not None]
        return max(0, -((now_ns() - min(deadlines)) // 1_000_000)) if deadlines else -1

    def _forget(self, fd: int) -> None:
        del self._waiting[fd]
        self._poll.unregister(fd)

    def _resume(self, task: Task[Any], late: bool) -> None:
        try:
            wait = task.throw(TimeoutError(errno.EAGAIN, "timed out")) if late else next(task)
        except (StopIteration, OSError):
            return
        waiting, events, deadline = wait
        self._waiting[waiting.fileno()] = task, deadline
        self._poll.register(waiting.fileno(), events)
