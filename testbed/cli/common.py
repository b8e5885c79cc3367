"""Options, types of arguments and progress display that several commands share."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from testbed.model.errors import Error
from testbed.model.terms import Runtime

if TYPE_CHECKING:
    from testbed.model.progress import Progress
    from testbed.remote.inventory import Host

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_hosts(command: argparse.ArgumentParser, required: bool = False) -> None:
    """Add the options that choose other hosts."""
    command.add_argument(
        "--hosts",
        type=Path,
        metavar="FILE",
        required=required,
        help="inventory of other hosts, reached by SSH (see experiments/hosts.example.toml)",
    )
    command.add_argument(
        "--on",
        nargs="+",
        default=[],
        metavar="NAME",
        help="only hosts with one of these names or labels",
    )


def chosen(arguments: argparse.Namespace) -> Sequence[Host]:
    """The chosen hosts; none means this machine. Raises `Error` for --on without --hosts."""
    if arguments.hosts is None:
        if arguments.on:
            raise Error("--on chooses among the hosts of an inventory", "add --hosts FILE")
        return ()
    from testbed.remote import inventory

    return inventory.choose(inventory.load(arguments.hosts), arguments.on)


def add_guest(command: argparse.ArgumentParser) -> None:
    """Add the options that choose the runtime of guests."""
    command.add_argument(
        "--guest",
        default="best",
        type=_guest,
        metavar="|".join(("best", *(r for r in Runtime if r.boots))),
        help="runtime of guests (default: the best one that this machine can run)",
    )
    command.add_argument(
        "--osv-kernel",
        type=Path,
        metavar="PATH",
        help="OSv kernel or tree (default: cache, else nightly release)",
    )


def _guest(text: str) -> str:
    try:
        if text == "best" or Runtime(text).boots:
            return text
    except ValueError:
        pass
    known = ", ".join(("best", *(r for r in Runtime if r.boots)))
    raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {known})")


def called(text: str) -> str:
    """The text with its commands `testbed …` as the user has to type them.

    A clone that was bootstrapped has no `testbed` on the user's PATH; `./bootstrap` says in the
    environment how it was called.
    """
    bootstrap = os.environ.get("TESTBED_BOOTSTRAP")
    if not bootstrap:
        return text
    return re.sub(r"\btestbed (?=[a-z])", lambda found: f"{bootstrap} {found[0]}", text)


OTHER_COLUMNS = 44
"""Columns of a line of progress beside its text: a bar, counts and the time left."""


@contextmanager
def progress() -> Iterator[Callable[[Progress], None]]:
    """Display of progress on standard error: one changing line on a terminal, else many lines.

    A text that stays is a line of its own above the changing one.
    Yields the function that shows a `Progress`.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Display

    console = Console(stderr=True)
    if not console.is_terminal:
        said = ""

        def say(now: Progress) -> None:
            nonlocal said
            if now.stays or now.text != said:
                said = said if now.stays else now.text
                left = f", {_left(now.left_s)}" if now.left_s is not None else ""
                print(f"[{now.done}/{now.total}] {now.text}{left}", file=sys.stderr)

        yield say
        return
    texts = TextColumn("{task.fields[left]}"), TextColumn("{task.description}")
    columns = BarColumn(20), MofNCompleteColumn(), *texts
    with Display(*columns, console=console) as display:
        task = display.add_task("starting", total=None, left="")

        def show(now: Progress) -> None:
            if now.stays:
                display.console.print(now.text, markup=False, highlight=False)
                return
            text = now.text[: max(console.width - OTHER_COLUMNS, 0)]
            display.update(
                task,
                completed=now.done,
                total=now.total,
                left=_left(now.left_s),
                description=text if text == now.text else f"{text[:-1]}…",
            )

        yield show


def _left(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02} left"
