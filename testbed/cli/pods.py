"""Commands of pods that somebody builds by hand."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from testbed.cli.common import Commands
from testbed.model import Error


def add(commands: Commands) -> None:
    """Of pods by hand."""
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
