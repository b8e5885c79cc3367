"""The command line: arguments, printing, exit codes. Everything else is imported when it is needed.

Exit codes: 0 done; 1 it did not work (some cells failed, doctor found something missing); 2 usage;
3 could not run at all; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.model import Error, Runtime

if TYPE_CHECKING:
    from testbed.campaign import Progress
    from testbed.store import Store


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

    run = commands.add_parser(
        "run", help="run a plan: build pods, measure, draw figures, take everything down",
        epilog="An interrupted run goes on with --resume DIR.",
    )  # fmt: skip
    run.set_defaults(call=_run)
    run.add_argument("--plan", default="standard", metavar="NAME|FILE.toml",
                     help="a plan of experiments/ or a file (default: %(default)s)")  # fmt: skip
    run.add_argument("--cells", action="append", metavar="GLOB",
                     help="only cells like 'capture/*/ipv6/*' (may be repeated)")  # fmt: skip
    guests = ["best", *(r for r in Runtime if r.is_guest)]
    run.add_argument("--guest", default="best", choices=guests,
                     help="what runs guests (default: the best that is there)")  # fmt: skip
    run.add_argument("--osv-kernel", type=Path, metavar="PATH",
                     help="OSv kernel or tree (default: cache, else nightly release)")  # fmt: skip
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

    doctor = commands.add_parser(
        "doctor", help="what this machine can run, and what to type where it can't"
    )
    doctor.set_defaults(call=_doctor)
    doctor.add_argument("--json", action="store_true")

    clean = commands.add_parser(
        "clean", help="take down what killed runs left behind, and nothing else"
    )
    clean.set_defaults(call=_clean)

    image = commands.add_parser("image", help="compose OSv images, and look into them")
    kinds = image.add_subparsers(dest="kind", required=True, metavar="build|inspect")
    build = kinds.add_parser("build", help="compose an image from a definition in osv/")
    build.set_defaults(call=_image_build)
    build.add_argument("definition", help="name in osv/, or a TOML file")
    build.add_argument("--output", "-o", type=Path, required=True, metavar="FILE")
    build.add_argument("--stock-hosts", action="store_true", help="leave out the hosts patch")
    inspect = kinds.add_parser("inspect", help="list an image's files")
    inspect.set_defaults(call=_image_inspect)
    inspect.add_argument("image", type=Path)
    inspect.add_argument("--json", action="store_true")
    return top


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


# --- commands -------------------------------------------------------------------------------


def _run(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from testbed import campaign, doctor, figures, plan, store

    if arguments.resume:
        path = arguments.resume
    else:
        chosen = plan.load(arguments.plan)
        if arguments.cells:
            chosen = chosen.select(arguments.cells)
        if arguments.blocks:
            chosen = replace(chosen, blocks=arguments.blocks)
        path = arguments.out or store.directory(chosen.name)
    doctor.preflight()
    try:
        with _progress() as report:
            if arguments.resume:
                finished = campaign.resume(path, arguments.keep, report)
            else:
                choice = campaign.Choice(arguments.guest, arguments.osv_kernel, arguments.keep)
                finished = campaign.start(chosen, path, choice, arguments.seed, report)
    except KeyboardInterrupt:
        print(f"testbed: interrupted, and all is taken down; go on with --resume {path}",
              file=sys.stderr)  # fmt: skip
        return 130
    with finished:
        finished.derive()
        drawn = figures.draw(finished)
    _print_table(finished, arguments.json)
    print(f"\nfigures: {' '.join(str(f) for f in drawn if f.suffix == '.png')}", file=sys.stderr)
    return 1 if any(t.status == "failed" for t in finished.trials()) else 0


def _figures(arguments: argparse.Namespace) -> int:
    from testbed import figures, store

    for path in figures.draw(store.open(arguments.directory)):
        print(path)
    return 0


def _table(arguments: argparse.Namespace) -> int:
    from testbed import store

    _print_table(store.open(arguments.directory), arguments.json)
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from testbed import compare, figures, store

    before, after = store.open(arguments.before), store.open(arguments.after)
    rows = compare.compare(before, after, arguments.band)
    status = compare.exit_status(rows)
    drawn = []
    if any(row.ratio.blocks for row in rows):
        folder = after.path / "figures"
        drawn = figures.draw_comparison(rows, before, after, arguments.band, folder)
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


def _doctor(arguments: argparse.Namespace) -> int:
    from testbed import doctor

    findings = []
    for finding in doctor.probe():
        findings.append(finding)
        if not arguments.json:
            print(finding, flush=True)
    if arguments.json:
        print(json.dumps([vars(f) for f in findings], indent=1))
    return 0 if doctor.ready(findings) else 1


def _clean(arguments: argparse.Namespace) -> int:
    from testbed import ledger

    removed = 0
    for removed, what in enumerate(ledger.clean(), start=1):  # noqa: B007
        print(f"removed {what}")
    print(f"{removed} things removed" if removed else "nothing was left behind")
    return 0


def _image_build(arguments: argparse.Namespace) -> int:
    from testbed import images, kernels

    name = arguments.definition
    path = Path(name) if name.endswith(".toml") else kernels.OSV / f"{name}.toml"
    image = images.build(path, arguments.output, hosts_patch=not arguments.stock_hosts)
    print(f"{arguments.output}: {image.size_bytes} bytes, sha256 {image.sha256}")
    return 0


def _image_inspect(arguments: argparse.Namespace) -> int:
    from testbed import images

    found = images.inspect(arguments.image)
    if arguments.json:
        print(json.dumps(found, indent=1))
        return 0
    print(f"{found['format']} image, {found['size_bytes']} bytes, sha256 {found['sha256']}")
    print(f"localhost is {' and '.join(found['localhost']) or 'unknown'}")
    for path, node in found["files"].items():
        target = f" -> {node['target']}" if "target" in node else ""
        print(f"{node.get('size_bytes', node['type']):>10}  {path}{target}")
    return 0


# --- printing -------------------------------------------------------------------------------


def _print_table(campaign: Store, as_json: bool) -> None:
    from testbed import report

    if as_json:
        print(json.dumps(report.data(campaign), indent=1))
        return
    from rich.console import Console

    console = Console()
    console.print(report.table(campaign, console.width))


@contextmanager
def _progress() -> Iterator[Callable[[Progress], None]]:
    """What runs now, how far it is and how long still: one line on a terminal, else many."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Display

    console = Console(stderr=True)
    if not console.is_terminal:
        said = ""

        def say(now: Progress) -> None:
            nonlocal said
            if now.text != said:
                said = now.text
                print(f"[{now.done}/{now.total}] {said}{_left(now.left_s)}", file=sys.stderr)

        yield say
        return
    columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Display(*columns, console=console) as display:
        task = display.add_task("starting", total=None)

        def show(now: Progress) -> None:
            display.update(task, completed=now.done, total=now.total,
                           description=f"{now.text}{_left(now.left_s)}")  # fmt: skip

        yield show


def _left(seconds: float | None) -> str:
    return "" if seconds is None else f", {seconds // 60:.0f}:{seconds % 60:02.0f} left"


if __name__ == "__main__":
    sys.exit(main())
