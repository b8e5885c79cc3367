"""Watches over one pod: mends links that vanish, ends the connections of guests that died.

A thread that sleeps until the kernel has something to say (a link message, the end of a process).
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
"""How often a mending that failed is tried again, and processes are looked for that are new."""


class Reconciler:
    """Keeps a pod whole, as a context manager.

    `deaths` names workloads that ended on their own, `mended` links that vanished and are back.
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
        self._thread = threading.Thread(target=self._watch, name=f"supervisor {pod.name}")
        self._poller = select.poll()
        self._poller.register(self._wake, select.POLLIN)
        self._poller.register(self._links, select.POLLIN)
        self._alive: dict[int, tuple[str, Running]] = {}
        """By descriptor."""
        self._seen: set[Running] = set()
        """Processes that are watched, or were until they ended."""

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
        """Watch processes that were started since."""
        for name, process in list(self._pod.processes.items()):
            if process not in self._seen:
                with contextlib.suppress(ProcessLookupError):  # was collected meanwhile
                    fd = os.pidfd_open(process.pid)
                    self._alive[fd] = (name, process)
                    self._poller.register(fd, select.POLLIN)
                self._seen.add(process)

    def _ended(self, fd: int) -> None:
        """A process has ended."""
        name, process = self._alive.pop(fd)
        self._poller.unregister(fd)
        os.close(fd)
        with self._pod.lock:
            if self._pod.processes.get(name) is process:  # it was not us who ended it
                self.deaths.append(name)
                self._pod.workload_ended(name)

    def _drain(self) -> None:
        """Forget messages: what they say is asked for anew, as there may be too many to get all."""
        while True:
            try:
                self._links.recv(65536)
            except BlockingIOError:
                return
            except OSError as e:
                if e.errno != errno.ENOBUFS:
                    raise

    def _mend(self) -> bool:
        """Whether it went well. What vanishes meanwhile can be an error of any of these kinds."""
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
