"""The process that keeps one pod which somebody wrote: it builds it, and lives as long as the pod.

It starts what ended again, asks workloads whether they are ready and alive, and answers at the
pod's socket (`pods`), whose name is free only once: no two pods of one name. What it made it takes
down at its end; if it was killed, `testbed clean` does. Mending links is left to `supervisor`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import http.client
import json
import os
import select
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pyroute2 import IPRoute

from testbed import bpf, datapaths, images, netlink, pods, process, runtimes
from testbed.ledger import Owner
from testbed.manifest import Probe, Restart, Spec, Workload
from testbed.model import Error, Family, Runtime, Transport, alias, guest_link, loopback
from testbed.pod import Pod
from testbed.runtimes import Options, Prepared
from testbed.supervisor import Supervisor

FIRST_DELAY_S, LAST_DELAY_S = 0.5, 60.0
"""Before a restart. It doubles each time, and starts anew after a run of `LAST_DELAY_S`. Kubernetes
begins with 10 s and ends at 5 min; here somebody is watching."""
EAGER_PERIOD_S = 0.02
"""Between questions to a workload that was not ready yet; later the probe's own period counts."""
EAGER_CONNECT_S = 0.05
"""Then an unready guest is asked anew: while it boots it hears nothing, and the kernel's own second
attempt comes a second later."""
EVENTS = 100
"""Kept for `describe`."""


def detach(spec: Spec, datapath: str, options: Options) -> tuple[int, int]:
    """Start the keeper of a pod as a process that outlives this one: (pid, descriptor).

    From the descriptor comes one line of JSON when the pod is built, `{}` or `{"error": …}`.
    Whoever ends the process by SIGTERM before that finds nothing left when the descriptor ends.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2, reading):
            os.dup2(nothing, fd)
        told = os.fdopen(writing, "w")

        def tell(**what: object) -> None:
            told.write(json.dumps(what) + "\n")
            told.close()

        try:
            keep(spec, datapath, options, tell)
        except Error as e:
            tell(error=e.message, hint=e.hint)
        except Exception as e:
            tell(error=f"the keeper of {spec.name}: {e!r}")
    finally:
        os._exit(0)


class Starting:
    """Pods that are being built, each by its keeper, as a context manager.

    Until it is left, whatever goes wrong (Ctrl-C, one that cannot be built) takes down all of them.
    """

    def __init__(self) -> None:
        self._keepers: dict[str, tuple[int, int]] = {}

    def start(self, spec: Spec, datapath: str, options: Options) -> None:
        """Start building one."""
        self._keepers[spec.name] = detach(spec, datapath, options)

    def wait(self, limit_s: float) -> list[str]:
        """Until all are ready, but no longer. Says of each workload that is not what it is.

        Raises `Error` if a pod cannot be built.
        """
        for _, reading in self._keepers.values():
            told = json.loads(_read_all(reading) or '{"error": "a keeper was killed"}')
            if "error" in told:
                raise Error(told["error"], told.get("hint"))
        deadline = time.monotonic() + limit_s
        unready = set(self._keepers)
        while unready and time.monotonic() < deadline:
            unready = {name for name in unready if not pods.status(name)["settled"]}
            time.sleep(0.01 if unready else 0)
        return [
            f"{name}: {w['name']} is not ready ({w['state']}); see 'testbed logs {name} -c "
            f"{w['name']}'"
            for name in self._keepers
            for w in pods.status(name)["workloads"]
            if not w["ready"] and w["state"] != "completed"
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        if e is None:
            return
        for pid, _ in self._keepers.values():
            os.kill(pid, signal.SIGTERM)
        for pid, _ in self._keepers.values():
            os.waitpid(pid, 0)


def _read_all(fd: int) -> bytes:
    with open(fd, "rb") as file:
        return file.read()


def keep(spec: Spec, datapath: str, options: Options, built: Callable[[], None]) -> None:
    """Build a pod, call `built`, and keep it until somebody asks for its end, or SIGTERM.

    Raises `Error` if something cannot be built. However it ends, everything is taken down.
    """
    asker = None
    try:
        with _listen(spec.name) as server:
            prepared = _prepare(spec, options)
            with _ending() as ending, Owner() as owner:
                scratch = process.create_folder(owner, f"{owner.id}.pod")
                _write_etc(spec, scratch)
                way = datapaths.get(datapath)
                with (
                    Pod(owner, spec.name, spec.manifest, way, prepared, scratch, scratch) as pod,
                    Supervisor(pod),
                    _Kept(spec, pod, prepared, scratch) as kept,
                ):
                    built()
                    asker = kept.serve(server, ending)
        answer: dict[str, Any] = {}
    except Error as e:
        if asker is None:
            raise
        answer = {"error": e.message, "hint": e.hint}
    if asker:
        with contextlib.suppress(OSError), asker:  # who asked may have gone
            asker.sendall(json.dumps(answer).encode() + b"\n")


@contextlib.contextmanager
def _ending() -> Iterator[int]:
    """A descriptor that is readable once SIGTERM came.

    Neither building nor taking down is interrupted: they are short, and libraries hold locks.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    yield reading


def _listen(name: str) -> socket.socket:
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        server.bind(pods.socket_name(name))
    except OSError as e:
        server.close()
        if e.errno == errno.EADDRINUSE:
            raise Error(f"pod {name!r} stands already", hint=f"testbed down {name}") from e
        raise
    server.listen()
    return server


def _prepare(spec: Spec, options: Options) -> dict[Runtime, Prepared]:
    """All runtimes, and all images, at once: before anything is built."""
    workloads = (*spec.init, *spec.manifest.workloads)
    kinds = dict.fromkeys(w.runtime for w in workloads)
    with ThreadPoolExecutor() as pool:
        prepared = dict(zip(kinds, pool.map(lambda r: runtimes.prepare(r, options), kinds),
                            strict=True))  # fmt: skip
        list(pool.map(lambda w: prepared[w.runtime].compose(w), workloads))
    return prepared


def _write_etc(spec: Spec, scratch: Path) -> None:
    """What Kubernetes puts into /etc of containers."""
    aliases = "".join(f"{address} {' '.join(names)}\n" for address, names in spec.host_aliases)
    for kind, patched, own in (
        ("native", False, loopback(Family.IPV4)),
        ("guest", True, alias(Family.IPV4)),
    ):
        known = images.hosts_file(patched=patched).read_text()
        (scratch / f"hosts.{kind}").write_text(f"{known}{own} {spec.hostname}\n{aliases}")
    (scratch / "resolv.conf").write_text(spec.resolv_conf)
    (scratch / "hostname").write_text(f"{spec.hostname}\n")


class _Kept:
    """A pod's workloads at work, each watched by a thread, as a context manager."""

    def __init__(
        self, spec: Spec, pod: Pod, prepared: Mapping[Runtime, Prepared], scratch: Path
    ) -> None:
        self.spec, self.pod, self.prepared, self.scratch = spec, pod, prepared, scratch
        self.began = datetime.now(UTC).isoformat(timespec="seconds")
        self.events: deque[str] = deque(maxlen=EVENTS)
        self.stopping = threading.Event()
        self.stop, self._stopper = os.pipe()
        """Readable (at its end) when everybody is to stop."""
        self.init = [_Watched(self, w, is_init=True) for w in spec.init]
        self.watched = [_Watched(self, w) for w in spec.manifest.workloads]
        self._threads = [threading.Thread(target=self._start, name="start")]

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stopping.set()
        os.close(self._stopper)
        for thread in self._threads:  # the first appends the others, and is joined before them
            thread.join()

    def say(self, what: str) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self.events.append(f"{now} {what}")

    def _start(self) -> None:
        for watched in self.init:
            watched.run()
            if watched.state != "completed":
                if not self.stopping.is_set():
                    self.say(f"nothing is started: {watched.workload.name} failed")
                return
        self._threads += [
            threading.Thread(target=w.run, name=w.workload.name) for w in self.watched
        ]
        for thread in self._threads[1:]:
            thread.start()

    # --- answers ----------------------------------------------------------------------------

    def serve(self, server: socket.socket, ending: int) -> socket.socket | None:
        """Answer questions until `ending` is readable, or somebody asks for the end and waits."""
        while True:
            if ending in select.select([server.fileno(), ending], [], [])[0]:
                return None
            asker, _ = server.accept()
            try:
                asker.settimeout(pods.PATIENCE_S)
                line = asker.makefile("rb").readline()
                if not pods.trusted(asker) or not line:
                    asker.close()
                    continue
                question = json.loads(line)["ask"]
                if question == "down":
                    return asker
                answer = self.describe() if question == "describe" else self.status()
                asker.sendall(json.dumps(answer).encode() + b"\n")
            except (OSError, ValueError, KeyError):
                pass  # the asker is gone, or no client of ours
            asker.close()

    def status(self) -> dict[str, Any]:
        """The pod as plain data."""
        return {
            "name": self.spec.name,
            "ready": all(w.ready or w.state == "completed" for w in self.watched),
            "settled": all(w.is_settled for w in self.watched)
            or any(w.state == "failed" for w in self.init),
            "datapath": self.pod.datapath.name,
            "since": self.began,
            "keeper": os.getpid(),
            "netns": self.pod.netns,
            "workloads": [w.status() for w in (*self.init, *self.watched)],
        }

    def describe(self) -> dict[str, Any]:
        """Status, wiring, counters and events."""
        with self.pod.lock:
            ips = {self.pod.netns: self.pod.ip, self.pod.link_netns: self.pod.link_ip}
            links = [link for netns, ip in ips.items() for link in _links(netns, ip)]
            counters = self.pod.attachment.counters()
        return {
            **self.status(),
            "links": links,
            "counters": {reason: vars(count) for reason, count in counters.items()},
            "cgroup": str(self.pod.cgroup),
            "events": list(self.events),
        }


class _Watched:
    """One workload, started as often as the pod's restart policy says."""

    def __init__(self, kept: _Kept, workload: Workload, *, is_init: bool = False) -> None:
        assert workload.program is not None
        self.kept, self.workload, self.program = kept, workload, workload.program
        self.is_init = is_init
        self.state = "waiting"
        """Then `running`; `restarting`; in the end `completed` or `failed`."""
        self.ready = False
        self.restarts = 0
        self.exit_status: int | None = None
        """Of the last run. A virtual machine's is 0, however its program ended."""
        self.runtime = kept.prepared[workload.runtime]
        self._process: subprocess.Popen[bytes] | None = None

    def run(self) -> None:
        """Until it has ended for good, or everybody stops."""
        delay_s = FIRST_DELAY_S
        policy = self.kept.spec.restart
        if self.is_init and policy is Restart.ALWAYS:
            policy = Restart.ON_FAILURE
        while not self.kept.stopping.is_set():
            began = time.monotonic()
            code = self._run_once()
            if code is None:
                return
            self.ready, self.exit_status = False, code
            self._say(f"ended with status {code}")
            if policy is Restart.NEVER or (policy is Restart.ON_FAILURE and code == 0):
                self.state = "failed" if code else "completed"
                return
            self.state = "restarting"
            if time.monotonic() - began > LAST_DELAY_S:
                delay_s = FIRST_DELAY_S
            if self.kept.stopping.wait(delay_s):
                return
            self.restarts += 1
            delay_s = min(2 * delay_s, LAST_DELAY_S)

    @property
    def is_settled(self) -> bool:
        """There is nothing to wait for."""
        return self.ready or self.state in ("completed", "failed")

    def status(self) -> dict[str, Any]:
        n = self.kept.pod.number_of(self.workload.name)
        try:
            enter = self.runtime.enter(self.kept.pod.place(self.workload))
        except Error as e:
            enter = None
            refusal = e
        return {
            "name": self.workload.name,
            "runtime": self.workload.runtime,
            "init": self.is_init,
            "state": self.state,
            "ready": self.ready,
            "restarts": self.restarts,
            "exit_status": self.exit_status,
            "pid": self._process.pid if self._process and self.state == "running" else None,
            "addresses": [str(guest_link(f, n) if n else loopback(f)) for f in Family],
            "ports": [f"{port}/{transport}" for transport, port in self.workload.ports],
            "log": str(self.kept.pod.console(self.workload.name)),
            **({"enter": enter} if enter else {"closed": str(refusal)}),
        }

    def _say(self, what: str) -> None:
        self.kept.say(f"{self.workload.name}: {what}")

    def _run_once(self) -> int | None:
        """Start it and watch it to its end: its status, or None if everybody stops."""
        pod, name = self.kept.pod, self.workload.name
        try:
            if self.is_init:
                self._process = self.runtime.start(pod.place(self.workload))
            else:
                pod.start_workload(name)
                self._process = pod.processes[name]
        except (Error, OSError) as e:
            self._say(f"cannot be started: {e}")
            return 127
        self.state = "running"
        self._say("started")
        while True:
            if not self._watch(self._process):
                return None
            if self.is_init or pod.processes.get(name) is self._process:
                return self._process.wait()
            # Whoever mends links ended it, and starts it again.
            while (new := pod.processes.get(name)) is None:
                if self.kept.stopping.wait(0.01):
                    return None
            self._process, self.ready = new, False
            self._say("started again on a new link")

    def _watch(self, running: subprocess.Popen[bytes]) -> bool:
        """Ask what there is to ask until the process ends (true) or everybody stops (false)."""
        try:
            fd = os.pidfd_open(running.pid)
        except ProcessLookupError:
            return True  # ended, and collected
        readiness = _Question(self.program.readiness or Probe(), eager=True)
        liveness = _Question(self.program.liveness) if self.program.liveness else None
        try:
            while True:
                due = [q.due for q in (readiness, liveness) if q and q.due is not None]
                wait_s = max(0.0, min(due) - time.monotonic()) if due else None
                ended, _, _ = select.select([fd, self.kept.stop], [], [], wait_s)
                if ended:
                    return self.kept.stop not in ended
                if readiness.is_due():
                    # Without a probe it is asked once whether it serves the ports it owns.
                    given = self.program.readiness
                    readiness.answered(self._asked(given) if given else self._listens())
                    if readiness.verdict is not None and readiness.verdict != self.ready:
                        self.ready = readiness.verdict
                        self._say("ready" if self.ready else "not ready any more")
                    if self.ready and not given:
                        readiness.due = None
                if liveness and liveness.is_due():
                    liveness.answered(self._asked(liveness.probe))
                    if liveness.verdict is False:
                        self._say("not alive, is ended")
                        liveness.due = None
                        process.end(running)
        finally:
            os.close(fd)

    def _asked(self, probe: Probe) -> bool:
        """The answer to a probe."""
        try:
            if probe.command:
                command = [*self.runtime.enter(self.kept.pod.place(self.workload)), *probe.command]
                done = subprocess.run(command, timeout=probe.timeout_s, check=False,
                                      stdin=subprocess.DEVNULL, capture_output=True)  # fmt: skip
                return done.returncode == 0
            with self._connection(probe.port, probe.timeout_s) as connection:
                if not probe.path:
                    return True
                asking = http.client.HTTPConnection("localhost", timeout=probe.timeout_s)
                asking.sock = connection
                asking.request("GET", probe.path)
                return 200 <= asking.getresponse().status < 400
        except (Error, OSError, subprocess.TimeoutExpired, http.client.HTTPException):
            return False

    def _connection(self, port: int, timeout_s: float) -> socket.socket:
        """To the workload itself, in whichever family it listens. Raises `OSError`."""
        pod, name = self.kept.pod, self.workload.name
        limit_s = timeout_s if self.ready else min(timeout_s, EAGER_CONNECT_S)
        refused = OSError()
        for family in Family:
            to = (str(pod.address(name, family)), port)
            try:
                dial = functools.partial(socket.create_connection, to, limit_s)
                connection = netlink.inside(pod.netns, dial)
            except OSError as e:
                refused = e
            else:
                connection.settimeout(timeout_s)
                return connection
        raise refused

    def _listens(self) -> bool:
        """Whether it serves all its ports: a virtual machine's by connecting (UDP goes unasked),
        others' by the kernel's tables, so that nobody is disturbed."""
        if not self.runtime.uses_tap:
            place = self.kept.pod.place(self.workload)
            return set(self.workload.ports) <= netlink.inside(place.netns, _served)
        try:
            for transport, port in self.workload.ports:
                if transport is Transport.TCP:
                    self._connection(port, 1).close()
        except OSError:
            return False
        return True


class _Question:
    """When to ask next, and what the last answers come to (`verdict`; None: not yet known)."""

    def __init__(self, probe: Probe, *, eager: bool = False) -> None:
        self.probe, self.eager = probe, eager
        wait_s = probe.delay_s if eager else max(probe.delay_s, probe.period_s)
        self.due: float | None = time.monotonic() + wait_s
        self.verdict: bool | None = None
        self._streak = 0

    def is_due(self) -> bool:
        return self.due is not None and self.due <= time.monotonic()

    def answered(self, yes: bool) -> None:
        self._streak = max(1, self._streak + 1) if yes else min(-1, self._streak - 1)
        if self._streak >= self.probe.successes:
            self.verdict = True
        elif -self._streak >= self.probe.failures:
            self.verdict = False
        waiting = self.eager and not self.verdict
        self.due = time.monotonic() + (EAGER_PERIOD_S if waiting else self.probe.period_s)


def _served() -> set[tuple[Transport, int]]:
    """What is listened to (TCP) or bound (UDP) in this thread's namespace (proc_net_tcp)."""
    served = set()
    for transport, state in ((Transport.TCP, "0A"), (Transport.UDP, "07")):
        for suffix in ("", "6"):
            table = Path(f"/proc/thread-self/net/{transport}{suffix}").read_text()
            for line in table.splitlines()[1:]:
                _, local, _, is_in, *_ = line.split()
                if is_in == state:
                    served.add((transport, int(local.rpartition(":")[2], 16)))
    return served


def _links(netns: str, ip: IPRoute) -> list[dict[str, Any]]:
    """Links of a namespace with their addresses, and the programs at their tc hooks."""
    addresses: dict[int, list[str]] = {}
    for a in ip.get_addr():
        shown = f"{a.get('address')}/{a['prefixlen']}"
        addresses.setdefault(a["index"], []).append(shown)
    hooks = {"ingress": bpf.INGRESS, "egress": bpf.EGRESS}
    return [
        {
            "netns": netns,
            "name": link.get("ifname"),
            "mac": link.get("address"),
            "up": link["state"] == "up",
            "addresses": addresses.get(link["index"], []),
            "programs": [
                f"{hook}:{options.get_attr('TCA_BPF_NAME')}"
                for hook, parent in hooks.items()
                for filter in ip.get_filters(index=link["index"], parent=parent)
                if (options := filter.get("options"))
            ],
        }
        for link in ip.get_links()
    ]
