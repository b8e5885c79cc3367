"""Commands that read stored campaigns: `table`, `figures`, `report`, … None needs root."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from testbed import paths
from testbed.cli.common import Commands, called
from testbed.model.errors import Error

if TYPE_CHECKING:
    from testbed.results.results import Results


def add(commands: Commands) -> None:
    """Add the commands about stored campaigns."""
    _add_figures(commands)
    _add_table(commands)
    _add_report(commands)
    _add_claims(commands)
    _add_compare(commands)
    _add_keep(commands)
    _add_paper(commands)


def _add_figures(commands: Commands) -> None:
    figures = commands.add_parser(
        "figures", help="draw the figures of a stored campaign (needs no root)"
    )
    figures.set_defaults(call=_figures)
    figures.add_argument("directory", type=Path, metavar="DIR")


def _figures(arguments: argparse.Namespace) -> int:
    from testbed.reports import crate
    from testbed.reports.figures import draw
    from testbed.results.results import read

    results = read(arguments.directory)
    for path in draw.draw(results):
        print(path)
    crate.write(results)  # which has other files now
    return 0


def _add_table(commands: Commands) -> None:
    table = commands.add_parser(
        "table", help="print the tables of stored campaigns (needs no root)"
    )
    table.set_defaults(call=_table)
    table.add_argument("directories", type=Path, nargs="+", metavar="DIR")
    form = table.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true")
    form.add_argument(
        "--bencher",
        action="store_true",
        help="print the numbers in Bencher's metric format, for dashboards that show trends",
    )


def _table(arguments: argparse.Namespace) -> int:
    from testbed.reports import table
    from testbed.results.results import read

    if arguments.bencher:
        if len(arguments.directories) > 1:
            raise Error("a file of Bencher's has one campaign", "give one directory")
        print(json.dumps(table.bencher(read(arguments.directories[0])), indent=1))
        return 0
    directories, failures = arguments.directories, []
    for directory in directories:
        try:
            print_table(read(directory), arguments.json)
        except Error as e:  # results/* has more in it than campaigns
            failures.append(e)
    if len(failures) == len(directories):
        raise failures[0]
    for failure in failures:
        print(f"testbed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _add_report(commands: Commands) -> None:
    report = commands.add_parser(
        "report", help="write a stored campaign into one HTML file (needs no root)"
    )
    report.set_defaults(call=_report)
    report.add_argument("directory", type=Path, metavar="DIR")
    report.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="default: DIR/report.html"
    )


def _report(arguments: argparse.Namespace) -> int:
    from testbed.reports import crate, html
    from testbed.results.results import read

    file = arguments.output or arguments.directory / "report.html"
    results = read(arguments.directory)
    html.write(results, file)
    if file.resolve().parent == results.path.resolve():
        crate.write(results)  # which has one file more
    print(file)
    return 0


def _add_keep(commands: Commands) -> None:
    keep = commands.add_parser(
        "keep",
        help="archive a stored campaign as a reference, compressed for git",
        epilog=called("'testbed compare results/reference/NAME DIR' compares a later one with it."),
    )
    keep.set_defaults(call=_keep)
    keep.add_argument("directory", type=Path, metavar="DIR")
    keep.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="default: results/reference/PLAN"
    )


def _keep(arguments: argparse.Namespace) -> int:
    from testbed.reports import archive
    from testbed.results import store

    campaign = store.open(arguments.directory)
    kept = archive.keep(campaign, arguments.output or paths.REFERENCE / campaign.campaign.name)
    print(kept.path)
    return 0


def _add_claims(commands: Commands) -> None:
    claims = commands.add_parser(
        "claims",
        help="judge the claims of a stored campaign's plan by its results",
        epilog="Exit status: 0 all hold, 1 some do not, 3 no claims, or no verdict on some.",
    )
    claims.set_defaults(call=_claims)
    claims.add_argument("directory", type=Path, metavar="DIR")
    claims.add_argument("--json", action="store_true")


def _claims(arguments: argparse.Namespace) -> int:
    from testbed.reports import claims, history
    from testbed.results.results import read

    campaign = read(arguments.directory)
    found = claims.judge(campaign)
    if arguments.json:
        print(json.dumps(claims.data(found, campaign), indent=1))
    elif not found:
        print(f"the plan {campaign.campaign.name} claims nothing: there is nothing to judge")
    else:
        from rich.console import Console

        console = Console()
        console.print(claims.table(found, campaign))
        if said := history.verified(campaign.campaign):
            console.print(said, highlight=False)
    return claims.exit_status(found)


def _add_paper(commands: Commands) -> None:
    paper = commands.add_parser(
        "paper",
        help="build paper/main.pdf from a stored campaign (needs LaTeX, no root)",
        epilog="LaTeX is installed by ./bootstrap --tex.",
    )
    paper.set_defaults(call=_paper)
    paper.add_argument(
        "directory", type=Path, metavar="DIR", nargs="?", help="default: results/reference/paper"
    )
    paper.add_argument(
        "--proof",
        type=Path,
        metavar="DIR",
        help="campaign of plan proof, which judges the claims (default: results/reference/proof)",
    )


def _paper(arguments: argparse.Namespace) -> int:
    from testbed.reports.paper import build
    from testbed.results.results import read

    campaign = read(arguments.directory or paths.REFERENCE / "paper")
    proof = read(arguments.proof or paths.REFERENCE / "proof")
    print(build.build(campaign, proof=proof))
    return 0


def _add_compare(commands: Commands) -> None:
    compare = commands.add_parser(
        "compare",
        help="compare a stored campaign with an earlier one (needs no root)",
        epilog="Exit status: 0 no cell is slower, 1 some are slower, 3 could not compare; with "
        "--ratios 1 also if a claim does not hold, 3 if there is no verdict on some.",
    )
    compare.set_defaults(call=_compare)
    compare.add_argument("before", type=Path, metavar="A", help="directory of the earlier campaign")
    compare.add_argument(
        "after",
        type=Path,
        metavar="B",
        help="directory of the later campaign; the figure is written there",
    )
    compare.add_argument(
        "--ratios",
        action="store_true",
        help="compare ratios to the reference within a block, as between two machines, and judge "
        "the claims of A by B",
    )
    compare.add_argument(
        "--band",
        type=_band,
        default=0.05,
        metavar="SHARE",
        help="smaller changes are equivalent (default: %(default)s)",
    )
    compare.add_argument("--json", action="store_true")


def _compare(arguments: argparse.Namespace) -> int:
    from testbed.reports import claims, compare
    from testbed.reports.figures import draw
    from testbed.results.results import read

    before, after = read(arguments.before), read(arguments.after)
    if before.path.resolve() == after.path.resolve():
        raise Error(f"{before.path} and {after.path} are the same campaign", "name two")
    rows = compare.compare(before, after, arguments.band, arguments.ratios)
    judged = claims.judge(after, before.campaign) if arguments.ratios else []
    statuses = {compare.exit_status(rows)} | ({claims.exit_status(judged)} if judged else set())
    status = next(number for number in (1, 3, 0) if number in statuses)
    drawn = []
    if any(row.ratio.blocks for row in rows) and not arguments.ratios:
        folder = after.path / "figures"
        drawn = draw.draw_comparison(rows, before, after, arguments.band, folder)
    if arguments.json:
        found = compare.data(rows, before, after, arguments.band) | {"exit_status": status}
        found["claims"] = claims.data(judged, before)
        print(json.dumps(found, indent=1))
    else:
        from rich.console import Console

        console = Console()
        console.print(compare.table(rows, before, after, arguments.band, console.width))
        if judged:
            console.print("\nThe earlier campaign's claims, by the later one:", style="bold")
            console.print(claims.table(judged, before))
    if drawn:
        print(f"\nfigure: {drawn[0]}", file=sys.stderr)
    if status == 3:
        print("testbed: could not compare, or gave no verdict: see above", file=sys.stderr)
    return status


def print_table(campaign: Results, as_json: bool) -> None:
    """Print a campaign's table and its claims, or the table as JSON."""
    from testbed.reports import claims, table

    if as_json:
        print(json.dumps(table.data(campaign), indent=1))
        return
    from rich.console import Console

    console = Console()
    console.print(table.table(campaign, console.width))
    if found := claims.judge(campaign):
        console.print()
        console.print(claims.table(found, campaign))


def _band(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value
