"""Command line `testbed`: arguments, printing, exit codes.

Each command imports what it needs when it runs, so that `--help` and completion are fast. Exit
codes: 0 done; 1 some of it failed (a cell, a check of the doctor); 2 usage; 3 could not run at all;
130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys

from testbed.cli import common, conformance, hosts, images, pods, results, run
from testbed.host import interrupts
from testbed.model.errors import Error


def parser() -> argparse.ArgumentParser:
    """The argument parser, with all commands and options."""
    top = argparse.ArgumentParser(
        prog="testbed",
        description="One localhost for the containers, unikernels and WASM workloads of a pod: "
        "build such pods, measure them, draw the figures.",
        epilog=common.called("Start with 'testbed doctor', then 'testbed run --plan quick'."),
    )
    top.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (run, results, conformance, hosts, pods, images):
        module.add(commands)
    completion = commands.add_parser(
        "completion",
        help="print shell code that completes commands, options and names of pods",
        epilog='For example in .bashrc: eval "$(testbed completion bash)"',
    )
    completion.set_defaults(call=_completion)
    completion.add_argument("shell", choices=("bash", "zsh"))
    return top


def _completion(arguments: argparse.Namespace) -> int:
    from argcomplete.shell_integration import shellcode

    print(shellcode(["testbed"], shell=arguments.shell))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point of the script `testbed`; returns the exit code."""
    top = parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks for completions
        import argcomplete

        argcomplete.autocomplete(top)
    arguments = top.parse_args(argv)
    with interrupts.once(common.called(PATIENCE)):
        return _call(arguments)


PATIENCE = (
    "testbed: still cleaning up, which ends by itself; after kill -9, 'testbed clean' does the rest"
)
"""What is said at a second Ctrl-C."""


def _call(arguments: argparse.Namespace) -> int:
    """Run a command; returns the exit code. Faults are one line, without --debug."""
    try:
        return int(arguments.call(arguments))
    except Error as e:
        if arguments.debug:
            raise
        hint = f"; {common.called(e.hint)}" if e.hint else ""
        print(f"testbed: {e.message}{hint}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("testbed: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of standard output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:
        if arguments.debug or e.filename is None:  # without a file, it is a bug
            raise
        print(f"testbed: {e.filename}: {e.strerror}", file=sys.stderr)
        return 3
