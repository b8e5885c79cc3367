"""The reconciler of a pod: mends what vanishes, and ends the connections of guests that end.

It is a thread that waits until the kernel reports a change of a link or of its programs, or the
end of a process. The kernel does not report that a cgroup or tcx lost a program, so the thread
also looks every `CHECK_S` without a report.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import threading
import time
from types import TracebackType
from typing import Self

from pyroute2.netlink.exceptions import NetlinkError

from testbed.host import namespaces
from testbed.host.process import Running
from testbed.model.errors import Error
from testbed.pods.pod import Pod

RTMGRP_LINK, RTMGRP_TC = 1, 8
CHECK_S = 5
"""Period after which all is looked at without a report."""
RETRY_MS = 250
"""Period after which a failed mending is tried again, and new processes are looked for. Two looks
for what is missing are so far apart, too, whatever somebody does to links and programs."""
VANISHED = (NetlinkError, OSError, LookupError, Error)
"""Errors of looking at, or mending, something that vanishes meanwhile."""


class Reconciler:
    """Mends a pod while the context lasts.

    `deaths`: workloads that ended by themselves. `mended`: links and programs that vanished and are
    back.
    """

    def __init__(self, pod: Pod) -> None:
        self.deaths: list[str] = []
        self.mended: list[str] = []
        self._pod = pod
        self._wake, self._sleeper = os.pipe()
        self._reports = [_reports(netns) for netns in {pod.netns, pod.links.link_netns}]
        self._thread = threading.Thread(target=self._watch, name=f"reconciler {pod.name}")
        self._poller = select.poll()
        self._poller.register(self._wake, select.POLLIN)
        for reports in self._reports:
            self._poller.register(reports, select.POLLIN)
        self._alive: dict[int, tuple[str, Running]] = {}
        """pidfd → workload and process."""
        self._seen: set[Running] = set()
        """Processes that are watched, or were watched until they ended."""

    def _watch(self) -> None:
        missing: set[str] = set()
        next_check = last_check = 0.0
        while True:
            self._watch_new()
            for fd, _ in self._poller.poll(RETRY_MS):
                if fd == self._wake:
                    return
                if fd in self._alive:
                    self._ended(fd)
                else:
                    next_check = min(next_check, last_check + RETRY_MS / 1000)
            for reports in self._reports:
                _drain(reports)
            if time.monotonic() >= next_check:
                missing |= self._missing()
                last_check = time.monotonic()
                next_check = last_check + CHECK_S
            if missing and (mended := self._mend()) is not None:
                self.mended += missing | mended
                missing.clear()

    def _watch_new(self) -> None:
        """Begin to watch processes that were started since the last call."""
        for name, process in list(self._pod.processes.items()):
            if process not in self._seen:
                with contextlib.suppress(ProcessLookupError):  # it ended and was waited for
                    fd = os.pidfd_open(process.pid)
                    self._alive[fd] = (name, process)
                    self._poller.register(fd, select.POLLIN)
                self._seen.add(process)

    def _ended(self, fd: int) -> None:
        """Handle the end of a process, unless we ended it ourselves."""
        name, process = self._alive.pop(fd)
        self._poller.unregister(fd)
        os.close(fd)
        with self._pod.lock:
            if self._pod.processes.get(name) is process:  # else we ended it
                self.deaths.append(name)
                self._pod.workload_ended(name)

    def _missing(self) -> set[str]:
        """Links and programs that are missing in the pod, as far as it can be told."""
        missing: set[str] = set()
        for look in (self._pod.missing_links, self._pod.missing_programs):
            with contextlib.suppress(*VANISHED):
                missing |= look()
        return missing

    def _mend(self) -> set[str] | None:
        """Mend the pod; returns the links that were made again, None if that failed."""
        with contextlib.suppress(*VANISHED):
            return self._pod.mend()
        return None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        os.close(self._sleeper)
        self._thread.join()
        for reports in self._reports:
            reports.close()
        for fd in (self._wake, *self._alive):
            os.close(fd)


def _reports(netns: str) -> socket.socket:
    """A socket that receives the kernel's reports of changes of a namespace's links and filters."""
    opened = namespaces.inside(
        netns, lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    )
    opened.bind((0, RTMGRP_LINK | RTMGRP_TC))
    opened.setblocking(False)
    return opened


def _drain(reports: socket.socket) -> None:
    """Discard reports. Links and programs are listed anew, since reports may be lost (ENOBUFS)."""
    while True:
        try:
            reports.recv(65536)
        except BlockingIOError:
            return
        except OSError as e:
            if e.errno != errno.ENOBUFS:
                raise
