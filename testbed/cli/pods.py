"""Commands about pods from Kubernetes manifests: `up`, `down`, `ps`, `logs`, `exec`, `trace`, …"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.cli.common import Commands, called
from testbed.model.errors import Error
from testbed.model.manifest import Tap

if TYPE_CHECKING:
    from testbed.pods.sandbox import Sandbox
    from testbed.pods.supervisor import Order


def add(commands: Commands) -> None:
    """Add the commands about pods."""
    _add_building(commands)
    _add_asking(commands)
    _add_top(commands)
    _add_trace(commands)
    _add_noded(commands)


UNTIL_READY = "Ctrl-C and SIGTERM take down what it builds, until it ends."


def _add_building(commands: Commands) -> None:
    up = commands.add_parser(
        "up",
        help="build the pods of a Kubernetes manifest, and leave them running",
        epilog="The runtime is chosen by annotation testbed/runtime.CONTAINER, or by "
        "runtimeClassName. A pod whose supervisor was killed gets a new one. " + UNTIL_READY,
    )
    attach = commands.add_parser(
        "attach",
        help="add a manifest's guests to a pod that somebody else made",
        epilog="Adds links, eBPF programs, guests, and rules by which these have the pod's "
        "addresses outside. Until they are removed, the namespace forwards for them. "
        + called("'testbed detach POD' removes them. ")
        + UNTIL_READY,
    )
    adopt = commands.add_parser(
        "adopt", help="start a new supervisor for a pod whose supervisor was killed"
    )
    up.set_defaults(call=_up)
    attach.set_defaults(call=_attach)
    adopt.set_defaults(call=_adopt)
    attach.add_argument(
        "--netns",
        type=Path,
        required=True,
        metavar="PATH",
        help="the pod's namespace: /run/netns/NAME or /proc/PID/ns/net",
    )
    attach.add_argument(
        "--cgroup",
        type=Path,
        metavar="PATH",
        help="cgroup (v2) of the pod's processes, for steer's fast path; without it they use lo",
    )
    attach.add_argument(
        "--tap",
        type=Tap.parse,
        action="append",
        default=[],
        metavar="NAME[,MAC][,ADDRESS…]",
        help="tap of a guest that somebody else boots, there or later; one for each guest of the "
        "manifest, whose images are not used then",
    )
    _pod(adopt, metavar="POD")
    for command in (up, attach):
        _add_manifests(command)
    for command in (up, attach, adopt):
        command.add_argument(
            "--wait",
            type=float,
            metavar="S",
            help="how long to wait for the pods to be ready (default: 60)",
        )


def _add_manifests(command: argparse.ArgumentParser) -> None:
    """Add the arguments that say which pods to build, and how."""
    command.add_argument(
        "manifests",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="v1 Pods, in YAML; - is standard input",
    )
    command.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="NAME=IMAGE",
        help="take this image for what a manifest calls NAME (docker-archive:FILE, "
        "oci-archive:FILE, oci:FOLDER, a folder or tar of a root file system, or host:PROGRAM); "
        "nothing is pulled",
    )
    command.add_argument(
        "--image-map",
        type=Path,
        metavar="FILE",
        help='the same from a TOML file with lines "NAME" = "IMAGE"',
    )
    command.add_argument(
        "--datapath",
        default="steer",
        metavar="NAME",
        help="datapath that makes localhost work (default: %(default)s)",
    )
    command.add_argument("--osv-kernel", type=Path, metavar="PATH", help="as for testbed run")


def _add_asking(commands: Commands) -> None:
    ps = commands.add_parser("ps", help="list pods and their workloads")
    ps.set_defaults(call=_ps)
    ps.add_argument("--json", action="store_true")

    for name, call, text in (
        ("describe", _describe, "show a pod's links, addresses, programs, counters and events"),
        ("logs", _logs, "print the output of a pod's workloads, or a guest's console"),
        ("exec", _exec, "run a command inside a workload (exec POD -- COMMAND)"),
        ("down", _down, "take pods down"),
        ("detach", _down, "remove guests that were attached to somebody else's pod"),
    ):
        command = commands.add_parser(name, help=text)
        command.set_defaults(call=call)
        _pod(command, metavar="POD", nargs={"down": "*", "detach": "+"}.get(name))
        if name in ("logs", "exec"):
            command.add_argument("-c", "--container", metavar="NAME", help="name of the workload")
        if name == "logs":
            command.add_argument("-f", "--follow", action="store_true")
        if name == "exec":
            command.add_argument(
                "-i", "--stdin", action="store_true", help="pass input on, as is always done"
            )
            command.add_argument(
                "-t", "--tty", action="store_true", help="give the command a terminal"
            )
            command.add_argument("words", nargs="+", metavar="COMMAND")
        if name == "down":
            command.add_argument("--all", action="store_true", help="all pods of this machine")
        if name == "describe":
            command.add_argument("--json", action="store_true")


def _pod(command: argparse.ArgumentParser, **options: Any) -> None:
    """Add an argument that names pods, with completion."""

    def running(**_: object) -> list[str]:
        from testbed.pods import control

        return control.names()

    argument = command.add_argument("pod", **options)
    argument.completer = running  # type: ignore[attr-defined]


def _up(arguments: argparse.Namespace) -> int:
    return _start(_ordered(arguments), arguments.wait)


def _attach(arguments: argparse.Namespace) -> int:
    from testbed.pods.sandbox import Sandbox

    cgroup = arguments.cgroup and arguments.cgroup.absolute()
    [order] = _ordered(arguments, Sandbox(arguments.netns.absolute(), cgroup))
    if arguments.tap:
        order = replace(order, spec=order.spec.on_taps(arguments.tap))
    return _start([order], arguments.wait)


def _adopt(arguments: argparse.Namespace) -> int:
    from testbed.pods import supervisor

    return _start([supervisor.of_orphan(arguments.pod)], arguments.wait, adopts=True)


def _ordered(arguments: argparse.Namespace, sandbox: Sandbox | None = None) -> list[Order]:
    from testbed import runtimes
    from testbed.host import nft
    from testbed.pods import kubernetes
    from testbed.pods.kubernetes.images import of_user
    from testbed.pods.supervisor import Order
    from testbed.runtimes.interface import Options

    options = Options(osv_kernel=arguments.osv_kernel)
    best = functools.cache(lambda: runtimes.best(replace(options, say=_say)))
    images = of_user(arguments.image, arguments.image_map)
    specs = kubernetes.read(arguments.manifests, best, images=images)
    if sandbox and len(specs) > 1:
        raise Error(f"{len(specs)} pods, for one namespace", hint="give a manifest of one pod")
    for spec in specs:
        for warning in spec.warnings:
            _say(warning)
    for name in (pair.partition("=")[0] for pair in arguments.image):
        if name not in images.used:
            _say(f"--image {name}: no container has this image")
    if (why := nft.unsupported()) and not sandbox:
        _say(f"pods get no addresses of their own: {why}")
    return [Order(spec, arguments.datapath, options, sandbox) for spec in specs]


def _say(line: str) -> None:
    print(f"testbed: {called(line)}", file=sys.stderr)


def _start(orders: list[Order], patience_s: float | None, *, adopts: bool = False) -> int:
    from testbed.host import facts
    from testbed.pods import supervisor

    with supervisor.Starting(_say) as starting:
        for order in orders:
            starting.start(order, adopts=adopts)
        starting.wait_built()
        unready = starting.wait(60 * facts.slowness() if patience_s is None else patience_s)
    for line in (*unready, *starting.unserved()):
        _say(line)
    if unready:
        return 1
    for order in orders:
        print(f"pod {order.spec.name} is up")
    return 0


def _ps(arguments: argparse.Namespace) -> int:
    from testbed.pods import control

    found = control.all()
    if arguments.json:
        print(json.dumps(found, indent=1))
        return 0
    head = (
        "POD",
        "IP",
        "WORKLOAD",
        "RUNTIME",
        "STATE",
        "READY",
        "RESTARTS",
        "PORTS",
        "ADDRESSES",
        "DATAPATH",
    )
    rows = [head] + [
        (
            p["name"],
            ",".join(p["addresses"]) or "-",
            w["name"],
            w["runtime"],
            w["state"],
            "yes" if w["ready"] else "no",
            str(w["restarts"]),
            ",".join(w["ports"]) or "-",
            ",".join(w["addresses"]),
            p["datapath"],
        )
        for p in found
        for w in p["workloads"]
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    for pod in found:
        if pod["supervisor"] is None:
            _say(
                f"the supervisor of pod {pod['name']} was killed, and the pod is as it was then; "
                f"testbed adopt {pod['name']}"
            )
    return 0


def _down(arguments: argparse.Namespace) -> int:
    from concurrent.futures import ThreadPoolExecutor

    from testbed.pods import control

    names = arguments.pod
    if arguments.command == "down" and arguments.all == bool(names):
        raise Error("down takes either names of pods or --all")
    if not names and not (names := control.names()):
        print("no pod is up")
        return 0
    if arguments.command == "detach":
        for name in names:
            if not control.status(name)["sandbox"]:
                raise Error(f"pod {name!r} was not attached", hint=f"testbed down {name}")
    with ThreadPoolExecutor(len(names)) as pool:
        for name, _ in zip(names, pool.map(control.down, names), strict=True):
            print(f"pod {name} is down")
    return 0


def _logs(arguments: argparse.Namespace) -> int:
    from testbed.pods import control

    chosen = control.workloads(arguments.pod, arguments.container)
    files = [w["log"] for w in chosen if arguments.follow or Path(w["log"]).exists()]
    if files:
        sys.stdout.flush()
        follow = ["--follow=name", "--retry"] if arguments.follow else []
        os.execvp("tail", ["tail", "--quiet", *follow, "--lines=+1", *files])
    return 0


def _exec(arguments: argparse.Namespace) -> int:
    from testbed.pods import control

    chosen = control.workloads(arguments.pod, arguments.container)
    workload = chosen[0]
    if "closed" in workload:
        raise Error(
            workload["closed"],
            hint=f"see what it prints: testbed logs {arguments.pod} -c {workload['name']}",
        )
    enter = workload["enter"]
    if arguments.tty:
        if sys.stdin.isatty():
            enter = workload["enter_terminal"]
        else:
            _say("standard input is no terminal, and the command gets none")
    os.execvp(enter[0], [*enter, *arguments.words])


def _describe(arguments: argparse.Namespace) -> int:
    from testbed.pods import control

    found = control.describe(arguments.pod)
    if arguments.json:
        print(json.dumps(found, indent=1))
        return 0
    found["addresses"] = " ".join(found["addresses"]) or "-"
    for key in ("name", "datapath", "addresses", "ready", "since", "supervisor", "cgroup"):
        print(f"{key:<10} {found[key]}")
    if found["sandbox"]:
        print(f"{'joined':<10} {found['sandbox']['netns']} {found['sandbox']['id']}")
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
    for tap in found["taps"]:
        known = " ".join((tap["mac"], *tap["addresses"])).strip() or "nothing is known of its guest"
        print(f"\n{tap['name']}: {known}{'' if tap['connected'] else ' (not there)'}")
        for key in ("from_guest", "to_guest", "refused", "unreachable"):
            print(f"  {key:<12} {tap[key]['packets']} packets, {tap[key]['bytes']} bytes")
    print("\ntraffic")
    for flow in found["traffic"]:
        ends = f"{flow['client']}→{flow['server']}"
        print(f"  {ends:<16} {flow['packets']} packets, {flow['bytes']} bytes")
    print("\ncounters")
    for reason, count in found["counters"].items():
        print(f"  {reason:<16} {count['packets']} packets, {count['bytes']} bytes")
    print("\nevents")
    for event in found["events"]:
        print(f"  {event}")
    return 0


def _add_trace(commands: Commands) -> None:
    trace = commands.add_parser(
        "trace",
        help="show each packet at each of the datapath's programs, and what became of it",
        epilog="Ends with Ctrl-C. The pod's programs are slower while it runs, and only then.",
    )
    trace.set_defaults(call=_trace)
    _pod(trace, metavar="POD")
    trace.add_argument("--port", type=int, metavar="N", help="only packets from or to a port")
    trace.add_argument(
        "--pcap",
        type=Path,
        metavar="FILE",
        help="also write the packets as pcapng, before and after each program",
    )
    trace.add_argument("--count", type=int, metavar="N", help="end after N events")
    trace.add_argument("--json", action="store_true", help="print a line of JSON for each event")


def _trace(arguments: argparse.Namespace) -> int:
    from testbed.pods.observe import pcapng, trace

    with ExitStack() as stack:
        tracing = stack.enter_context(trace.opened(arguments.pod))
        capture = None
        if arguments.pcap:
            capture = pcapng.Writer(stack.enter_context(arguments.pcap.open("wb")))
        print(f"tracing {arguments.pod}; end it with Ctrl-C", file=sys.stderr, flush=True)
        events = (
            e for e in tracing.events() if arguments.port is None or e.has_port(arguments.port)
        )
        with suppress(KeyboardInterrupt):
            for event in islice(events, arguments.count):
                print(json.dumps(event.data()) if arguments.json else event, flush=True)
                if capture:
                    trace.write(capture, event)
        if tracing.missed:
            _say(f"{tracing.missed} events were missed: too many at once")
    return 0


def _add_top(commands: Commands) -> None:
    top = commands.add_parser(
        "top", help="show packets and bits per second of each pair of workloads, and counters"
    )
    top.set_defaults(call=_top)
    _pod(top, metavar="POD", nargs="*", help="default: all pods")
    top.add_argument(
        "--interval",
        type=float,
        default=1.0,
        metavar="S",
        help="seconds between two readings (default: %(default)s)",
    )
    top.add_argument(
        "--once",
        action="store_true",
        help="print one interval, and end, as it does if its output is no terminal",
    )
    top.add_argument("--json", action="store_true", help="print one interval as JSON, and end")


def _top(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.live import Live

    from testbed.pods import control
    from testbed.pods.observe import top

    def chosen() -> list[str]:
        return arguments.pod or control.names()

    before = top.snapshot(chosen())
    if arguments.once or arguments.json or not sys.stdout.isatty():
        time.sleep(arguments.interval)
        found = top.rates(before, top.snapshot(chosen()))
        if arguments.json:
            print(json.dumps(top.data(found), indent=1))
        else:
            Console().print(top.table(found))
        return 0
    with suppress(KeyboardInterrupt), Live(screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(arguments.interval)
            now = top.snapshot(chosen())
            live.update(top.table(top.rates(before, now)), refresh=True)
            before = now
    return 0


def _add_noded(commands: Commands) -> None:
    noded = commands.add_parser(
        "noded",
        help="run the node daemon, which carries out the calls of the CNI plugin testbed-cni",
        epilog="deploy/testbed-noded.service starts it by systemd. Pods and their supervisors go "
        "on when it ends; it adopts those whose supervisor was killed.",
    )
    noded.set_defaults(call=_noded)
    noded.add_argument(
        "--plugin",
        type=Path,
        metavar="DIR",
        help="first put the plugin there: the container runtime's folder, often /opt/cni/bin",
    )
    noded.add_argument(
        "--network",
        type=Path,
        metavar="DIR",
        help="put the plugin into the first list of plugins there, and again whenever somebody "
        "writes that list anew: the container runtime's folder, often /etc/cni/net.d",
    )
    noded.add_argument(
        "--remove",
        action="store_true",
        help="take the plugin out of the lists of --network and the folder --plugin, and end",
    )
    noded.add_argument(
        "--datapath",
        default="steer",
        help="hold the programs of this one ready (default: steer)",
    )


def _noded(arguments: argparse.Namespace) -> int:
    from testbed.pods import networks, noded

    if arguments.remove:
        for changed in noded.remove(arguments.plugin, arguments.network):
            print(f"{changed} {'lists testbed-cni no longer' if changed.exists() else 'is gone'}")
        return 0
    if arguments.plugin:
        print(f"{noded.plugin(arguments.plugin)} is there", flush=True)
    if arguments.network and (extended := networks.add(arguments.network)):
        print(f"{extended} lists testbed-cni", flush=True)
    noded.serve(
        arguments.datapath, lambda: print("calls are answered", flush=True), arguments.network
    )
    return 0
