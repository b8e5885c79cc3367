"""Runs the workloads of a pod manifest: starts them, probes them, restarts them.

Restarts follow `restartPolicy`; probes decide which workloads are ready and alive. After each
change the pod's status is written down for a supervisor process that may take over (`control`).
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from testbed.host import cgroups, namespaces, process
from testbed.model.addresses import guest_link, loopback
from testbed.model.errors import Error
from testbed.model.manifest import Restart, Spec, Workload
from testbed.model.terms import Family, Runtime
from testbed.pods import control
from testbed.pods.pod import Pod
from testbed.pods.probes import Prober
from testbed.pods.watch import HOOK_LIMIT_S, Watch, shown
from testbed.runtimes.interface import Prepared

FIRST_DELAY_S, LAST_DELAY_S = 0.5, 60.0
"""Delays before a restart: the first, which doubles each time, and the longest. After a run of
`LAST_DELAY_S` it is the first again. Kubernetes' are 10 s and 5 min; here, a person is waiting."""
LAST_WORDS = 200
"""Characters of a workload's last line that are shown."""
LAST_WORDS_BYTES = 8192
"""Length of the end of a log in which a workload's last words are looked for."""
EVENTS = 100
"""Number of the latest events that `describe` shows."""


class Workloads:
    """The running workloads of a pod, each supervised by a thread, as a context manager."""

    def __init__(
        self,
        spec: Spec,
        pod: Pod,
        prepared: Mapping[Runtime, Prepared],
        scratch: Path,
        left: Mapping[str, Any] | None,
    ) -> None:
        """`left`: the pod's last status, if a supervisor process of it was killed."""
        self.spec, self.pod, self.prepared, self.scratch = spec, pod, prepared, scratch
        self.began = datetime.now(UTC).isoformat(timespec="seconds")
        self.events: deque[str] = deque(maxlen=EVENTS)
        self.stopping = threading.Event()
        self.stop, self._stopper = os.pipe()
        """A pipe, which becomes readable (end of file) when all threads are to stop."""
        before = {w["name"]: w for w in left["workloads"]} if left else {}
        mains, sidecars = spec.manifest.workloads, spec.sidecars
        self.init = [
            Watched(self, w, before.get(w.name), is_init=True)
            for w in spec.init
            if w not in sidecars
        ]
        self.watched = [
            Watched(self, w, before.get(w.name), is_sidecar=w in sidecars) for w in mains
        ]
        self._writing = threading.Lock()
        self.say("taken over from a supervisor process that was killed" if left else "built")
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
        with ThreadPoolExecutor() as pool:
            list(pool.map(Watched.pre_stop, self.watched))

    def say(self, what: str) -> None:
        """Add an event, and write the status down."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self.events.append(f"{now} {what}")
        with self._writing:
            try:
                control.write_down(self.scratch, self.status())
            except OSError as e:  # /run is full: the status before stays written down
                self.events.append(f"{now} cannot be written down: {e}")

    def run_beside(self, target: Callable[[], None], name: str) -> None:
        """Run a function in a thread. It has to end when `stop` is readable, and is waited for."""
        thread = threading.Thread(target=target, name=name)
        self._threads.append(thread)
        thread.start()

    def _start(self) -> None:
        """Start everything: init containers and sidecars in their order, then the others."""
        by_name = {w.workload.name: w for w in (*self.init, *self.watched)}
        for watched in (by_name[workload.name] for workload in self.spec.init):
            if watched.is_sidecar:
                self.run_beside(watched.run, watched.workload.name)
                watched.has_started.wait()
            else:
                watched.run()
            if self.stopping.is_set():
                return
            if watched.state == "failed":
                self.say(f"nothing more is started: {watched.workload.name} failed")
                return
        for watched in self.watched:
            if not watched.is_sidecar:
                self.run_beside(watched.run, watched.workload.name)
        self.pod.attach_deferred()

    def end_sidecars(self) -> None:
        """End the sidecars if all other workloads have ended for good."""
        mains = [w for w in self.watched if not w.is_sidecar]
        if all(w.state in ("completed", "failed") for w in mains):
            for watched in self.watched:
                if watched.is_sidecar:
                    watched.retire()

    def status(self) -> dict[str, Any]:
        """Status of the pod as plain data, as `ps --json` prints it."""
        sandbox = self.pod.sandbox
        return {
            "name": self.spec.name,  # first: deploy/testbed-cni.c looks for it there
            "ready": all(w.ready or w.state == "completed" for w in self.watched),
            "settled": all(w.is_settled for w in self.watched)
            or any(w.state == "failed" for w in self.init),
            "datapath": self.pod.datapath.name,
            "addresses": [str(address) for address in self.pod.addresses.values()],
            "since": self.began,
            "supervisor": os.getpid(),
            "netns": self.pod.netns,
            "host_netns": namespaces.own(),
            "sandbox": sandbox and {key: str(value or "") for key, value in vars(sandbox).items()},
            "workloads": [w.status() for w in (*self.init, *self.watched)],
        }

    def last_words(self) -> list[str]:
        """`Watched.last_words` of the workloads, in the order of `status`."""
        return [w.last_words() for w in (*self.init, *self.watched)]


class Watched:
    """One workload, started and restarted as the pod's restart policy says."""

    def __init__(
        self,
        workloads: Workloads,
        workload: Workload,
        was: Mapping[str, Any] | None,
        *,
        is_init: bool = False,
        is_sidecar: bool = False,
    ) -> None:
        """`was`: its last status under a supervisor process that was killed."""
        assert workload.program is not None
        self.workloads, self.workload, self.program = workloads, workload, workload.program
        self.is_init, self.is_sidecar = is_init, is_sidecar
        self.has_started = threading.Event()
        """Set when it has started, by its startup probe, or will not any more."""
        self._retired = threading.Event()
        """Set if it is a sidecar that nobody needs any more."""
        self.state: str = was["state"] if was else "waiting"
        """waiting, running, restarting, completed or failed. The last two are final."""
        self.ready = False
        self.unserved: list[str] = []
        """Ports that it lists and, some time after its start, nobody served."""
        self.restarts: int = was["restarts"] if was else 0
        self.exit_status: int | None = was["exit_status"] if was else None
        """Exit status of the last run."""
        self._was = was
        self._pid: int | None = was["pid"] if was else None
        self._started_at: int = was["started"] if was else 0
        """Start time of that process (`process.started_at`)."""
        self.runtime = workloads.prepared[workload.runtime]
        self.prober = Prober(workloads.pod, workload, self.runtime)

    def run(self) -> None:
        """Run the workload until it has ended for good, or all threads are to stop."""
        try:
            if self.state not in ("completed", "failed"):
                self._run()
        finally:
            self.has_started.set()
            if not (self.is_init or self.is_sidecar or self.workloads.stopping.is_set()):
                self.workloads.end_sidecars()

    def _run(self) -> None:
        delay_s = FIRST_DELAY_S
        policy = Restart.ALWAYS if self.is_sidecar else self.workloads.spec.restart
        if self.is_init and policy is Restart.ALWAYS:
            policy = Restart.ON_FAILURE
        while not self.workloads.stopping.is_set():
            if self._retired.is_set():
                self.state = "completed"
                return
            began = time.monotonic()
            code = self._run_once()
            if code is None:
                return
            self.ready, self.exit_status = False, code
            last = policy is Restart.NEVER or (policy is Restart.ON_FAILURE and code == 0)
            if self._retired.is_set():
                last, code = True, 0
            self.state = ("failed" if code else "completed") if last else "restarting"
            self.say(f"ended with status {code}")
            if last:
                return
            if time.monotonic() - began > LAST_DELAY_S:
                delay_s = FIRST_DELAY_S
            if self.workloads.stopping.wait(delay_s):
                return
            self.restarts += 1
            delay_s = min(2 * delay_s, LAST_DELAY_S)

    def retire(self) -> None:
        """End it for good, since it is a sidecar of workloads that have all ended."""
        self._retired.set()
        if running := self.workloads.pod.processes.get(self.workload.name):
            self.end(running, "nobody needs it any more")

    def pre_stop(self) -> None:
        """Run its `preStop` hook, if it runs."""
        if self.state == "running" and (hook := self.program.pre_stop):
            if hook.sleep_s:
                time.sleep(min(hook.sleep_s, HOOK_LIMIT_S))
            elif not self.prober.do(hook, HOOK_LIMIT_S, ready=True):
                self.say("its preStop hook failed")

    @property
    def is_settled(self) -> bool:
        """Whether it is ready, or has ended for good."""
        return self.ready or self.state in ("completed", "failed")

    def status(self) -> dict[str, Any]:
        n, place = (
            self.workloads.pod.number_of(self.workload.name),
            self.workloads.pod.place(self.workload),
        )
        try:
            entrance: dict[str, Any] = {
                "enter": self.runtime.enter(place),
                "enter_terminal": self.runtime.enter(place, terminal=True),
            }
        except Error as e:
            entrance = {"closed": str(e)}
        is_up = self.state == "running" and not self.ready
        return {
            "name": self.workload.name,
            "runtime": self.workload.runtime,
            "init": self.is_init,
            "state": self.state,
            "ready": self.ready,
            "restarts": self.restarts,
            "exit_status": self.exit_status,
            "pid": self._pid if self.state == "running" else None,
            "started": self._started_at,
            "addresses": [
                str(guest_link(f, n) if n else loopback(f))
                for f in Family
                if f in self.runtime.families
            ],
            "ports": [shown(port) for port in self.workload.ports],
            "unserved": self.unserved,
            "unanswered": shown(port) if (port := self.prober.unanswered) and is_up else "",
            **({"queues": place.queues} if self.runtime.uses_tap else {}),
            "log": str(self.workloads.pod.console(self.workload.name)),
            **entrance,
        }

    def last_words(self) -> str:
        """The last line that its program printed; empty if it printed none lately.

        It is for a terminal: at most `LAST_WORDS` characters, and none that would control it.
        """
        text = self.workloads.pod.place(self.workload).console_end(LAST_WORDS_BYTES)
        lines = (_printable(line).strip() for line in reversed(text.splitlines()))
        last = next((line for line in lines if line and self.runtime.is_of_program(line)), "")
        return last if len(last) <= LAST_WORDS else f"{last[:LAST_WORDS]}…"

    def say(self, what: str) -> None:
        """Add an event about it."""
        self.workloads.say(f"{self.workload.name}: {what}")

    def _run_once(self) -> int | None:
        """Start the process, and supervise it to its end.

        Returns its exit status, or None if all threads are to stop.
        """
        pod, name = self.workloads.pod, self.workload.name
        try:
            left = self._left()
            running = left or pod.run(self.workload)
        except ProcessLookupError:
            self.say("ended while nobody supervised the pod")
            with pod.lock:
                pod.workload_ended(name)
            return process.Orphan.UNKNOWN
        except Exception as e:  # whatever it is, the thread goes on, and tries again
            self.say(f"cannot be started: {e}")
            return 127
        if not self.is_init:
            with pod.lock:
                pod.processes[name] = running
        self._record_start(running, "still runs" if left else "runs")
        if self._retired.is_set():
            self.retire()
        is_new = not left
        while True:
            if not Watch(self, running).to_the_end(is_new=is_new):
                return None
            if self.is_init or pod.processes.get(name) is running:
                return self.runtime.exit_status(pod.place(self.workload), running.wait())
            # The reconciler ended it, since it mends its link, and starts it again.
            while (new := pod.processes.get(name)) is None:
                if self.workloads.stopping.wait(0.01):
                    return None
            running, self.ready, is_new = new, False, True
            self._record_start(running, "was started again on a new link")

    def _record_start(self, running: process.Running, how: str) -> None:
        self._pid, self._started_at = running.pid, process.started_at(running.pid)
        self.state = "running"
        self.say(f"{how}, pid {running.pid}")

    def _left(self) -> process.Running | None:
        """The process that a killed supervisor process left, if it started one.

        Its end can be seen, its exit status cannot. Raises `ProcessLookupError` if it has ended. A
        process that was started but is not in the written status is killed.
        """
        was, self._was = self._was, None
        if not was:
            return None
        pod, name = self.workloads.pod, self.workload.name
        if was["state"] == "running":
            left = process.Orphan(was["pid"], was["started"])
            if name not in pod.cut_off:
                return left
            self.say("its link was lost")
            process.end(left)
            raise ProcessLookupError(was["pid"])
        cgroups.empty(pod.place(self.workload).cgroup)
        return None

    def end(self, running: process.Running, why: str) -> None:
        """End its process, after its `preStop` hook."""
        self.say(f"{why}: it is ended")
        self.pre_stop()
        process.end(running)


def _printable(line: str) -> str:
    return "".join(letter for letter in line.replace("\t", " ") if letter.isprintable())
