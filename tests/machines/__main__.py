"""Entry point `python3 -m tests.machines COMMAND`: tests on other machines. Needs root.

This file uses only the standard library. A command imports what else it needs.
"""

from __future__ import annotations

import importlib
import signal
import sys
from types import FrameType

from testbed.model.errors import Error

COMMANDS = {
    "fresh": "run the tests in Debian roots that have nothing but git",
    "kernels": "run programs, cells and checks on Debian's kernels, in virtual machines",
    "kvm": "run guests by KVM and vhost-net, on an emulated machine where it is not here",
}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(args: list[str]) -> int:
    if not args or args[0] not in COMMANDS:
        print(
            *(f"python3 -m tests.machines {name}  # {what}" for name, what in COMMANDS.items()),
            sep="\n",
        )
        return 0 if args in (["-h"], ["--help"]) else 2
    for number in SIGNALS:
        signal.signal(number, interrupt)
    command = importlib.import_module(f"tests.machines.{args[0]}")
    try:
        return int(command.main(args[1:]))
    except Error as e:
        print(f"{args[0]}: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{args[0]}: interrupted", file=sys.stderr)
        return 130


def interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt once. Further signals are ignored, so that cleaning up can end."""
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt


sys.exit(main(sys.argv[1:]))
