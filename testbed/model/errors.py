"""A fault that a user can act on, and nothing else: what every layer raises."""

from __future__ import annotations


class Error(Exception):
    """A fault that a user can act on: what is wrong and where, then what to type.

    Raised by every layer, printed by the command line as one line (traceback with `--debug`).
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message
