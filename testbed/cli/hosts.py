"""Commands about this machine and other hosts: `doctor`, `hosts`, `clean`."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from testbed.cli.common import Commands, add_hosts, called, chosen
from testbed.model.errors import Error

if TYPE_CHECKING:
    from testbed.doctor import Finding
    from testbed.plan import Plan


def add(commands: Commands) -> None:
    """Add the commands about machines."""
    doctor = commands.add_parser(
        "doctor", help="check what this machine can run, and say how to install what is missing"
    )
    doctor.set_defaults(call=_doctor)
    doctor.add_argument("--json", action="store_true")
    doctor.add_argument(
        "--plan",
        default="paper",
        metavar="NAME|FILE.toml",
        help="the plan whose intervals are estimated (default: %(default)s)",
    )
    doctor.add_argument(
        "--fast", action="store_true", help="without the ten seconds of trials of that estimate"
    )
    add_hosts(doctor)

    hosts = commands.add_parser("hosts", help="show which hosts of an inventory can be reached")
    hosts.set_defaults(call=_hosts)
    hosts.add_argument("--json", action="store_true")
    add_hosts(hosts, required=True)

    clean = commands.add_parser(
        "clean", help="remove what killed runs left behind, and nothing else"
    )
    clean.set_defaults(call=_clean)


def _doctor(arguments: argparse.Namespace) -> int:
    from testbed import doctor, plan

    if chosen(arguments):
        return _doctor_of_hosts(arguments)
    wanted = plan.load(arguments.plan)
    findings = []
    for finding in doctor.probe():
        findings.append(finding)
        if not arguments.json:
            print(finding, flush=True)
    ready = doctor.ready(findings)
    if ready and not arguments.fast:
        findings.append(_noise(wanted))
        if not arguments.json:
            print(findings[-1], flush=True)
    if arguments.json:
        print(json.dumps([vars(f) for f in findings], indent=1))
    else:
        print(
            called(f"ready: '{doctor.next_command(findings)}' is next; ")
            + "degraded lines say what they cost"
            if ready
            else "not ready: what is missing has to be there first"
        )
    return 0 if ready else 1


def _noise(plan: Plan) -> Finding:
    """Finding about what else the machine does, and how narrow a plan's intervals get on it."""
    from testbed.campaigns import noise
    from testbed.doctor import Finding, State

    try:
        found = noise.measure()
    except (Error, OSError) as e:
        return Finding("quiet", State.DEGRADED, str(e), "how narrow intervals get is unknown")
    detail = f"{found.text(plan.blocks, plan.target_width)} (plan {plan.name})"
    if found.quiet:
        return Finding("quiet", State.FINE, detail)
    hint = "most trials are disturbed and run twice; end other programs, or take more blocks"
    return Finding("quiet", State.DEGRADED, detail, hint)


def _doctor_of_hosts(arguments: argparse.Namespace) -> int:
    from testbed import doctor
    from testbed.remote import survey

    options = ["--fast"] if arguments.fast else ["--plan", arguments.plan]
    well = True
    answers = {}
    for host, answer in survey.each(chosen(arguments), lambda h: survey.examine(h, *options)):
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


def _hosts(arguments: argparse.Namespace) -> int:
    from testbed.remote import survey

    reached = True
    answers = {}
    for host, seen in survey.each(chosen(arguments), survey.look):
        reached &= not isinstance(seen, Error)
        answers[host.name] = {"error": str(seen)} if isinstance(seen, Error) else vars(seen)
        if not arguments.json:
            print(seen if isinstance(seen, Error) else f"{host.name:<12} {seen}")
    if arguments.json:
        print(json.dumps(answers, indent=1))
    return 0 if reached else 1


def _clean(arguments: argparse.Namespace) -> int:
    from testbed.host import ledger

    removed = 0
    for removed, what in enumerate(ledger.clean(), start=1):  # noqa: B007
        print(f"removed {what}")
    print(f"{removed} things removed" if removed else "nothing was left behind")
    return 0
