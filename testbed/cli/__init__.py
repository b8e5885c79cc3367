"""The command line: arguments, printing, exit codes. Everything else is imported when it is needed.

Exit codes: 0 done; 1 it did not work (some cells failed, doctor found something missing); 2 usage;
3 could not run at all; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys

from testbed.cli import campaigns, hosts, images, pods
from testbed.model import Error


def parser() -> argparse.ArgumentParser:
    """All commands and options."""
    top = argparse.ArgumentParser(
        prog="testbed",
        description="One localhost for the containers, unikernels and WASM workloads of a pod: "
        "build such pods, measure them, draw the figures.",
        epilog="Start with 'testbed doctor', then 'testbed run --plan quick'.",
    )
    top.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (campaigns, hosts, pods, images):
        module.add(commands)
    return top


def main(argv: list[str] | None = None) -> int:
    """Entry of `testbed`; returns the exit code."""
    arguments = parser().parse_args(argv)
    try:
        return int(arguments.call(arguments))
    except Error as e:
        if arguments.debug:
            raise
        print(f"testbed: {e}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("testbed: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
