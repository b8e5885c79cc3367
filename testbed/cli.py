"""The command line: arguments, printing, exit codes. Everything else is imported when it is needed.

Exit codes: 0 done; 1 it did not work (some cells failed, doctor found something missing); 2 usage;
3 could not run at all; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.model import Error, Family, Runtime

if TYPE_CHECKING:
    from rich.table import Table

    from testbed.campaign import Progress
    from testbed.remote import Host
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
    _add_hosts(run)

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

    conformance = commands.add_parser(
        "conformance", help="check what programs may rely on at localhost, through any datapath",
        epilog="Exit status: 0 nothing failed, 1 some checks failed, 3 could not run.",
    )  # fmt: skip
    conformance.set_defaults(call=_conformance)
    conformance.add_argument("--datapath", nargs="+", metavar="NAME",
                             help="default: all that make localhost work")  # fmt: skip
    conformance.add_argument("--guest", default="best", choices=guests,
                             help="what runs guests (default: the best that is there)")  # fmt: skip
    conformance.add_argument(
        "--osv-kernel",
        type=Path,
        metavar="PATH",
        help="OSv kernel or tree (default: cache, else nightly release)",
    )
    conformance.add_argument("--family", nargs="+", type=Family, choices=tuple(Family))
    conformance.add_argument("--check", action="append", metavar="GLOB",
                             help="only checks like 'datagram-*' (may be repeated)")  # fmt: skip
    conformance.add_argument("--list", action="store_true", help="list the checks, and run none")
    conformance.add_argument("--json", action="store_true", help="print the results as JSON")
    conformance.add_argument("--junit", type=Path, metavar="FILE",
                             help="write the results as JUnit's XML, too")  # fmt: skip
    conformance.add_argument("--netns", type=Path, metavar="PATH",
                             help="a pod that is there already: its namespace ...")  # fmt: skip
    conformance.add_argument("--control", metavar="ADDRESS[:PORT]",
                             help="... and where its guest's agent takes orders")  # fmt: skip

    doctor = commands.add_parser(
        "doctor", help="what this machine can run, and what to type where it can't"
    )
    doctor.set_defaults(call=_doctor)
    doctor.add_argument("--json", action="store_true")
    _add_hosts(doctor)

    hosts = commands.add_parser("hosts", help="who is there of an inventory's hosts")
    hosts.set_defaults(call=_hosts)
    hosts.add_argument("--json", action="store_true")
    _add_hosts(hosts, required=True)

    clean = commands.add_parser(
        "clean", help="take down what killed runs left behind, and nothing else"
    )
    clean.set_defaults(call=_clean)

    up = commands.add_parser(
        "up", help="build the pods of a Kubernetes manifest, and leave them standing",
        epilog="Which runtime: annotation testbed/runtime.CONTAINER, or runtimeClassName.",
    )  # fmt: skip
    up.set_defaults(call=_up)
    up.add_argument("manifest", type=Path, metavar="FILE", help="v1 Pods, in YAML")
    up.add_argument("--datapath", default="steer", metavar="NAME",
                    help="what makes localhost work (default: %(default)s)")  # fmt: skip
    up.add_argument("--osv-kernel", type=Path, metavar="PATH", help="as for run")
    up.add_argument("--wait", type=float, default=60, metavar="S",
                    help="for the pods to be ready (default: %(default)s)")  # fmt: skip

    ps = commands.add_parser("ps", help="list pods and their workloads")
    ps.set_defaults(call=_ps)
    ps.add_argument("--json", action="store_true")

    for name, call, text in (
        ("describe", _describe, "a pod's wiring: links, addresses, programs, counters, events"),
        ("logs", _logs, "what a pod's workloads printed; a guest's console"),
        ("exec", _exec, "run a command inside a workload (exec POD -- COMMAND)"),
        ("down", _down, "take pods down"),
    ):
        command = commands.add_parser(name, help=text)
        command.set_defaults(call=call)
        command.add_argument("pod", metavar="POD", nargs="+" if name == "down" else None)
        if name in ("logs", "exec"):
            command.add_argument("-c", "--container", metavar="NAME", help="which workload")
        if name == "logs":
            command.add_argument("-f", "--follow", action="store_true")
        if name == "exec":
            command.add_argument("words", nargs="+", metavar="COMMAND")
        if name == "describe":
            command.add_argument("--json", action="store_true")

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


def _add_hosts(command: argparse.ArgumentParser, required: bool = False) -> None:
    command.add_argument(
        "--hosts", type=Path, metavar="FILE", required=required,
        help="other hosts, by SSH (see experiments/hosts.example.toml)",
    )  # fmt: skip
    command.add_argument(
        "--on", nargs="+", default=[], metavar="NAME",
        help="only those with one of these names or labels",
    )  # fmt: skip


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
            chosen = replace(chosen, blocks=arguments.blocks, target_width=None)
        path = arguments.out or store.directory(chosen.name)
    places: Sequence[campaign.Place] = campaign.HERE
    if hosts := _chosen(arguments):
        from testbed import remote

        places = [remote.Place(host) for host in hosts]
    else:
        doctor.preflight()
    try:
        with _progress() as report:
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


def _report(arguments: argparse.Namespace) -> int:
    from testbed import page, store

    file = arguments.output or arguments.directory / "report.html"
    page.write(store.open(arguments.directory), file)
    print(file)
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


def _chosen(arguments: argparse.Namespace) -> Sequence[Host]:
    """The hosts that are meant; none: this machine. Raises `Error` for --on without --hosts."""
    if arguments.hosts is None:
        if arguments.on:
            raise Error("--on chooses among the hosts of an inventory", "add --hosts FILE")
        return ()
    from testbed import remote

    return remote.choose(remote.load(arguments.hosts), arguments.on)


def _hosts(arguments: argparse.Namespace) -> int:
    from testbed import remote

    reached = True
    answers = {}
    for host, seen in remote.each(_chosen(arguments), remote.look):
        reached &= not isinstance(seen, Error)
        answers[host.name] = {"error": str(seen)} if isinstance(seen, Error) else vars(seen)
        if not arguments.json:
            print(seen if isinstance(seen, Error) else f"{host.name:<12} {seen}")
    if arguments.json:
        print(json.dumps(answers, indent=1))
    return 0 if reached else 1


def _doctor_of_hosts(arguments: argparse.Namespace) -> int:
    from testbed import doctor, remote

    well = True
    answers = {}
    for host, answer in remote.each(_chosen(arguments), remote.examine):
        if isinstance(answer, Error):
            answers[host.name], lines, well = {"error": str(answer)}, [str(answer)], False
        else:
            found = [doctor.Finding(**f | {"state": doctor.State(f["state"])}) for f in answer]
            answers[host.name], lines = answer, [f"{host.name:<12} {f}" for f in found]
            well &= doctor.ready(found)
        if not arguments.json:
            print(*lines, sep="\n")
    if arguments.json:
        print(json.dumps(answers, indent=1))
    return 0 if well else 1


def _conformance(arguments: argparse.Namespace) -> int:
    from testbed import campaign, conformance, datapaths
    from testbed.conformance import output, suite

    globs = tuple(arguments.check or ("*",))
    if arguments.list:
        _print(output.listing(conformance.checks(globs)))
        return 0
    foreign = arguments.netns is not None
    if foreign != (arguments.control is not None):
        raise Error("a pod that is there already needs both --netns and --control")
    localhost = [name for name in datapaths.NAMES if datapaths.get(name).localhost]
    choice = suite.Choice(
        tuple(arguments.datapath or (["foreign"] if foreign else localhost)), arguments.guest,
        tuple(arguments.family or Family), globs, arguments.osv_kernel,
        netns=arguments.netns, control=arguments.control or "",
    )  # fmt: skip
    results = []
    with _progress() as report:
        for event in suite.run(choice):
            if isinstance(event, conformance.Result):
                results.append(event)
            else:
                report(campaign.Progress(event.text, event.done, event.total, None))
    if arguments.junit:
        arguments.junit.write_bytes(output.junit(results))
    if arguments.json:
        print(json.dumps(output.as_json(results), indent=1))
    else:
        _print(output.matrix(results))
        for status in (conformance.Status.UNSUPPORTED, conformance.Status.FAIL):
            for line in output.reasons(results, status):
                print(f"{status}: {line}")
    return 1 if any(r.status is conformance.Status.FAIL for r in results) else 0


def _print(table: Table) -> None:
    from rich.console import Console

    Console().print(table)


def _doctor(arguments: argparse.Namespace) -> int:
    from testbed import doctor

    if _chosen(arguments):
        return _doctor_of_hosts(arguments)
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


def _up(arguments: argparse.Namespace) -> int:
    from testbed import keeper, kubernetes, runtimes

    specs = kubernetes.read(arguments.manifest)
    for spec in specs:
        for warning in spec.warnings:
            print(f"testbed: {warning}", file=sys.stderr)
    options = runtimes.Options(osv_kernel=arguments.osv_kernel)
    with keeper.Starting() as starting:
        for spec in specs:
            starting.start(spec, arguments.datapath, options)
        unready = starting.wait(arguments.wait)
    for line in unready:
        print(f"testbed: {line}", file=sys.stderr)
    return 1 if unready else 0


def _ps(arguments: argparse.Namespace) -> int:
    from testbed import pods

    found = pods.all()
    if arguments.json:
        print(json.dumps(found, indent=1))
        return 0
    head = ("POD", "WORKLOAD", "RUNTIME", "STATE", "READY", "RESTARTS", "PORTS", "ADDRESSES",
            "DATAPATH")  # fmt: skip
    rows = [head] + [
        (p["name"], w["name"], w["runtime"], w["state"], "yes" if w["ready"] else "no",
         str(w["restarts"]), ",".join(w["ports"]) or "-", ",".join(w["addresses"]), p["datapath"])
        for p in found for w in p["workloads"]
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    return 0


def _down(arguments: argparse.Namespace) -> int:
    from concurrent.futures import ThreadPoolExecutor

    from testbed import pods

    with ThreadPoolExecutor(len(arguments.pod)) as pool:
        for name, _ in zip(arguments.pod, pool.map(pods.down, arguments.pod), strict=True):
            print(f"pod {name} is down")
    return 0


def _logs(arguments: argparse.Namespace) -> int:
    from testbed import pods

    chosen = pods.workloads(arguments.pod, arguments.container)
    files = [w["log"] for w in chosen if arguments.follow or Path(w["log"]).exists()]
    if files:
        sys.stdout.flush()
        follow = ["--follow=name", "--retry"] if arguments.follow else []
        os.execvp("tail", ["tail", "--quiet", *follow, "--lines=+1", *files])
    return 0


def _exec(arguments: argparse.Namespace) -> int:
    from testbed import pods

    chosen = pods.workloads(arguments.pod, arguments.container)
    workload = chosen[0]
    if "closed" in workload:
        raise Error(workload["closed"])
    os.execvp(workload["enter"][0], [*workload["enter"], *arguments.words])


def _describe(arguments: argparse.Namespace) -> int:
    from testbed import pods

    found = pods.describe(arguments.pod)
    if arguments.json:
        print(json.dumps(found, indent=1))
        return 0
    for key in ("name", "datapath", "ready", "since", "keeper", "cgroup"):
        print(f"{key:<10} {found[key]}")
    for w in found["workloads"]:
        print(f"\n{w['name']} ({w['runtime']}): {w['state']}{', ready' if w['ready'] else ''}")
        for key in ("addresses", "ports", "pid", "restarts", "exit_status", "log"):
            shown = " ".join(w[key]) if isinstance(w[key], list) else w[key]
            print(f"  {key:<12} {'-' if shown in (None, '') else shown}")
    for link in found["links"]:
        print(f"\n{link['netns']}: {link['name']} {link['mac']}{'' if link['up'] else ' (down)'}")
        for key in ("addresses", "programs"):
            if link[key]:
                print(f"  {key:<12} {' '.join(link[key])}")
    print("\ncounters")
    for reason, count in found["counters"].items():
        print(f"  {reason:<16} {count['packets']} packets, {count['bytes']} bytes")
    print("\nevents")
    for event in found["events"]:
        print(f"  {event}")
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
