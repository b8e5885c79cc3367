"""Commands that measure, and those that read what was measured."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from testbed import paths
from testbed.cli import common
from testbed.cli.common import Commands
from testbed.conformance import check, checks
from testbed.model.errors import Error
from testbed.model.terms import Family, Runtime

if TYPE_CHECKING:
    from rich.table import Table

    from testbed.conformance.check import Result
    from testbed.results.store import Store


def add(commands: Commands) -> None:
    """Of campaigns and conformance."""
    run = commands.add_parser(
        "run", help="run a plan: build pods, measure, draw figures, take everything down",
        epilog="An interrupted run goes on with --resume DIR.",
    )  # fmt: skip
    run.set_defaults(call=_run)
    run.add_argument("--plan", default="standard", metavar="NAME|FILE.toml",
                     help="a plan of experiments/ or a file (default: %(default)s)")  # fmt: skip
    run.add_argument("--cells", action="append", metavar="GLOB",
                     help="only cells like 'capture/*/ipv6/*' (may be repeated)")  # fmt: skip
    _add_guest(run)
    run.add_argument("--blocks", type=_positive, metavar="N", help="instead of the plan's number")
    run.add_argument(
        "--out", type=Path, metavar="DIR", help="campaign directory (default: results/TIME-PLAN)"
    )
    run.add_argument(
        "--resume", type=Path, metavar="DIR", help="go on with an interrupted campaign"
    )
    run.add_argument(
        "--seed", type=int, default=1, help="of the random order (default: %(default)s)"
    )
    run.add_argument("--keep", action="store_true",
                     help="stop at the first pod that fails, and leave it standing")  # fmt: skip
    run.add_argument("--json", action="store_true", help="print the table as JSON")
    common.add_hosts(run)

    figures = commands.add_parser(
        "figures", help="draw the figures of a stored campaign (needs no root)"
    )
    figures.set_defaults(call=_figures)
    figures.add_argument("directory", type=Path, metavar="DIR")

    table = commands.add_parser(
        "table", help="print the table of a stored campaign (needs no root)"
    )
    table.set_defaults(call=_table)
    table.add_argument("directory", type=Path, metavar="DIR")
    table.add_argument("--json", action="store_true")

    page = commands.add_parser(
        "report", help="write a stored campaign into one HTML file (needs no root)"
    )
    page.set_defaults(call=_report)
    page.add_argument("directory", type=Path, metavar="DIR")
    page.add_argument("-o", "--output", type=Path, metavar="FILE",
                      help="default: DIR/report.html")  # fmt: skip

    claims = commands.add_parser(
        "claims", help="say whether a stored campaign bears out what its plan claims",
        epilog="Exit status: 0 all claims hold, 1 one does not, 3 nobody can tell.",
    )  # fmt: skip
    claims.set_defaults(call=_claims)
    claims.add_argument("directory", type=Path, metavar="DIR")
    claims.add_argument("--json", action="store_true")

    compare = commands.add_parser(
        "compare", help="hold a stored campaign against an earlier one (needs no root)",
        epilog="Exit status: 0 none slower, 1 some slower, 3 could not compare.",
    )  # fmt: skip
    compare.set_defaults(call=_compare)
    compare.add_argument("before", type=Path, metavar="A", help="directory of the earlier campaign")
    compare.add_argument("after", type=Path, metavar="B", help="of the later; gets the figure")
    compare.add_argument("--band", type=_band, default=0.05, metavar="SHARE",
                         help="smaller changes are equivalent (default: %(default)s)")  # fmt: skip
    compare.add_argument("--json", action="store_true")

    keep = commands.add_parser(
        "keep", help="keep a stored campaign for reference: whole, and small enough for git",
        epilog="'testbed compare results/reference/NAME DIR' holds a later one against it.",
    )  # fmt: skip
    keep.set_defaults(call=_keep)
    keep.add_argument("directory", type=Path, metavar="DIR")
    keep.add_argument("-o", "--output", type=Path, metavar="DIR",
                      help="default: results/reference/PLAN")  # fmt: skip

    paper = commands.add_parser(
        "paper", help="build paper/main.pdf from a stored campaign (needs LaTeX, no root)",
        epilog="LaTeX is installed by ./bootstrap --tex.",
    )  # fmt: skip
    paper.set_defaults(call=_paper)
    paper.add_argument("directory", type=Path, metavar="DIR", nargs="?",
                       help="default: results/reference/paper")  # fmt: skip
    paper.add_argument("--proof", type=Path, metavar="DIR",
                       help="of plan proof: what came of the claims (default: "
                       "results/reference/proof)")  # fmt: skip

    conformance = commands.add_parser(
        "conformance", help="check what programs may rely on at localhost, through any datapath",
        epilog="Exit status: 0 nothing failed, 1 some checks failed, 3 could not run.",
    )  # fmt: skip
    conformance.set_defaults(call=_conformance)
    conformance.add_argument("--datapath", nargs="+", metavar="NAME",
                             help="default: all that make localhost work")  # fmt: skip
    _add_guest(conformance)
    conformance.add_argument("--native", type=Runtime, default=Runtime.PROCESS,
                             choices=(Runtime.PROCESS, Runtime.WASM),
                             help="what natives are (default: process); with wasm checks run "
                             "through wasm→guest, guest→wasm and wasm→container")  # fmt: skip
    conformance.add_argument("--family", nargs="+", type=Family, choices=tuple(Family))
    conformance.add_argument("--check", action="append", metavar="GLOB",
                             help="only checks like 'datagram-*' (may be repeated)")  # fmt: skip
    conformance.add_argument("--list", action="store_true", help="list the checks, and run none")
    conformance.add_argument("--json", action="store_true", help="print the results as JSON")
    conformance.add_argument("--keep", action="store_true",
                             help="put the results into results/reference/conformance")  # fmt: skip
    conformance.add_argument("--pages", action="store_true",
                             help="write docs/conformance.md and README's table from what is kept, "
                             "and run nothing")  # fmt: skip
    conformance.add_argument("--junit", type=Path, metavar="FILE",
                             help="write the results as JUnit's XML, too")  # fmt: skip
    conformance.add_argument("--netns", type=Path, metavar="PATH",
                             help="a pod that is there already: its namespace ...")  # fmt: skip
    conformance.add_argument("--control", metavar="ADDRESS[:PORT]",
                             help="... and where its guest's agent takes orders")  # fmt: skip


def _add_guest(command: argparse.ArgumentParser) -> None:
    guests = ["best", *(r for r in Runtime if r.is_guest)]
    command.add_argument("--guest", default="best", choices=guests,
                         help="what runs guests (default: the best that is there)")  # fmt: skip
    command.add_argument(
        "--osv-kernel", type=Path, metavar="PATH",
        help="OSv kernel or tree (default: cache, else nightly release)",
    )  # fmt: skip


def _run(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from testbed import doctor, plan
    from testbed.campaigns import campaign
    from testbed.reports.figures import draw
    from testbed.results import store

    if arguments.resume:
        path = arguments.resume
    else:
        chosen = plan.load(arguments.plan)
        if arguments.cells:
            chosen = chosen.select(arguments.cells)
        if arguments.blocks:
            chosen = replace(chosen, blocks=arguments.blocks, target_width=None)
        path = arguments.out or store.directory(chosen.name)
    places: Sequence[campaign.Place] = campaign.HERE
    if hosts := common.chosen(arguments):
        from testbed.remote import place

        ids = store.open(path).campaign.cells if arguments.resume else [c.id for c in chosen.cells]
        places = place.places(hosts, between=any(id.startswith("routed/") for id in ids))
    else:
        doctor.preflight()
    try:
        with common.progress() as report:
            if arguments.resume:
                finished = campaign.resume(path, arguments.keep, report, places)
            else:
                choice = campaign.Choice(arguments.guest, arguments.osv_kernel, arguments.keep)
                finished = campaign.start(chosen, path, choice, arguments.seed, report, places)
    except KeyboardInterrupt:
        print(f"testbed: interrupted, and all is taken down; go on with --resume {path}",
              file=sys.stderr)  # fmt: skip
        return 130
    with finished:
        finished.derive()
        drawn = draw.draw(finished)
    _print_table(finished, arguments.json)
    print(f"\nfigures: {' '.join(str(f) for f in drawn if f.suffix == '.png')}"
          f"\nall of it in one file: testbed report {path}", file=sys.stderr)  # fmt: skip
    return 1 if any(t.status == "failed" for t in finished.trials()) else 0


def _figures(arguments: argparse.Namespace) -> int:
    from testbed.reports.figures import draw
    from testbed.results import store

    for path in draw.draw(store.open(arguments.directory)):
        print(path)
    return 0


def _table(arguments: argparse.Namespace) -> int:
    from testbed.results import store

    _print_table(store.open(arguments.directory), arguments.json)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from testbed.reports import html
    from testbed.results import store

    file = arguments.output or arguments.directory / "report.html"
    html.write(store.open(arguments.directory), file)
    print(file)
    return 0


def _keep(arguments: argparse.Namespace) -> int:
    from testbed.reports import archive
    from testbed.results import store

    campaign = store.open(arguments.directory)
    kept = archive.keep(campaign, arguments.output or paths.REFERENCE / campaign.campaign.name)
    print(kept.path)
    return 0


def _claims(arguments: argparse.Namespace) -> int:
    from testbed.reports import claims
    from testbed.results import store

    campaign = store.open(arguments.directory)
    found = claims.judge(campaign)
    if arguments.json:
        print(json.dumps(claims.data(found), indent=1))
    else:
        from rich.console import Console

        Console().print(claims.table(found, campaign.campaign.guest))
    return claims.exit_status(found)


def _paper(arguments: argparse.Namespace) -> int:
    from testbed.reports.paper import build
    from testbed.results import store

    campaign = store.open(arguments.directory or paths.REFERENCE / "paper")
    proof = store.open(arguments.proof or paths.REFERENCE / "proof")
    print(build.build(campaign, proof=proof))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from testbed.reports import compare
    from testbed.reports.figures import draw
    from testbed.results import store

    before, after = store.open(arguments.before), store.open(arguments.after)
    rows = compare.compare(before, after, arguments.band)
    status = compare.exit_status(rows)
    drawn = []
    if any(row.ratio.blocks for row in rows):
        folder = after.path / "figures"
        drawn = draw.draw_comparison(rows, before, after, arguments.band, folder)
    if arguments.json:
        print(json.dumps(compare.data(rows, before, after, arguments.band), indent=1))
    else:
        from rich.console import Console

        Console().print(compare.table(rows, before, after, arguments.band))
    if drawn:
        print(f"\nfigure: {drawn[0]}", file=sys.stderr)
    if status == 3:
        print("testbed: could not compare: see the reasons above", file=sys.stderr)
    return status


def _conformance(arguments: argparse.Namespace) -> int:
    from testbed import datapaths
    from testbed.campaigns import campaign
    from testbed.conformance import archive, output, runner

    globs = tuple(arguments.check or ("*",))
    if arguments.list:
        _print(output.listing(checks.matching(globs)))
        return 0
    if arguments.pages:
        for path in archive.write_pages():
            print(path)
        return 0
    if arguments.keep and (arguments.check or arguments.family or arguments.netns):
        raise Error("only whole runs are kept", hint="leave out --check, --family and --netns")
    foreign = arguments.netns is not None
    if foreign != (arguments.control is not None):
        raise Error("a pod that is there already needs both --netns and --control")
    localhost = [name for name in datapaths.NAMES if datapaths.get(name).localhost]
    choice = runner.Choice(
        tuple(arguments.datapath or (["foreign"] if foreign else localhost)), arguments.guest,
        tuple(arguments.family or Family), globs, arguments.native, arguments.osv_kernel,
        netns=arguments.netns, control=arguments.control or "",
    )  # fmt: skip
    results: list[Result] = []
    try:
        with common.progress() as report:
            for event in runner.run(choice):
                if isinstance(event, check.Result):
                    results.append(event)
                else:
                    report(campaign.Progress(event.text, event.done, event.total, None))
    except BaseException:
        if results:  # what there is until then
            _show_conformance(results, arguments)
        raise
    for run in archive.runs_of(results) if arguments.keep else ():
        print(f"kept in {archive.keep(run)}", file=sys.stderr)
    _show_conformance(results, arguments)
    return 1 if any(r.status is check.Status.FAIL for r in results) else 0


def _show_conformance(results: Sequence[Result], arguments: argparse.Namespace) -> None:
    from testbed.conformance import output
    from testbed.conformance.check import Status

    if arguments.junit:
        arguments.junit.write_bytes(output.junit(results))
    if arguments.json:
        print(json.dumps(output.as_json(results), indent=1))
        return
    _print(output.matrix(results))
    for status in (Status.UNSUPPORTED, Status.FAIL):
        for line in output.reasons(results, status):
            print(f"{status}: {line}")


def _print_table(campaign: Store, as_json: bool) -> None:
    from testbed.reports import claims, table

    if as_json:
        print(json.dumps(table.data(campaign), indent=1))
        return
    from rich.console import Console

    console = Console()
    console.print(table.table(campaign, console.width))
    if found := claims.judge(campaign):
        console.print()
        console.print(claims.table(found, campaign.campaign.guest))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _band(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _print(table: Table) -> None:
    from rich.console import Console

    Console().print(table)
