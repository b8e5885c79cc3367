"""Signals that end a process interrupt it once, like Ctrl-C, so that it cleans up to the end."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Of a user, of a service manager or `timeout`, and of a terminal that is closed."""


def ignore(patience: str = "") -> None:
    """Make the signals write `patience` and do nothing else, so that cleaning up comes to its end.

    The handler is a function and not SIG_IGN: with SIG_IGN, a signal that is already pending makes
    Python raise an OSError.
    """

    def go_on(*_: object) -> None:
        with suppress(OSError):
            os.write(2, f"{patience}\n".encode() if patience else b"")

    for number in SIGNALS:
        _handle(number, go_on)


def raise_once(patience: str = "") -> None:
    """Raise `KeyboardInterrupt` in the main thread at the first of the signals.

    Those after it write `patience` to standard error, and do nothing else.
    """

    def stop(number: int, _: object) -> None:
        ignore(patience)
        if number == signal.SIGHUP:
            _leave_terminal()
        raise KeyboardInterrupt

    for number in SIGNALS:
        _handle(number, stop)


@contextmanager
def once(patience: str) -> Iterator[None]:
    """`raise_once` within a block; afterwards the signals are handled as before it."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    raise_once(patience)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def restore() -> None:
    """Let the signals end this process at once."""
    for number in SIGNALS:
        _handle(number, signal.SIG_DFL)


def _leave_terminal() -> None:
    """Read from and write to /dev/null where a terminal was that is gone; else writing fails."""
    for fd in (0, 1, 2):
        terminal = select.poll()
        terminal.register(fd, 0)
        if any(event & (select.POLLHUP | select.POLLERR) for _, event in terminal.poll(0)):
            os.dup2(os.open(os.devnull, os.O_RDWR), fd)


def _handle(number: signal.Signals, handler: Any) -> None:
    """Set the handler of a signal, but leave alone what is ignored: `nohup` and shells do that."""
    if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, handler)
