"""Signals that end a process interrupt it once, like Ctrl-C, so that it cleans up to the end."""

from __future__ import annotations

import signal
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Of a user, of a service manager or `timeout`, and of a terminal that is closed."""


def ignore() -> None:
    """Make the signals do nothing, so that a second one does not interrupt cleaning up.

    The handler is an empty function and not SIG_IGN: with SIG_IGN, a signal that is already pending
    makes Python raise an OSError.
    """
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)


def raise_at(*numbers: signal.Signals) -> None:
    """Raise `KeyboardInterrupt` in the main thread at the first of these signals.

    After it, all of `SIGNALS` are ignored, so that cleaning up comes to its end.
    """

    def stop(*_: object) -> None:
        ignore()
        raise KeyboardInterrupt

    for number in numbers:
        _handle(number, stop)


def restore() -> None:
    """Let the signals end this process at once."""
    for number in SIGNALS:
        _handle(number, signal.SIG_DFL)


def _handle(number: signal.Signals, handler: Any) -> None:
    """Set the handler of a signal, but leave SIGHUP alone where it is ignored: nohup does that."""
    if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, handler)
