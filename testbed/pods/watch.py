"""Watches one process of a workload: runs its hooks and probes, from its start to its end.

`Watched` (`workloads`) starts the process, and starts it again; `probes` asks.
"""

from __future__ import annotations

import os
import select
import time
from typing import TYPE_CHECKING

from testbed.host import facts, process
from testbed.model.manifest import Action, Probe
from testbed.model.terms import Transport
from testbed.pods.probes import Question

if TYPE_CHECKING:
    from testbed.pods.workloads import Watched

HOOK_LIMIT_S = 30.0
"""Time limit of a hook: Kubernetes' default `terminationGracePeriodSeconds`."""
START_PERIOD_S = 0.02
"""Period of looking whether a workload runs."""


class Watch:
    """Hook and probes of one process of a workload, from its start to its end."""

    def __init__(self, watched: Watched, running: process.Running) -> None:
        self._watched, self._running, self._program = watched, running, watched.program
        self._began = time.monotonic()
        self._startup = (
            Question(self._program.startup, first_s=0) if self._program.startup else None
        )
        self._readiness: Question | None = None
        self._liveness: Question | None = None

    def to_the_end(self, *, is_new: bool) -> bool:
        """Watch until the process ends (true) or all threads are to stop (false).

        `is_new`: it was started just now, so the `postStart` hook runs first.
        """
        try:
            fd = os.pidfd_open(self._running.pid)
        except ProcessLookupError:
            return True  # ended, and collected
        try:
            self._events = [fd, self._watched.workloads.stop]
            while not self._runs():
                if (ended := self._ended(START_PERIOD_S)) is not None:
                    return ended
            if is_new and not self._post_start():
                self._watched.end(self._running, "its postStart hook failed")
                return True
            if not self._startup:
                self._begin_probes()
            while True:
                questions = (self._startup, self._readiness, self._liveness)
                due = [q.due for q in questions if q and q.due is not None]
                wait_s = max(0.0, min(due) - time.monotonic()) if due else None
                if (ended := self._ended(wait_s)) is not None:
                    return ended
                self._ask()
        finally:
            os.close(fd)

    def _ended(self, wait_s: float | None) -> bool | None:
        """Wait for the end: true if the process ended, false if all threads are to stop."""
        ended, _, _ = select.select(self._events, [], [], wait_s)
        return self._watched.workloads.stop not in ended if ended else None

    def _runs(self) -> bool:
        watched = self._watched
        return watched.runtime.runs(watched.workloads.pod.place(watched.workload))

    def _post_start(self) -> bool:
        """Run the `postStart` hook, if there is one: whether it succeeds."""
        hook = self._program.post_start
        if hook and hook.sleep_s:
            self._ended(hook.sleep_s)
        elif hook:
            return self._watched.prober.do(hook, HOOK_LIMIT_S, ready=True)
        return True

    def _begin_probes(self) -> None:
        """Begin with the probes of a workload that has started."""
        self._startup, liveness = None, self._program.liveness
        readiness = self._program.readiness or Probe(Action())
        self._readiness = Question(readiness, first_s=0, eager=True)
        self._liveness = Question(liveness, first_s=liveness.period_s) if liveness else None
        self._watched.has_started.set()

    def _ask(self) -> None:
        """Run the probes that are due."""
        watched, prober = self._watched, self._watched.prober
        if self._startup and self._startup.is_due():
            self._startup.answered(prober.ask(self._startup.probe, ready=True))
            if self._startup.verdict:
                self._begin_probes()
            elif self._startup.verdict is False:
                self._startup.due = None
                watched.end(self._running, "its startup probe failed")
        if self._readiness and self._readiness.is_due():
            self._readiness.answered(
                prober.ask(self._readiness.probe, watched.ready)
                if self._program.readiness
                else self._serves()
            )
            verdict = self._readiness.verdict
            if verdict is not None and verdict != watched.ready:
                watched.ready = verdict
                watched.say("ready" if verdict else "no longer ready")
            if watched.ready and not self._program.readiness:
                self._readiness.due = None
        if self._liveness and self._liveness.is_due():
            self._liveness.answered(prober.ask(self._liveness.probe, watched.ready))
            if self._liveness.verdict is False:
                self._liveness.due = None
                watched.end(self._running, "not alive")

    def _serves(self) -> bool:
        """Whether a workload without a readiness probe is ready: it serves the ports it lists.

        As in Kubernetes, a port that is listed need not be served: it is not waited for longer than
        a workload of this runtime takes to answer.
        """
        watched = self._watched
        unserved = watched.prober.unserved(watched.ready)
        if unserved is None:
            return False
        waited_s = time.monotonic() - self._began
        if unserved and waited_s < watched.runtime.ready_limit_s * facts.slowness():
            return False
        watched.unserved = sorted(map(shown, unserved))
        return True


def shown(port: tuple[Transport, int]) -> str:
    """A port as `ps` shows it: 80/tcp."""
    return f"{port[1]}/{port[0]}"
