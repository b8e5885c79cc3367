"""The reconciler of a pod: mends links that vanish, and ends the connections of guests that end.

It is a thread that sleeps until the kernel reports a change of a link or the end of a process.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import threading
from types import TracebackType
from typing import Self

from pyroute2.netlink.exceptions import NetlinkError

from testbed.host import namespaces
from testbed.host.process import Running
from testbed.pods.pod import Pod

RTMGRP_LINK = 1
RETRY_MS = 250
"""Period after which a failed mending is tried again, and new processes are looked for."""


class Reconciler:
    """Mends a pod while the context lasts.

    `deaths`: workloads that ended by themselves. `mended`: links that vanished and are back.
    """

    def __init__(self, pod: Pod) -> None:
        self.deaths: list[str] = []
        self.mended: list[str] = []
        self._pod = pod
        self._wake, self._sleeper = os.pipe()
        self._links = namespaces.inside(
            pod.links.link_netns,
            lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE),
        )
        self._links.bind((0, RTMGRP_LINK))
        self._links.setblocking(False)
        self._thread = threading.Thread(target=self._watch, name=f"reconciler {pod.name}")
        self._poller = select.poll()
        self._poller.register(self._wake, select.POLLIN)
        self._poller.register(self._links, select.POLLIN)
        self._alive: dict[int, tuple[str, Running]] = {}
        """pidfd → workload and process."""
        self._seen: set[Running] = set()
        """Processes that are watched, or were watched until they ended."""

    def _watch(self) -> None:
        missing: set[str] = set()
        while True:
            self._watch_new()
            for fd, _ in self._poller.poll(RETRY_MS):
                if fd == self._wake:
                    return
                if fd == self._links.fileno():
                    self._drain()
                    missing |= self._pod.missing_links()
                else:
                    self._ended(fd)
            if missing and self._mend():
                self.mended += missing
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

    def _drain(self) -> None:
        """Discard link messages. Links are listed anew, since messages may be lost (ENOBUFS)."""
        while True:
            try:
                self._links.recv(65536)
            except BlockingIOError:
                return
            except OSError as e:
                if e.errno != errno.ENOBUFS:
                    raise

    def _mend(self) -> bool:
        """Mend the pod; returns whether it succeeded.

        A link that vanishes meanwhile can raise any of these errors.
        """
        try:
            self._pod.mend()
        except (NetlinkError, OSError, LookupError):
            return False
        return True

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        os.close(self._sleeper)
        self._thread.join()
        self._links.close()
        for fd in (self._wake, *self._alive):
            os.close(fd)
