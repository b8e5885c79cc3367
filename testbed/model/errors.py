"""The exception that every layer raises for a fault that a user can act on."""

from __future__ import annotations


class Error(Exception):
    """A fault that a user can act on: `message` says what is wrong and where, `hint` what to type.

    Every layer raises it. The command line prints it as one line (traceback with `--debug`). A hint
    names commands as `testbed COMMAND`; the command line adds how it was called.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message
