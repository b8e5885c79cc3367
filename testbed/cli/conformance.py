"""Command `conformance`: checks that a datapath's `localhost` behaves like `localhost`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed import paths
from testbed.cli import common
from testbed.cli.common import Commands
from testbed.model.errors import Error
from testbed.model.terms import Family, Runtime

if TYPE_CHECKING:
    from rich.table import Table

    from testbed.conformance import runner
    from testbed.conformance.check import Result


def add(commands: Commands) -> None:
    """Add the command `conformance`."""
    conformance = commands.add_parser(
        "conformance",
        prog="conformance" if paths.is_bundle() else None,
        help="check that localhost behaves as programs expect, through any datapath",
        epilog="Exit status: 0 no check failed, 1 some checks failed, 3 could not run.",
    )
    conformance.set_defaults(call=_conformance)
    # A bundle builds no pods and has no archive: it has these options at their defaults alone.
    about_pods = argparse.ArgumentParser() if paths.is_bundle() else conformance
    _add_pods(about_pods)
    _add_archive(about_pods)
    if about_pods is not conformance:
        conformance.set_defaults(**vars(about_pods.parse_args([])))
    conformance.add_argument("--family", nargs="+", type=Family, choices=tuple(Family))
    conformance.add_argument(
        "--check",
        action="append",
        metavar="GLOB",
        help="only checks like 'datagram-*' (may be repeated)",
    )
    conformance.add_argument("--list", action="store_true", help="list the checks, and run none")
    conformance.add_argument("--json", action="store_true", help="print the results as JSON")
    conformance.add_argument(
        "--junit", type=Path, metavar="FILE", help="also write the results as JUnit XML"
    )
    conformance.add_argument(
        "--tap",
        type=Path,
        metavar="FILE",
        help="also write the results as TAP (Test Anything Protocol, version 14)",
    )
    conformance.add_argument(
        "--netns", type=Path, metavar="PATH", help="check an existing pod: its namespace ..."
    )
    conformance.add_argument(
        "--control",
        metavar="ADDRESS[:PORT]",
        help="... and the control connection of the traffic agent in its guest",
    )
    conformance.add_argument(
        "--cgroup",
        type=Path,
        metavar="PATH",
        help="cgroup (v2) of that pod's processes, to which the natives are to belong",
    )


def _add_pods(conformance: argparse.ArgumentParser) -> None:
    """Add the options about pods that are built for the checks."""
    conformance.add_argument(
        "--datapath", nargs="+", metavar="NAME", help="default: all that make localhost work"
    )
    common.add_guest(conformance)
    conformance.add_argument(
        "--shim",
        action="store_true",
        help="give the traffic agent in OSv guests the shim, as programs have it: 127.0.0.1 and "
        "::1 are the pod's, too",
    )
    conformance.add_argument(
        "--native",
        type=Runtime,
        default=Runtime.PROCESS,
        choices=(Runtime.PROCESS, Runtime.WASM),
        help="runtime of natives (default: process); with wasm, checks run "
        "through wasm→guest, guest→wasm and wasm→container",
    )


def _add_archive(conformance: argparse.ArgumentParser) -> None:
    """Add the options about archived results, pages and bundles."""
    conformance.add_argument(
        "--keep", action="store_true", help="archive the results in results/reference/conformance"
    )
    conformance.add_argument(
        "--pages",
        action="store_true",
        help="write docs/conformance.md and README's table from archived results; run nothing",
    )
    conformance.add_argument(
        "--bundle",
        type=Path,
        metavar="FILE.tar.gz",
        help="write a bundle of the suite and a static agent, which checks existing pods on any "
        "machine with Python; run nothing",
    )


def _conformance(arguments: argparse.Namespace) -> int:
    from testbed.conformance import archive, bundle, check, checks, output, runner
    from testbed.runtimes.interface import Description

    globs = tuple(arguments.check or ("*",))
    if arguments.list:
        chosen = checks.matching(globs)
        if arguments.json:
            print(json.dumps([output.check_as_json(c) for c in chosen], indent=1))
        else:
            _print(output.listing(chosen))
        return 0
    if arguments.pages:
        for path in archive.write_pages():
            print(path)
        return 0
    if arguments.bundle:
        bundle.write(arguments.bundle)
        print(arguments.bundle)
        print("unpack it where the pod is; README in it has what to do there", file=sys.stderr)
        return 0
    choice = _choice(arguments, globs)
    results: list[Result] = []
    known: dict[str, Any] = {}
    if arguments.keep:  # before anybody edits the clone
        known = archive.circumstances() | {"shim": arguments.shim}
    guest = None
    try:
        with common.progress() as report:
            for event in runner.run(choice):
                if isinstance(event, check.Result):
                    results.append(event)
                elif isinstance(event, Description):
                    guest = event
                else:
                    report(event)
    except BaseException:
        if results:  # show what was checked before the error
            _show_conformance(results, arguments)
        raise
    for run in archive.runs_of(results, guest, **known) if arguments.keep else ():
        print(f"kept in {archive.keep(run)}", file=sys.stderr)
    _show_conformance(results, arguments)
    return 1 if any(r.status is check.Status.FAIL for r in results) else 0


def _choice(arguments: argparse.Namespace, globs: tuple[str, ...]) -> runner.Choice:
    """What is to be run. Raises `Error` for options that do not go together."""
    from testbed.conformance import runner

    if arguments.keep and (arguments.check or arguments.family or arguments.netns):
        raise Error("only whole runs are kept", hint="leave out --check, --family and --netns")
    foreign = arguments.netns is not None
    if paths.is_bundle() and not foreign:
        raise Error("a bundle checks pods that are there already", "give --netns and --control")
    if arguments.shim and arguments.guest != Runtime.OSV:
        raise Error("only OSv guests have a shim", hint="leave out --shim, or add --guest osv")
    if foreign != (arguments.control is not None):
        raise Error("a pod that is there already needs both --netns and --control")
    if arguments.cgroup and not (foreign and (arguments.cgroup / "cgroup.procs").exists()):
        raise Error(f"{arguments.cgroup} is no cgroup of a pod that is there already")
    for file in filter(None, (arguments.junit, arguments.tap)):
        if not file.parent.is_dir():
            raise Error(f"{file}: there is no folder {file.parent}")
    return runner.Choice(
        tuple(arguments.datapath or (["foreign"] if foreign else _that_make_localhost_work())),
        arguments.guest,
        tuple(arguments.family or Family),
        globs,
        arguments.native,
        arguments.osv_kernel,
        shim=arguments.shim,
        netns=arguments.netns,
        control=arguments.control or "",
        cgroup=arguments.cgroup and arguments.cgroup.absolute(),
    )


def _that_make_localhost_work() -> list[str]:
    from testbed import datapaths

    return [name for name in datapaths.names() if datapaths.get(name).localhost]


def _show_conformance(results: Sequence[Result], arguments: argparse.Namespace) -> None:
    from testbed.conformance import output
    from testbed.conformance.check import Status

    if arguments.json:
        print(json.dumps(output.as_json(results), indent=1))
    else:
        _print(output.matrix(results))
        for status in (Status.UNSUPPORTED, Status.FAIL):
            for line in output.reasons(results, status):
                print(f"{status}: {line}")
    if arguments.junit:  # after the table, which is not lost if a file cannot be written
        arguments.junit.write_bytes(output.junit(results))
    if arguments.tap:
        arguments.tap.write_text(output.tap(results))


def _print(table: Table) -> None:
    from rich.console import Console

    Console().print(table)
