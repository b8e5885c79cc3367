"""Command `run`: runs a plan as a campaign, and draws its figures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.cli import common
from testbed.cli.common import Commands
from testbed.cli.results import print_table

if TYPE_CHECKING:
    from testbed.campaigns.places import Place


def add(commands: Commands) -> None:
    """Add the command `run`."""
    run = commands.add_parser(
        "run",
        help="run a plan: build pods, measure, draw figures, take everything down",
        epilog=common.called("Continue an interrupted run with testbed run --resume DIR."),
    )
    run.set_defaults(call=_run)
    run.add_argument(
        "--plan",
        default="standard",
        metavar="NAME|FILE.toml",
        help="name of a plan in experiments/, or a file (default: %(default)s)",
    )
    run.add_argument(
        "--cells",
        action="append",
        metavar="GLOB",
        help="only cells that match, such as 'capture/*/ipv6/*' (may be repeated)",
    )
    common.add_guest(run)
    run.add_argument(
        "--blocks", type=_positive, metavar="N", help="number of blocks, instead of the plan's"
    )
    run.add_argument(
        "--out", type=Path, metavar="DIR", help="campaign directory (default: results/TIME-PLAN)"
    )
    run.add_argument("--resume", type=Path, metavar="DIR", help="continue an interrupted campaign")
    run.add_argument(
        "--seed",
        type=int,
        help="seed of the random order (default: that of the plan's [preregistration], else 1)",
    )
    run.add_argument(
        "--keep",
        action="store_true",
        help="stop at the first pod that fails, and leave it running",
    )
    run.add_argument("--json", action="store_true", help="print the table as JSON")
    common.add_hosts(run)


def _run(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from testbed import doctor, plan
    from testbed.campaigns import campaign
    from testbed.campaigns.places import HERE
    from testbed.images import kernels
    from testbed.reports import crate
    from testbed.reports.figures import draw
    from testbed.results import store
    from testbed.results.results import Results

    if arguments.resume:
        path = arguments.resume
    else:
        chosen = plan.load(arguments.plan)
        if arguments.cells:
            chosen = chosen.select(arguments.cells)
        if arguments.blocks:
            chosen = replace(chosen, blocks=arguments.blocks, target_width=None)
        default = chosen.preregistration.seed if chosen.preregistration else 1
        seed = default if arguments.seed is None else arguments.seed
        path = arguments.out or store.directory(chosen.name)
        if arguments.osv_kernel and arguments.guest in ("osv", "best"):
            kernels.find_osv(arguments.osv_kernel)  # raises Error before a directory is made
    places: Sequence[Place] = HERE
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
                finished = campaign.start(chosen, path, choice, seed, report, places)
    except KeyboardInterrupt:
        again = common.called(f"testbed run --resume {path}")
        print(f"testbed: interrupted, and all is taken down; go on with {again}", file=sys.stderr)
        return 130
    with finished:
        finished.derive()
        results = Results(finished)
        drawn = draw.draw(results)
        crate.write(results)
    print_table(results, arguments.json)
    pictures = [file for file in drawn if file.suffix == ".png"]
    print(
        f"\n{len(pictures)} figures, as PNG and PDF: {path / 'figures'}"
        f"\nall of it in one file: {common.called(f'testbed report {path}')}",
        file=sys.stderr,
    )
    return 1 if any(t.status == "failed" for t in results.trials) else 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value
