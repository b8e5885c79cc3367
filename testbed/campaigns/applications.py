"""Runs applications: real programs in a pod, in the places of a cell's traffic agents.

The server, and the sidecar if there is one, are the programs of their workloads, and start with the
pod. The client's workload runs a shell at its control port, which is told the client's scripts: a
virtual machine could be told nothing else. What the client prints is read by the application's
regular expressions. A trial is held to the same checks as one of traffic agents.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial

from testbed.application import PARAMETERS, UNITS_US, Application, Client, Output, Server, fill
from testbed.campaigns import roles
from testbed.campaigns.observation import observing
from testbed.campaigns.trial import ANSWERED, finished
from testbed.datapaths.interface import Count, Datapath, Layout
from testbed.host import cgroups, facts
from testbed.images import programs
from testbed.model.addresses import CONTROL_PORT, alias, authority, guest_link, loopback, pod_link
from testbed.model.cells import Cell, Pair
from testbed.model.errors import Error
from testbed.model.manifest import Manifest, Program, Workload
from testbed.model.terms import Family, Runtime, Transport
from testbed.model.trials import Limit, Status, Trial
from testbed.pods.pod import Pod
from testbed.runtimes.interface import Prepared

SIDECAR = "native3"
"""Name of the sidecar's workload. No pair has it."""
FIRST_REQUESTS = 1000
"""Number of requests of the first run of a client that is told a number and not a time."""
GROWTH = 10
"""Factor between numbers of requests of two runs at most."""
RETRY_S = 0.2
LIMIT_S = 120.0
"""Time that a run of the client may take beyond its duration."""
STATUS = "client ended with status"
"""What the shell prints last, before the status."""


def unsupported(
    cell: Cell, application: Application, datapath: Datapath, guest: Prepared
) -> str | None:
    """Why an application cannot run in the pod of a cell, or None."""
    client, server = roles.ROLES[cell.pair]
    if "wasm" in cell.pair:
        return "a component of WASI runs nothing but itself"
    if client == server:
        return "a guest has one program: its client is another one's"
    if application.sidecar and cell.pair is Pair.GUEST_GUEST:
        return "a sidecar is native: its traffic with one of two guests would be measured"
    if datapath.server_addresses:
        return f"{datapath.name} goes to another host, and an application runs in one pod"
    runtime = guest.description.runtime
    if roles.number(client) and not guest.has_shell:
        return f"{runtime} runs one program, and no shell that starts a client"
    if roles.number(server) and not guest.has_shell and application.server.script:
        return f"{runtime} runs one program, and a shell starts this server"
    return _lacking(application)


def _lacking(application: Application) -> str | None:
    """Which of the application's programs this host lacks, or None."""
    try:
        for program in filter(None, (application.server, application.client, application.sidecar)):
            programs.find(program)
    except Error as e:
        return e.message
    return None


# --- workloads ------------------------------------------------------------------------------


def manifest(
    application: Application, pair: Pair, family: Family, datapath: Datapath, guest: Runtime
) -> Manifest:
    """Manifest of a pod whose workloads are the application's programs."""
    client, server = roles.ROLES[pair]
    at = partial(_listening, family=family, datapath=datapath)
    ports = {server: roles.port(server), client: CONTROL_PORT}
    found = {
        server: _server(application.server, at(server)),
        client: _client(application.client),
    }
    if application.sidecar:
        ports[SIDECAR] = roles.port(SIDECAR)
        to = {f"server_{k}": v for k, v in dialed(SIDECAR, server, family, datapath).items()}
        found[SIDECAR] = _server(application.sidecar, at(SIDECAR) | to)
    return Manifest(
        tuple(
            Workload(
                name,
                roles.runtime(name, guest),
                () if name == client else ((Transport.TCP, ports[name]),),
                cpus=(roles.cpu(name, alone=False),),
                control_port=ports[name],
                program=found[name],
            )
            for name in sorted(found, key=roles.port)
        )
    )


def dialed(client: str, server: str, family: Family, datapath: Datapath) -> dict[str, object]:
    """What one workload is told of another: `host`, `port` and both as `authority`.

    Natives dial a loopback address. Guests dial `localhost`, where servers listen by IPv4 alone; by
    IPv6 they dial the address that it has, as programs choose the family by themselves.
    """
    ends = [roles.number(name) for name in (client, server)]
    if not any(ends) or (datapath.localhost and not ends[0]):
        host = str(loopback(family))
    elif datapath.localhost and family is Family.IPV4:
        host = "localhost"
    elif datapath.localhost:
        has_loopback = datapath.layout is not Layout.NO_LOOPBACK
        host = str(alias(family) if has_loopback else loopback(family))
    else:
        host = str(guest_link(family, ends[1]) if ends[1] else pod_link(family))
    port = roles.port(server)
    return {"host": host, "port": port, "authority": authority(host, port)}


def _listening(name: str, family: Family, datapath: Datapath) -> dict[str, object]:
    """What a server is told: `bind`, `port` and both as `listen`."""
    is_local = datapath.localhost and not roles.number(name)
    bind, port = str(loopback(family)) if is_local else family.wildcard, roles.port(name)
    return {"bind": bind, "port": port, "listen": authority(bind, port)}


def _server(server: Server, values: Mapping[str, object]) -> Program:
    files = {path: fill(text, values) for path, text in server.files.items()}
    return Program(
        str(programs.define(server, files)),
        ("sh", "-c", fill(server.script, values)) if server.script else (),
        tuple(fill(word, values) for word in server.args),
        tuple((name, fill(value, values)) for name, value in server.env.items()),
        working_dir="/",
    )


def _client(client: Client) -> Program:
    """A shell for everyone who connects; what it prints goes back."""
    shell = ("busybox", "nc", "-ll", "-p", str(CONTROL_PORT), "-e", "/bin/sh")
    image = programs.define(client, client.files)
    return Program(str(image), shell, env=tuple(client.env.items()), working_dir="/")


# --- trials ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Printed:
    """What a client printed, in units of trials."""

    per_s: float
    requests: int
    errors: int
    quantities: Mapping[str, float]
    histogram_us: tuple[tuple[float, int], ...]


def read(output: Output, text: str, requests: int = 0) -> Printed:
    """Read what a client printed; `requests` is the number that it was told, if it was.

    Raises `Error` that says which pattern is not in the text.
    """

    def number(key: str) -> float:
        if found := re.search(getattr(output, key), text, re.MULTILINE):
            return float(found[1])
        raise Error(f"the client printed no {key}, but {_end_of(text)}")

    per_s = number("per_s")
    if per_s <= 0:
        raise Error("the client printed that no request was answered")
    unit_us = UNITS_US[output.unit]
    percentiles = ("p50", "p99") if output.p50 else ()
    quantities = {f"{key}_us": number(key) * unit_us for key in percentiles}
    histogram = Counter[float]()
    for taken, count in re.findall(output.histogram, text, re.MULTILINE) if not percentiles else ():
        histogram[float(taken) * unit_us] += int(count)
    errors = re.findall(output.errors, text, re.MULTILINE) if output.errors else ()
    return Printed(
        per_s,
        requests or int(number("requests")),
        sum(map(int, errors)),
        quantities,
        tuple(sorted(histogram.items())),
    )


def _end_of(text: str) -> str:
    """The last lines of what a client printed, as one line."""
    return (" | ".join(text.strip().splitlines()[-3:]) or "nothing")[-300:]


@dataclass(frozen=True)
class _Running:
    """An application in a pod, and the cell that is measured."""

    cell: Cell
    application: Application
    pod: Pod

    @property
    def ends(self) -> tuple[str, str]:
        """Names of client and server."""
        return roles.ROLES[self.cell.pair]

    def told(self) -> dict[str, object]:
        """What the client is told."""
        client, server = self.ends
        near = SIDECAR if self.application.sidecar else server
        where = dialed(client, near, self.cell.family, self.pod.datapath)
        return {**where, **{name: getattr(self.cell, name) for name in PARAMETERS}}

    def run(self, duration_s: float, requests: int) -> Printed:
        """Run the client once, for a time or a number of requests."""
        length = {"duration_s": math.ceil(duration_s), "requests": requests}
        text = self.shell(fill(self.application.client.run, self.told() | length), duration_s)
        return read(self.application.output, text, requests)

    def shell(self, script: str, duration_s: float = 0) -> str:
        """Run a script in the client's place, and return what it prints.

        Raises `Error` with its last lines if its status is not 0, or it does not end.
        """
        limit_s = (duration_s + LIMIT_S) * facts.slowness()
        order = f"(\n{script}\n) </dev/null 2>&1\nprintf '\\n{STATUS} %s\\n' $?\n"
        text = ""
        with self.pod.dial(self.ends[0], family=self.cell.family) as connection:
            connection.settimeout(limit_s)
            connection.sendall(order.encode())
            try:
                with connection.makefile(errors="replace") as lines:
                    for line in lines:
                        if line.startswith(STATUS):
                            if line.split()[-1] == "0":
                                return text
                            break
                        text += line
            except TimeoutError as e:
                said = f"was silent for {limit_s:g} s: it printed {_end_of(text)}"
                raise Error(f"the client {said}") from e
        raise Error(f"the client failed: it printed {_end_of(text)}")

    def begin(self, warmup_s: float, duration_s: float, limit_s: float) -> int:
        """Prepare and warm up. Returns the number of requests of the trial.

        It is tried again for a time if it fails: a server, or what is in between, may accept
        connections before it can answer.
        """
        deadline = time.monotonic() + limit_s * facts.slowness()
        while True:
            try:
                if self.application.client.prepare:
                    self.shell(fill(self.application.client.prepare, self.told()))
                return self._warm_up(warmup_s, duration_s)
            except (Error, OSError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(RETRY_S)

    def _warm_up(self, warmup_s: float, duration_s: float) -> int:
        """Run the client for at least `warmup_s`. Returns the number of requests of the trial."""
        if not self.application.client.counts:
            self.run(warmup_s, 0)
            return 0
        requests = FIRST_REQUESTS
        while (took_s := requests / self.run(warmup_s, requests).per_s) < warmup_s:
            requests = math.ceil(requests * min(GROWTH, 1.2 * warmup_s / took_s))
        return math.ceil(requests / took_s * duration_s)


def run(
    cell: Cell,
    application: Application,
    pod: Pod,
    guest: Prepared,
    warmup_s: float,
    duration_s: float,
) -> Trial:
    """Measure a cell in its application's pod. Errors are stored in the trial and not raised."""
    started = datetime.now(UTC).isoformat(timespec="milliseconds")
    running = _Running(cell, application, pod)
    trial = Trial(cell.id, 0, 0, Status.FAILED, started=started)
    try:
        pod.revive({cell.family})
        trial = replace(trial, dialed=str(running.told()["host"]))
        requests = running.begin(warmup_s, duration_s, guest.ready_limit_s)
        machines = [pod.guest_cgroup] if guest.description.accelerator else []
        with observing([partial(pod.carried, *running.ends)], [pod], machines) as seen:
            printed = running.run(duration_s, requests)
        memory = cgroups.resident_bytes(pod.cgroup.parent)
    except (Error, OSError) as e:
        return replace(trial, reason=str(e))
    took_s, elapsed_s = printed.requests / printed.per_s, seen.machine["elapsed_s"]
    is_slow = printed.per_s < ANSWERED * cell.rate_per_s
    return finished(
        trial,
        seen,
        fault=_fault(cell, application, printed, seen.carried[0]),
        value=printed.per_s,
        duration_s=took_s,
        active_s=elapsed_s,
        late_s=elapsed_s - took_s,
        transactions=printed.requests,
        errors=printed.errors,
        limited=Limit.SATURATED if is_slow else None,
        histogram_us=printed.histogram_us,
        quantities={**printed.quantities, "memory_bytes": float(memory)},
    )


def _fault(cell: Cell, application: Application, printed: Printed, carried: Count) -> str | None:
    """Why what a client printed cannot be used, or None."""
    if printed.errors:
        return f"{printed.errors} requests failed"
    least = printed.requests * max(application.request_bytes, cell.size_bytes)
    if carried.bytes < least:
        return f"the datapath carried {carried.bytes} bytes of {least}: traffic went elsewhere"
    return None
