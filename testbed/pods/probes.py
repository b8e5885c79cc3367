"""Probes of a workload: runs them, schedules them, judges the answers. Runs its hooks likewise."""

from __future__ import annotations

import functools
import http.client
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from testbed.host import namespaces
from testbed.host.sockets import served_ports
from testbed.model.errors import Error
from testbed.model.manifest import Action, Probe, Workload
from testbed.model.terms import Family, Transport
from testbed.pods.pod import Pod
from testbed.runtimes.interface import Prepared

EAGER_PERIOD_S = 0.02
"""Period of readiness probes until a workload is ready; then the probe's own period applies."""
EAGER_CONNECT_S = 0.05
"""Time limit of a connection to an unready guest. A booting guest misses the SYN, and the kernel
would repeat it only after a second."""


class Question:
    """Schedule of a probe, and the verdict by its last answers (None: not yet known)."""

    def __init__(self, probe: Probe, *, first_s: float, eager: bool = False) -> None:
        """`first_s`: time to the first answer. `eager`: ask often until the first success."""
        self.probe, self.eager = probe, eager
        self.due: float | None = time.monotonic() + max(probe.delay_s, first_s)
        self.verdict: bool | None = None
        self._streak = 0
        """Number of equal answers in a row; negative: failures."""

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


class Prober:
    """Runs probes and hooks of one workload."""

    def __init__(self, pod: Pod, workload: Workload, runtime: Prepared) -> None:
        self._pod, self._workload, self._runtime = pod, workload, runtime
        self.unanswered: tuple[Transport, int] | None = None
        """Port of a guest that neither answered nor refused when `unserved` looked last."""

    def ask(self, probe: Probe, ready: bool) -> bool:
        """Run a probe: whether it succeeds."""
        return self.do(probe.action, probe.timeout_s, ready)

    def do(self, action: Action, timeout_s: float, ready: bool) -> bool:
        """Do what a probe or a hook does, other than sleeping: whether it succeeds."""
        try:
            if action.command:
                command = [*self._runtime.enter(self._pod.place(self._workload)), *action.command]
                done = subprocess.run(
                    command,
                    timeout=timeout_s,
                    check=False,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                return done.returncode == 0
            with self._connection(action.port, timeout_s, ready) as connection:
                if not action.path:
                    return True
                with _shut_after(connection, timeout_s):
                    return 200 <= _status(connection, action) < 400
        except (Error, OSError, subprocess.TimeoutExpired, http.client.HTTPException):
            return False

    def _connection(self, port: int, timeout_s: float, ready: bool) -> socket.socket:
        """Connect to the workload's own address, in a family in which it listens.

        Raises `OSError` if it listens in none: `ConnectionRefusedError` if it says so itself.
        """
        pod, name = self._pod, self._workload.name
        limit_s = timeout_s if ready else min(timeout_s, EAGER_CONNECT_S)
        failed = OSError()
        for family in Family:
            to = (str(pod.address(name, family)), port)
            try:
                dial = functools.partial(socket.create_connection, to, limit_s)
                connection = namespaces.inside(pod.netns, dial)
            except OSError as e:
                failed = failed if isinstance(failed, ConnectionRefusedError) else e
            else:
                connection.settimeout(timeout_s)
                return connection
        raise failed

    def unserved(self, ready: bool) -> set[tuple[Transport, int]] | None:
        """Ports of the workload that nobody serves. None: a guest is not up yet.

        Ports are read from the kernel's tables, which disturbs nobody. A guest whose sockets are in
        none of them is asked by connecting; its UDP ports are not checked.
        """
        ports = set(self._workload.ports)
        if self._runtime.kernel_has_sockets:
            place = self._pod.place(self._workload)
            return ports - namespaces.inside(place.netns, served_ports)
        unserved = set()
        for transport, port in ports:
            try:
                if transport is Transport.TCP:
                    self._connection(port, 1, ready).close()
            except ConnectionRefusedError:
                unserved.add((transport, port))
            except OSError:
                self.unanswered = transport, port
                return None
        self.unanswered = None
        return unserved


@contextmanager
def _shut_after(connection: socket.socket, limit_s: float) -> Iterator[None]:
    """Shut a connection down after a time. Its own limit begins anew with each byte that comes."""

    def shut() -> None:
        with suppress(OSError):  # it is closed already
            connection.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(limit_s, shut)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def _status(connection: socket.socket, action: Action) -> int:
    """Status of the answer to an HTTP GET."""
    asking = http.client.HTTPConnection("localhost", timeout=connection.gettimeout())
    asking.sock = connection
    has_host = any(name.lower() == "host" for name, _ in action.headers)
    asking.putrequest("GET", action.path, skip_host=has_host)
    for name, value in action.headers:
        asking.putheader(name, value)
    asking.endheaders()
    return asking.getresponse().status
